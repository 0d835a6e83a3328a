"""Generation on a cluster that is not there: the scheduling policy, event by event.

What is simulated is what `stages.generate.stage` and `runtime.pool` do: each source has its engines
and a queue of buckets; engines of all pools take the GPUs that are free; an engine starts, takes
buckets, answers as many prompts at once as it has slots, commits chunk by chunk, and gives its
GPUs back when its pool has no bucket left. Nodes may be slow, or be lost with what their engines
had not committed. Not simulated: prefill, network, storage, the driver's own time.

Every active answer of an engine advances at the same speed, so an engine counts the tokens that
each has made since it began (`made`), and an answer of n tokens that enters at m leaves at m + n.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

Event = Callable[[float], None]
Chunk = Sequence[float]
"""Tokens of each answer that is committed together."""


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

    @property
    def tokens(self) -> float:
        """Of all answers."""
        return sum(sum(chunk) for bucket in self.buckets for chunk in bucket)

    def speed(self, active: int) -> float:
        """Tokens/s of each of `active` answers."""
        return self.rate * (1 + self.half / self.slots) / (active + self.half)


@dataclass(frozen=True)
class Policy:
    """What may be decided."""

    in_hand: int = 1
    """Buckets that an engine answers at the same time."""
    ahead: int = 1
    """Further buckets that are bound to an engine; `core.pools` binds none."""
    barrier: bool = True
    """Whether a chunk waits until the one before is answered and committed."""


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
        self.now = now + pool.source.startup
        self.factor, self.made = factor, 0.0
        self.active: list[tuple[float, int, int, float]] = []
        """(value of `made` when it leaves, bucket, chunk, tokens) of each answer, a heap."""
        self.hand: dict[int, _Bucket] = {}
        self.bound: deque[_Bucket] = deque()

    def take(self, policy: Policy) -> None:
        """Fill the hand, then what is bound, from the pool's queue."""
        while len(self.hand) < policy.in_hand and (self.bound or self.pool.queue):
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
        self.source, self.engines = source, 0
        chunks = {
            (b, c): chunk
            for b, bucket in enumerate(source.buckets)
            for c, chunk in enumerate(bucket)
        }
        self.committed = dict.fromkeys(chunks, 0)
        self.queue = deque(
            _Bucket(b, dict(enumerate(bucket))) for b, bucket in enumerate(source.buckets) if bucket
        )

    def give_back(self, bucket: _Bucket) -> None:
        """Of a lost engine: what it had committed is not done again."""
        left = {c: chunk for c, chunk in bucket.chunks.items() if c in bucket.left}
        if left:
            self.queue.appendleft(_Bucket(bucket.number, left))


class _Simulation:
    def __init__(self, sources: Sequence[Source], cluster: Cluster, policy: Policy):
        self.cluster, self.policy, self.outcome = cluster, policy, Outcome()
        self.pools = [_Pool(source) for source in sources]
        self.free = dict.fromkeys(range(cluster.nodes), cluster.gpus)
        self.engines: set[_Engine] = set()
        self.events: list[tuple[float, int, Event]] = []
        self.count = 0

    def run(self) -> Outcome:
        for node, second in self.cluster.lost.items():
            self._at(second, partial(self._lose, node))
        self._place(0.0)
        while self.events:
            now, _, event = heapq.heappop(self.events)
            event(now)
            if not self.engines and not any(pool.queue for pool in self.pools):
                break
        return self._total()

    def _total(self) -> Outcome:
        outcome = self.outcome
        for pool in self.pools:
            if set(pool.committed.values()) - {1}:
                raise RuntimeError(f"{pool.source.name}: no node is left for its engines")
            outcome.useful += pool.source.tokens / pool.source.rate * pool.source.gpus
            outcome.answers += sum(len(c) for b in pool.source.buckets for c in b)
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
        self._place(now)

    def _finish(self, engine: _Engine, now: float) -> None:
        engine.hand = {n: bucket for n, bucket in engine.hand.items() if bucket.left}
        self.outcome.wall = max(self.outcome.wall, now)
        self._next(engine, now)

    def _next(self, engine: _Engine, now: float) -> None:
        if engine.until <= now or engine not in self.engines:
            return  # its node is lost, or it is not needed any more
        engine.take(self.policy)
        if not engine.pool.queue:
            for idle in self._not_needed(engine.pool, now):
                self._end(idle, now)
                self.free[idle.node] += idle.pool.source.gpus
            self._place(now)
        if not engine.hand:
            return
        then = engine.finish_one(self.policy)
        if then is not None:
            self._at(then, partial(self._finish, engine))

    def _not_needed(self, pool: _Pool, now: float) -> list[_Engine]:
        """Engines without a bucket, or that still start, of a pool whose queue is empty."""
        own = [e for e in self.engines if e.pool is pool and e.until > now]
        return [e for e in own if not e.hand]

    def _end(self, engine: _Engine, now: float) -> None:
        source = engine.pool.source
        self.outcome.held += (now - engine.since) * source.gpus
        self.outcome.starting += min(source.startup, now - engine.since) * source.gpus
        self.engines.discard(engine)
        engine.pool.engines -= 1

    def _at(self, second: float, event: Event) -> None:
        self.count += 1  # tells events of the same second apart
        heapq.heappush(self.events, (second, self.count, event))

    # --- placement

    def _place(self, now: float) -> None:
        """Start engines while there are buckets and room: pools in turn, those in need first."""
        for pool in self._wanting():
            source = pool.source
            fitting = [n for n, free in self.free.items() if free >= source.gpus]
            if not fitting:
                continue
            node = min(fitting, key=lambda n: (self.free[n], n))
            self.free[node] -= source.gpus
            pool.engines += 1
            factor = self.cluster.slow.get(node, 1.0)
            engine = _Engine(pool, node, now, factor, self.cluster.lost.get(node, math.inf))
            self.engines.add(engine)
            self.outcome.starts += 1
            self._at(engine.now, partial(self._next, engine))

    def _wanting(self) -> Iterator[_Pool]:
        """Each pool as often as it wants another engine: `least` of all, then in turn."""
        wishes = [
            (number >= pool.source.least, number, order, pool)
            for order, pool in enumerate(self.pools)
            for number in range(pool.engines, min(pool.source.engines, len(pool.queue)))
        ]
        wishes.sort(key=lambda wish: wish[:3])
        return (pool for *_, pool in wishes)


def simulate(sources: Sequence[Source], cluster: Cluster, policy: Policy) -> Outcome:
    """Run all sources' buckets to the end.

    Raises:
        RuntimeError: no node that an engine fits on is left.
    """
    return _Simulation(sources, cluster, policy).run()
