"""The sums of a plan, without files: work, cost and time of each pool.

A pool's work is cut into equal buckets, which its engines take one after another. Pools of a
phase share the GPUs. Not covered: network, storage, and answers that are longer than others
(`simulate` has those).
"""

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from wrpo_ray.config import PricesConfig
from wrpo_ray.planning.spread import SURE, Spread
from wrpo_ray.runtime.ledger import Usage

SUMS = (
    "rows", "done", "prompts", "prompt_tokens", "output_tokens", "actor_seconds", "units",
    "startup",
)  # fmt: skip
"""Fields of works that are added where a pool does several; only its first one starts engines."""

START_SPREAD = Spread(2, 3)
"""Of starts: on a busy machine, equal engines took 13 to 69 s in a run, and 15 to 124 s in another.
"""


@dataclass(frozen=True)
class Work:
    """The work of one step; tokens and seconds are those of the missing rows."""

    step: str
    pool: str
    """The pool: works of one stage, phase and pool share engines. Empty for CPU work, which is not
    estimated."""
    rows: int = 0
    """Of the step's result when it is finished."""
    done: int = 0
    """Upper bound of the rows that exist already."""
    prompts: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    actor_seconds: float = 0.0
    gpus: float = 0
    """GPUs of an engine."""
    cpus: float = 0
    """CPUs of an engine."""
    engines: int = 1
    """Engines, or workers, at the same time."""
    units: int = 1
    """Equal parts that engines take one after another."""
    startup: float = 0.0
    """Seconds until an engine is up."""
    lengths: str = ""
    """Where lengths come from: given, measured, input or guess."""
    rate: str = ""
    """Where the rate comes from."""
    stage: str = ""
    phase: str = ""
    """Works of a stage and phase run side by side."""
    spread: Spread = SURE
    """How far the seconds may be off."""
    least: float = 1.0
    """Share of the work that there is in any case."""
    note: str = ""
    """What a reader of the plan has to know of the step."""

    @property
    def gpu_seconds(self) -> float:
        """Of all engines, with their starts."""
        starts = self.startup * min(self.engines, self.units)
        return (self.actor_seconds + starts) * self.gpus

    @property
    def cpu_seconds(self) -> float:
        """Of all engines, with their starts."""
        return (self.actor_seconds + self.startup * min(self.engines, self.units)) * self.cpus

    def at(self, bound: int) -> "Work":
        """The work at its lower (-1) or upper (1) bound."""
        if bound < 0:
            factor = self.least * self.spread.at(bound)
        else:
            factor = self.spread.beside(Spread(1, 2 - self.least)).more
        starts = SURE if self.spread == SURE else START_SPREAD
        return replace(
            self,
            actor_seconds=self.actor_seconds * factor,
            startup=self.startup * starts.at(bound),
        )

    @property
    def seconds(self) -> float:
        """Wall-clock seconds, if all engines start at once."""
        rounds = math.ceil(self.units / self.engines)
        return self.startup + rounds * self.actor_seconds / self.units

    def money(self, prices: PricesConfig) -> float:
        """GPU-hours and tokens at their prices."""
        gpu_seconds = self.gpu_seconds
        spent = Usage(0, self.prompt_tokens, self.output_tokens, 0, gpu_seconds)
        return spent.money(self.pool, prices)


@dataclass(frozen=True)
class Beside:
    """Stages that run side by side: those of the sources, and SFT with the target's answers."""

    sources: Collection[str]
    target: Collection[str]
    first: Mapping[str, float]
    """{stage of the sources: share of its work that the target waits for}"""

    def longest(self, took: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
        """Of (stage, seconds) those on the way that takes longest."""
        sources = [one for one in took if one[0] in self.sources]
        first = [(f"{n} for SFT", s * self.first[n]) for n, s in sources if n in self.first]
        target = [*first, *(one for one in took if one[0] in self.target)]
        way = max((sources, target), key=lambda w: sum(seconds for _, seconds in w))
        begin = min(took.index(one) for one in sources)
        others = [one for one in took if one[0] not in {*self.sources, *self.target}]
        before = [one for one in others if took.index(one) < begin]
        return [*before, *way, *others[len(before) :]]


@dataclass(frozen=True)
class Plan:
    """The works of a config on so many GPUs; None is room for all engines."""

    works: Sequence[Work]
    prices: PricesConfig
    gpus: int | None = None
    memory: Sequence[str] = ()
    """A line for each training still to do."""
    cpus: float | None = None
    """CPUs of the node where the run starts Ray itself; None where there is room for all."""
    beside: Beside | None = None
    """Stages that run side by side; None if all follow one another."""

    @property
    def stages(self) -> list[str]:
        """Names, in order."""
        return list(dict.fromkeys(w.stage for w in self.works))

    def seconds(self, stage: str | None = None) -> float:
        """Wall-clock seconds of one stage, whose phases run one after another, or of all."""
        if stage is None:
            return sum(seconds for _, seconds in self.path())
        works = [w for w in self.works if w.stage == stage]
        return sum(phase_seconds(part, self.gpus, self.cpus) for part in phases(works))

    def path(self) -> list[tuple[str, float]]:
        """The critical path: (stage, seconds), each of which waits for the one before."""
        took = [(name, self.seconds(name)) for name in self.stages]
        return self.beside.longest(took) if self.beside else took

    def range(self) -> tuple[float, float]:
        """Wall-clock seconds of all, if everything uncertain takes as little, or as long."""
        low, high = (replace(self, works=[w.at(b) for w in self.works]) for b in (-1, 1))
        return low.seconds(), high.seconds()

    def totals(self) -> dict[str, float]:
        """Sums over all works."""
        names = ("prompt_tokens", "output_tokens")
        return {
            **{name: sum(getattr(w, name) for w in self.works) for name in names},
            "gpu_hours": sum(w.gpu_seconds for w in self.works) / 3600,
            "money": sum(w.money(self.prices) for w in self.works),
            "seconds": self.seconds(),
        }

    def record(self) -> dict[str, Any]:
        """The plan as JSON."""
        derived = [
            {"gpu_hours": w.gpu_seconds / 3600, "money": w.money(self.prices), "seconds": w.seconds}
            for w in self.works
        ]
        return {
            "gpus": self.gpus,
            "memory": list(self.memory),
            "works": [asdict(w) | d for w, d in zip(self.works, derived, strict=True)],
            "stage_seconds": {name: self.seconds(name) for name in self.stages},
            "critical_path": dict(self.path()),
            "totals": self.totals(),
            "range_seconds": list(self.range()),
        }


def phases(works: Sequence[Work]) -> list[list[Work]]:
    """Groups of works that run side by side, in order."""
    parts: dict[tuple[str, str], list[Work]] = {}
    for work in works:
        parts.setdefault((work.stage, work.phase), []).append(work)
    return list(parts.values())


def pools(works: Sequence[Work]) -> list[Work]:
    """The works of each pool of a phase, added up."""
    found: dict[str, Work] = {}
    for work in works:
        held = found.get(work.pool)
        sums = {name: getattr(held, name) + getattr(work, name) for name in SUMS} if held else {}
        found[work.pool] = replace(held or work, **sums)
    return list(found.values())


def phase_seconds(works: Sequence[Work], gpus: int | None, cpus: float | None = None) -> float:
    """Wall-clock seconds of works that run side by side.

    With `gpus` the GPUs of a pool that ends go to those that still have buckets, so all of them
    are busy, but for the bucket that ends last.
    """
    by_pool = pools(works)
    if not gpus or len(by_pool) == 1 or not any(w.gpus for w in by_pool):
        held = sum(w.cpu_seconds for w in by_pool) / cpus if cpus else 0.0
        return max(held, *(w.seconds for w in by_pool))
    busy = sum(w.gpu_seconds for w in by_pool) / gpus
    buckets = [w.actor_seconds / w.units for w in by_pool]
    alone = [w.startup + bucket for w, bucket in zip(by_pool, buckets, strict=True)]
    return max(busy + max(buckets) / 2, *alone)


def share(works: Sequence[Work], gpus: int) -> list[Work]:
    """The works with the engines that `gpus` GPUs have room for, by `balance` in each phase.

    Workers of a training run are never more than the config's.
    """
    shared = []
    for part in phases(works):
        by_pool = pools(part)
        names = [w.pool for w in by_pool]
        engines = dict(zip(names, balance(by_pool, gpus), strict=True))
        for w in part:
            most = w.engines if w.pool == w.step else engines[w.pool]
            shared.append(replace(w, engines=min(most, engines[w.pool])))
    return shared


def balance(works: Sequence[Work], gpus: int) -> list[int]:
    """How many engines each work gets so that all end together: the least possible latest end.

    Each next engine goes to the work that would end last. Where there is not even room for one
    engine of each, they follow one another, and each gets as many as fit.
    """
    need = [w.gpus * bool(w.actor_seconds) for w in works]
    engines = [1 if gpu else w.engines for gpu, w in zip(need, works, strict=True)]
    free = gpus - sum(need)
    if free < 0:
        return [
            max(1, min(w.units, int(gpus // w.gpus))) if gpu else w.engines
            for gpu, w in zip(need, works, strict=True)
        ]
    queue = [(-w.actor_seconds, i) for i, w in enumerate(works) if need[i]]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        if need[i] <= free and engines[i] < works[i].units:
            engines[i] += 1
            free -= need[i]
            heapq.heappush(queue, (-works[i].actor_seconds / engines[i], i))
    return engines
