"""The simulator against Ray: engines that sleep, on clusters of logical nodes."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulation as simulate
from wrpo_ray.config import Actors, ClusterConfig
from wrpo_ray.runtime import cluster
from wrpo_ray.runtime import pool as pools
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.storage.folder import Folder

START = 1.0
"""Seconds that an engine takes to start, after its process."""


class Sleeper:
    """An engine that takes as long as its bucket says."""

    def __init__(self) -> None:
        time.sleep(START)
        self.ready = time.time()

    def __call__(self, row: dict) -> dict:
        time.sleep(row["sleeps"])
        return row | {"ready": self.ready}


def seconds(count: int, total: float) -> list[float]:
    """Heavy-tailed times of buckets."""
    drawn = np.exp(np.random.default_rng(0).normal(0, 0.8, count))
    return (drawn * total / drawn.sum()).tolist()


def on_ray(nodes: int, times: list[float], folder: str) -> dict[str, float]:
    """Seconds on a cluster of so many nodes of one CPU, and until its first engine was ready."""
    from ray.cluster_utils import Cluster

    there = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(nodes - 1):
        there.add_node(num_cpus=1)
    cluster.connect(ClusterConfig(address=there.address), Folder(folder), "test")
    rows = [{"sleeps": t} for t in times]
    began = time.time()
    pool = Pool("sleep", Actors(min=1, max=nodes, num_cpus=1))
    done = list(pools.map_rows(pool, rows, Sleeper, {}))
    wall = time.time() - began
    cluster.disconnect()
    there.shutdown()
    assert len(done) == len(rows)
    ready = {r["ready"] - began for r in done}
    return {"wall": wall, "first": min(ready), "last": max(ready), "engines": len(ready)}


def foretold(nodes: int, times: list[float], startup: float) -> float:
    buckets = [[[t]] for t in times]
    source = simulate.Source("sleep", 1, nodes, 1.0, startup, buckets, slots=1, half=0)
    return simulate.simulate([source], simulate.Cluster(nodes, 1), simulate.Policy(1, 0)).wall


@pytest.mark.parametrize(
    ("nodes", "total"),
    [
        (2, 8.0),
        pytest.param(1, 20.0, marks=pytest.mark.soak),
        pytest.param(2, 40.0, marks=pytest.mark.soak),
        pytest.param(4, 80.0, marks=pytest.mark.soak),
    ],
)
def test_ray_takes_the_time_that_the_simulator_foretells(nodes, total, tmp_path):
    times = seconds(12 * nodes, total)
    code = (
        "import json, sys, test_simulated_cluster as t;"
        "print(json.dumps(t.on_ray(*json.loads(sys.argv[1]))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps([nodes, times, str(tmp_path)])],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    predicted = foretold(nodes, times, seen["first"])
    print(f"{nodes} nodes: Ray {seen['wall']:.1f} s, simulated {predicted:.1f} s", seen)
    assert seen["engines"] == nodes
    assert seen["wall"] > predicted * 0.95
    if total > 10:  # the long form, on a machine of its own
        # engines of a busy machine start after one another, which delays all but the first
        late = seen["last"] - seen["first"]
        assert seen["wall"] < predicted * 1.15 + late + 1


SHORT = {
    "nodes": 2, "prompts": 160, "buckets": 32, "quicker": 40.0,
    "sources": ["mistral-large-2407", "gemma2-27b"],
}  # fmt: skip


@pytest.mark.parametrize("work", [SHORT, pytest.param({}, marks=pytest.mark.soak)])
def test_the_runner_on_logical_gpus_has_the_engines_that_the_simulator_has(work):
    """Sources with engines of one GPU and with groups of several, and a reward that follows them.

    Pools grow to more than one engine where the simulator's do; none works before its start.
    """
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "on_ray.py"), "--work", json.dumps(work)],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    working = Counter(s["pool"] for s in found["spans"] if s["ready"] < s["until"])
    simulated = Counter(s["pool"] for s in found["simulated_spans"] if s["ready"] < s["until"])
    print(f"Ray {found['wall']:.1f} s, simulated {found['simulated']:.1f} s", working, simulated)
    assert working.keys() == simulated.keys()
    for pool, count in simulated.items():
        assert working[pool] > 1 or count == 1, pool
    for span in found["spans"]:
        if span["ready"] < span["until"]:
            assert span["ready"] - span["since"] >= 0.99 * found["starts"][span["pool"]]
    assert found["wall"] > 0.95 * found["simulated"]
    if not work:  # the long form, on a machine of its own
        assert found["wall"] < 1.1 * found["simulated"]
