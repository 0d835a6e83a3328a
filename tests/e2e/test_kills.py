"""Actors, nodes and drivers are killed: the rows are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from support.harness import ROOT, SOURCES, Wrpo, greedy, processes_of, rows, shards
from support.shared_data import DATA
from support.waiting import LIMIT, wait_until

GSM8K = DATA / "gsm8k_real_responses.parquet"
DONE = ("generate-*/*/*.parquet", "score-*/*/*.parquet")
"""The shards that a crash must not cost."""
KINDS = ("generate", "score", "node", "driver")
"""What is killed: an actor that generates, one that scores, a node with all it runs, the driver."""
Kill = tuple[int, str | None]
"""After how many shards are finished, and of which kind; None draws one of those that are there."""


class Nodes:
    """A Ray of three logical nodes with one CPU each, which runs of the command connect to."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        self.node = node
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.workers = [self.cluster.add_node(**node) for _ in range(2)]

    def replace_one(self, rng: random.Random) -> None:
        """A node dies with all that runs on it, one with an engine rather than another."""
        busy = [node for node in self.workers if _engines(node)] or self.workers
        lost = rng.choice(busy)
        self.workers.remove(lost)
        self.cluster.remove_node(lost, allow_graceful=False)
        self.workers.append(self.cluster.add_node(**self.node))


def _engines(node: Any) -> list[psutil.Process]:
    """The engines on a node of `ray.cluster_utils.Cluster`."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [p for p in raylet.children(recursive=True) if _is_actor(p, "generate")]


def _is_actor(process: psutil.Process, kind: str) -> bool:
    """Whether it is an actor of the pools of one stage."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).startswith(f"ray::{kind} ")
    return False


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


class Trial:
    """A run that is killed whenever it has made so many more shards."""

    def __init__(self, wrpo: Wrpo, output: Path, nodes: Nodes, seed: int):
        self.wrpo, self.output, self.nodes = wrpo, output, nodes
        self.rng = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.logs = output.parent / f"{output.name}-logs"
        self.logs.mkdir()

    def run(self, kills: Sequence[Kill] = ()) -> None:
        """Kill at each of these moments, then run to the end."""
        driver = self._start()
        for moment, kind in kills:
            wait_until(lambda moment=moment: self._made() >= moment, driver)
            finished = shards(self.output, "**/*.parquet")
            driver = self._kill(driver, kind)
            assert finished.keys() <= shards(self.output, "**/*.parquet").keys()
        assert driver.wait(LIMIT) == 0, self._log()

    def _made(self) -> int:
        return sum(len(shards(self.output, pattern)) for pattern in DONE)

    def _start(self) -> subprocess.Popen:
        number = len(list(self.logs.iterdir()))
        with (self.logs / f"{number:03}").open("w") as log:
            return subprocess.Popen(
                self.wrpo.arguments("fuse", "--until", "select"),
                cwd=ROOT,
                env=os.environ | {"RAY_ADDRESS": self.nodes.cluster.address},
                stderr=log,
                stdout=subprocess.DEVNULL,
            )

    def _log(self) -> str:
        return max(self.logs.iterdir()).read_text()[-3000:]

    def _kill(self, driver: subprocess.Popen, kind: str | None) -> subprocess.Popen:
        if kind in ("generate", "score"):
            wait_until(lambda: self._actors(kind), driver)
        there = [k for k in KINDS if k in ("node", "driver") or self._actors(k)]
        kind = kind or self.rng.choice(there)
        self.killed[kind] += 1
        if kind == "node":
            self.nodes.replace_one(self.rng)
        elif kind == "driver":
            driver.kill()
            driver.wait()
            return self._start()
        else:
            self.rng.choice(self._actors(kind)).kill()
        return driver

    def _actors(self, kind: str) -> list[psutil.Process]:
        found = []
        for pid in processes_of(self.output):
            with suppress(psutil.Error):
                found.append(psutil.Process(pid))
        return [process for process in found if _is_actor(process, kind)]


def check(trial: Trial, undisturbed: Path, count: int, sources: Sequence[str]) -> None:
    """The same rows by key and content, each once, and runs that tell what they passed over."""
    for source in sources:
        key = ("prompt_id", "source", "sample")
        for step, content in (("generate", "text"), ("score-reward", "text")):
            found = rows(trial.output, f"{step}-{source}", *key, content)
            assert found == rows(undisturbed, f"{step}-{source}", *key, content)
            assert len({row[:3] for row in found}) == len(found) == count
    chosen = rows(trial.output, "select", "prompt_id", "source_chosen")
    assert [r[0] for r in chosen] == [r[0] for r in rows(undisturbed, "select", "prompt_id")]
    later = [log.read_text() for log in sorted(trial.logs.iterdir())[1:]]
    assert len(later) == trial.killed["driver"]
    assert all("buckets have rows" in log for log in later if "generate-" in log)  # else too short
    wait_until(lambda: not processes_of(trial.output))


def test_a_kill_of_each_kind_costs_no_row(demo, zoo, greedy_run, nodes, tmp_path):
    """Of a driver: test_object_store.py and test_evaluate.py; in training: test_train.py."""
    output, kinds = tmp_path / "killed", ("generate", "score", "node")
    trial = Trial(greedy(demo, zoo, output), output, nodes, seed=0)
    trial.run(list(zip((4, 12, 20), kinds, strict=True)))  # of 32 shards
    assert trial.killed == dict.fromkeys(kinds, 1)
    check(trial, greedy_run, 120, SOURCES[:1])


@pytest.mark.soak
def test_killed_at_random_moments(demo, zoo, nodes, tmp_path):
    """25 times, on the real GSM8K questions."""
    if not GSM8K.exists():
        pytest.skip(f"needs {GSM8K}")
    prompts = {"path": str(questions(tmp_path / "questions.jsonl"))}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    first = Trial(greedy(demo, zoo, undisturbed, prompts, SOURCES), undisturbed, nodes, 0)
    first.run()
    trial = Trial(greedy(demo, zoo, killed, prompts, SOURCES), killed, nodes, 25)
    moments = sorted(trial.rng.sample(range(1, first._made() * 9 // 10), 25))
    trial.run([(moment, None) for moment in moments])
    print(f"killed {dict(trial.killed)}")
    check(trial, undisturbed, 1319, SOURCES)


def questions(to: Path) -> Path:
    """Each question of GSM8K's test set once."""
    asked = dict.fromkeys(pq.read_table(GSM8K, columns=["question"])["question"].to_pylist())
    to.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in asked))
    return to
