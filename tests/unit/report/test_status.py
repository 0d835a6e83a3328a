"""`wrpo status` of made folders: what is done, under way and waiting, how fast, and whose it is."""

import json
import os
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from support.made_run import MadeRun

from wrpo_ray import cli
from wrpo_ray.data.buckets import Bucket
from wrpo_ray.data.outline import Outline, StepOutline, read_outline
from wrpo_ray.report.status import LAST, screen, status
from wrpo_ray.runtime import lease
from wrpo_ray.runtime.lease import Lease
from wrpo_ray.storage import folder as storage
from wrpo_ray.storage.folder import Folder

NOW = 1_800_000_000.0


def outline(*steps: StepOutline, **config) -> Outline:
    tree = {"split": {"sft": 1 / 3}, **config}
    return Outline("evaluate", 4, tree, {}, steps)


def step(name: str, kind: str, **about) -> StepOutline:
    return StepOutline(
        name.split("-")[0], name, f"k-{name}", name, "manifest.json", kind, **about
    )  # fmt: skip


PROMPTS = step("prompts", "ingestprompts")
GENERATE = step("generate-a", "generate", prompts=PROMPTS.key, splits=("preference",), samples=5)


def put(folder: Path, name: str, ago: float, text: str = "x") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    os.utime(folder / name, (NOW - ago, NOW - ago))


def finished(folder: Path, **counts: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"counts": counts, "seconds": 75.0}))


def held(root: Path, ago: float, **changes) -> None:
    record = {"session": "s", "host": "elsewhere", "machine": "m", "pid": 7, "started": 0}
    record |= {"held": True}
    put(root, lease.file_name("s"), ago, json.dumps(record | changes))


def test_an_engine_without_a_finished_answer_is_running(tmp_path):
    """As long as the run lives: of a run that was killed nothing is under way."""
    finished(tmp_path / "prompts", rows=300)
    at = {"running": 64, "running_tokens": 12_345}
    ledger = {"seconds": 9.0, "open": True, "steps": {"generate-a": {"pool": "a", "under_way": at}}}
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    given = outline(PROMPTS, GENERATE)
    assert status(Folder(str(tmp_path)), given, NOW).steps[1].state == "waiting"
    held(tmp_path, ago=4)
    found = status(Folder(str(tmp_path)), given, NOW)
    generate = found.steps[1]
    assert (generate.state, generate.done, generate.total) == ("running", 0, 1000)
    told = StringIO()
    Console(file=told, width=80).print(screen(found))
    assert "generate-a: 64 answers under way have 12,345 tokens" in told.getvalue()


def test_rows_rate_and_time_left(tmp_path):
    finished(tmp_path / "prompts", rows=300)
    for i in range(11):  # a shard every 10 s
        put(tmp_path / "generate-a", Bucket(i % 4, 4).shard(i), ago=100 - 10 * i)
    spent = {"rows": 550, "prompt_tokens": 1, "output_tokens": 9000}
    spent |= {"actor_seconds": 1.0, "gpu_seconds": 3600.0}
    ledger = {"seconds": 1800.0, "open": True, "steps": {"generate-a": {"pool": "a"} | spent}}
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    held(tmp_path, ago=4)
    given = outline(PROMPTS, GENERATE, step("score-a", "score"), budget={"output_tokens": 36000},
                    prices={"gpu_hour": 2.5})  # fmt: skip
    found = status(Folder(str(tmp_path)), given, NOW)
    prompts, generate, score = found.steps
    assert (prompts.state, prompts.done) == ("done", 300)
    assert (generate.state, generate.done, generate.total) == ("running", 550, 1000)
    assert generate.rate == pytest.approx(5.0)  # 550 rows in 11 shards, ten of them in 100 s
    assert generate.left == pytest.approx(90)
    assert score.state == "waiting"
    assert found.holder == "elsewhere, process 7, heartbeat 4 s ago"
    told = StringIO()
    Console(file=told, width=80).print(screen(found))
    text = told.getvalue()
    assert "550/1,000" in text
    assert "5/s" in text
    assert "1:30 left" in text
    assert "9,000 output tokens of 36,000 (25%)" in text
    assert "2.50 money" in text
    assert "1 of 3 steps done" in text


def test_buckets_and_optimizer_steps(tmp_path):
    for index in (0, 1, 3):
        put(tmp_path / "select", Bucket(index, 4).shard("all"), ago=50 - 10 * index)
    put(tmp_path / "select", "00002-of-00004/.part-0123-x.parquet", ago=0)
    lines = [
        json.dumps({"step": i, "steps": 40, "tokens": 200, "tokens_per_s": 100}) for i in range(30)
    ]
    put(tmp_path / "wrpo", "metrics.jsonl", ago=1, text="\n".join(lines) + '\n{"step": 3')
    held(tmp_path, ago=1)
    select, train = status(
        Folder(str(tmp_path)), outline(step("select", "select"), step("wrpo", "train")), NOW
    ).steps
    assert (select.done, select.total, select.unit) == (3, 4, "buckets")
    assert (train.done, train.total, train.unit) == (30, 40, "steps")
    assert train.left == pytest.approx(20)  # ten steps of two seconds


@pytest.mark.parametrize(
    ("held_by", "told", "is_running"),
    [
        (None, "nobody: no run is under way", False),
        ({"ago": 1}, "elsewhere, process 7, heartbeat 1 s ago", True),
        ({"ago": 500}, "without a heartbeat for 500 s", False),
        ({"ago": 1, "machine": lease.machine(), "pid": 2**22 + 1}, "was killed", False),
    ],
)
def test_who_holds_the_lease(tmp_path, held_by, told, is_running):
    if held_by:
        held(tmp_path, **held_by)
    put(tmp_path / "select", Bucket(0, 4).shard("all"), ago=1)
    found = status(Folder(str(tmp_path)), outline(step("select", "select")), NOW)
    assert told in found.holder
    assert found.is_running is is_running
    assert found.steps[0].state == ("running" if is_running else "begun")


def test_a_lease_that_is_held_here_is_seen(tmp_path):
    with Lease(Folder(str(tmp_path)), "me"):
        found = status(Folder(str(tmp_path)), outline())
    assert found.is_running
    assert f"process {os.getpid()}" in found.holder


def test_only_the_last_lines_of_metrics_are_parsed(tmp_path, monkeypatch):
    """However long training has gone on; lines that are not whole are passed over."""
    lines = [json.dumps({"step": i, "steps": 900, "tokens": 10, "tokens_per_s": 5 + i // 600})
             for i in range(700)]  # fmt: skip
    put(tmp_path / "train-wrpo", "metrics.jsonl", 1, "\n".join([*lines, "3", "{}", '{"step": 7']))
    parsed, parse = [], storage._record
    monkeypatch.setattr(storage, "_record", lambda line: parsed.append(line) or parse(line))
    train = step("train-wrpo", "train")
    found = status(Folder(str(tmp_path)), outline(train), NOW).steps[0]
    assert (found.done, found.total, found.rate) == (700, 900, pytest.approx(0.6))
    assert len(parsed) == LAST + 3


def test_no_rows_are_read(tmp_path, monkeypatch):
    run = MadeRun(tmp_path, rows=16, buckets=2)
    run.write()
    monkeypatch.setattr(Folder, "read_table", None)
    found = status(run.root, read_outline(run.root), time.time())
    assert {s.state for s in found.steps} == {"done"}


def test_the_command_tells_of_an_ended_run(tmp_path, capsys):
    MadeRun(tmp_path, rows=16, buckets=2).write()
    assert cli.main(["status", str(tmp_path), "--watch"]) == 0
    told = capsys.readouterr().out
    assert "14 of 14 steps done" in told
    assert "nobody: no run is under way" in told
    assert "3 steps" in told  # a stage whose steps are all done is one line
    assert cli.main(["status", str(tmp_path / "none")]) == 2
    assert "no run is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("each", "told"), [(0.0005, "2,000/s"), (0.25, "4/s"), (5, "one each 5.0 s"), (90, "90 s")]
)
def test_the_rate_of_slow_and_quick_steps(each, told, tmp_path):
    """11 shards of a row each, `each` seconds apart."""
    finished(tmp_path / "prompts", rows=300)
    for i in range(11):
        put(tmp_path / "generate-a", Bucket(i % 4, 4).shard(i), ago=(10 - i) * each)
    spent = {"rows": 11, "prompt_tokens": 1, "output_tokens": 9}
    spent |= {"actor_seconds": 1.0, "gpu_seconds": 0.0}
    ledger = {"seconds": 1.0, "open": True, "steps": {"generate-a": {"pool": "a"} | spent}}
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    held(tmp_path, ago=0)
    out = StringIO()
    Console(file=out, width=100).print(
        screen(status(Folder(str(tmp_path)), outline(PROMPTS, GENERATE), NOW))
    )
    assert told in out.getvalue()
