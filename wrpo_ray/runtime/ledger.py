"""The ledger of an output: its cost over all runs, checked against the budget.

The driver sums tokens and actor-seconds by step folder, and writes `ledger.json` once a second. A
run that is interrupted leaves the ledger marked as open; the next run then also counts the answers
in the stores, by the names of their shards. Not counted: seconds of actors that were lost before
they reported them.

While a run is under way the ledger also has what its engines are at, for plans: it is no usage yet.
"""

from __future__ import annotations

import math
import operator
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from wrpo_ray.config import BudgetConfig, PricesConfig
from wrpo_ray.data.finished import stored
from wrpo_ray.data.shards import Counts
from wrpo_ray.errors import BudgetError, UserError
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

FILE = "ledger.json"
EVERY = 1.0
"""Seconds between writes of the ledger."""


class _Figures:
    """Numbers that are added and subtracted field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(operator.add, _values(self), _values(other)))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*map(operator.sub, _values(self), _values(other)))


def _values(figures: Any) -> tuple[Any, ...]:
    return tuple(asdict(figures).values())


@dataclass(frozen=True)
class Usage(_Figures):
    """Rows, tokens and seconds; usages can be added."""

    rows: int = 0
    prompt_tokens: int = 0
    """Counted once a request, whatever its number of samples."""
    output_tokens: int = 0
    actor_seconds: float = 0.0
    """Time that actors or workers held their resources, with the start of engines."""
    gpu_seconds: float = 0.0
    idle_seconds: float = 0.0
    """Of `actor_seconds`, those in which an actor had no row."""
    start_seconds: float = 0.0
    """Of `actor_seconds`, those in which an actor loaded its model."""
    starts: int = 0
    """Actors that loaded a model."""

    @classmethod
    def of(cls, counts: Counts) -> Usage:
        """Rows and tokens, without any seconds."""
        return cls(**asdict(counts))

    @property
    def busy_seconds(self) -> float:
        """Actor-seconds without starts and without waiting for rows."""
        return max(0.0, self.actor_seconds - self.idle_seconds - self.start_seconds)

    def money(self, pool: str, prices: PricesConfig) -> float:
        """The cost by the prices of a pool."""
        tokens = (
            self.prompt_tokens * prices.input_tokens.get(pool, 0)
            + self.output_tokens * prices.output_tokens.get(pool, 0)
        ) / 1e6
        return tokens + self.gpu_seconds / 3600 * prices.pools.get(pool, prices.gpu_hour)


@dataclass(frozen=True)
class UnderWay(_Figures):
    """Answers that engines are at just now, or hold; they can be added and subtracted.

    Those of a lost actor are gone with it.
    """

    running: int = 0
    """Answers that have tokens and are not at their end."""
    running_tokens: int = 0
    ended: int = 0
    """Answers that wait for others of their request, and are in no usage."""
    ended_tokens: int = 0
    prompt_tokens: int = 0
    """Of the requests of these answers."""
    unstored: int = 0
    """Answers in the usage that are not committed yet."""
    seconds: float = 0.0
    """Of busy actors, in no usage yet."""
    actors: int = 0
    """Actors with such answers."""

    @property
    def tokens(self) -> int:
        """Tokens that are in no usage."""
        return self.running_tokens + self.ended_tokens

    @property
    def usage(self) -> Usage:
        """The addition to the usage if all answers ended now."""
        return Usage(self.running + self.ended, self.prompt_tokens, self.tokens, self.seconds)

    def still(self, length: float, most: float = math.inf) -> float:
        """Tokens that a running answer still needs on average, if answers have `length` on average.

        It is certain neither that an answer has the mean length (the rest would be length - made)
        nor that it goes on however long it is (length). Half-way between, lengths are sums of two
        exponential ones; their mean residual life is length/2 * (1 + length / (length + 2 made)).
        Real lengths deviate by 0.5 to 0.7 of their mean, these by 0.71. None is above `most`.

        Example:
            >>> [round(UnderWay(4, 4 * made).still(100, 400)) for made in (0, 50, 300, 390)]
            [100, 75, 57, 10]
        """
        if not self.running:
            return min(length, most)
        made = self.running_tokens / self.running
        return max(0.0, min(length / 2 * (1 + length / (length + 2 * made)), most - made))

    def __bool__(self) -> bool:
        return bool(self.running or self.ended or self.unstored)


AT_REST = UnderWay()


@dataclass(frozen=True)
class Entry:
    """The usage of a step folder."""

    pool: str
    """The model, reward or step whose prices apply."""
    usage: Usage
    under_way: UnderWay = AT_REST
    """Nothing is, unless a run that lives has written it."""


def read_ledger(root: Folder) -> dict[str, Entry]:
    """{name of the step folder: entry}; empty if there is no ledger yet.

    Raises:
        UserError: the file is damaged or was changed.
    """
    steps = _read(root)["steps"]
    try:
        return {
            f: Entry(e.pop("pool"), under_way=UnderWay(**e.pop("under_way", {})), usage=Usage(**e))
            for f, e in steps.items()
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{root}/{FILE}: was changed; put it back from a copy") from None


def is_open(root: Folder) -> bool:
    """Whether a run is under way, or ended without closing the ledger."""
    return bool(_read(root)["open"])


def read_seconds(root: Folder) -> float:
    """Wall-clock seconds of all runs so far."""
    return float(_read(root)["seconds"])


def _read(root: Folder) -> dict[str, Any]:
    if not root.exists(FILE):
        return {"steps": {}, "seconds": 0.0, "open": True}
    return {"open": True} | root.read_record(FILE, steps=dict, seconds=(int, float))


class Ledger:
    """The ledger while a run writes it; the run has to hold the lease."""

    def __init__(self, root: Folder, prices: PricesConfig, budget: BudgetConfig):
        self.root, self.prices, self.budget = root, prices, budget
        self.entries = {f: Entry(e.pool, e.usage) for f, e in read_ledger(root).items()}
        record = _read(root)
        self._before, self._started = float(record["seconds"]), time.monotonic()
        self._written, self._lock = 0.0, threading.Lock()
        if record["open"]:
            self._count_stores()

    def __enter__(self) -> Ledger:
        self._write(is_open=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the ledger; after an error it stays open, as actors may have unreported results."""
        self._write(is_open=kind is not None)

    @property
    def hours(self) -> float:
        """Wall-clock hours of all runs so far."""
        return (self._before + time.monotonic() - self._started) / 3600

    @property
    def total(self) -> Usage:
        """Usage over all steps."""
        return sum((e.usage for e in self._now()), Usage())

    @property
    def money(self) -> float:
        """Cost over all steps, by the current prices."""
        return sum(e.usage.money(e.pool, self.prices) for e in self._now())

    def add(self, step: Step, pool: str, usage: Usage, change: UnderWay = AT_REST) -> None:
        """Add to the usage of a step, and to what is under way."""
        with self._lock:
            held = self.entries.get(step.folder, Entry(pool, Usage()))
            self.entries[step.folder] = Entry(pool, held.usage + usage, held.under_way + change)
            if time.monotonic() - self._written >= EVERY:
                self._write(is_open=True)

    def flush(self) -> None:
        """Write the ledger now."""
        with self._lock:
            self._write(is_open=True)

    def check(self) -> None:
        """Raise BudgetError if the budget is spent."""
        spent = {
            "output_tokens": self.total.output_tokens,
            "money": self.money,
            "hours": self.hours,
        }
        for name, value in spent.items():
            bound = getattr(self.budget, name)
            if bound is not None and value >= bound:
                raise BudgetError(
                    f"budget.{name}: {value:,.10g} of {bound:,.10g} is spent; what is finished is "
                    f"kept: raise budget.{name} and run the same command again to go on"
                )

    def _now(self) -> list[Entry]:
        """A copy of the entries: threads of other pools add to them."""
        with self._lock:
            return list(self.entries.values())

    def _write(self, *, is_open: bool) -> None:
        self._written = time.monotonic()
        steps = {f: _record(entry) for f, entry in sorted(self.entries.items())}
        seconds = round(self.hours * 3600, 1)
        self.root.write_json(FILE, {"seconds": seconds, "open": is_open, "steps": steps})

    def _count_stores(self) -> None:
        """Add the tokens of stored answers that no run reported."""
        for folder in (f for f in self.root.folders() if f.startswith("generate-")):
            pool = folder.removeprefix("generate-").rpartition("-")[0]
            held = self.entries.get(folder, Entry(pool, Usage()))
            there = Usage.of(stored(self.root / folder))
            if there.output_tokens > held.usage.output_tokens:
                seconds = replace(held.usage, rows=0, prompt_tokens=0, output_tokens=0)
                self.entries[folder] = Entry(held.pool, there + seconds)


def _record(entry: Entry) -> dict[str, Any]:
    """The entry as JSON; what is under way only while something is."""
    now = {"under_way": asdict(entry.under_way)} if entry.under_way else {}
    return {"pool": entry.pool} | asdict(entry.usage) | now
