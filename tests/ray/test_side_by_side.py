"""SFT and its samples beside the sources, on a Ray with room for both.

Engines and the reward are fakes, and each engine stops after some requests, more than there are of
SFT's prompts, until target-SFT has answered some: a run whose phases follow one another never ends.
Training is real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from support import fake_engine
from support.harness import ROOT, SOURCES, demo, shards
from support.ray_head import RayHead
from support.waiting import LIMIT, wait_until

__all__ = ["demo"]
PROMPTS, SAMPLES = 160, 2
HELD = 72
"""Requests after which an engine stops: above a third of the prompts, below a half."""
MADE = "generate-*/*/*.parquet", "score-*/*/*.parquet", "select-*/*/*.parquet", "rows-sft-*/*.arrow"


def table(output: Path, pattern: str, *columns: str) -> pa.Table:
    """The rows of these shards."""
    return pa.concat_tables(
        pq.read_table(output / f, columns=list(columns)) for f in shards(output, pattern)
    )


def made(output: Path) -> dict[str, int]:
    """Times of last change of all that is finished."""
    return {name: at for pattern in MADE for name, at in shards(output, pattern).items()}


def test_sft_trains_and_answers_while_sources_answer_and_a_kill_there_loses_nothing(
    demo, zoo, monkeypatch, tmp_path
):
    output, few = tmp_path / "run", {"max": 1, "num_cpus": 1}
    config = demo(
        output,
        prompts={"path": str(zoo / "prompts.jsonl"), "limit": PROMPTS},
        sources=[
            {"name": name, "model": str(zoo / "sources" / name), "actors": few}
            for name in SOURCES[:2]
        ],
        reward={"function": "support.fake_engine:reward", "actors": few},
        sampling={"samples": SAMPLES, "max_tokens": 8},
        storage={"buckets": 4, "commit_seconds": 1},
        evaluate=None,
    )
    monkeypatch.setenv("PYTHONPATH", fake_engine.PYTHONPATH)
    held = f"{HELD} {output} generate-target-sft-*/*/*.parquet"
    with RayHead(8, env={"WRPO_TEST_HELD": held}) as head:

        def start() -> subprocess.Popen:
            log = (tmp_path / "log").open("a")
            env = os.environ | {"RAY_ADDRESS": head.address}
            command = config.arguments("fuse", "--until", "pair")
            return subprocess.Popen(command, cwd=ROOT, env=env, stderr=log, stdout=log)

        try:
            driver = start()
            wait_until(lambda: list(output.glob("sft-*/metrics.jsonl")), driver)
            driver.send_signal(signal.SIGKILL)
            driver.wait(LIMIT)
            before = made(output)
            assert not list(output.glob("generate-llama-bytes-*/manifest-*.json"))[1:]  # its part
            driver = start()
            assert driver.wait(LIMIT) == 0
        finally:
            driver.kill()
            print((tmp_path / "log").read_text())
    after = made(output)
    assert before.items() <= after.items()  # nothing was written again
    own = shards(output, "generate-target-sft-*/*/*.parquet").values()
    for name in SOURCES[:2]:
        assert min(own) < max(shards(output, f"generate-{name}-*/*/*.parquet").values())
    check_rows(output)


def check_rows(output: Path) -> None:
    """Every answer and score is there once; SFT's rows are those of the whole selection."""
    key = ("prompt_id", "source", "sample")
    splits = table(output, "prompts-*/*/*.parquet", "prompt_id", "split").to_pylist()
    asked = Counter(row["split"] for row in splits)
    assert 0 < asked["sft"] < asked["preference"]
    for kind in ("generate", "score-reward"):
        for name in (*SOURCES[:2], "target-sft"):
            found = table(output, f"{kind}-{name}-*/*/*.parquet", *key).to_pylist()
            wanted = asked["preference"] if name == "target-sft" else len(splits)
            assert len(found) == len({tuple(row.values()) for row in found}) == wanted * SAMPLES
    whole, early = sorted(
        (rows_of(folder) for folder in output.glob("select-*")), key=len, reverse=True
    )
    assert early == [row for row in whole if row["split"] == "sft"]
    manifests = [json.loads(f.read_text()) for f in output.glob("rows-sft-*/manifest.json")]
    assert [m["counts"]["rows"] for m in manifests] == [len(early)]


def rows_of(folder: Path) -> list[dict]:
    found = pa.concat_tables(pq.read_table(f) for f in sorted(folder.glob("*/*.parquet")))
    return found.sort_by("prompt_id").to_pylist()
