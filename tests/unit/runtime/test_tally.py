"""When failed rows stop a run: what a job's buckets tell before all of them are done."""

from collections import deque
from itertools import permutations

import pytest

from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.errors import FailureLimitError
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.tally import Tally
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

STEP = Step("score", {})


def tally(tmp_path, limit: float, buckets: int, share: float = 1.0) -> Tally:
    """Of a job with one failed row in its folder of failures."""
    run = Run(Folder(str(tmp_path)), buckets, failure_limit=limit)
    rows = [records.failure("score", ValueError("no"), prompt_id=records.digest(0))]
    write_shard(STEP.failures(run.root), Bucket(0, buckets), records.FAILURE, rows, "failed")
    return Tally(run, STEP, run.root / STEP.folder, share)


def counts(rows: int, failed: int) -> dict[str, int]:
    return {"rows": rows, "new": rows, "failed": failed}


@pytest.mark.parametrize("order", permutations([(3, 0), (0, 0), (15, 0), (12, 3)]))
def test_a_run_stops_by_its_rows_and_not_by_the_order_of_its_buckets(tmp_path, order):
    """3 of 33 rows fail: below 0.1, and above 0.09 once all are done."""
    allowed = tally(tmp_path, 0.1, len(order))
    for bucket in order:
        allowed.add(counts(*bucket))
    assert STEP.is_done(allowed.run.root)
    stopped = tally(tmp_path / "other", 0.09, len(order))
    for bucket in order[:-1]:
        stopped.add(counts(*bucket))
    with pytest.raises(FailureLimitError, match="3 of 33 rows failed, above failure_limit 0.09"):
        stopped.add(counts(*order[-1]))


def test_when_every_row_fails_the_first_bucket_stops_the_run(tmp_path):
    found = tally(tmp_path, 0.1, 4)
    with pytest.raises(FailureLimitError, match="40 of 40 rows failed so far"):
        found.add(counts(0, 40))


def test_failures_that_are_too_many_for_the_whole_stop_the_run_early(tmp_path):
    """2 % of each of 256 buckets with 1,200 rows fail, where 1 % may."""
    found = tally(tmp_path, 0.01, 256)
    for _ in range(150):
        found.add(counts(1176, 24))
    with pytest.raises(FailureLimitError, match="rows failed so far"):
        deque(map(found.add, [counts(1176, 24)] * 50))


def test_a_part_may_hold_failures_that_the_whole_allows(tmp_path):
    """A third of the prompts, 100 rows in two buckets: 30 failed rows are a tenth of the whole."""
    for failed, stops in ((30, False), (31, True)):
        found = tally(tmp_path / str(failed), 0.1, 2, share=1 / 3)
        found.add(counts(50 - failed, failed))
        if not stops:
            found.add(counts(50, 0))
            continue
        with pytest.raises(FailureLimitError, match="31 of 100 rows failed so far"):
            found.add(counts(50, 0))


def test_a_part_of_nothing_is_done(tmp_path):
    found = tally(tmp_path, 0.1, 1, share=0.0)
    found.add(counts(0, 0))
    assert STEP.is_done(found.run.root)
