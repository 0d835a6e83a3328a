"""Requests to a store: as many for a bucket, and for a restart, whatever the store's size."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.counting_store import counting
from support.killed_writer import LoggedEngine, job_of, work, write_prompts

from wrpo_ray.config import AnswersConfig, BudgetConfig, PricesConfig, RewardConfig
from wrpo_ray.data import finished
from wrpo_ray.data.shards import Counts, shard_path, share_layouts
from wrpo_ray.pipeline.runner import log_resumed
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.ledger import Ledger
from wrpo_ray.runtime.tally import Tally
from wrpo_ray.stages.generate.stage import Generator
from wrpo_ray.stages.pair.stage import Answers, Select
from wrpo_ray.stages.score.stage import Score, Scorer
from wrpo_ray.storage.folder import Folder

BUCKETS = 8


class Lengths:
    """A reward."""

    def score(self, items: list[Any]) -> list[float]:
        """Scores by length."""
        return [float(len(item.text)) for item in items]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setattr("support.killed_writer.EACH", 0)
    monkeypatch.setattr("support.killed_writer.BUCKETS", BUCKETS)
    return LoggedEngine(tmp_path / "log")


def fill_others(root: Path, key: str, count: int) -> None:
    """So many shards in each bucket but the last, which are marked as finished."""
    for index in range(BUCKETS - 1):
        for number in range(count):
            path = root / shard_path((index, BUCKETS), f"{number:x}", Counts(2, 2, 2))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        mark = finished.Mark((index, BUCKETS), 2 * count, 0, 3, Counts(2 * count, 2, 2))
        (root / finished.MARKS / key).mkdir(parents=True, exist_ok=True)
        (root / finished.MARKS / key / mark.name).touch()


def restart(output: Path, engine: LoggedEngine, shards: int) -> Counter[str]:
    """Requests of a run that finds so many shards in the other buckets, for its own bucket."""
    write_prompts(output, 60)
    run, job = Run(Folder(str(output)), BUCKETS, session=str(output)), job_of()
    store = job.samples.folder(run.root)
    fill_others(Path(store.path), job.step.key, shards)
    with counting() as requests:
        ledger = Ledger(run.root, PricesConfig(), BudgetConfig())
        log_resumed(run, [job])
        tally = Tally(run, job.step, store)
        stores = [store, job.step.failures(run.root)]
        seen = run.having_seen(stores, [run.root / job.prompts.step.folder])
        generator = Generator(seen, [job])
        generator.engine = engine
        assert tally.left == 1
        tally.add(generator({"job": 0, "bucket": BUCKETS - 1}))
    assert ledger.total.rows == 2 * shards * (BUCKETS - 1)
    assert job.step.is_done(run.root)
    return requests


def test_a_restart_takes_no_more_requests_beside_more_shards(tmp_path, engine):
    few = restart(tmp_path / "few", engine, 1)
    assert restart(tmp_path / "many", engine, 100) == few
    assert few["read"] <= 3  # the ledger and the prompts
    assert few["list"] <= 10


def test_a_bucket_takes_so_many_requests(tmp_path, engine):
    """None but those that its own files need; the driver looks for all workers.

    A file is read twice: its footer, then its columns; a third time where some are read later.
    """
    write_prompts(tmp_path, 60)
    run, job = Run(Folder(str(tmp_path)), BUCKETS, session=str(tmp_path)), job_of()
    score = Score(job.samples, RewardConfig(function="a:b"), (None,), ("f",))
    select = Select(job.prompts, Answers((score.samples,), AnswersConfig()))
    stores = [j.samples.folder(run.root) for j in (job, score)]
    stores += [j.step.failures(run.root) for j in (job, score)]
    run = run.having_seen(stores, [run.root / job.prompts.step.folder])
    share_layouts(run.session, run.layouts)
    generator, scorer = Generator(run, [job]), Scorer(run, [score])
    generator.engine, scorer.reward = engine, Lengths()
    row = {"job": 0, "bucket": 1}
    for worker, told in (
        (lambda: generator(row), {"read": 2, "write": 2}),  # prompts; answers, a mark
        (lambda: scorer(row), {"list": 2, "read": 6, "write": 2}),  # answers; wins
        (lambda: select.fill(run, run.bucket(1)), {"list": 1, "read": 5, "write": 1}),
    ):
        with counting() as requests:
            worker()
        assert requests == Counter(told)
    again = Generator(replace(run, session="later"), [job])
    with counting() as requests:
        again(row | {"is_again": True})
    assert requests == Counter({"list": 2, "read": 4, "write": 1})  # its folder, failures


def test_a_finished_store_is_counted_by_its_marks(tmp_path, engine):
    write_prompts(tmp_path, 60)
    work(tmp_path, tmp_path / "log")
    run, job = Run(Folder(str(tmp_path)), BUCKETS), job_of()
    with counting() as requests:
        assert finished.stored(job.samples.folder(run.root)).rows == 120
        assert Tally(run, job.step, job.samples.folder(run.root)).left == 0
    assert requests["read"] == 0
    assert requests["list"] == 3  # the folder, its marks by two
