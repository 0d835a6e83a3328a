"""The node cache: copies of remote folders on local disk, shared by processes and evicted.

A copy is made in `<key>.part` and renamed to `<key>` when all its files are there, so a folder
without `.part` is complete. A file arrives in a folder below it, and is moved when its size and its
hash are right, so that other nodes can read it from there (`runtime.weights`). One process makes a
copy while the others wait for a file lock. A
process that uses a copy holds a shared lock on it until it ends; the kernel releases the locks of a
killed process. Copies without a lock are evicted, the least recently used first, when a new one
does not fit. The folder is this user's alone: whoever could write to it could plant a model. Not
covered: a cache shared by several nodes, which not every network file system can lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from wrpo_ray.errors import UserError
from wrpo_ray.storage.remote import ARRIVING, TRANSFER, Source

LIMIT_VARIABLE = "WRPO_CACHE_GB"
"""Environment variable: the limit for all copies of a node, in GB (10^9 bytes)."""
SPARE = 10**9
"""Bytes of disk space kept free for Ray and the engines."""
RELEASE_TIMEOUT = 60.0
"""Seconds to wait for other processes to release copies."""
_held: dict[Path, BinaryIO] = {}
"""This process's locks on copies, kept until it ends."""


@dataclass(frozen=True)
class NodeCache:
    """A folder of copies with a size limit."""

    folder: Path
    limit: int | None = None
    """Bytes of all copies; None means that only the disk limits them."""
    patience: float = RELEASE_TIMEOUT

    def copy(self, key: str, source: Source) -> Path:
        """Return the complete copy of this key, locked by this process from now on.

        Raises:
            UserError: the copy does not fit.
            OSError: a file is incomplete; another call resumes the download.
        """
        entry = _Entry(self.folder, key)
        with FileLock(entry.path(".lock")):
            entry.hold()
            self._complete(entry, source)
        return entry.copy

    def bring(self, key: str, source: Source, spared: Collection[str] = ()) -> dict[str, str]:
        """Make the copy of this key ahead of its use; returns {file: hash}, as far as known.

        It is not locked when this returns. Copies of the keys `spared` are not evicted for it.

        Raises:
            UserError: the copy does not fit beside those that are in use or spared.
            OSError: a file is incomplete.
        """
        entry = _Entry(self.folder, key)
        with FileLock(entry.path(".lock")), entry.held():
            self._complete(entry, source, frozenset(spared))
            return entry.hashes

    def _complete(
        self, entry: _Entry, source: Source, spared: frozenset[str] = frozenset()
    ) -> None:
        """Make the copy of a locked entry, unless it is there."""
        if entry.copy.is_dir():
            return
        files = source.files()
        entry.part.mkdir(exist_ok=True)
        need = sum(file.size for file in files.values())
        self._await_room(entry, str(source), need, spared)
        hashes = {name: file.hash for name, file in files.items() if file.hash}
        hashes |= TRANSFER.fetch(entry.key, source, files, entry.part)
        _check_sizes({name: file.size for name, file in files.items()}, entry.part, source)
        shutil.rmtree(entry.part / ARRIVING, ignore_errors=True)
        entry.record(str(source), need, hashes)
        entry.part.rename(entry.copy)

    def _await_room(self, entry: _Entry, what: str, need: int, spared: frozenset[str]) -> None:
        deadline = time.monotonic() + self.patience
        while problem := self._make_room(entry, what, need, spared):
            if spared or time.monotonic() > deadline:
                raise UserError(problem)
            time.sleep(min(1.0, self.patience / 10))

    def _make_room(self, entry: _Entry, what: str, need: int, spared: frozenset[str]) -> str | None:
        """Reserve `need` bytes for the entry, and evict as few copies as possible.

        Returns the problem, and evicts nothing, if other processes would have to release theirs.
        """
        with FileLock(self.folder / "room.lock"), ExitStack() as claims:
            others = [e for e in self._entries() if e != entry]
            idle = [e for e in others if e.key not in spared and claims.enter_context(e.claimed())]
            held = [e for e in others if e not in idle]
            if self._lack(entry, need, [], freed=sum(e.written for e in others)) > 0:
                raise UserError(self._refusal(what, need, held))
            if self._lack(entry, need, held, freed=sum(e.written for e in idle)) > 0:
                return self._refusal(what, need, held)
            idle.sort(key=lambda e: e.used)
            while self._lack(entry, need, held + idle) > 0:
                idle.pop(0).delete()
            entry.record(what, need)
        return None

    def _entries(self) -> list[_Entry]:
        return [_Entry(self.folder, file.stem) for file in self.folder.glob("*.json")]

    def _lack(self, entry: _Entry, need: int, others: list[_Entry], freed: int = 0) -> int:
        """Missing bytes for the entry beside the others, by the limit or on the disk."""
        to_come = need - entry.written + sum(e.bytes - e.written for e in others)
        by_disk = to_come + SPARE - freed - shutil.disk_usage(self.folder).free
        by_limit = need + sum(e.bytes for e in others) - (self.limit or 0)
        return by_disk if self.limit is None else max(by_disk, by_limit)

    def _refusal(self, what: str, need: int, held: list[_Entry]) -> str:
        limit = "" if self.limit is None else f"may hold {_gb(self.limit)} ({LIMIT_VARIABLE}) and "
        return (
            f"{what} takes {_gb(need)} and does not fit: the cache {self.folder} {limit}has "
            f"{_gb(shutil.disk_usage(self.folder).free)} of disk left, and "
            f"{_gb(sum(e.bytes for e in held))} are copies in use; raise cluster.cache_gb, free "
            f"the disk, or set WRPO_CACHE to a folder on a larger one"
        )


@dataclass(frozen=True)
class _Entry:
    """A copy, complete or not, with its lock files and its record."""

    folder: Path
    key: str

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.key}{suffix}"

    @property
    def copy(self) -> Path:
        return self.path("")

    @property
    def part(self) -> Path:
        return self.path(".part")

    def record(self, what: str, size: int, hashes: dict[str, str] | None = None) -> None:
        told = {"of": what, "bytes": size} | ({"hashes": hashes} if hashes else {})
        made = self.path(".json-new")  # others read it without the lock of this entry
        made.write_text(json.dumps(told) + "\n")
        made.replace(self.path(".json"))

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the complete copy's files, as far as they are known."""
        try:
            return dict(json.loads(self.path(".json").read_text()).get("hashes", {}))
        except (OSError, ValueError, AttributeError):
            return {}

    @property
    def bytes(self) -> int:
        """Bytes of the complete copy; 0 if its record is damaged."""
        try:
            return int(json.loads(self.path(".json").read_text())["bytes"])
        except (OSError, json.JSONDecodeError):
            return 0

    @property
    def written(self) -> int:
        """Bytes on the disk so far."""
        walk = os.walk(self.part)  # which skips a folder that another process finishes or deletes
        found = sum(_size(Path(at, name)) for at, _, names in walk for name in names)
        return self.bytes if self.copy.is_dir() else found

    @property
    def used(self) -> float:
        """Unix time of its last use."""
        return self.path(".held").stat().st_mtime

    def hold(self) -> None:
        """Lock the copy against eviction until this process ends."""
        path = self.path(".held")
        if path not in _held:
            file = path.open("ab")
            fcntl.flock(file, fcntl.LOCK_SH)
            _held[path] = file
        os.utime(path, ns=(time.time_ns(),) * 2)  # the kernel's own stamps are coarse

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the copy against eviction within the block, or longer if it was locked before."""
        path = self.path(".held")
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(path, ns=(time.time_ns(),) * 2)
            yield

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Lock the copy within the block; yield False if another process uses it."""
        with self.path(".held").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def delete(self) -> None:
        """Delete the copy; an interrupted deletion leaves a `.part` folder."""
        if self.copy.is_dir():
            shutil.rmtree(self.part, ignore_errors=True)
            self.copy.rename(self.part)
        shutil.rmtree(self.part, ignore_errors=True)
        self.path(".json").unlink()


def node_cache() -> NodeCache:
    """Return this node's cache: $WRPO_CACHE, or `wrpo-cache-<uid>` in the temporary folder.

    A $WRPO_CACHE that others may write to, such as a node's scratch disk, gets that subfolder too.

    Raises:
        UserError: the folder is another user's, or the limit in the environment is not a number of
            GB.
    """
    own = f"wrpo-cache-{os.getuid()}"
    if given := os.environ.get("WRPO_CACHE"):
        folder = Path(given).expanduser().resolve()
        folder = folder / own if folder.is_dir() and not _is_private(folder) else folder
    else:
        folder = Path(tempfile.gettempdir()).absolute() / own
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not _is_private(folder):
        raise UserError(
            f"the cache {folder} is another user's, or others may write to it, so that its models "
            f"could be anyone's; set WRPO_CACHE to a folder of your own"
        )
    limit = os.environ.get(LIMIT_VARIABLE)
    try:
        return NodeCache(folder, int(float(limit) * 10**9) if limit else None)
    except (ValueError, OverflowError):  # infinity is no number of bytes
        raise UserError(f"{LIMIT_VARIABLE}={limit}: not a number of GB") from None


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's own, and nobody else may write to it."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o22


def plain_path(folder: Path) -> Path:
    """Return the folder, or a link to it whose path has letters, digits and `-_.+=,@~` only.

    Engines search for weights by glob patterns that begin with the folder: for `run?` they would
    also read the weights of `run1`, and for `run[1]` none.
    """
    if re.fullmatch(r"[\w/.+=,@~-]*", str(folder), re.ASCII):
        return folder
    links = node_cache().folder / "links"
    links.mkdir(exist_ok=True)
    link = links / uuid.uuid5(uuid.NAMESPACE_URL, str(folder)).hex
    made = links / uuid.uuid4().hex
    made.symlink_to(folder)
    made.replace(link)
    return link


def _check_sizes(sizes: dict[str, int], folder: Path, source: Source) -> None:
    for name, size in sizes.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            (folder / name).unlink(missing_ok=True)
            raise OSError(f"{source}: {name} arrived with {there} bytes in place of {size}")


def _size(file: Path) -> int:
    """Bytes of a file; 0 for one that was moved meanwhile."""
    with suppress(FileNotFoundError):
        found = file.stat()
        return found.st_size if stat.S_ISREG(found.st_mode) else 0
    return 0


def _gb(size: int) -> str:
    return f"{size / 10**9:.3g} GB"
