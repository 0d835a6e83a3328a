"""Answers of unfinished buckets: told by actors, and booked once by the driver."""

import json
import threading

import pytest

from wrpo_ray.config import Actors, BudgetConfig, PricesConfig
from wrpo_ray.errors import BudgetError
from wrpo_ray.runtime import progress
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.ledger import FILE, Ledger, UnderWay, Usage
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
    """A report of the actor 0, who is at nothing unless `more` says so."""
    at = {"under_way": {}, "number": 0, "actor": 0}
    return {"made": made, "seconds": seconds, "idle": 1.0, "start": start} | at | more


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
    assert not untold.has_answers
    untold.add(0, new=0, failed=1)
    assert untold.has_answers
    assert untold.take() == {0: {"begun": 1, "asked": 8, "failed": 1, "new": 0}}
    assert not untold.has_answers


def test_a_bucket_that_ends_while_its_actor_is_asked_leaves_a_report_without_answers(
    account, ledger
):
    """Between two steps of the report: its answers are in the bucket's result, and booked once."""
    actor = Generator.__new__(Generator)
    actor._untold, actor._start_clock = Untold(), StartClock()
    actor._untold.add(0, begun=1, asked=8, new=1, output_tokens=7)

    class EndsAfter:
        """A lock after whose first use the bucket ends."""

        def __init__(self, lock):
            self.lock = lock

        def __enter__(self):
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()
            actor._untold._lock = self.lock
            self.result = actor._told()

    actor._untold._lock = ends = EndsAfter(actor._untold._lock)
    report, times = actor.made(), {"seconds": 1.0, "idle": 0.0, "actor": 0}
    assert (len(report["made"]), len(ends.result["made"])) == (0, 1)
    account.finish(ends.result | times | {"job": 0, "bucket": 0})
    account.add(report | times)
    usage = ledger.entries[STEPS[0][0].folder].usage
    assert (usage.rows, usage.output_tokens, account.progress.rows) == (1, 7, 1)


# --- what is under way -----------------------------------------------------------------------


def at(running: int, tokens: int, **more: int) -> dict[str, int]:
    return {"running": running, "running_tokens": tokens} | more


def under_way(ledger, job=0) -> UnderWay:
    return ledger.entries[STEPS[job][0].folder].under_way


def test_what_is_under_way_is_no_usage_until_answers_end(account, ledger):
    """Two reports before the first answer, of 10 s each, of which 1 s idle and 4 s a start."""
    account.add(told({0: {"begun": 1, "asked": 9}}, start=4.0, under_way={0: at(8, 100)}))
    account.add(told({}, number=1, under_way={0: at(7, 230, ended=1, ended_tokens=30)}))
    usage = ledger.entries[STEPS[0][0].folder].usage
    assert usage == Usage()
    assert under_way(ledger) == UnderWay(7, 230, 1, 30, seconds=20 - 2 - 4, actors=1)
    shown = account.progress
    assert (shown.under_way.tokens, shown.rows, shown.asked) == (260, 0, 9)
    account.add(told({0: {"new": 5, "output_tokens": 50}}, number=2, under_way={0: at(4, 210)}))
    usage = ledger.entries[STEPS[0][0].folder].usage
    assert usage == Usage(5, 0, 50, 30.0, 60.0, 3.0, 4.0, 1)
    assert under_way(ledger) == UnderWay(4, 210, actors=1)
    assert account.progress.under_way.tokens == 210
    account.finish(told({0: {"new": 4, "output_tokens": 45}}, number=3, job=0, bucket=0))
    assert not under_way(ledger)
    assert account.progress.under_way.tokens == 0


def test_what_a_lost_actor_was_at_is_gone_with_it(account, ledger):
    """Its seconds, too, as those of unreported answers are; the other actor's are there."""
    account.add(told({}, under_way={0: at(8, 100), 1: at(2, 50)}))
    account.add(told({}, under_way={0: at(5, 70)}, actor=1))
    assert under_way(ledger).running_tokens == 170
    assert under_way(ledger).actors == 2
    account.add({"lost": 0})
    assert under_way(ledger) == UnderWay(5, 70, seconds=9.0, actors=1)
    assert not under_way(ledger, 1)
    assert account.progress.under_way.tokens == 70
    account.finish(told({0: {"new": 5, "output_tokens": 80}}, number=1, actor=1, job=0, bucket=0))
    assert ledger.entries[STEPS[0][0].folder].usage.actor_seconds == 20.0


def test_an_older_report_that_comes_late_changes_nothing_that_is_under_way(account, ledger):
    account.finish(told({0: {"new": 8, "output_tokens": 90}}, number=5, job=0, bucket=0))
    account.add(told({0: {"new": 1, "output_tokens": 9}}, number=4, under_way={0: at(8, 80)}))
    assert not under_way(ledger)
    assert ledger.entries[STEPS[0][0].folder].usage.output_tokens == 99


def test_an_actors_time_is_shared_by_the_tokens_since_its_last_report(account, ledger):
    """The job 0 ended answers of 120 tokens, of which 100 were there; the job 1 made 60 more."""
    account.add(told({}, seconds=3.0, under_way={0: at(1, 100)}))
    made = {0: {"new": 1, "output_tokens": 120}}
    account.add(told(made, seconds=8.0, number=1, under_way={1: at(1, 60)}))
    assert ledger.entries[STEPS[0][0].folder].usage.actor_seconds == pytest.approx(3 + 8 * 20 / 80)
    assert under_way(ledger, 1).seconds == pytest.approx((8 - 1) * 60 / 80)


def test_nothing_is_under_way_after_the_pool(account, ledger, tmp_path):
    account.add(told({}, under_way={0: at(8, 100, unstored=3)}))
    ledger._write(is_open=True)
    written = json.loads((tmp_path / FILE).read_text())["steps"]
    assert written[STEPS[0][0].folder]["under_way"]["running_tokens"] == 100
    account.close()  # and it is written at once, however long nothing follows
    written = json.loads((tmp_path / FILE).read_text())["steps"]
    assert "under_way" not in written[STEPS[0][0].folder]


class At:
    """An engine that is at some answers."""

    def under_way(self) -> dict[int, dict[str, int]]:
        return {1: {"running": 2, "running_tokens": 9}}


def test_a_report_has_answers_that_are_not_committed():
    untold = Untold()
    untold.add(0, new=5)
    untold.add(1, new=2, output_tokens=7)
    untold.stored(0, 5)
    report = untold.tell(At())
    assert report["under_way"] == {1: {"running": 2, "running_tokens": 9, "unstored": 2}}
    assert report["made"][1] == {"new": 2, "output_tokens": 7}
    untold.stored(1, 2)
    assert untold.tell(None) == {"made": {}, "under_way": {}, "number": report["number"] + 1}


def test_the_rate_has_the_tokens_of_answers_under_way(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = Progress("generate a", 4)
    now = 60.0
    shown.under_way = UnderWay(9, 900)
    shown.count(0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("generate a  0/4 buckets  0 rows  15 tokens/s")


def test_the_time_that_is_left_does_not_begin_anew_for_answers_under_way(monkeypatch, capsys):
    """Of 40 answers 10 have ended with 100 tokens each, and 10 have 100 and go on.

    With the mean length x the latter still need x/2 * (1 + x / (x + 200)), so that
    20 x = 2000 + 5 x (1 + x / (x + 200)) and x = 156.2; 20 of them and 10 times 112.3 tokens are
    left, at 2,000 a minute. By rows it would be three minutes.
    """
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = Progress("generate a", 4)
    shown.begin(2, 20)
    now = 60.0
    shown.under_way = UnderWay(10, 1000)
    shown.count(10, tokens=1000)
    assert capsys.readouterr().err.endswith("33.3 tokens/s  2:07 left\n")
    shown.rows, shown.tokens = 0, 0
    now = 120.0
    shown.count(0)  # nothing has ended: how long answers are is not known
    assert capsys.readouterr().err.endswith("0 rows  8.33 tokens/s\n")


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
