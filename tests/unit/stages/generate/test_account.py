"""Answers of unfinished buckets: told by actors, and booked once by the driver."""

import threading

import pytest

from wrpo_ray.config import Actors, BudgetConfig, PricesConfig
from wrpo_ray.errors import BudgetError
from wrpo_ray.runtime import progress
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.ledger import Ledger, Usage
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.pool_members import StartClock
from wrpo_ray.runtime.progress import Progress
from wrpo_ray.stages.generate.account import Account, Untold
from wrpo_ray.stages.generate.stage import Generator
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

STEPS = [(Step("generate-a", {"n": n}), "a") for n in range(2)]


@pytest.fixture
def ledger(tmp_path):
    with Ledger(Folder(str(tmp_path)), PricesConfig(), BudgetConfig(output_tokens=100)) as held:
        yield held


@pytest.fixture
def account(ledger, tmp_path) -> Account:
    run = Run(Folder(str(tmp_path)), buckets=4, ledger=ledger)
    pool = Pool("generate a", Actors(max=1, num_gpus=2))
    return Account(run, pool, STEPS, Progress("generate a", 4))


def told(made, seconds=10.0, start=0.0, **more):
    return {"made": made, "seconds": seconds, "idle": 1.0, "start": start} | more


def test_what_unfinished_buckets_made_is_booked_once(account, ledger):
    """Two reports and the result: rows, tokens and seconds are the sums, one engine has started."""
    first = {"begun": 2, "asked": 8, "new": 2, "failed": 1, "prompt_tokens": 5, "output_tokens": 20}
    account.add(told({0: first}, start=4.0))
    account.add(told({0: {"new": 1, "output_tokens": 10}}))
    account.finish(told({0: {"new": 1, "output_tokens": 9}}, seconds=2.5, job=0, bucket=0))
    usage = ledger.entries[STEPS[0][0].folder].usage
    assert usage == Usage(4, 5, 39, 22.5, 45.0, 3.0, 4.0, 1)
    shown = account.progress
    assert (shown.done, shown.rows, shown.failed, shown.tokens) == (1, 4, 1, 39)
    assert (shown.begun, shown.asked) == (2, 8)


def test_an_actors_time_is_shared_by_the_tokens_of_its_jobs(account, ledger):
    made = {0: {"new": 1, "output_tokens": 30}, 1: {"new": 1, "output_tokens": 10}}
    account.add(told(made, start=4.0))
    spent = [ledger.entries[step.folder].usage for step, _ in STEPS]
    assert [usage.actor_seconds for usage in spent] == [7.5, 2.5]
    assert sum(spent, Usage()).starts == 1
    assert sum(spent, Usage()).start_seconds == 4.0


def test_a_bucket_whose_answers_were_told_before_has_its_time(account, ledger):
    """Another bucket's result told them a moment ago."""
    account.finish(told({}, seconds=3.0, job=1, bucket=2))
    assert ledger.entries[STEPS[1][0].folder].usage.actor_seconds == 3.0
    assert account.progress.done == 1


def test_a_budget_stops_a_run_at_the_end_of_a_bucket_only(account):
    """Before it, answers that are not committed would be lost."""
    account.add(told({0: {"new": 9, "output_tokens": 500}}))
    with pytest.raises(BudgetError, match="500 of 100"):
        account.finish(told({}, job=0, bucket=0))
    assert account.progress.done == 1


def test_counts_are_taken_once_by_whoever_asks_first():
    untold, taken = Untold(), []

    def ask() -> None:
        for _ in range(2000):
            taken.append(untold.take())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5000):
        untold.add(3, new=1, output_tokens=2)
    for thread in threads:
        thread.join()
    taken.append(untold.take())
    assert sum(counts.get(3, {}).get("new", 0) for counts in taken) == 5000
    assert sum(counts.get(3, {}).get("output_tokens", 0) for counts in taken) == 10_000


def test_only_answers_are_worth_telling():
    untold = Untold()
    untold.add(0, begun=1, asked=8, failed=0)
    assert untold.take_answers() == {}
    untold.add(0, new=0, failed=1)
    assert untold.take_answers() == {0: {"begun": 1, "asked": 8, "failed": 1, "new": 0}}
    assert untold.take_answers() == {}


def test_a_bucket_that_ends_while_its_actor_is_asked_leaves_nothing_to_tell():
    """Whatever comes between two steps of the report, it is whole or nothing."""
    actor = Generator.__new__(Generator)
    actor._untold, actor._start_clock = Untold(), StartClock()
    actor._untold.add(0, begun=1, asked=8, new=1)

    class EndsAfter:
        """A lock after whose first use the bucket ends."""

        def __init__(self, lock):
            self.lock, self.result = lock, None

        def __enter__(self):
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()
            actor._untold._lock = self.lock
            self.result = {"made": actor._untold.take()}

    actor._untold._lock = ends = EndsAfter(actor._untold._lock)
    told = actor.made()
    assert sorted(map(len, [told.get("made", {}), ends.result["made"]])) == [0, 1]
    assert told == {} or told["made"]


def test_a_line_tells_what_unfinished_buckets_made_and_the_time_that_is_left(monkeypatch, capsys):
    """An engine that was up at 40 s has made 10 of 4 x 10 answers at 100 s: 3 x 60 s are left."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = Progress("generate a", 4)
    now = 70.0
    shown.begin(2, 20, start=40.0)
    now = 100.0
    shown.count(9, failed=1, tokens=600)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "generate a  0/4 buckets  9 rows  1 failed  a row each 6.7 s  10 tokens/s  3:00 left"
    )
    now = 110.0
    shown.count(1)  # a line each half a minute, within buckets
    assert not capsys.readouterr().err
    now = 130.0
    shown.begin(0, 0, start=20.0)  # another engine; it does not change when the first was up
    shown.count(10, tokens=600)
    (line,) = capsys.readouterr().err.splitlines()
    assert "20 rows  1 failed  a row each 4.5 s" in line
    assert line.endswith("1:21 left")  # 19 of 40 at 90 s for 21
