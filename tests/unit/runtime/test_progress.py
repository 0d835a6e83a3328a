"""What a user sees of a running step: lines in a file, a table on a terminal."""

import io
import itertools

import pytest
from rich.console import Console

from wrpo_ray.runtime import progress
from wrpo_ray.runtime.progress import Progress


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Ten seconds pass between any two looks at the clock."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))


def test_lines_tell_what_is_done_failed_and_left(capsys):
    step = Progress("generate a", 4)
    step.about["mean reward"] = "0.50"
    step.add(100)
    step.add(100, failed=3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(
        "generate a  1/4 buckets  100 rows  5 rows/s  1:00 left  mean reward 0.50"
    )
    assert "2/4 buckets  200 rows  3 failed" in lines[1]
    step.add(0)
    step.add(0)
    assert "left" not in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("rate", "told"),
    [
        (0, ""), (1e-5, "a row each 27.8 h"), (1 / 7200, "a row each 2.0 h"),
        (1 / 600, "a row each 10 min"), (1 / 119, "a row each 119 s"), (0.1, "a row each 10 s"),
        (0.24, "a row each 4.2 s"), (0.999, "a row each 1.0 s"), (1, "1 rows/s"),
        (1.234, "1.23 rows/s"), (31.26, "31.3 rows/s"), (310.4, "310 rows/s"),
        (12_345.6, "12,346 rows/s"), (1e9, "1,000,000,000 rows/s"),
    ],
)  # fmt: skip
def test_any_rate_says_something(rate, told):
    assert progress.format_rate(rate, "a row", "rows") == told
    assert progress.format_rate(rate) == told.replace("a row", "one").replace(" rows", "")


@pytest.mark.parametrize("rows", [1, 3, 20, 400, 10_000])
@pytest.mark.parametrize("seconds", [10, 1000, 100_000])
def test_no_rows_that_are_made_are_told_as_none(rows, seconds, monkeypatch, capsys):
    """Whatever a row takes, a line tells neither `0 rows/s` nor a power of ten."""
    ticks = itertools.count(0, seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))
    Progress("generate a", 1).add(rows, tokens=50 * rows)
    line = capsys.readouterr().err
    assert " 0 " not in line.replace("0 failed", "")
    assert "e+" not in line
    assert "a row each " in line or " rows/s" in line
    assert "a token each " in line or " tokens/s" in line


def test_hours_are_told():
    assert [progress._clock(s) for s in (0, 9.6, 75, 3723)] == ["0:00", "0:10", "1:15", "1:02:03"]


def test_a_terminal_has_a_row_for_each_step_under_way(monkeypatch):
    screen = io.StringIO()
    table = progress._Table()
    table.console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "_TABLE", table)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    first, second = Progress("generate a", 2), Progress("generate b", 1)
    first.add(10)
    assert table.is_shown
    second.add(5, failed=1)
    shown = Console(file=io.StringIO(), width=100)
    shown.print(table)
    told = shown.file.getvalue()
    assert "generate a" in told
    assert "generate b" not in told  # finished: a line in place of a row
    assert "generate b  1/1 buckets  5 rows  1 failed" in screen.getvalue()
    first.add(10)
    assert not table.is_shown
