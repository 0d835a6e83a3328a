"""The ledger and the budget: sums over calls, what a kill leaves, stopping and going on."""

import json
import pickle
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from wrpo_ray.cli.entry import main
from wrpo_ray.config import BudgetConfig, PricesConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import buckets, write_shard
from wrpo_ray.errors import BudgetError, UserError
from wrpo_ray.pipeline import runner
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.ledger import FILE, Entry, Ledger, UnderWay, Usage, read_ledger
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

STEP = Step("generate-a", {"samples": 2}, store={"model": "x"})
PRICES = PricesConfig(gpu_hour=2, pools={"b": 4}, input_tokens={"b": 1}, output_tokens={"b": 10})


@pytest.fixture
def root(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


def ledger(root: Folder, **budget) -> Ledger:
    return Ledger(root, PRICES, BudgetConfig(**budget))


def run(root: Folder, held: Ledger) -> Run:
    return Run(root, buckets=4, ledger=held)


def test_money_is_tokens_and_gpu_hours_at_the_pools_prices():
    spent = Usage(prompt_tokens=2_000_000, output_tokens=500_000, gpu_seconds=1800)
    assert spent.money("a", PRICES) == 1.0
    assert spent.money("b", PRICES) == 2 * 1 + 0.5 * 10 + 0.5 * 4


def test_totals_are_read_while_pools_add(root):
    """Without the lock the loop meets a dictionary that grows: seen in a study's training."""
    with ledger(root) as held:
        steps = [Step(f"generate-{i}", {}) for i in range(3000)]

        def add() -> None:
            for step in steps:
                held.add(step, "a", Usage(output_tokens=1))

        adding = threading.Thread(target=add)
        adding.start()
        while adding.is_alive():
            held.check()
        adding.join()
        assert held.total.output_tokens == len(steps)


def test_a_budget_stops_and_a_higher_one_goes_on(root):
    with ledger(root, output_tokens=100) as held:
        asked = run(root, held)
        asked.record_usage(STEP, "a", 5.0, gpus=2, rows=3, output_tokens=60)
        with pytest.raises(
            BudgetError, match=r"output_tokens: 110 of 100 is spent; .* raise budget"
        ):
            asked.record_usage(STEP, "a", 5.0, gpus=2, rows=3, output_tokens=50)
    with pytest.raises(BudgetError), ledger(root, output_tokens=100) as held:
        held.check()  # the same command stops at once
    with ledger(root, output_tokens=200) as held:
        held.check()
        run(root, held).record_usage(STEP, "a", 1.0, output_tokens=20)
    assert read_ledger(root)[STEP.folder].usage == Usage(6, 0, 130, 11.0, 20.0)


def test_money_and_hours_are_bounds_too(root):
    with ledger(root, money=1.0) as held, pytest.raises(BudgetError, match=r"budget.money: 1 of 1"):
        run(root, held).record_usage(STEP, "a", 900.0, gpus=2)
    record = root.read_json(FILE)
    root.write_json(FILE, record | {"seconds": 7200.0})
    with ledger(root, hours=2) as held, pytest.raises(BudgetError, match=r"budget.hours: 2.* of 2"):
        held.check()
    with ledger(root, hours=2.1) as held:
        held.check()


def test_what_a_killed_call_did_not_tell_is_counted_in_the_stores(root):
    """It held 3 x 2 answers of 10 tokens and had told of 20 tokens when it was killed."""
    held = ledger(root)
    held.__enter__()
    held.add(STEP, "a", Usage(rows=2, output_tokens=20, actor_seconds=7, gpu_seconds=7))
    held._write(is_open=True)  # at most a second later
    write_answers(root)
    with ledger(root) as after:
        assert after.entries[STEP.folder].usage == Usage(6, 3 * 5, 60, 7, 7)
        assert after.entries[STEP.folder].pool == "a"
    assert not json.loads(root.read(FILE))["open"]


def test_what_a_killed_run_was_at_is_gone(root):
    """The next run's ledger has its usage only; a ledger without the field is read as it is."""
    held = ledger(root)
    held.__enter__()
    held.add(STEP, "a", Usage(rows=2), UnderWay(running=3, running_tokens=50))
    held._write(is_open=True)
    assert read_ledger(root)[STEP.folder].under_way == UnderWay(3, 50)
    with ledger(root) as after:
        assert after.entries[STEP.folder] == Entry("a", Usage(rows=2))
    assert "under_way" not in json.loads(root.read(FILE))["steps"][STEP.folder]
    assert read_ledger(root)[STEP.folder] == Entry("a", Usage(rows=2))


def test_a_ledger_with_another_kind_of_field_is_refused(root):
    for wrong in ({"running": 1, "walking": 2}, [1], 3):
        steps = {STEP.folder: {"pool": "a", "rows": 1, "under_way": wrong}}
        root.write_json(FILE, {"seconds": 1.0, "open": True, "steps": steps})
        with pytest.raises(UserError, match="was changed"):
            read_ledger(root)


def test_what_was_in_hand_when_a_budget_stopped_is_counted_too(root):
    """One bucket was told and stopped the run; another's chunks were committed meanwhile."""
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(BudgetError))
        held = stack.enter_context(ledger(root, output_tokens=20))
        write_answers(root)
        run(root, held).record_usage(STEP, "a", 7.0, rows=2, output_tokens=20)
    with ledger(root) as after:
        assert after.total.output_tokens == 60


def test_a_spent_budget_ends_the_command_with_3(root, tmp_path, monkeypatch, capsys):
    def fuse(*_: object) -> None:
        with ledger(root, output_tokens=1) as held:
            run(root, held).record_usage(STEP, "a", 1.0, output_tokens=5)

    monkeypatch.setattr(runner, "fuse", fuse)
    config = {"output": "out", "prompts": {"path": "p"}, "sources": [{"name": "a", "model": "m"}]}
    (tmp_path / "c.yaml").write_text(json.dumps(config | {"reward": {"model": "r"}}))
    assert main(["fuse", str(tmp_path / "c.yaml")]) == 3
    assert "budget.output_tokens: 5 of 1 is spent" in capsys.readouterr().err


def test_an_output_from_before_there_was_a_ledger_is_counted(root):
    write_answers(root)
    with ledger(root) as held:
        assert held.total.output_tokens == 60


def test_a_ledger_that_was_closed_is_believed(root):
    with ledger(root):
        pass
    write_answers(root)
    with ledger(root) as held:
        assert held.total == Usage()


def write_answers(root: Folder) -> None:
    for bucket in buckets(2):
        rows = [
            {"prompt_id": key, "source": "a", "sample": s, "prompt_tokens": 5, "output_tokens": 10}
            for key in map(records.digest, range(3))
            if key in bucket
            for s in range(2)
        ]
        write_shard(root / STEP.folder, bucket, records.RESPONSE, rows, "x")


def test_seconds_of_several_calls_add_up(root):
    with ledger(root):
        time.sleep(0.2)
    with ledger(root) as held:
        assert held.hours * 3600 >= 0.2


def test_workers_get_a_run_without_a_ledger(root):
    with ledger(root, output_tokens=1) as held:
        worker = pickle.loads(pickle.dumps(run(root, held)))
    worker.record_usage(STEP, "a", 1.0, output_tokens=5)
    assert worker.ledger is None
    assert worker.root == root
