"""Drivers, actors and nodes killed at random moments: the rows are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from support.harness import ROOT, Wrpo, processes_of, rows, shards, wait_until
from support.shared_data import DATA

GSM8K = DATA / "gsm8k_real_responses.parquet"
SOURCES = ("llama-bytes", "qwen3-bpe", "gemma2-chars")
DONE = ("generate-*/*.parquet", "score-*/*.parquet")
"""The shards that a crash must not cost."""


class Nodes:
    """A Ray of three logical nodes with one CPU each, which runs of the command connect to."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        self.node = node
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.workers = [self.cluster.add_node(**node) for _ in range(2)]

    def replace_one(self, rng: random.Random) -> None:
        """A node dies with all that runs on it, and another one takes its place."""
        lost = self.workers.pop(rng.randrange(len(self.workers)))
        self.cluster.remove_node(lost, allow_graceful=False)
        self.workers.append(self.cluster.add_node(**self.node))


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

    def run(self, kills: list[int]) -> None:
        """Kill at each of these numbers of finished shards, then run to the end."""
        driver = self._start()
        for moment in kills:
            self._wait(driver, moment)
            time.sleep(self.rng.uniform(0, 1))
            finished = shards(self.output, "**/*.parquet")
            driver = self._kill(driver)
            assert finished.keys() <= shards(self.output, "**/*.parquet").keys()
        assert driver.wait(900) == 0, self._log()

    def _wait(self, driver: subprocess.Popen, shards: int) -> None:
        wait_until(lambda: self._made() >= shards or driver.poll() is not None, 600)
        assert driver.poll() is None, self._log()

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

    def _kill(self, driver: subprocess.Popen) -> subprocess.Popen:
        victims = {name: self._actors(name) for name in ("Generator", "Scorer")}
        kinds = ["driver", "node", *(name for name, found in victims.items() if found)]
        kind = self.rng.choice(kinds)
        self.killed[kind] += 1
        if kind == "node":
            self.nodes.replace_one(self.rng)
        elif kind == "driver":
            driver.kill()
            driver.wait()
            return self._start()
        else:
            self.rng.choice(victims[kind]).kill()
        return driver

    def _actors(self, name: str) -> list[psutil.Process]:
        found = []
        for pid in processes_of(self.output):
            try:
                process = psutil.Process(pid)
                if f"Map({name})" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def greedy(demo: Any, output: Path, prompts: dict[str, Any], sources: Sequence[str]) -> Wrpo:
    """The demo's sources and reward on these prompts; each answer is decided by its prompt."""
    long = {"engine": {"hf_overrides": {"max_position_embeddings": 2048}, "max_model_len": 2048}}
    return demo(
        output,
        prompts=prompts,
        sources=[
            {"name": name, "model": str(ROOT / ".cache/zoo/sources" / name), **long}
            for name in sources
        ],
        sampling={"samples": 1, "temperature": 0, "max_tokens": 16},
        reward={"model": str(ROOT / ".cache/zoo/reward"), "overflow": "cut_prompt"},
        storage={"buckets": 16, "chunk": 4},
        evaluate=None,
    )


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
    assert all("shards are there" in log for log in later if "generate-" in log)  # else too short
    wait_until(lambda: not processes_of(trial.output))


@pytest.mark.parametrize(
    ("kills", "count"), [(3, 120), pytest.param(25, 1319, marks=pytest.mark.soak)]
)
def test_killed_at_random_moments(demo, zoo, nodes, tmp_path, kills, count):
    """The long form takes the real GSM8K questions, the short one the demo's and two sources."""
    sources = SOURCES if kills > 10 else SOURCES[:2]
    prompts = {"path": str(zoo / "prompts.jsonl"), "limit": count}
    if kills > 10:
        if not GSM8K.exists():
            pytest.skip(f"needs {GSM8K}")
        prompts = {"path": str(questions(tmp_path / "questions.jsonl"))}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    first = Trial(greedy(demo, undisturbed, prompts, sources), undisturbed, nodes, 0)
    first.run([])
    trial = Trial(greedy(demo, killed, prompts, sources), killed, nodes, kills)
    trial.run(sorted(trial.rng.sample(range(1, first._made() * 9 // 10), kills)))
    print(f"killed {dict(trial.killed)} at {kills} moments")
    check(trial, undisturbed, count, sources)


def questions(to: Path) -> Path:
    """Each question of GSM8K's test set once."""
    asked = dict.fromkeys(pq.read_table(GSM8K, columns=["question"])["question"].to_pylist())
    to.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in asked))
    return to
