"""Status of a run from the files in its output, as one screen; works on any machine.

It reads the outline, manifests, the ledger, the lease, the last lines of metrics, and listings of
the folders of unfinished steps, but no rows. Answers and scores are counted by the ledger, which
has those of unfinished buckets a few seconds after they are made.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from wrpo_ray.config import BudgetConfig, PricesConfig
from wrpo_ray.data.finished import failed_rows
from wrpo_ray.data.outline import PLAN, Outline, StepOutline
from wrpo_ray.data.shards import list_shards
from wrpo_ray.errors import BrokenFileError, UserError
from wrpo_ray.report.group_table import by_group, tables
from wrpo_ray.runtime import lease, tries
from wrpo_ray.runtime.ledger import Entry, Usage, read_ledger, read_seconds
from wrpo_ray.runtime.progress import format_rate
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.display import one_line

Row = dict[str, Any]
RECENT = 300.0
"""Window of a rate, in seconds."""
LAST = 20
"""Window of a rate, in optimizer steps."""
METRICS = "metrics.jsonl"
STEPS = ("step", "steps")
"""Fields of a line of metrics: the optimizer step, from 0, and how many there will be."""
LOST = "lost (its process or node ended without a word)"
DONE, ACTIVE, BEGUN, WAITING = "done", "running", "begun", "waiting"


@dataclass(frozen=True)
class StepStatus:
    """Progress of a step in rows, buckets or optimizer steps."""

    stage: str
    name: str
    state: str
    done: int = 0
    total: int | None = None
    unit: str = "rows"
    rate: float | None = None
    """Units per second."""
    failed: int = 0
    seconds: float | None = None
    """Duration of a finished step."""
    notes: tuple[str, ...] = ()
    """What has to be known of recorded answers, and what is under way."""

    @property
    def left(self) -> float | None:
        """Estimated seconds until it is done; None if unknown."""
        if not self.rate or self.total is None or self.state != ACTIVE:
            return None
        return max(0, self.total - self.done) / self.rate


@dataclass(frozen=True)
class Status:
    """Status of a run."""

    output: str
    last_try: str
    """What became of the last try, as text."""
    holder: str
    """The holder of the lease, as text."""
    is_running: bool
    steps: tuple[StepStatus, ...]
    spent: Row
    """{resource: (spent, limit or None)}"""
    groups: Row
    """Of selection and pairing, by group of prompts; empty where the config names no groups."""


def status(root: Folder, outline: Outline, now: float | None = None) -> Status:
    """Return the status of a run; `now` is Unix seconds."""
    now = time.time() if now is None else now
    holder, is_running = _holder(root, now)
    reader = _StepReader(root, outline, is_running, now)
    steps = tuple(map(reader.step, outline.steps))
    told = _try_text(root, now, is_running, is_done=all(step.state == DONE for step in steps))
    groups = by_group(
        reader.counts.get("select", {}), reader.counts.get("pair", {}), outline.config
    )
    return Status(str(root), told, holder, is_running, steps, _spent(root, outline), groups)


def is_running(root: Folder) -> bool:
    """Whether a run holds the lease of the output."""
    return _holder(root, time.time())[1]


def _holder(root: Folder, now: float) -> tuple[str, bool]:
    """The holder of the lease as text, and whether its heartbeat is recent."""
    try:
        held = lease.read(root)
    except (FileNotFoundError, BrokenFileError):
        return "nobody: no run is under way", False
    who = f"{held['host']}, process {held['pid']}"
    if lease.is_alive(held) is False:
        return f"nobody: the run on {who} was killed", False
    beaten = root.filesystem.get_file_info(f"{root.path}/{held['name']}").mtime_ns
    age = max(0.0, now - beaten / 1e9) if beaten else 0.0
    if age > lease.EXPIRES:
        return f"{who}, without a heartbeat for {age:,.0f} s: it was lost, or clocks differ", False
    return f"{who}, heartbeat {age:.0f} s ago", True


def _try_text(root: Folder, now: float, is_running: bool, *, is_done: bool) -> str:
    """The state of the last try; one that is neither running nor ended was lost."""
    found = tries.last(root)
    if found is None:
        return "not known: it was made by an earlier version, or has not begun"
    number, state, end = found["number"], found["state"], found["ended"] or now
    if state == tries.RUNNING and not is_running:
        state = f"{tries.FINISHED} (lost after its last step)" if is_done else LOST
    began, after = _clock(now - found["started"]), _clock(end - found["started"])
    ended = f"after {after}, {_clock(now - end)} ago"
    when = f"began {began} ago" if found["ended"] is None else ended
    reason = f": {found['reason']}" if found["reason"] else ""
    return f"try {number} {state}, {when}{reason}"


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


class _StepReader:
    """Reads the progress of steps from files and listings."""

    def __init__(self, root: Folder, outline: Outline, is_running: bool, now: float):
        self.root, self.outline, self.is_running, self.now = root, outline, is_running, now
        self.ledger: dict[str, Entry] = read_ledger(root)
        self.plan: Row = root.read_record(PLAN) if root.exists(PLAN) else {}
        self.rows: dict[str, int] = {}
        self.counts: dict[str, Row] = {}

    def step(self, step: StepOutline) -> StepStatus:
        """One step."""
        if step.is_done(self.root):
            record = step.read_manifest(self.root)
            counts = self.counts[step.name] = record["counts"]
            rows = self.rows[step.key] = counts.get("rows", 0)
            return StepStatus(
                step.stage, step.name, DONE, rows, rows, failed=counts.get("failed", 0),
                seconds=record["seconds"],
                notes=tuple(filter(None, (record.get("told"), step.note))),
            )  # fmt: skip
        told = self._training(step) if step.kind == "train" else self._buckets(step)
        if told is None:
            return StepStatus(step.stage, step.name, WAITING, total=self._total(step))
        done, total, unit, rate, changed = told
        is_active = self.is_running and (changed is None or self.now - changed < RECENT)
        return StepStatus(
            step.stage, step.name, ACTIVE if is_active else BEGUN, done, total, unit, rate,
            failed=failed_rows(step.failures(self.root)), notes=tuple(self._under_way(step)),
        )  # fmt: skip

    def _under_way(self, step: StepOutline) -> Iterator[str]:
        """A line on answers that engines of a run that lives are at."""
        entry = self.ledger.get(step.folder)
        if self.is_running and entry and (at := entry.under_way).running:
            yield f"{at.running:,} answers under way have {at.running_tokens:,} tokens"

    def _total(self, step: StepOutline) -> int | None:
        """Expected rows; None if unknown."""
        is_of_all = step.groups is None and step.prompts in self.rows
        if step.kind in ("generate", "score") and is_of_all and step.samples:
            sft = (self.outline.config.get("split") or {}).get("sft", 0.0)
            shares = {"sft": sft, "preference": 1 - sft}
            share = sum(shares.get(split, 1.0) for split in step.splits)
            return int(round(self.rows[step.prompts] * share) * step.samples)
        planned: int | None = (self.plan.get(step.key) or {}).get("rows")
        return planned

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
        shards = list_shards(self.root / step.folder)
        entry = self.ledger.get(step.folder)
        if not shards and not (entry and (entry.usage.rows or any(self._under_way(step)))):
            return None
        times = sorted(shard.written / 1e9 for shard in shards if shard.written)
        changed = times[-1] if times else None
        if step.kind in ("generate", "score") and entry:
            total = self._total(step)
            done = entry.usage.rows if total is None else min(entry.usage.rows, total)
            return done, total, "rows", _rate(times, done), changed
        filled = len({shard.place[0] for shard in shards})
        return filled, self.outline.buckets, "buckets", _rate(times, filled), changed


def _rate(times: list[float], done: int) -> float | None:
    """Units per second, from recent shards; None with fewer than two."""
    recent = [time for time in times if time > times[-1] - RECENT] if times else []
    if len(recent) < 2 or recent[-1] == recent[0]:
        return None
    return done * (len(recent) - 1) / len(times) / (recent[-1] - recent[0])


def _is_whole(record: Row) -> bool:
    """Whether a line of metrics has the fields that a run writes."""
    return all(type(record.get(name)) is int for name in STEPS)


@contextmanager
def reading(root: Folder) -> Iterator[None]:
    """Turn errors from damaged files of a run into a UserError.

    Raises:
        UserError: a file is not as a run writes it.
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
    """The status for rich: a line for each step, or for a stage whose steps have one state."""
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
        table.add_row(*(Text(one_line(cell)) for cell in cells), style=styles[step.state])
    done = sum(step.state == DONE for step in found.steps)
    about = [found.output, f"run: {found.last_try}", f"lease: {found.holder}"]
    about.append(f"{done} of {len(found.steps)} steps done")
    head = Text("".join(f"{one_line(line)}\n" for line in about))
    notes = [one_line(f"{step.name}: {note}") for step in found.steps for note in step.notes]
    spent = f"spent: {_spent_told(found.spent)}"
    by_group = map(_group_table, tables(found.groups))
    return Group(head, table, *by_group, Text("\n" + "\n".join([*notes, spent])))


def _group_table(given: tuple[str, list[list[str]]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    title, (head, *rows) = given
    table = Table(
        box=None, padding=(0, 1, 0, 0), header_style="dim", title=f"\n{title}", title_justify="left"
    )
    for place, name in enumerate(head):
        table.add_column(Text(one_line(name)), justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    return table


def _lines(steps: Sequence[StepStatus]) -> Iterator[StepStatus]:
    """Merge the steps of a stage that are all done or all waiting."""
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
