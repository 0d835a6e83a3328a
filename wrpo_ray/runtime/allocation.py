"""How many engines each pool gets, and on which nodes: pure functions, without Ray.

Every pool gets its least engines first, the largest engines before others. What is left is given
by water-filling: the next engine goes to the pool that would end last, so that all end together,
unless it would end before it had worked for a part of the time that it takes to start. A running
engine gives its place to another pool, once it has finished its rows, only where all would end
sooner by more than a start; and to a training that would wait for longer. An engine goes to the
node that it fills best, so that whole nodes stay free for engines that need them, and it lies on
one node if any node of the cluster can hold it.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

Resources = Mapping[str, float]
"""{name of a resource of Ray, such as CPU or GPU: amount}"""
WORTH = 0.5
"""An engine is started if it then works for at least this part of the time of its start."""
GAIN = 0.25
"""Engines are moved between pools if all then end sooner by this part of the time of a start."""
NEAR = 12.0
"""Starts of an engine before the end, from when on engines are moved: before that, what a pool
frees at its own end serves the others long enough."""
EPSILON = 1e-6
"""Amounts of resources that differ by less are equal."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    name: str
    total: Resources
    free: Resources
    only_gpu: bool = False
    """Whether work without GPUs must not run on it."""


@dataclass(frozen=True)
class Demand:
    """The work of a pool that is left, and its engines."""

    pool: str
    needs: Resources
    """Of one engine."""
    left: float
    """Work that is left, in seconds of one engine."""
    startup: float = 0.0
    """Seconds until an engine works."""
    running: int = 0
    """Engines that run or start."""
    least: int = 1
    most: int = 1
    bundles: Sequence[Resources] = ()
    """Parts of an engine, each on one node; used where no node can hold all of them."""
    leaving: int = 0
    """Further engines, which finish their rows and then end for another pool."""
    follows: bool = False
    """Whether its work comes from other pools, so that it does not end before them."""
    is_timed: bool = True
    """Whether `left` is measured, and no guess."""
    places: Sequence[str] = ()
    """The node of each engine that works, as far as they lie on one."""
    displaces: bool = False
    """Whether engines of others end for its least ones, which are workers of a training."""

    @cached_property
    def size(self) -> tuple[float, float, float]:
        """The order of engines from small to large."""
        return _order(self.needs)

    @property
    def is_cpu_only(self) -> bool:
        """Whether an engine has neither GPUs nor custom resources."""
        return not any(self.size[:2])

    def end(self, engines: int) -> float:
        """Seconds until the work ends on so many engines, of which new ones start now."""
        if engines < self.running:
            return self.left / engines if engines else float("inf")
        if not engines:
            return float("inf")
        new = max(0, engines - self.running)
        with_new = (self.left + new * self.startup) / engines
        old = self.left / self.running if self.running else float("inf")
        return min(old, max(with_new, self.startup) if new else with_new)

    def is_worth(self, engines: int) -> bool:
        """Whether the last of so many engines has enough to do after its start."""
        return self.end(engines) >= (1 + WORTH) * self.startup and self.left > 0

    @cached_property
    def wanted(self) -> int:
        """Engines that are worth their start in a cluster with room for all."""
        low, high = min(self.least, self.most), self.most
        while low < high:  # `is_worth` holds up to some number of engines
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.is_worth(middle) else (low, middle - 1)
        return max(low, self.running)


@dataclass(frozen=True)
class Share:
    """The engines of a pool."""

    engines: int
    """That run, with those to start."""
    places: Sequence[tuple[str, ...]] = ()
    """The nodes of each engine to start: one, or several where no node can hold an engine."""
    gives_way: bool = False
    """Whether another pool lacks resources of an engine of this one for its least engines, or gets
    those of engines that leave."""
    leave: Sequence[str] = ()
    """The node of each engine to end for others as soon as its rows are finished; "" is any."""


def allocate(nodes: Sequence[Node], demands: Sequence[Demand]) -> dict[str, Share]:
    """The share of each pool, by its name."""
    names = {name for demand in demands for name in demand.needs}
    by_size = sorted(demands, key=lambda d: d.size, reverse=True)
    filling = _Filling(_Room(nodes, names), by_size)
    filling.place_least()
    lacking = filling.lacking
    for demand in lacking:
        filling.room.reserve(demand)
    has_gpus = [d for d in filling.demands if not d.is_cpu_only]
    filling.pour(has_gpus)
    filling.room.keep_cpus(has_gpus)
    filling.pour([d for d in filling.demands if d.is_cpu_only])
    shares = {d.pool: filling.share(d, lacking) for d in demands}
    if not lacking:
        return _with_moves(has_gpus, shares)
    first = next((d for d in lacking if d.displaces and d.needs.get("GPU")), None)
    leave = displaced(first, filling.count(first), has_gpus) if first else {}
    return shares | {pool: replace(shares[pool], leave=where) for pool, where in leave.items()}


def displaced(training: Demand, placed: int, demands: Sequence[Demand]) -> dict[str, list[str]]:
    """{pool: node of each engine to end} so that all workers of a training have GPUs.

    They are on as few nodes as suffice, on those whose pools then end first. None end while others
    leave, where a pool is a guess, or where pools that end soon give as many GPUs.
    """
    pools = [d for d in demands if d.running and not d.displaces]
    wanted = training.least - placed
    if any(d.leaving or not (d.is_timed or d.follows) for d in pools):
        return {}
    there: dict[str, list[Demand]] = defaultdict(list)
    for demand in pools:
        for place in demand.places:
            there[place].append(demand)
    leave: dict[str, list[str]] = defaultdict(list)
    for node in sorted(there, key=lambda node: (_end_without(there[node]), node)):
        if wanted <= 0 or _end_without(there[node]) == float("inf"):
            break
        freed: Resources = {}
        for demand in sorted(there[node], key=lambda d: d.size, reverse=True):
            if len(leave[demand.pool]) < demand.running - max(1, demand.least):
                leave[demand.pool].append(node)
                freed = _more(freed, demand.needs)
            if _room_for(training.needs, freed) >= wanted:
                break
        wanted -= _room_for(training.needs, freed)
    startup = max((d.startup for d in pools if leave[d.pool]), default=0.0)
    is_soon = _end_of(pools, (training.least - placed) * training.needs["GPU"]) <= startup
    return {} if wanted > 0 or is_soon else {pool: nodes for pool, nodes in leave.items() if nodes}


def _end_without(engines: Sequence[Demand]) -> float:
    """When the last of these pools ends without these engines; never if one has too few."""
    counts = Counter(d.pool for d in engines)
    return max(
        d.end(left) if (left := d.running - counts[d.pool]) >= max(1, d.least) else float("inf")
        for d in engines
    )


def _end_of(demands: Sequence[Demand], gpus: float) -> float:
    """When pools that end by themselves have freed so many GPUs."""
    for demand in sorted(demands, key=lambda d: d.end(d.running)):
        if not demand.follows:
            gpus -= demand.running * demand.needs.get("GPU", 0.0)
        if gpus <= EPSILON:
            return demand.end(demand.running)
    return float("inf")


def _with_moves(demands: Sequence[Demand], shares: dict[str, Share]) -> dict[str, Share]:
    """Shares with engines that leave; what they free is for the pool that ends last."""
    leave = moves(demands, [shares[d.pool].engines for d in demands])
    if not leave and not any(d.leaving for d in demands):
        return shares
    last = max(demands, key=lambda d: 0 if d.follows else d.end(d.running))
    found = {
        d.pool: replace(
            shares[d.pool], leave=("",) * leave.get(d.pool, 0),
            gives_way=shares[d.pool].gives_way or not (d is last or d.follows),
        )
        for d in demands
    }  # fmt: skip
    return shares | found


def moves(demands: Sequence[Demand], engines: Sequence[int]) -> dict[str, int]:
    """{pool: engines to end} so that pools that would end later have their places.

    One engine after another goes from the pool that then ends first to the one that ends last,
    while all end sooner. None does while others leave, or if the sum gains less than `GAIN`.
    """
    pools = [d for d in demands if not d.follows and d.left > 0]
    if not pools or any(d.leaving for d in demands) or not all(d.is_timed for d in pools):
        return {}
    count = {d.pool: n for d, n in zip(demands, engines, strict=True)}
    ends = {d.pool: d.end(count[d.pool]) for d in pools}
    before, leave, startup = max(ends.values()), Counter[str](), 0.0
    while True:
        last = max(pools, key=lambda d: ends[d.pool])
        if ends[last.pool] > NEAR * last.startup:
            break
        giving = [
            (d.end(count[d.pool] - 1), d.pool, room) for d in pools
            if d is not last and d.least < count[d.pool] <= d.running
            and (room := min(_room_for(last.needs, d.needs), last.most - count[last.pool])) > 0
        ]  # fmt: skip
        end, pool, room = min(giving, default=(float("inf"), "", 0))
        if max(end, last.end(count[last.pool] + room)) >= ends[last.pool]:
            break
        count[pool], count[last.pool] = count[pool] - 1, count[last.pool] + room
        ends |= {pool: end, last.pool: last.end(count[last.pool])}
        startup, leave[pool] = max(startup, last.startup), leave[pool] + 1
    return dict(leave) if before - max(ends.values()) > GAIN * startup else {}


def _room_for(needs: Resources, place: Resources) -> int:
    """How many engines the place of another one holds, which has their GPUs; CPUs are plenty."""
    scarce = [(n, place.get(name, 0.0)) for name, n in needs.items() if n and name != "CPU"]
    return int(min(((free + EPSILON) // n for n, free in scarce), default=0))


class _Filling:
    """Engines that have been given so far."""

    def __init__(self, room: "_Room", demands: Sequence[Demand]):
        self.room, self.demands = room, demands
        self.places: dict[str, list[tuple[str, ...]]] = {d.pool: [] for d in demands}

    def count(self, demand: Demand) -> int:
        """Engines of a pool, with those that it has been given."""
        return demand.running + len(self.places[demand.pool])

    def place_least(self) -> None:
        """Give each pool a first engine, then each a second, up to its least."""
        for number in range(1, max((d.least for d in self.demands), default=0) + 1):
            for demand in self.demands:
                if self.count(demand) < min(number, demand.least):
                    self._place(demand)

    @property
    def lacking(self) -> list[Demand]:
        """Pools with fewer engines than their least."""
        return [d for d in self.demands if self.count(d) < d.least]

    def pour(self, demands: Sequence[Demand]) -> None:
        """Give one engine after another to the pool that ends last, while there is room."""
        heap = [(-d.end(self.count(d)), order) for order, d in enumerate(demands)]
        heapq.heapify(heap)
        while heap:
            _, order = heapq.heappop(heap)
            demand = demands[order]
            engines = self.count(demand) + 1
            if engines <= demand.most and demand.is_worth(engines) and self._place(demand):
                heapq.heappush(heap, (-demand.end(engines), order))

    def _place(self, demand: Demand) -> bool:
        place = self.room.place(demand)
        if place:
            self.places[demand.pool].append(place)
        return bool(place)

    def share(self, demand: Demand, lacking: Sequence[Demand]) -> Share:
        """A pool's share, and whether it gives way to one of the pools that lack engines."""
        short = {n for d in lacking if d.pool != demand.pool for n in self.room.lacks(d.needs)}
        gives_way = bool(short & {name for name, n in demand.needs.items() if n})
        return Share(self.count(demand), tuple(self.places[demand.pool]), gives_way)


_Kind = tuple[tuple[tuple[str, float], ...], bool]
"""What is free on a node, and whether only work with GPUs runs there."""


class _Room:
    """The free resources: nodes with the same ones are kept together, in order."""

    def __init__(self, nodes: Sequence[Node], names: set[str]):
        self.nodes, self.names = nodes, names
        self.kinds: dict[_Kind, dict[str, None]] = defaultdict(dict)
        self.total: dict[str, float] = defaultdict(float)
        for node in nodes:
            self.kinds[self._kind(node.free, node.only_gpu)][node.name] = None
            for name, n in node.free.items():
                self.total[name] += n

    def _kind(self, free: Resources, only_gpu: bool) -> _Kind:
        some = ((name, round(n, 6)) for name, n in free.items() if n > EPSILON)
        return tuple(sorted(one for one in some if one[0] in self.names)), only_gpu

    def lacks(self, needs: Resources) -> set[str]:
        """Resources of which too little was free; all where it is only scattered over nodes."""
        short = {name for name, n in needs.items() if n > self.total[name] + EPSILON}
        return short or {name for name, n in needs.items() if n}

    def place(self, demand: Demand) -> tuple[str, ...]:
        """Take room for one engine; returns its nodes, or () if there is none."""
        if len(demand.bundles) < 2 or any(fits(demand.needs, n.total) for n in self.nodes):
            return self._take([demand.needs], demand.is_cpu_only)
        return self._take(demand.bundles, demand.is_cpu_only)

    def _take(self, parts: Sequence[Resources], is_cpu_only: bool) -> tuple[str, ...]:
        """Take room for all parts or for none; returns the nodes."""
        taken: list[tuple[_Kind, _Kind, str]] = []
        for needs in parts:
            found = [
                kind for kind, names in self.kinds.items()
                if names and not (kind[1] and is_cpu_only) and fits(needs, dict(kind[0]))
            ]  # fmt: skip
            if not found:
                for before, after, name in reversed(taken):
                    self._move(name, after, before)
                return ()
            kind = min(found, key=lambda kind: _order(_less(dict(kind[0]), needs)))
            after = self._kind(_less(dict(kind[0]), needs), kind[1])
            name = next(iter(self.kinds[kind]))
            self._move(name, kind, after)
            taken.append((kind, after, name))
        return tuple(dict.fromkeys(name for *_, name in taken))

    def _move(self, name: str, before: _Kind, after: _Kind) -> None:
        del self.kinds[before][name]
        self.kinds[after][name] = None

    def reserve(self, demand: Demand) -> None:
        """Keep room for an engine on the emptiest node that could hold it, as far as it is free."""
        able = {n.name for n in self.nodes if fits(demand.needs, n.total)}
        found = [
            (kind, name) for kind, names in self.kinds.items() for name in names if name in able
        ]
        if found:
            kind, name = max(found, key=lambda each: (_order(dict(each[0][0])), each[1]))
            left = self._kind(_less(dict(kind[0]), demand.needs), kind[1])
            self._move(name, kind, left)

    def keep_cpus(self, demands: Sequence[Demand]) -> None:
        """Keep the CPUs that engines would need on the GPUs that are free."""
        sizes = [(d.needs.get("GPU", 0.0), d.needs.get("CPU", 0.0)) for d in demands]
        each = max((cpus / gpus for gpus, cpus in sizes if gpus), default=0.0)
        kinds, self.kinds = self.kinds, defaultdict(dict)
        for (free, only_gpu), names in kinds.items():
            kept = {"CPU": each * dict(free).get("GPU", 0.0)}
            self.kinds[self._kind(_less(dict(free), kept), only_gpu)] |= names


def fits(needs: Resources, free: Resources) -> bool:
    """Whether there is enough of everything."""
    return all(n <= free.get(name, 0.0) + EPSILON for name, n in needs.items())


def _less(free: Resources, needs: Resources) -> dict[str, float]:
    return {name: max(0.0, n - needs.get(name, 0.0)) for name, n in free.items()}


def _more(free: Resources, place: Resources) -> Resources:
    return {name: free.get(name, 0.0) + place.get(name, 0.0) for name in {*free, *place}}


def _order(free: Resources) -> tuple[float, float, float]:
    """GPUs, custom resources, CPUs: what is scarce comes first."""
    custom = sum(n for name, n in free.items() if name not in ("CPU", "GPU"))
    return free.get("GPU", 0.0), custom, free.get("CPU", 0.0)
