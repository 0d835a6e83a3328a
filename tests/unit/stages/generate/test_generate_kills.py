"""A process that generates is killed at random moments.

Nothing is lost or doubled, nor done again that was older than `commit_seconds`.
"""

import multiprocessing
import random
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from support.killed_writer import (
    AGE,
    BUCKETS,
    EACH,
    SAMPLES,
    job_of,
    run_of,
    work,
    write_prompts,
)
from support.waiting import LIMIT

from wrpo_ray.data import records
from wrpo_ray.data.buckets import buckets
from wrpo_ray.data.finished import marks, stored
from wrpo_ray.data.shards import list_shards

SLACK = 1.0
"""Seconds by which a commit, or a kill, may be late on a busy machine."""
Key = tuple[str, int]


def asked(log: Path) -> list[tuple[float, Key]]:
    """(time, answer) of all that the engine answered; a line may be cut off."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(float(line[0]), (line[1], int(line[2]))) for line in lines if len(line) == 3]


def kept(output: Path) -> Counter[Key]:
    """How often each answer is in the shards."""
    run = run_of(output)
    store = job_of().samples.folder(run.root)
    tables = [store.read_table(s.path, ["prompt_id", "sample"]) for s in list_shards(store)]
    rows = pa.concat_tables(tables).to_pylist() if tables else []
    return Counter((row["prompt_id"], row["sample"]) for row in rows)


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.soak)])
def test_killed_at_random_moments(tmp_path, kills):
    output, log = tmp_path / "out", tmp_path / "log"
    prompts = 100 * kills
    write_prompts(output, prompts)
    rng, context = random.Random(kills), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.killed_writer"])
    killed: list[float] = []
    store, key = job_of().samples.folder(run_of(output).root), job_of().step.key
    for _ in range(kills):
        before = len(asked(log))
        process = context.Process(target=work, args=(output, log), daemon=True)
        process.start()
        while len(asked(log)) == before and process.is_alive():
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 2 * EACH * prompts * SAMPLES / kills))
        finished, there = set(marks(store, key, BUCKETS, 3)), kept(output)
        process.kill()
        process.join(LIMIT)
        killed.append(time.time())
        assert there <= kept(output)
        assert finished <= marks(store, key, BUCKETS, 3).keys()
    last = context.Process(target=work, args=(output, log), daemon=True)
    last.start()
    last.join(LIMIT)
    assert last.exitcode == 0
    check(output, log, killed, prompts)


def check(output: Path, log: Path, killed: list[float], prompts: int) -> None:
    """Each answer once; of those asked again, each was younger than AGE when it was lost."""
    run, job = run_of(output), job_of()
    keys = [records.digest(number) for number in range(prompts)]
    assert kept(output) == Counter((key, s) for key in keys for s in range(SAMPLES))
    times: dict[Key, list[float]] = {}
    for moment, key in asked(log):
        times.setdefault(key, []).append(moment)
    again = [(moments[i], moments[i + 1]) for moments in times.values()
             for i in range(len(moments) - 1)]  # fmt: skip
    for first, second in again:
        lost = min(moment for moment in killed if moment >= first)
        assert lost < second
        assert lost - first < AGE + SLACK
    assert len(asked(log)) > 0
    assert job.step.is_done(run.root)
    assert stored(job.samples.folder(run.root)).rows == prompts * SAMPLES
    found = marks(job.samples.folder(run.root), job.step.key, BUCKETS, 3)
    assert found.keys() == {bucket.index for bucket in buckets(BUCKETS)}
