"""A chain on a cluster that is not there: the scheduling policy, event by event.

What is simulated is what `stages.generate.stage` and `runtime.pool` do: each pool has its engines
and a queue of buckets; `runtime.allocation` gives engines of all pools the GPUs that are free; an
engine downloads weights that its node lacks, starts, takes buckets, answers as many prompts at
once as it has slots, commits chunk by chunk, and gives its GPUs back when its pool has no bucket
left. Buckets can wait for those of other pools, pools and trainings for groups of buckets. Nodes
may be slow, or be lost with what their engines had not committed. Not simulated: what the driver
and the store of answers take.

Every active answer of an engine advances at the same speed, so an engine counts the tokens that
each has made since it began (`made`), and an answer of n tokens that enters at m leaves at m + n.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from wrpo_ray.runtime.allocation import Demand, Node, allocate

Event = Callable[[float], None]
Chunk = Sequence[float]
"""Tokens of each answer that is committed together."""
Place = tuple[str, int]
"""Name of a pool, and the number of a bucket."""
IDLE = 30.0
"""Seconds without a bucket after which an engine that may get one is ended."""
LOOK = 1.0
"""Seconds between two looks at what the pools should have."""
MOVES = 10.0
"""Seconds between two looks where nothing but the work that is left has changed."""


@dataclass(frozen=True)
class Source:
    """A model, its pool of engines and its work."""

    name: str
    gpus: int
    """GPUs of an engine, on one node."""
    engines: int
    """Engines at the most."""
    rate: float
    """Tokens/s of an engine with all slots busy."""
    startup: float
    """Seconds until an engine takes its first bucket."""
    buckets: Sequence[Sequence[Chunk]]
    least: int = 1
    """Engines that are asked for before any pool asks for more."""
    slots: int = 256
    """Answers at once."""
    half: int = 64
    """k answers at once make k / (k + half) of what infinitely many would."""
    steps: Sequence[float] = ()
    """Instead of `half`: seconds of a decoding step by the number of answers."""
    in_hand: int = 0
    """Buckets that an engine works on at once; 0 is the policy's number."""
    bytes: float = 0.0
    """Of the weights."""
    weights: str = ""
    """Their name, which pools of one model share; empty is the pool's."""
    after: frozenset[str] = frozenset()
    """Groups that are finished before the pool begins."""
    groups: Sequence[str] = ()
    """The group of each bucket; without them all are in one, of the pool's name."""
    fed_by: Sequence[Sequence[Place]] = ()
    """The buckets that each bucket needs."""

    @property
    def tokens(self) -> float:
        """Of all answers."""
        return sum(sum(chunk) for bucket in self.buckets for chunk in bucket)

    def speed(self, active: int) -> float:
        """Tokens/s of each of `active` answers."""
        if self.steps:
            return 1 / self.steps[active]
        return self.rate * (1 + self.half / self.slots) / (active + self.half)


@dataclass(frozen=True)
class Gang:
    """A training: whole nodes at the same time."""

    name: str
    nodes: int
    seconds: float
    useful: float
    """GPU-seconds of its FLOPs at the stated share of the peak."""
    startup: float = 0.0
    after: frozenset[str] = frozenset()
    starts_after: frozenset[str] | None = None
    """Groups after which its nodes are taken and its workers start; None: when it can train."""


@dataclass(frozen=True)
class Pause:
    """Work without GPUs of a known time, such as choosing y_ws."""

    name: str
    seconds: float
    after: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Policy:
    """What may be decided."""

    in_hand: int = 1
    """Buckets that an engine answers at the same time."""
    ahead: int = 0
    """Further buckets that are bound to an engine; `runtime.pool` binds none."""
    barrier: bool = False
    """Whether a chunk waits until the one before is answered and committed."""
    in_turn: bool = False
    """Whether pools take turns, as at first, and not what the allocator gives them."""
    moves: bool = True
    """Whether engines end for another pool's sake."""
    displaces: bool = True
    """Whether engines end for a training that would wait for its nodes."""


@dataclass(frozen=True)
class Store:
    """Where weights come from; in bytes/s."""

    node: float = math.inf
    """Into a node."""
    total: float = math.inf
    """Out of the store."""
    load: float = math.inf
    """From a node's disk or memory into a GPU."""
    peers: bool = False
    """Whether nodes get weights from each other, as those of runs do: only the first copy comes out
    of the store."""
    on_nodes: bool = False
    """Whether all weights are on all nodes before the run."""


@dataclass(frozen=True)
class Cluster:
    """Nodes, and what befalls them."""

    nodes: int
    gpus: int = 8
    """GPUs of a node."""
    slow: Mapping[int, float] = field(default_factory=dict)
    """Share of the speed that is left, by node."""
    lost: Mapping[int, float] = field(default_factory=dict)
    """Second at which it is lost, by node."""
    notice: float = 30.0
    """Seconds until a loss is seen and its buckets are given to others."""
    store: Store = Store()
    held: str = ""
    """A training for which its nodes are held free until it has run."""


@dataclass(frozen=True)
class Span:
    """The time of an engine or a training on its GPUs."""

    pool: str
    gpus: int
    since: float
    ready: float
    """End of its start."""
    until: float


@dataclass
class Outcome:
    """Times in GPU-seconds, but for `wall`."""

    capacity: float = 0.0
    """GPUs times wall."""
    wall: float = 0.0
    useful: float = 0.0
    """Committed tokens, each once, at the full rate."""
    starting: float = 0.0
    redone: float = 0.0
    held: float = 0.0
    """By engines, from the beginning of their start until they are gone."""
    answers: int = 0
    """Committed."""
    starts: int = 0
    """Of engines."""
    spans: list[Span] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)
    """Second at which each group of buckets, training and pause was finished."""

    @property
    def efficiency(self) -> float:
        """Useful share of all GPUs' time."""
        return self.useful / self.capacity

    @property
    def unused(self) -> float:
        """GPUs that no engine held."""
        return self.capacity - self.held

    @property
    def slack(self) -> float:
        """Engines with fewer answers than slots, on slow nodes, or without a bucket."""
        return self.held - self.useful - self.starting - self.redone


class _Bucket:
    """A bucket in hand: the chunks that are not committed."""

    def __init__(self, number: int, chunks: dict[int, Chunk]):
        self.number, self.chunks = number, chunks
        self.waiting = deque(chunks)
        self.left = {c: len(answers) for c, answers in chunks.items()}
        self.entered: dict[int, int] = {}

    def next(self, barrier: bool) -> tuple[int, float] | None:
        """(chunk, tokens) of the next answer to ask for."""
        while self.waiting:
            chunk = self.waiting[0]
            at = self.entered.get(chunk, 0)
            if at == 0 and barrier and self.left and next(iter(self.left)) != chunk:
                return None
            if at < len(self.chunks[chunk]):
                self.entered[chunk] = at + 1
                return chunk, self.chunks[chunk][at]
            self.waiting.popleft()
        return None


class _Engine:
    def __init__(self, pool: _Pool, node: int, now: float, factor: float, until: float):
        self.pool, self.node, self.since, self.until = pool, node, now, until
        self.now = math.inf
        """Until when it has answered; infinite while it starts."""
        self.ready = math.inf
        self.idle = 0
        """How often it was left without a bucket."""
        self.is_leaving = False
        """Whether it takes no more buckets, and ends for another pool."""
        self.factor, self.made = factor, 0.0
        self.active: list[tuple[float, int, int, float]] = []
        """(value of `made` when it leaves, bucket, chunk, tokens) of each answer, a heap."""
        self.hand: dict[int, _Bucket] = {}
        self.bound: deque[_Bucket] = deque()

    def take(self, policy: Policy) -> None:
        """Fill the hand, then what is bound, from the pool's queue."""
        if self.is_leaving:
            return
        share = math.ceil(self.pool.buckets / max(1, self.pool.engines))
        in_hand = min(self.pool.source.in_hand or policy.in_hand, share)
        while len(self.hand) < in_hand and (self.bound or self.pool.queue):
            bucket = (self.bound or self.pool.queue).popleft()
            self.hand[bucket.number] = bucket
        while len(self.bound) < policy.ahead and self.pool.queue:
            self.bound.append(self.pool.queue.popleft())

    def finish_one(self, policy: Policy) -> float | None:
        """Answer until a bucket is finished; returns when, or None if the node is lost before."""
        source, active = self.pool.source, self.active
        while all(bucket.left for bucket in self.hand.values()):
            self._admit(policy.barrier)
            speed = source.speed(len(active)) * self.factor
            leaves, number, chunk, _ = active[0]
            then = self.now + (leaves - self.made) / speed
            if then >= self.until:
                self.made += max(0.0, self.until - self.now) * speed
                return None
            heapq.heappop(active)
            self.now, self.made = then, leaves
            bucket = self.hand[number]
            bucket.left[chunk] -= 1
            if not bucket.left[chunk]:
                del bucket.left[chunk]
                self.pool.committed[number, chunk] += 1
        return self.now

    def _admit(self, barrier: bool) -> None:
        free = self.pool.source.slots - len(self.active)
        for bucket in self.hand.values():
            while free and (answer := bucket.next(barrier)):
                chunk, tokens = answer
                heapq.heappush(self.active, (self.made + tokens, bucket.number, chunk, tokens))
                free -= 1

    def uncommitted(self) -> float:
        """Tokens made of chunks that are not committed."""
        entered = sum(tokens - (leaves - self.made) for leaves, _, _, tokens in self.active)
        finished = sum(
            sum(bucket.chunks[c][: bucket.entered.get(c, 0)]) for bucket in self.hand.values()
            for c in bucket.left
        ) - sum(tokens for *_, tokens in self.active)  # fmt: skip
        return entered + finished


class _Pool:
    def __init__(self, source: Source):
        self.source, self.engines, self.leaving = source, 0, 0
        self.left = source.tokens
        """Tokens of unfinished buckets."""
        self.buckets = sum(map(bool, source.buckets))
        """Unfinished ones."""
        self.is_open = not source.after
        chunks = {
            (b, c): chunk
            for b, bucket in enumerate(source.buckets)
            for c, chunk in enumerate(bucket)
        }
        self.committed = dict.fromkeys(chunks, 0)
        made = {
            b: _Bucket(b, dict(enumerate(bucket)))
            for b, bucket in enumerate(source.buckets)
            if bucket
        }
        self.lacks = {b: len(source.fed_by[b]) for b in made} if source.fed_by else {}
        """Buckets that an unready one still needs, by number."""
        self.unready = {b: bucket for b, bucket in made.items() if self.lacks.get(b)}
        self.queue = deque(bucket for b, bucket in made.items() if b not in self.unready)

    def group(self, bucket: int) -> str:
        """The group of a bucket."""
        return self.source.groups[bucket] if self.source.groups else self.source.name

    def give_back(self, bucket: _Bucket) -> None:
        """Of a lost engine: what it had committed is not done again."""
        left = {c: chunk for c, chunk in bucket.chunks.items() if c in bucket.left}
        if left:
            self.queue.appendleft(_Bucket(bucket.number, left))

    def demand(self, startup: float) -> Demand:
        """What the allocator is told: room for buckets that are to come is kept."""
        source = self.source
        most = min(source.engines, max(self.engines, self.engines + len(self.queue)))
        if self.unready:
            most = min(source.engines, max(self.engines, self.buckets))
        return Demand(
            source.name, {"GPU": source.gpus}, self.left / source.rate, startup,
            self.engines, min(source.least, most), most,
            leaving=self.leaving, follows=bool(source.fed_by),
        )  # fmt: skip


@dataclass
class _Transfer:
    left: float
    """Bytes."""
    waiting: list[Event]


class _Downloads:
    """Weights on their way to nodes, which share what the store and each node can do."""

    def __init__(self, store: Store):
        self.store, self.since = store, 0.0
        self.active: dict[tuple[int, str], _Transfer] = {}
        self.there: set[tuple[int, str]] = set()

    def rates(self) -> dict[tuple[int, str], float]:
        """Bytes/s of each: the node's are divided equally, the store's by what nodes can take."""
        by_node = Counter(node for node, _ in self.active)
        found = {key: self.store.node / by_node[key[0]] for key in self.active}
        first = {name: key for key in reversed(self.active) for name in [key[1]]}
        held = {name for _, name in self.there}
        loads = [
            key for key in self.active
            if not self.store.peers or (first[key[1]] == key and key[1] not in held)
        ]  # fmt: skip
        left = self.store.total
        for n, key in enumerate(sorted(loads, key=lambda key: found[key])):
            found[key] = min(found[key], left / (len(loads) - n))
            left -= found[key]
        return found

    def advance(self, now: float) -> list[Event]:
        """Go on to this moment; returns what waited for transfers that are finished."""
        passed, self.since = now - self.since, now
        for key, rate in self.rates().items():
            self.active[key].left -= rate * passed
        done = [key for key, transfer in self.active.items() if transfer.left < 1]
        self.there |= set(done)
        return [event for key in done for event in self.active.pop(key).waiting]

    def next(self) -> float:
        """Seconds until one is finished, if nothing else begins."""
        return min((self.active[key].left / rate for key, rate in self.rates().items()),
                   default=math.inf)  # fmt: skip


class _Simulation:
    def __init__(
        self,
        sources: Sequence[Source],
        cluster: Cluster,
        policy: Policy,
        others: Sequence[Gang | Pause] = (),
    ):
        self.cluster, self.policy, self.outcome = cluster, policy, Outcome()
        self.pools = {source.name: _Pool(source) for source in sources}
        self.others = {other.name: other for other in others}
        self.free = dict.fromkeys(range(cluster.nodes), cluster.gpus)
        self.engines: set[_Engine] = set()
        self.events: list[tuple[float, int, Event]] = []
        self.count = 0
        self.looks_at = -1.0
        self.looked = 0.0
        self.downloads = _Downloads(cluster.store)
        self.unfinished = Counter(dict.fromkeys(self.others, 1))
        """Buckets by group, trainings and pauses."""
        self.feeds: dict[Place, list[Place]] = defaultdict(list)
        for name, pool in self.pools.items():
            self.unfinished.update(pool.group(b) for b in {b for b, _ in pool.committed})
            for number in list(pool.unready):
                places = [(n, b) for n, b in pool.source.fed_by[number] if self._is_made(n, b)]
                for place in places:
                    self.feeds[place].append((name, number))
                pool.lacks[number] = len(places)
                if not places:  # all buckets that it needs are empty
                    pool.queue.append(pool.unready.pop(number))
        self.displaced: set[str] = set()
        """Trainings for which engines have left, or leave."""
        self.taken: dict[str, list[int]] = {}
        """Nodes of trainings that are ready, or run."""
        self.ready: dict[str, float] = {}
        """Second at which the workers of a training are or will be ready, if it waits for rows."""
        held = self.others.get(cluster.held)
        kept = held.nodes if isinstance(held, Gang) else 0
        self.held = set(range(cluster.nodes - kept, cluster.nodes))

    def _is_made(self, pool: str, bucket: int) -> bool:
        return bool(self.pools[pool].source.buckets[bucket])

    def run(self) -> Outcome:
        for node, second in self.cluster.lost.items():
            self._at(second, partial(self._lose, node))
        self._begin_what_can(0.0)
        self._look(0.0)
        while self.events and +self.unfinished:
            now, _, event = heapq.heappop(self.events)
            event(now)
        for engine in list(self.engines):
            self._end(engine, self.outcome.wall)
        return self._total()

    def _total(self) -> Outcome:
        outcome = self.outcome
        for pool in self.pools.values():
            if set(pool.committed.values()) - {1}:
                raise RuntimeError(f"{pool.source.name}: no node is left for its engines")
            outcome.useful += pool.source.tokens / pool.source.rate * pool.source.gpus
            outcome.answers += sum(len(c) for b in pool.source.buckets for c in b)
        if +self.unfinished:
            raise RuntimeError(f"{', '.join(+self.unfinished)}: what they wait for never comes")
        outcome.useful += sum(g.useful for g in self.others.values() if isinstance(g, Gang))
        outcome.capacity = outcome.wall * self.cluster.nodes * self.cluster.gpus
        return outcome

    # --- events

    def _lose(self, node: int, now: float) -> None:
        self.free.pop(node, None)
        for engine in [e for e in self.engines if e.node == node]:
            self._end(engine, now)
            rate = engine.pool.source.rate / engine.pool.source.gpus
            self.outcome.redone += engine.uncommitted() / rate
            self._at(now + self.cluster.notice, partial(self._notice, engine))
            self.engines.add(engine)  # its buckets are still with it

    def _notice(self, engine: _Engine, now: float) -> None:
        self.engines.discard(engine)
        for bucket in [*engine.bound, *engine.hand.values()]:
            engine.pool.give_back(bucket)
        self._look(now)

    def _finish(self, engine: _Engine, now: float) -> None:
        pool = engine.pool
        finished = [n for n, bucket in engine.hand.items() if not bucket.left]
        engine.hand = {n: bucket for n, bucket in engine.hand.items() if bucket.left}
        self.outcome.wall = max(self.outcome.wall, now)
        pool.buckets -= len(finished)
        for number in finished:
            pool.left -= sum(sum(chunk) for chunk in pool.source.buckets[number])
            self._feed((pool.source.name, number), now)
            self._finish_one(pool.group(number), now)
        self._next(engine, now)
        if self.policy.moves and now - self.looked >= MOVES:
            self._look(now)

    def _feed(self, place: Place, now: float) -> None:
        """Put buckets that needed this one, and no other, into their queues."""
        for name, number in self.feeds.pop(place, ()):
            pool = self.pools[name]
            pool.lacks[number] -= 1
            if not pool.lacks[number]:
                pool.queue.append(pool.unready.pop(number))
                self._wake(pool, now)

    def _wake(self, pool: _Pool, now: float) -> None:
        """Give an idle engine of a pool its bucket, or look for another engine."""
        idle = [e for e in self.engines if e.pool is pool and e.idle and not e.hand]
        for engine in idle[: len(pool.queue)]:
            engine.idle, engine.now = 0, now
            self._next(engine, now)
        if pool.queue:
            self._look(now)

    def _finish_one(self, group: str, now: float) -> None:
        """Note a finished bucket of a group, a training or a pause."""
        self.unfinished[group] -= 1
        if not self.unfinished[group]:
            self.outcome.ends[group] = now
            self.outcome.wall = max(self.outcome.wall, now)
            self._begin_what_can(now)

    def _begin_what_can(self, now: float) -> None:
        """Open pools, and begin trainings and pauses, whose groups are finished."""
        for pool in self.pools.values():
            if not pool.is_open and self._is_after(pool.source.after):
                pool.is_open = True
                self._look(now)
        for other in list(self.others.values()):
            early = other.starts_after if isinstance(other, Gang) else None
            if isinstance(other, Gang) and other.name in self.ready and self._is_after(other.after):
                self._train_now(other, now)
            if other.name in self.taken or not self._is_after(
                other.after if early is None else early
            ):
                continue
            self.taken[other.name] = []
            if isinstance(other, Pause):
                self._at(now + other.seconds, partial(self._finish_one, other.name))
            else:
                self._look(now)

    def _is_after(self, groups: frozenset[str]) -> bool:
        return not any(self.unfinished[group] for group in groups)

    def _next(self, engine: _Engine, now: float) -> None:
        if engine.until <= now or engine not in self.engines:
            return  # its node is lost, or it is not needed any more
        engine.take(self.policy)
        if not engine.pool.queue:
            for idle in self._not_needed(engine.pool, now):
                self._release(idle, now)
            self._look(now)
        if not engine.hand:
            if engine.is_leaving:
                self._release(engine, now)
                self._look(now)
            elif engine in self.engines:  # more buckets may come
                engine.idle += 1
                self._at(now + IDLE, partial(self._end_idle, engine, engine.idle))
            return
        then = engine.finish_one(self.policy)
        if then is not None:
            self._at(then, partial(self._finish, engine))

    def _end_idle(self, engine: _Engine, idle: int, now: float) -> None:
        if engine in self.engines and engine.idle == idle and not engine.hand:
            self._release(engine, now)
            self._look(now)

    def _not_needed(self, pool: _Pool, now: float) -> list[_Engine]:
        """Engines without a bucket, or that still start, of a pool whose queue is empty."""
        own = [e for e in self.engines if e.pool is pool and e.until > now and not e.hand]
        return [e for e in own if math.isinf(e.ready) or not pool.unready]

    def _release(self, engine: _Engine, now: float) -> None:
        self._end(engine, now)
        self.free[engine.node] += engine.pool.source.gpus

    def _end(self, engine: _Engine, now: float) -> None:
        source, ready = engine.pool.source, min(engine.ready, now)
        self.outcome.held += (now - engine.since) * source.gpus
        self.outcome.starting += (ready - engine.since) * source.gpus
        self.outcome.spans.append(Span(source.name, source.gpus, engine.since, ready, now))
        self.engines.discard(engine)
        if engine.is_leaving:
            engine.pool.leaving -= 1
        else:
            engine.pool.engines -= 1

    def _at(self, second: float, event: Event) -> None:
        self.count += 1  # tells events of the same second apart
        heapq.heappush(self.events, (second, self.count, event))

    # --- placement

    def _look(self, now: float) -> None:
        """Decide at the next full second what starts."""
        second = math.ceil(now / LOOK) * LOOK
        if self.looks_at < second:
            self.looks_at = second
            self._at(second, self._place)

    def _place(self, now: float) -> None:
        """Start what the allocator gives the pools, and trainings that have all their nodes."""
        self.looks_at, self.looked = -1.0, now
        places = self._in_turn() if self.policy.in_turn else self._allocated()
        for name, node in places:
            if name in self.pools:
                self._start(self.pools[name], node, now)
            else:
                self.taken[name].append(node)
                self.free[node] = 0
        for name, nodes in self.taken.items():
            gang = self.others[name]
            if isinstance(gang, Gang) and len(nodes) == gang.nodes:
                self._train(gang, now)

    def _allocated(self) -> list[tuple[str, int]]:
        """(pool or training, node) of each engine, or node of a training, to start."""
        size = {"GPU": self.cluster.gpus}
        own = {self.cluster.held} & set(self.taken)
        nodes = [
            Node(str(n), size, {"GPU": free})
            for n, free in self.free.items()
            if n not in self.held or own
        ]
        demands = [
            replace(p.demand(self._startup(p.source)), places=self._places_of(p))
            for p in self.pools.values() if p.is_open
        ]  # fmt: skip
        for name, taken in self.taken.items():
            gang = self.others[name]
            if isinstance(gang, Gang) and len(taken) < gang.nodes:
                demands.append(
                    Demand(name, size, gang.seconds, gang.startup, len(taken), gang.nodes,
                           gang.nodes, displaces=self._may_displace(name))
                )  # fmt: skip
        shares = allocate(nodes, demands)
        trainings = {d.pool for d in demands if d.displaces}
        for name, pool in self.pools.items():
            if name in shares and (self.policy.moves or trainings):
                self._let_leave(pool, shares[name].leave)
        if any(share.leave for share in shares.values()):
            self.displaced |= trainings
        return [
            (d.pool, int(n))
            for d in demands
            for (n,) in shares[d.pool].places[: self._most_now(d.pool)]
        ]  # fmt: skip

    def _may_displace(self, training: str) -> bool:
        return self.policy.displaces and training not in self.displaced

    def _working(self, pool: _Pool) -> list[_Engine]:
        """Engines with buckets that do not leave, those with the least in hand first."""
        own = [e for e in self.engines if e.pool is pool and e.hand and not e.is_leaving]
        return sorted(own, key=lambda e: (len(e.hand), e.since, e.node))

    def _places_of(self, pool: _Pool) -> list[str]:
        """Nodes of its engines; only trainings need to know."""
        return [str(e.node) for e in self._working(pool)] if self.taken else []

    def _let_leave(self, pool: _Pool, places: Sequence[str]) -> None:
        """An engine on each of these nodes, or any, takes no more buckets."""
        for place in places:
            own = [e for e in self._working(pool) if place in ("", str(e.node))]
            if not own:
                continue
            engine = own[0]
            engine.is_leaving = True
            while engine.bound:
                pool.queue.appendleft(engine.bound.pop())
            pool.engines, pool.leaving = pool.engines - 1, pool.leaving + 1

    def _most_now(self, name: str) -> int:
        """Engines that have something to do at once."""
        return len(self.pools[name].queue) if name in self.pools else self.cluster.nodes

    def _startup(self, source: Source) -> float:
        """Seconds of a start, if no other one slows it down."""
        store = self.cluster.store
        download = 0.0 if store.on_nodes else source.bytes / min(store.node, store.total)
        return source.startup + self._load(source) + download

    def _load(self, source: Source) -> float:
        return source.bytes / (self.cluster.store.load * source.gpus)

    def _start(self, pool: _Pool, node: int, now: float) -> None:
        """Take the GPUs, and download the weights if the node has not got them."""
        self.free[node] -= pool.source.gpus
        pool.engines += 1
        factor = self.cluster.slow.get(node, 1.0)
        engine = _Engine(pool, node, now, factor, self.cluster.lost.get(node, math.inf))
        self.engines.add(engine)
        self.outcome.starts += 1
        key = (node, pool.source.weights or pool.source.name)
        loads = partial(self._load_weights, engine)
        if self.cluster.store.on_nodes or not pool.source.bytes or key in self.downloads.there:
            loads(now)
            return
        self._go_on(now)
        transfer = self.downloads.active.setdefault(key, _Transfer(pool.source.bytes, []))
        transfer.waiting.append(loads)
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        """Account for downloads up to now, and come back when the next one is finished."""
        for event in self.downloads.advance(now):
            event(now)
        seconds = self.downloads.next()
        if seconds < math.inf:
            self._at(now + seconds, self._go_on)

    def _load_weights(self, engine: _Engine, now: float) -> None:
        source = engine.pool.source
        self._at(now + source.startup + self._load(source), partial(self._ready, engine))

    def _ready(self, engine: _Engine, now: float) -> None:
        if engine in self.engines:
            engine.now = engine.ready = now
            self._next(engine, now)

    def _train(self, gang: Gang, now: float) -> None:
        """Start the workers of a training that has all its nodes; it trains when it has rows."""
        nodes = self.taken[gang.name]
        self.taken[gang.name] = [*nodes, -1]  # it has begun
        self.ready[gang.name] = now + gang.startup
        if self._is_after(gang.after):
            self._train_now(gang, now)

    def _train_now(self, gang: Gang, now: float) -> None:
        ready = self.ready.pop(gang.name)
        self._at(max(ready, now) + gang.seconds, partial(self._trained, gang, ready))

    def _trained(self, gang: Gang, ready: float, now: float) -> None:
        gpus, since = gang.nodes * self.cluster.gpus, ready - gang.startup
        self.outcome.held += (now - since) * gpus
        self.outcome.starting += gang.startup * gpus
        self.outcome.spans.append(Span(gang.name, gpus, since, now - gang.seconds, now))
        for node in self.taken[gang.name][: gang.nodes]:
            self.free[node] = self.cluster.gpus
        if gang.name == self.cluster.held:
            self.held = set()
        self._finish_one(gang.name, now)
        self._look(now)

    def _in_turn(self) -> Iterator[tuple[str, int]]:
        """As at first: pools in turn, those in need first, each on the node that it fills best."""
        for pool in self._wanting():
            source = pool.source
            fitting = [n for n, free in self.free.items() if free >= source.gpus]
            if fitting:
                yield source.name, min(fitting, key=lambda n: (self.free[n], n))

    def _wanting(self) -> Iterator[_Pool]:
        """Each pool as often as it wants another engine: `least` of all, then in turn."""
        wishes = [
            (number >= pool.source.least, number, order, pool)
            for order, pool in enumerate(self.pools.values())
            if pool.is_open
            for number in range(pool.engines, min(pool.source.engines, len(pool.queue)))
        ]
        wishes.sort(key=lambda wish: wish[:3])
        return (pool for *_, pool in wishes)


def simulate(
    sources: Sequence[Source],
    cluster: Cluster,
    policy: Policy,
    others: Sequence[Gang | Pause] = (),
) -> Outcome:
    """Run all sources' buckets, trainings and pauses to the end.

    Raises:
        RuntimeError: no node that an engine fits on is left.
    """
    return _Simulation(sources, cluster, policy, others).run()
