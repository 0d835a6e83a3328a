"""Progress of the steps: a live table on a terminal, else a log line every few seconds.

Both go to stderr. On a terminal each step in progress has a row, and log lines appear above the
table; a finished step becomes a line.
"""

import sys
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from wrpo_ray.runtime.ledger import AT_REST
from wrpo_ray.text.addresses import redact
from wrpo_ray.text.display import printable

EVERY, WITHIN = 5.0, 30.0
"""Seconds between lines of one step, without a table; and between those within a unit."""
ROUNDS = 50
"""Of the estimate of a mean length, which changes little after some."""
listeners: list[Callable[[str], None]] = []
"""Called with each line that is logged, in the thread that logs it."""


def log(text: str) -> None:
    """Write a line with the time of day to stderr; secrets are redacted."""
    line = f"{time.strftime('%H:%M:%S')}  {printable(redact(text))}"
    if _TABLE.is_shown:
        _TABLE.console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        print(f"{line}\n", end="", file=sys.stderr, flush=True)  # in one write: threads log, too
    for listener in listeners:
        listener(line)


def format_rate(rate: float, one: str = "one", many: str = "") -> str:
    """`310 rows/s`, or `a row each 4.2 s` for a rate below 1; empty for a rate of 0."""
    if rate <= 0:
        return ""
    if rate >= 1:
        number = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        return f"{number} {many}".strip() + "/s"
    return f"{one} each {_span(1 / rate)}"


def _span(seconds: float) -> str:
    """4.2 s, 75 s, 12 min, or 3.5 h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Progress:
    """`generate llama  7/16 buckets  90 rows  3 failed  a row each 1.4 s  212 tokens/s  1:09 left`.

    `about` holds further values to show, such as {"mean reward": "0.41"}. Rows of
    unfinished units can be counted, too; then `begin` tells how many rows units have.
    """

    def __init__(self, label: str, total: int, unit: str = "buckets"):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.rows = self.failed = self.tokens = 0
        self.begun = self.asked = 0
        """Units that were begun, and the rows that they have."""
        self.under_way = AT_REST
        """Rows that are not at their end, for the rate of tokens and the time that is left."""
        self.about: dict[str, str] = {}
        self._started = self._shown = time.monotonic()

    def add(self, rows: int, failed: int = 0, tokens: int = 0) -> None:
        """Count a finished unit, with the rows made in this run, failed rows and new tokens."""
        self.done += 1
        self.count(rows, failed, tokens, every=EVERY)

    def begin(self, units: int, rows: int, start: float = 0.0) -> None:
        """Note that units with so many rows were begun, after `start` seconds of loading a model.

        Rates are without the first start.
        """
        if not self.rows:
            self._started = min(self._started + start, time.monotonic())
        self.begun += units
        self.asked += rows

    def count(self, rows: int, failed: int = 0, tokens: int = 0, every: float = WITHIN) -> None:
        """Count rows of unfinished units; a line at the earliest after `every` seconds."""
        self.rows += rows
        self.tokens += tokens
        self.failed += failed
        is_finished, now = self.done == self.total, time.monotonic()
        _TABLE.update(self, is_finished)
        if is_finished or (not _TABLE.is_shown and now - self._shown >= every):
            self._shown = now
            log("  ".join([self.label, *self.columns().values()]))

    def _left(self, passed: float) -> float | None:
        """Seconds that are left: by rows where it is known how many units have, else by units."""
        if self.done == self.total:
            return None
        made = self.rows + self.failed
        rows = self.asked / self.begun * self.total if self.begun else 0.0
        if self.under_way.running and (tokens := self._tokens_left(rows - made)):
            return passed / (self.tokens + self.under_way.tokens) * tokens
        if made and rows > made:
            return passed / made * (rows - made)
        return passed / self.done * (self.total - self.done) if self.done else None

    def _tokens_left(self, rows: float) -> float | None:
        """Tokens of `rows` rows that are left; None before the first one ends.

        The first ones are the shortest, so the mean length is that by which those under way get it
        (expectation maximization).
        """
        at, ended = self.under_way, self.rows + self.under_way.ended
        if not ended:
            return None
        tokens = self.tokens + at.tokens
        length = tokens / ended
        for _ in range(ROUNDS):
            length = (tokens + at.running * at.still(length)) / (ended + at.running)
        return max(0.0, rows - at.ended - at.running) * length + at.running * at.still(length)

    def columns(self) -> dict[str, str]:
        """{column: text} of the progress; empty columns are left out."""
        passed = max(time.monotonic() - self._started, 1e-9)
        left = self._left(passed)
        columns = {
            "done": f"{self.done:,}/{self.total:,} {self.unit}",
            "rows": f"{self.rows:,} rows",
            "failed": f"{self.failed:,} failed" if self.failed else "",
            "rate": format_rate(self.rows / passed, "a row", "rows"),
            "tokens": format_rate(
                (self.tokens + self.under_way.tokens) / passed, "a token", "tokens"
            ),
            "left": f"{_clock(left)} left" if left is not None else "",
            **{name: f"{name} {value}" for name, value in self.about.items()},
        }
        return {name: text for name, text in columns.items() if text}


def _clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Table:
    """The live table of the steps in progress, redrawn once a second. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: dict[int, Progress] = {}
        self._live: Any = None

    @cached_property
    def console(self) -> Any:
        """The terminal."""
        from rich.console import Console

        return Console(stderr=True)

    @property
    def is_shown(self) -> bool:
        """Whether the table is on the screen."""
        return self._live is not None

    def update(self, step: Progress, is_finished: bool) -> None:
        """Show a step, or remove a finished one; the table ends with the last step."""
        if not sys.stderr.isatty():
            return
        with self._lock:
            self._steps[id(step)] = step
            if is_finished:
                del self._steps[id(step)]
            if self._steps and not self._live:
                from rich.live import Live

                self._live = Live(self, console=self.console, refresh_per_second=1, transient=True)
                self._live.start()
            elif self._live and not self._steps:
                self._live.stop()
                self._live = None

    def __rich__(self) -> Any:
        from rich.table import Table

        steps = list(self._steps.values())
        cells = [step.columns() for step in steps]
        columns = dict.fromkeys(name for texts in cells for name in texts)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for step, texts in zip(steps, cells, strict=True):
            table.add_row(step.label, *(texts.get(name, "") for name in columns))
        return table


_TABLE = _Table()
