"""What a user sees of a running step: lines in a file, a table on a terminal."""

import io
import itertools

import pytest
from rich.console import Console

from wrpo_ray.core import progress
from wrpo_ray.core.progress import Progress


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
