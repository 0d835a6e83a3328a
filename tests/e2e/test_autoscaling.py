"""A run on Ray's autoscaler: each step's nodes come and go, and the run outlives lost nodes.

The source's engine and the reward are fakes that start at once; training is real.

With WRPO_PLOTS=FOLDER the nodes over time are drawn into it (docs/img/autoscaling.svg).
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import fake_engine
from support.harness import ROOT, shards
from support.ray_head import RayHead
from support.waiting import LIMIT, wait_until

NODES = {
    "cpu": {"resources": {"CPU": 2}, "max_workers": 1},
    "generate": {"resources": {"CPU": 1, "generate": 1}, "max_workers": 2},
    "train": {"resources": {"CPU": 1, "train": 1}, "max_workers": 2},
}


class Watch:
    """Live nodes of each type, asked of the head twice a second: {seconds: {type: nodes}}.

    `engines` are the most actors of the source's pool that lived at once.
    """

    def __init__(self, head: RayHead):
        self.head = head
        self.counts: dict[float, dict[str, int]] = {}
        self.ids: dict[str, list[str]] = {}
        self.engines = 0
        self.began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        from ray.util.state import list_actors, list_nodes

        pool = [("class_name", "=", "generate llama-bytes"), ("state", "=", "ALIVE")]
        while not self._stop.wait(0.5):
            alive = list_nodes(
                self.head.api,
                [("state", "=", "ALIVE")],
                raise_on_missing_output=False,  # some are about to be gone
            )
            self.ids = {kind: [n.node_id for n in alive if _kind(n) == kind] for kind in NODES}
            self.counts[time.monotonic() - self.began] = {k: len(v) for k, v in self.ids.items()}
            engines = list_actors(self.head.api, pool, raise_on_missing_output=False)
            self.engines = max(self.engines, len(engines))

    def changes(self) -> dict[float, dict[str, int]]:
        """The counts, where they differ from those before."""
        found: dict[float, dict[str, int]] = {}
        for seconds, counts in self.counts.items():
            if not found or counts != next(reversed(found.values())):
                found[round(seconds, 1)] = counts
        return found


def _kind(node: Any) -> str | None:
    if node.is_head_node:
        return None
    return next((kind for kind in ("generate", "train") if kind in node.resources_total), "cpu")


def draw(changes: dict[float, dict[str, int]], to: Path) -> None:
    """Nodes of each type over the seconds of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    for kind, axes in zip(NODES, figure.subplots(len(NODES), sharex=True), strict=True):
        counts = [c[kind] for c in changes.values()]
        axes.step(list(changes), counts, where="post")
        axes.fill_between(list(changes), counts, step="post", alpha=0.3)
        axes.set(ylabel=kind, ylim=(0, 2.4), yticks=(0, 1, 2))
    axes.set_xlabel("seconds")
    figure.savefig(to)


def test_nodes_follow_the_steps_and_a_run_outlives_lost_ones(demo, zoo, monkeypatch, tmp_path):
    """From no node to those of generation, to none of them and those of training, to none."""
    output, log = tmp_path / "run", tmp_path / "log"
    of = {"resources": {"generate": 1}}
    source = {"name": "llama-bytes", "model": str(zoo / "sources" / "llama-bytes")}
    config = demo(
        output,
        prompts={"path": str(zoo / "prompts.jsonl"), "limit": 800},
        sources=[source | {"actors": of | {"max": 2}}],
        reward={"function": "support.fake_engine:reward", "actors": of},
        storage={"buckets": 64, "chunk": 8},
        evaluate=None,
    )
    monkeypatch.setenv("PYTHONPATH", fake_engine.PYTHONPATH)
    with RayHead(0, NODES, idle_seconds=3) as head, Watch(head) as watch, log.open("w") as file:
        driver = subprocess.Popen(
            config.arguments(
                "fuse",
                "--until",
                "sft",
                "--set",
                "sft.resources={train: 1}",
                "--set",
                "sft.workers=2",
                "--set",
                "sft.epochs=1",
            ),
            cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": head.address},
            stderr=file,
            stdout=file,
        )

        def lose(kind: str, is_time: Callable[[], object]) -> None:
            """One of the nodes dies as soon as it is time."""
            wait_until(is_time, driver)
            head.kill_node(watch.ids[kind][0])

        try:
            answers = "generate-*/*.parquet"
            lose("generate", lambda: watch.engines == 2 and len(shards(output, answers)) > 3)
            lose("train", lambda: list(output.glob("sft-*/metrics.jsonl")))
            assert driver.wait(LIMIT) == 0
        finally:
            driver.kill()
            print(log.read_text())
        wait_until(lambda: not any(watch.ids.values()))
    changes = watch.changes()
    print(changes)
    if folder := os.environ.get("WRPO_PLOTS"):
        draw(changes, Path(folder) / "autoscaling.svg")
    assert max(c["generate"] for c in watch.counts.values()) == 2
    assert watch.engines == 2  # of one pool, which asked for the second node
    assert any(c["train"] == 2 and not c["generate"] for c in watch.counts.values())
