"""Where a run is, from its output alone: one screen, from any machine that sees the folder.

Read are the outline, manifests, the ledger, the lease, the last lines of metrics, and listings of
unfinished steps' folders; no rows. Rows of answers and scores are those of finished buckets.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import pyarrow.dataset as ds
import pyarrow.fs as pafs

from wrpo_ray.config import BudgetConfig, PricesConfig
from wrpo_ray.data.outline import PLAN, Outline, StepOutline
from wrpo_ray.errors import BrokenFileError, UserError
from wrpo_ray.runtime import lease
from wrpo_ray.runtime.ledger import (
    Entry,
    Usage,
    read_ledger,
    read_seconds,
)
from wrpo_ray.runtime.progress import format_rate
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.publish import TEMPORARY_PREFIX

Row = dict[str, Any]
RECENT = 300.0
"""Seconds over which a rate is taken."""
LAST = 20
"""Optimizer steps over which a rate is taken."""
METRICS = "metrics.jsonl"
STEPS = ("step", "steps")
"""Fields of a line of metrics: the optimizer step, from 0, and how many there will be."""
DONE, ACTIVE, BEGUN, WAITING = "done", "running", "begun", "waiting"


@dataclass(frozen=True)
class StepStatus:
    """A step: how many of its rows, buckets or optimizer steps there are."""

    stage: str
    name: str
    state: str
    done: int = 0
    total: int | None = None
    unit: str = "rows"
    rate: float | None = None
    """Units a second."""
    failed: int = 0
    seconds: float | None = None
    """That it took."""

    @property
    def left(self) -> float | None:
        """Seconds until it is done, at this rate."""
        if not self.rate or self.total is None or self.state != ACTIVE:
            return None
        return max(0, self.total - self.done) / self.rate


@dataclass(frozen=True)
class Status:
    """A run."""

    output: str
    holder: str
    """Who holds the lease, in words."""
    is_running: bool
    steps: tuple[StepStatus, ...]
    spent: Row
    """{what: (so much, bound or None)}"""


def status(root: Folder, outline: Outline, now: float | None = None) -> Status:
    """The status of a run; `now` is Unix seconds."""
    now = time.time() if now is None else now
    holder, is_running = _holder(root, now)
    look = _Look(root, outline, is_running, now)
    return Status(
        str(root), holder, is_running, tuple(map(look.step, outline.steps)), _spent(root, outline)
    )


def is_running(root: Folder) -> bool:
    """Whether a run holds the output."""
    return _holder(root, time.time())[1]


def _holder(root: Folder, now: float) -> tuple[str, bool]:
    """Who holds the lease, and whether its heart beats."""
    try:
        held = lease.read(root)
    except (FileNotFoundError, BrokenFileError):
        return "nobody: no run is under way", False
    who = f"{held['host']}, process {held['pid']}"
    if lease.is_dead(held):
        return f"nobody: the run on {who} was killed", False
    beaten = root.filesystem.get_file_info(f"{root.path}/{lease.FILE}").mtime_ns
    age = max(0.0, now - beaten / 1e9) if beaten else 0.0
    if age > lease.EXPIRES:
        return f"{who}, without a heartbeat for {age:,.0f} s: it was lost, or clocks differ", False
    return f"{who}, heartbeat {age:.0f} s ago", True


def _spent(root: Folder, outline: Outline) -> Row:
    prices = PricesConfig.model_validate(outline.config.get("prices") or {})
    budget = BudgetConfig.model_validate(outline.config.get("budget") or {})
    entries = read_ledger(root).values()
    total = sum((e.usage for e in entries), Usage())
    seconds = read_seconds(root)
    return {
        "output tokens": (total.output_tokens, budget.output_tokens),
        "GPU-hours": (total.gpu_seconds / 3600, None),
        "money": (sum(e.usage.money(e.pool, prices) for e in entries), budget.money),
        "hours": (seconds / 3600, budget.hours),
    }


class _Look:
    """What listings tell of steps."""

    def __init__(self, root: Folder, outline: Outline, is_running: bool, now: float):
        self.root, self.outline, self.is_running, self.now = root, outline, is_running, now
        self.ledger: dict[str, Entry] = read_ledger(root)
        self.plan: Row = root.read_record(PLAN) if root.exists(PLAN) else {}
        self.rows: dict[str, int] = {}

    def step(self, step: StepOutline) -> StepStatus:
        """One step."""
        if step.is_done(self.root):
            record = step.read_manifest(self.root)
            counts = record["counts"]
            rows = self.rows[step.key] = counts.get("rows", 0)
            return StepStatus(
                step.stage, step.name, DONE, rows, rows, failed=counts.get("failed", 0),
                seconds=record["seconds"],
            )  # fmt: skip
        told = self._training(step) if step.kind == "train" else self._buckets(step)
        if told is None:
            return StepStatus(step.stage, step.name, WAITING, total=self._total(step))
        done, total, unit, rate, changed = told
        is_active = self.is_running and (changed is None or self.now - changed < RECENT)
        return StepStatus(
            step.stage, step.name, ACTIVE if is_active else BEGUN, done, total, unit, rate,
            failed=_rows(step.failures(self.root)),
        )  # fmt: skip

    def _total(self, step: StepOutline) -> int | None:
        """Rows it is to make, where the number of prompts is known."""
        if step.kind in ("generate", "score") and step.prompts in self.rows and step.samples:
            sft = (self.outline.config.get("split") or {}).get("sft", 0.0)
            shares = {"sft": sft, "preference": 1 - sft}
            share = sum(shares.get(split, 1.0) for split in step.splits)
            return round(self.rows[step.prompts] * share) * step.samples
        return (self.plan.get(step.key) or {}).get("rows")

    def _training(self, step: StepOutline) -> Any:
        folder = self.root / step.folder
        if not folder.exists(METRICS):
            return None
        records = list(islice(filter(_is_whole, folder.latest_records(METRICS)), LAST))
        if not records:
            return None
        seconds = [r["tokens"] / r["tokens_per_s"] for r in records if r.get("tokens_per_s")]
        rate = len(seconds) / sum(seconds) if sum(seconds) else None
        info = folder.filesystem.get_file_info(f"{folder.path}/{METRICS}")
        changed = info.mtime_ns / 1e9 if info.mtime_ns else None
        return records[0]["step"] + 1, records[0]["steps"], "steps", rate, changed

    def _buckets(self, step: StepOutline) -> Any:
        files = list(_files(self.root / step.folder))
        if not files:
            return None
        times = sorted(time for _, time in files if time)
        changed = times[-1] if times else None
        entry = self.ledger.get(step.folder)
        if step.kind in ("generate", "score") and entry:
            total = self._total(step)
            done = entry.usage.rows if total is None else min(entry.usage.rows, total)
            return done, total, "rows", _rate(times, done), changed
        filled = len({name.partition("-")[0] for name, _ in files})
        return filled, self.outline.buckets, "buckets", _rate(times, filled), changed


def _files(folder: Folder) -> Iterator[tuple[str, float | None]]:
    """Name and time of change of the finished shards right in a folder."""
    found = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, allow_not_found=True))
    for info in found:
        if (
            info.is_file
            and "-of-" in info.base_name
            and not info.base_name.startswith(TEMPORARY_PREFIX)
        ):
            yield info.base_name, info.mtime_ns / 1e9 if info.mtime_ns else None


def _rate(times: list[float], done: int) -> float | None:
    """Units a second, as shards that appeared lately tell; None of fewer than two."""
    recent = [time for time in times if time > times[-1] - RECENT] if times else []
    if len(recent) < 2 or recent[-1] == recent[0]:
        return None
    return done * (len(recent) - 1) / len(times) / (recent[-1] - recent[0])


def _rows(folder: Folder) -> int:
    """By the footers of a few small files."""
    paths = [f"{folder.path}/{name}" for name in folder.files(suffix=".parquet")]
    if not paths:
        return 0
    return ds.dataset(paths, format="parquet", filesystem=folder.filesystem).count_rows()


def _is_whole(record: Row) -> bool:
    """Whether a line of metrics is a run's own."""
    return all(type(record.get(name)) is int for name in STEPS)


@contextmanager
def reading(root: Folder) -> Iterator[None]:
    """For what reads and shows files of a run, which others may have changed.

    Raises:
        UserError: something in them is not as a run writes it.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{root}: its files are not as a run writes them "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); see which of its "
            f"JSON files was changed, and put it back from a copy"
        ) from None


# --- the screen ------------------------------------------------------------------------------


def screen(found: Status) -> Any:
    """The status as something that rich prints: a line a step, or a stage that is all alike."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("stage", "step", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("rows", "rate", "time", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    styles = {DONE: "green", ACTIVE: "bold", BEGUN: "yellow", WAITING: "dim"}
    before = ""
    for step in _lines(found.steps):
        stage, before = (step.stage if step.stage != before else ""), step.stage
        cells = (stage, step.name, step.state, *_cells(step))
        table.add_row(*map(Text, cells), style=styles[step.state])
    done = sum(step.state == DONE for step in found.steps)
    head = Text(f"{found.output}\nlease: {found.holder}\n{done} of {len(found.steps)} steps done\n")
    return Group(head, table, Text(f"\nspent: {_spent_told(found.spent)}"))


def _lines(steps: Sequence[StepStatus]) -> Iterator[StepStatus]:
    """Steps, but one for several of a stage that are all done or all waiting."""
    for stage, group in groupby(steps, key=lambda step: step.stage):
        parts = list(group)
        state = parts[0].state
        if len(parts) < 3 or state in (ACTIVE, BEGUN) or any(s.state != state for s in parts):
            yield from parts
            continue
        known = [step.total for step in parts if step.total is not None]
        yield StepStatus(
            stage, f"{len(parts)} steps", state, sum(s.done for s in parts),
            sum(known) if len(known) == len(parts) else None,
            failed=sum(s.failed for s in parts), seconds=sum(s.seconds or 0 for s in parts),
        )  # fmt: skip


def _cells(step: StepStatus) -> tuple[str, str, str, str]:
    """Rows, rate, time and failures."""
    unit, failed = "" if step.unit == "rows" else f" {step.unit}", f"{step.failed:,}"
    failed = failed if step.failed else ""
    total = "" if step.total is None else f"{step.total:,}"
    if step.state == DONE:
        return f"{step.done:,}", "", _clock(step.seconds or 0), failed
    if step.state == WAITING:
        return total, "", "", ""
    done = f"{step.done:,}/{total}{unit}" if total else f"{step.done:,}{unit}"
    rate = format_rate(step.rate) if step.rate and step.state == ACTIVE else ""
    return done, rate, "" if step.left is None else f"{_clock(step.left)} left", failed


def _spent_told(spent: Row) -> str:
    told = []
    for name, (value, bound) in spent.items():
        shown = f"{value:,.0f}" if name == "output tokens" else f"{value:,.2f}"
        if value or bound:
            told.append(
                f"{shown} {name}" + (f" of {bound:,} ({value / bound:.0%})" if bound else "")
            )
    return ", ".join(told) or "nothing yet"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
