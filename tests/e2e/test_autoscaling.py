"""A run on Ray's autoscaler: each step's nodes come and go, and the run outlives lost nodes.

Groups are those of cluster/raycluster, smaller: steps start nodes of their own group only, however
much they ask for. The source's engine and the reward are fakes that start at once; training is
real.

With WRPO_PLOTS=FOLDER the nodes over time are drawn into it (docs/img/autoscaling.svg).
"""

from __future__ import annotations

import json
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

from wrpo_ray.stages.ingest.distribute import SMALL

GPU = {"labels": {"wrpo-ray/gpu": "true"}}
NODES: dict[str, dict[str, Any]] = {
    "cpu": {"resources": {"CPU": 2}, "max_workers": 1},
    **{
        f"generate-{n}gpu": GPU | {
            "resources": {"CPU": n, "GPU": n, f"generate-{n}gpu": n}, "max_workers": 2,
        }
        for n in (1, 4, 8)
    },
    "train": GPU | {"resources": {"CPU": 1, "train": 1}, "max_workers": 2},
}  # fmt: skip
GENERATE, UNUSED = "generate-1gpu", ("generate-4gpu", "generate-8gpu")


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
    return next((kind for kind in NODES if kind in node.resources_total), "cpu")


def draw(changes: dict[float, dict[str, int]], to: Path) -> None:
    """Nodes of each type over the seconds of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    for kind, axes in zip(NODES, figure.subplots(len(NODES), sharex=True), strict=True):
        counts = [c[kind] for c in changes.values()]
        axes.step(list(changes), counts, where="post")
        axes.fill_between(list(changes), counts, step="post", alpha=0.3)
        axes.set(ylim=(0, 2.4), yticks=(0, 1, 2))
        axes.set_ylabel(kind, rotation=0, ha="right", va="center")
    axes.set_xlabel("seconds")
    figure.savefig(to)


def large(prompts: Path, folder: Path) -> Path:
    """The first prompts with a column that makes Ray Data shuffle them, and not one task."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()[:800]]
    to = folder / "prompts.jsonl"
    to.write_text("".join(json.dumps(row | {"notes": "x" * 45_000}) + "\n" for row in rows))
    assert to.stat().st_size > SMALL
    return to


def test_nodes_follow_the_steps_and_a_run_outlives_lost_ones(demo, zoo, monkeypatch, tmp_path):
    """From no node to those of generation, to none of them and those of training, to none."""
    output, log = tmp_path / "run", tmp_path / "log"
    of = {"resources": {GENERATE: 1}}
    source = {"name": "llama-bytes", "model": str(zoo / "sources" / "llama-bytes")}
    config = demo(
        output,
        prompts={"path": str(large(zoo / "prompts.jsonl", tmp_path)), "limit": 800},
        sources=[source | {"actors": of | {"max": 4, "num_gpus": 1}}],
        reward={"function": "support.fake_engine:reward", "actors": of},
        storage={"buckets": 64},
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
            answers = "generate-*/*/*.parquet"
            lose(GENERATE, lambda: watch.engines == 2 and len(shards(output, answers)) > 3)
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
    assert max(c[GENERATE] for c in watch.counts.values()) == 2
    assert watch.engines == 2  # of one pool, which asked for two more
    assert any(c["train"] == 2 and not c[GENERATE] for c in watch.counts.values())
    # neither for the engines, nor for Ray Data, nor for 64 tasks of a CPU each, of which the cpu
    # group has room for two
    assert not [c for c in watch.counts.values() if any(c[kind] for kind in UNUSED)]
