"""Which node reads which file from where: the tracker of copies, without Ray."""

import errno
import hashlib
import random
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.waiting import LIMIT, wait_until

from wrpo_ray.runtime import prefetch, weights
from wrpo_ray.runtime.allocation import Node
from wrpo_ray.runtime.connection import CONNECTION
from wrpo_ray.runtime.placement import Actors, Model, Pool
from wrpo_ray.runtime.prefetch import Prefetch, nodes_for
from wrpo_ray.runtime.weights import UPLOADS, Lead, Tracker
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.remote import PIECE, Listed, write_pieces

FILES = [f"model-{i}" for i in range(12)]


class Nodes:
    """Nodes that copy one model, a step of one stream at a time in random order."""

    def __init__(self, count: int, rng: random.Random):
        self.tracker, self.rng = Tracker(), rng
        self.missing = {f"n{i}": list(FILES) for i in range(count)}
        self.reads: list[tuple[str, Lead]] = []
        self.under_way: list[tuple[str, Lead]] = []
        for node in self.missing:
            self.tracker.add_shelf(node, object())

    def ask(self, node: str) -> None:
        if self.missing[node]:
            lead = self.tracker.take("m", f"p{node}", node, self.missing[node])
            if lead:
                self.missing[node].remove(lead.name)
                self.under_way.append((node, lead))
                self.reads.append((node, lead))

    def finish(self, found: str = "hash") -> tuple[str, Lead]:
        node, lead = self.under_way.pop(self.rng.randrange(len(self.under_way)))
        self.tracker.settle("m", f"p{node}", node, lead.name, found)
        if not found:
            self.missing[node].append(lead.name)
        return node, lead

    def run(self) -> None:
        while any(self.missing.values()) or self.under_way:
            self.ask(self.rng.choice(list(self.missing)))
            for sender in self.missing:
                sent = sum(lead.node == sender for _, lead in self.under_way)
                assert sent == self.tracker.uploads[sender] <= UPLOADS
            if self.under_way and self.rng.random() < 0.5:
                self.finish()

    @property
    def from_store(self) -> list[str]:
        return sorted(lead.name for _, lead in self.reads if not lead.node)


@pytest.mark.parametrize("seed", range(20))
def test_each_file_leaves_the_store_once_and_nobody_sends_what_it_lacks(seed):
    nodes = Nodes(10, random.Random(seed))
    nodes.run()
    assert nodes.from_store == sorted(FILES)
    assert len(nodes.reads) == 10 * len(FILES)
    had: set[tuple[str, str]] = set()
    for node, lead in nodes.reads:  # in the order in which they were begun
        assert not lead.node or (lead.hash == "hash" and lead.node != node)
        had.add((node, lead.name))
        assert not lead.node or (lead.node, lead.name) in had


def test_nodes_begin_with_different_files():
    nodes = Nodes(4, random.Random(0))
    for node in nodes.missing:
        nodes.ask(node)
    assert len({lead.name for _, lead in nodes.reads}) == 4
    assert not any(lead.node for _, lead in nodes.reads)


def test_a_node_that_does_not_deliver_is_not_asked_again():
    nodes = Nodes(3, random.Random(0))
    for name in FILES:
        nodes.tracker.has("m", "n0", {name: "hash"})
    nodes.missing["n0"] = []
    nodes.ask("n1")
    assert nodes.reads[-1][1].node == "n0"
    nodes.finish("")
    nodes.run()
    assert [lead.node for _, lead in nodes.reads].count("n0") == 1
    assert nodes.from_store == sorted(FILES)


def test_what_a_lost_process_was_reading_is_read_by_another(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(weights.time, "monotonic", lambda: now[0])
    tracker = Tracker()
    tracker.add_shelf("a", "shelf")
    assert tracker.take("m", "one", "a", ["f"]) == Lead("f")
    now[0] = weights.LOST - 1
    assert tracker.take("m", "two", "b", ["f"]) is None
    tracker.beat("one")
    now[0] += weights.LOST - 1
    assert tracker.take("m", "two", "b", ["f"]) is None
    now[0] += 2
    assert tracker.take("m", "two", "b", ["f"]) == Lead("f")
    tracker.settle("m", "one", "a", "f", "hash")  # it was only slow
    assert tracker.take("m", "three", "c", ["f"]) == Lead("f", "a", "shelf", "hash")
    assert tracker.uploads["a"] == 1


def test_nodes_that_nobody_will_serve_read_from_the_store_at_once():
    """Such as workers of a training, which fetch its rows themselves: none waits for another."""
    tracker = Tracker()
    tracker.has("m", "a", {"f": "hash"})
    assert tracker.take("m", "one", "b", ["f"]) == Lead("f")
    assert tracker.take("m", "two", "c", ["f"]) == Lead("f")
    tracker.add_shelf("c", "shelf")
    assert tracker.take("m", "three", "d", ["f"]) is None  # it comes from c
    tracker.settle("m", "two", "c", "f", "hash")
    assert tracker.take("m", "three", "d", ["f"]) == Lead("f", "c", "shelf", "hash")


class Direct:
    """A tracker or a shelf whose calls return at once; `ray.get` is the identity."""

    def __init__(self, actor):
        self.actor = actor

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self.actor, name))


class Holder:
    """A node that has the files, or spoils what it sends."""

    def __init__(self, content: bytes):
        self.content = content

    def read(self, key: str, name: str, offset: int) -> bytes:
        return self.content[offset : offset + PIECE]


class Store:
    """A store that counts how often a file is read."""

    def __init__(self, content: bytes):
        self.content, self.reads = content, 0

    def fetch(self, name: str, file: Listed, to: Path) -> str:
        self.reads += 1
        return write_pieces([self.content], name, file, to)


@pytest.fixture
def here(monkeypatch):
    """This process is on node `here`, where Ray's calls are plain ones."""
    monkeypatch.setattr("ray.get", lambda value, timeout=None: value)
    monkeypatch.setattr(weights, "this_node", lambda: "here")


def fetch_from(holder: Holder, store: Store, to: Path) -> Tracker:
    """Fetch a file that a node has, with the hash of the store's content."""
    tracker = Tracker()
    tracker.add_shelf("a", Direct(holder))
    tracker.has("m", "a", {"f": hashlib.sha256(store.content).hexdigest()})
    files = {"f": Listed(len(store.content))}
    try:
        weights._Fetch(Direct(tracker), "m", store, files, to).run()
    finally:
        assert not +tracker.uploads
    return tracker


def test_what_a_node_has_spoiled_comes_from_the_store(here, tmp_path):
    content = bytes(PIECE + 5)
    for spoiled in (content[:-1] + b"x", content[:-1], content[:3], b""):
        store, to = Store(content), tmp_path / str(len(spoiled)) / str(spoiled[-1:])
        tracker = fetch_from(Holder(spoiled), store, to)
        assert (to / "f").read_bytes() == content
        assert store.reads == 1
        assert tracker.models["m"]["f"].holders == {"here"}


def test_a_node_with_a_full_disk_blames_nobody(here, monkeypatch, tmp_path):
    """Others go on reading from the node that has the file, not from the store."""
    store, asked = Store(b"content"), []

    def write(pieces, *_):
        asked.extend(pieces)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "write_pieces", write)
    kept = Tracker()
    kept.add_shelf("a", Direct(Holder(b"content")))
    kept.has("m", "a", {"f": "hash"})
    with pytest.raises(OSError, match="No space left"):
        weights._Fetch(Direct(kept), "m", store, {"f": Listed(7)}, tmp_path).run()
    assert kept.models["m"]["f"].holders == {"a"}
    assert not +kept.uploads
    assert (asked, store.reads) == ([b"content"], 0)


def test_an_answer_takes_as_long_whatever_the_number_of_nodes_that_are_busy():
    """A thousand nodes ask twice a second. Counted: the nodes that are looked at."""
    looks = {}
    for count in (10, 1000):
        tracker, names = Tracker(), [f"n{i}" for i in range(count)]
        counted = Counted(names)
        for name in names:
            tracker.add_shelf(name, "shelf")
            tracker.has("m", name, dict.fromkeys(FILES, "hash"))
            for _ in range(UPLOADS):
                tracker._count_upload(name, 1)
        for name in FILES:
            tracker.models["m"][name].holders = counted
        assert tracker.take("m", "p", "late", FILES) is None
        looks[count] = counted.looks
    assert looks[10] == looks[1000] <= 2 * len(FILES)


class Counted(set):
    """A set that counts how many of its elements are looked at."""

    looks = 0

    def __iter__(self):
        for name in super().__iter__():
            self.looks += 1
            yield name

    def __and__(self, other):
        self.looks += min(len(self), len(other))
        return super().__and__(other)


def test_a_model_goes_to_nodes_that_can_hold_an_engine():
    gpus = [Node(f"g{i}", {"CPU": 8, "GPU": 4}, {}, True) for i in range(3)]
    nodes = [Node("head", {"CPU": 0}, {}), Node("cpu", {"CPU": 8}, {}), *gpus]
    of = lambda actors, **more: nodes_for(Pool("p", Actors(**actors), **more), nodes)  # noqa: E731
    assert of({"max": 9, "num_gpus": 1}) == (["g0", "g1", "g2"], 9)
    assert of({"max": 2}) == (["cpu"], 2)  # not on nodes that are for GPUs
    assert of({"max": 2, "num_gpus": 1}, parts=4) == (["g0", "g1", "g2"], 2)
    assert of({"max": 2, "num_gpus": 1}, parts=8) == (["g0", "g1", "g2"], 16)
    assert of({"max": 2, "resources": {"h100": 1}}) == ([], 2)


def test_where_no_model_is_wanted_ray_is_not_asked(monkeypatch):
    """Such as in a process whose connection to Ray has ended."""
    monkeypatch.setattr(CONNECTION, "_is_closed", True)
    ahead = Prefetch()
    ahead.open("session")
    ahead.want([])
    ahead.wait([])
    assert ahead.is_ready("node", [])
    ahead.close()


class Looks(Prefetch):
    """Looks at nodes of the test's own; copies arrive when the test says so."""

    def __init__(self, monkeypatch, nodes: list[str]):
        super().__init__()
        self.nodes, self.error = nodes, None
        monkeypatch.setattr(prefetch, "nodes_of_ray", self.look)
        monkeypatch.setattr(prefetch, "CONNECTION", type(prefetch.CONNECTION)())  # is open
        monkeypatch.setattr(prefetch, "TURN", 0.01)
        self.open("session")

    def look(self) -> list[Node]:
        if self.error:
            raise self.error
        return [Node(name, {"CPU": 1}, {}) for name in self.nodes]

    def _start(self) -> None:
        self._tracker = self._tracker or object()

    def _begin(self, name, key, model, spared=()) -> None:
        pass

    def arrive(self, name: str, model: Model) -> None:
        with self._lock:
            self._sites[name].there.add(model[0].copy_key(model[1]))

    def waiting(self, model: Model) -> Future[None]:
        """The wait of a training for the model, in a thread."""
        done: Future[None] = Future()

        def wait() -> None:
            try:
                done.set_result(self.wait([model]))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        wait_until(lambda: self._awaited[model[0].copy_key(model[1])] or done.done())
        return done


def model_of(name: str) -> Model:
    return Folder(f"hf://org/{name}@{'0' * 40}"), "0"


def pool_with(model: Model) -> Pool:
    return Pool("p", Actors(max=9), models=(model,))


def test_a_training_does_not_wait_for_nodes_that_have_left(monkeypatch):
    looks, model = Looks(monkeypatch, ["a", "b"]), model_of("sft")
    looks.want([pool_with(model)])
    done = looks.waiting(model)
    looks.arrive("a", model)
    assert not done.done()
    looks.nodes.remove("b")
    done.result(LIMIT)


def test_a_training_that_waits_keeps_its_model_when_another_branch_goes_on(monkeypatch):
    looks, mine, other = Looks(monkeypatch, ["a"]), model_of("sft"), model_of("reward")
    looks.want([pool_with(mine)])
    done = looks.waiting(mine)
    looks.want([pool_with(other)])
    assert list(looks._sites["a"].ahead.values()) == [mine, other]
    assert not done.done()
    looks.arrive("a", mine)
    done.result(LIMIT)
    looks.want([pool_with(other)])
    assert list(looks._sites["a"].ahead.values()) == [other]


def test_an_error_of_ray_ends_the_wait_of_a_training(monkeypatch):
    """The thread that looks at the nodes has ended with it."""
    looks, model = Looks(monkeypatch, ["a"]), model_of("sft")
    looks.want([pool_with(model)])
    looks.error = RuntimeError("the state of the cluster cannot be read")
    done = looks.waiting(model)
    with pytest.raises(RuntimeError, match="cannot be read"):
        done.result(LIMIT)
