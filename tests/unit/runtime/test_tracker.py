"""Which node reads which file from where: the tracker of copies, without Ray."""

import random

import pytest

from wrpo_ray.runtime import weights
from wrpo_ray.runtime.allocation import Node
from wrpo_ray.runtime.connection import CONNECTION
from wrpo_ray.runtime.placement import Actors, Pool
from wrpo_ray.runtime.prefetch import Prefetch, nodes_for
from wrpo_ray.runtime.weights import UPLOADS, Lead, Tracker

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
    assert tracker.take("m", "one", "a", ["f"]) == Lead("f")
    now[0] = weights.LOST - 1
    assert tracker.take("m", "two", "b", ["f"]) is None
    tracker.beat("one")
    now[0] += weights.LOST - 1
    assert tracker.take("m", "two", "b", ["f"]) is None
    now[0] += 2
    assert tracker.take("m", "two", "b", ["f"]) == Lead("f")
    tracker.settle("m", "one", "a", "f", "hash")  # it was only slow
    tracker.add_shelf("a", "shelf")
    assert tracker.take("m", "three", "c", ["f"]) == Lead("f", "a", "shelf", "hash")
    assert tracker.uploads["a"] == 1


def test_copies_on_nodes_without_a_shelf_are_read_from_the_store():
    tracker = Tracker()
    tracker.has("m", "a", {"f": "hash"})
    assert tracker.take("m", "one", "b", ["f"]) == Lead("f")
    assert tracker.take("m", "two", "c", ["f"]) is None


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
    prefetch = Prefetch()
    prefetch.open("session")
    prefetch.want([])
    prefetch.wait([])
    assert prefetch.is_ready("node", [])
    prefetch.close()
