"""Weights from node to node, so that N nodes are one download.

A run has a tracker, an actor that knows which node has which file. Whoever makes a copy asks it for
each file: the first one reads it from the store, the others from a node that has it, through Ray's
object store, which holds two pieces of each stream at most. The shelf of a node, another actor,
reads its files to others. What fails between nodes is read from the store. Not covered: runs do
not know of each other's trackers, and models in a user's own hub cache are not served.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wrpo_ray.errors import WrpoError
from wrpo_ray.runtime.placement import Model
from wrpo_ray.storage.cache import node_cache
from wrpo_ray.storage.remote import (
    MAX_STREAMS,
    PIECE,
    TRANSFER,
    Listed,
    Source,
    fetch_all,
    read_piece,
    write_pieces,
)

SESSION = "WRPO_SESSION"
"""Environment variable of a run's processes with the id of its driver."""
UPLOADS = 4
"""Files that a node sends to others at once."""
POLL = 0.5
"""Seconds until a node asks again for files that others are still reading."""
BEAT, LOST = 5.0, 30.0
"""Seconds between signs of life of a fetching process, and until it is taken for lost."""
READ_TIMEOUT = 60.0
"""Seconds for a piece from another node."""


@dataclass(frozen=True)
class Lead:
    """Where a file is to be read."""

    name: str
    node: str = ""
    """Empty for the store."""
    shelf: Any = None
    hash: str = ""
    """As whoever read it from the store has computed it."""


@dataclass
class _File:
    holders: set[str] = field(default_factory=set)
    """Nodes that have it."""
    reader: str = ""
    """Who reads it from the store."""
    reader_node: str = ""
    hash: str = ""


class Tracker:
    """The actor that knows which node has which file of a model. Not thread-safe."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, _File]] = defaultdict(lambda: defaultdict(_File))
        self.having: dict[str, set[str]] = defaultdict(set)
        """{model: nodes that have had a file of it}"""
        self.shelves: dict[str, Any] = {}
        self.heard: dict[str, float] = {}
        """{process that fetches: time of its last sign of life}"""
        self.leads: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
        """{process: {file: (model, node that sends it)}}"""
        self.uploads: Counter[str] = Counter()
        self.free: set[str] = set()
        """Nodes with a shelf that may send one more file."""

    def add_shelf(self, node: str, shelf: Any) -> None:
        """Note who serves a node's copies; None: nobody."""
        self.shelves[node] = shelf
        if shelf is None:
            del self.shelves[node]
        self._count_upload(node, 0)

    def _count_upload(self, node: str, change: int) -> None:
        self.uploads[node] += change
        is_free = node in self.shelves and self.uploads[node] < UPLOADS
        (self.free.add if is_free else self.free.discard)(node)

    def has(self, key: str, node: str, hashes: Mapping[str, str]) -> None:
        """Note the files of a complete copy on a node."""
        self.having[key].add(node)
        for name, known in hashes.items():
            file = self.models[key][name]
            file.holders.add(node)
            file.hash = file.hash or known

    def beat(self, who: str) -> None:
        """Note that a process is alive; forget those that are not."""
        now = time.monotonic()
        self.heard[who] = now
        for other in [w for w, heard in self.heard.items() if now - heard > LOST]:
            for name in list(self.leads[other]):
                self._end_lead(other, name)
            del self.heard[other], self.leads[other]

    def take(self, key: str, who: str, node: str, missing: Sequence[str]) -> Lead | None:
        """Return the next of the missing files for a node, and where to read it; None: wait.

        Files that nobody has come first, so that nodes read different ones from the store. Others
        wait for who reads one only if its node will serve the file.
        """
        self.beat(who)
        files = self.models[key]
        first = hash(who) % len(missing)
        names = [*missing[first:], *missing[:first]]
        for name in names:
            if not files[name].holders and not files[name].reader:
                return self._lead(key, who, node, Lead(name))
        free = self.having[key] & self.free - {node}
        for name in names:  # a thousand nodes ask twice a second: no look at all holders
            file = files[name]
            is_served = any(n != node and n in self.shelves for n in file.holders)
            is_coming = file.reader and file.reader_node in self.shelves
            if not is_served and not is_coming:
                return self._lead(key, who, node, Lead(name))
            if senders := file.holders & free:
                sender = min(senders, key=lambda n: self.uploads[n])
                lead = Lead(name, sender, self.shelves[sender], file.hash)
                return self._lead(key, who, node, lead)
        return None

    def _lead(self, key: str, who: str, node: str, lead: Lead) -> Lead:
        self.leads[who][lead.name] = key, lead.node
        self._count_upload(lead.node, 1)
        if not lead.node:
            file = self.models[key][lead.name]
            file.reader, file.reader_node = who, node
        return lead

    def settle(self, key: str, who: str, node: str, name: str, found: str | None) -> None:
        """Note that a node has a file, with its hash; None: that it cannot take it.

        An empty hash: it was not delivered. Then the node that should have sent it is not asked for
        this model again.
        """
        sender = self._end_lead(who, name)
        if found:
            self.has(key, node, {name: found})
        elif found is not None and sender:
            for file in self.models[key].values():
                file.holders.discard(sender)

    def _end_lead(self, who: str, name: str) -> str:
        """Forget who reads a file from where; returns the node that sends it."""
        if name not in self.leads[who]:  # it was taken for lost
            return ""
        key, sender = self.leads[who].pop(name)
        self._count_upload(sender, -1)
        file = self.models[key][name]
        if file.reader == who:
            file.reader = ""
        return sender


# --- on the nodes --------------------------------------------------------------------------------


def use_peers() -> None:
    """Let this process, a worker of a run, ask other nodes for the files of its copies."""
    TRANSFER.fetch = fetch_with_peers


def fetch_with_peers(
    key: str, source: Source, files: Mapping[str, Listed], to: Path
) -> dict[str, str]:
    """Fetch missing files from other nodes or from the source; returns {file: hash} of these.

    Raises:
        OSError: the source does not deliver a file.
    """
    import ray

    try:
        tracker = ray.get_actor(tracker_name(os.environ.get(SESSION, "")))
    except ValueError:  # a run on nothing that has to be copied
        return fetch_all(key, source, files, to)
    fetch = _Fetch(tracker, key, source, files, to)
    try:
        return fetch.run()
    except ray.exceptions.RayError:  # the tracker is lost
        return fetch.hashes | fetch_all(key, source, files, to)


def tracker_name(session: str) -> str:
    """The name of a run's tracker among Ray's actors."""
    return f"wrpo-weights-{session}"


class _Fetch:
    """One copy that is being made on this node."""

    def __init__(
        self, tracker: Any, key: str, source: Source, files: Mapping[str, Listed], to: Path
    ):
        self.tracker, self.key, self.source, self.files, self.to = tracker, key, source, files, to
        self.who, self.node = uuid.uuid4().hex, this_node()
        self.missing = [name for name in files if not (to / name).is_file()]
        self.hashes: dict[str, str] = {}
        self._asking, self._has_failed = threading.Lock(), False

    def run(self) -> dict[str, str]:
        with ThreadPoolExecutor(MAX_STREAMS) as threads:
            streams = [threads.submit(self._stream) for _ in range(MAX_STREAMS)]
            while wait(streams, timeout=BEAT).not_done:
                self.tracker.beat.remote(self.who)
            for stream in streams:
                stream.result()
        return self.hashes

    def _stream(self) -> None:
        try:
            while lead := self._next():
                found = None
                try:
                    found = self._read(lead)
                finally:
                    self.tracker.settle.remote(self.key, self.who, self.node, lead.name, found)
                if found:
                    self.hashes[lead.name] = found
                else:
                    self.missing.append(lead.name)
        except BaseException:
            self._has_failed = True
            raise

    def _next(self) -> Lead | None:
        """The next file to read; None if others of this process's streams read what is left."""
        import ray

        with self._asking:  # one of the streams waits for all
            while self.missing and not self._has_failed:
                asked = self.tracker.take.remote(self.key, self.who, self.node, self.missing)
                lead: Lead | None = ray.get(asked)
                if lead:
                    self.missing.remove(lead.name)
                    return lead
                time.sleep(POLL)
        return None

    def _read(self, lead: Lead) -> str:
        """Read a file; returns its hash, or "" if another node did not deliver it.

        Raises:
            OSError: the store does not deliver it, or this node's disk does not take it.
        """
        import ray

        file = self.files[lead.name]
        if not lead.node:
            return self.source.fetch(lead.name, file, self.to)
        try:
            expected = Listed(file.size, file.hash or lead.hash)
            return write_pieces(self._pieces(lead, file.size), lead.name, expected, self.to)
        except ray.exceptions.RayError:  # also an error of the other node's disk
            return ""
        except OSError as error:
            if error.errno is not None:  # of this node's
                raise
            return ""

    def _pieces(self, lead: Lead, size: int) -> Iterator[bytes]:
        """The pieces of a file on another node; the next one is on its way meanwhile."""
        import ray

        asked: list[Any] = []
        for offset in range(0, size, PIECE):
            asked.append(lead.shelf.read.remote(self.key, lead.name, offset))
            if len(asked) > 1:
                yield ray.get(asked.pop(0), timeout=READ_TIMEOUT)
        for left in asked:
            yield ray.get(left, timeout=READ_TIMEOUT)


class Shelf:
    """The actor of a node that brings models to its cache, and reads its copies to other nodes."""

    def __init__(self, tracker: Any):
        self.tracker = tracker
        use_peers()

    def bring(self, model: Model, spared: Collection[str]) -> str:
        """Bring a model to this node; returns why that is not possible, or an empty text."""
        folder, version = model
        try:
            key, hashes = folder.bring(version, spared)
        except (WrpoError, OSError) as error:  # the engine says so, if it has to
            return str(error)
        self.tracker.has.remote(key, this_node(), hashes)
        return ""

    def read(self, key: str, name: str, offset: int) -> bytes:
        """Return a piece of a file of a copy."""
        return read_piece(node_cache().folder / key, name, offset)


def this_node() -> str:
    """Ray's id of the node that this process runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
