"""Overload: places for keys in turn, refusals before a body is read, when refused clients return.

All of it counts the requests of one event loop.
"""

import asyncio
import math
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

LONGEST_WAIT = 20.0
"""Maximum seconds of a Retry-After, before jitter: about what a replica takes to start anew, after
which nobody should still wait for the rate at which the lost one ended nothing."""
JITTER = 1.25
"""A Retry-After is up to so many times what was computed, so that clients do not come together."""
RECHECK = 1.0
"""Seconds after which a waiting request looks for places that have come without an end."""
SAMPLE = 64
"""Ends of requests from which the rate is measured."""
DEBT = 60.0
"""The most place-seconds by which a key's turns come after those of others."""


class FullError(Exception):
    """More requests wait than may."""


@dataclass(eq=False)
class _Turn:
    """A request of a key that waits for its places, or holds them."""

    key: str
    weight: int
    given: asyncio.Future[None]
    begun: float = 0.0


class FairQueue:
    """Places that go to the key that holds the fewest, so that no backlog delays another key.

    Of several, it is the one that has used the least: place-seconds while others waited, as in
    start-time fair queuing (Goyal et al., 1996). What a key has used counts from that of the key
    here with the least, up to `DEBT`: nobody saves up by being away, and nobody pays for an idle
    server. A key that holds none gets the next place that becomes free before all that hold some,
    however many requests of these wait. Beyond `waiting`, the newest waiting request of the key
    with the most requests is refused.
    """

    def __init__(
        self,
        places: Callable[[], int],
        waiting: Callable[[], float] = lambda: math.inf,
        now: Callable[[], float] = time.monotonic,
    ):
        self.places, self.waiting, self._now = places, waiting, now
        self._held: Counter[str] = Counter()
        self._queues: dict[str, deque[_Turn]] = {}
        self._used: dict[str, float] = {}

    async def enter(self, key: str, weight: int = 1) -> _Turn:
        """Wait for a place, which `leave` gives back.

        A request of several answers has that `weight`: it starts at one free place, and counts as
        so many from then on.

        Raises:
            FullError: too many requests wait.
        """
        turn = _Turn(key, weight, asyncio.get_running_loop().create_future())
        if key not in self._queues and key not in self._held:
            least = self._least()
            self._used[key] = min(max(self._used.get(key, 0.0), least), least + DEBT)
        self._queues.setdefault(key, deque()).append(turn)
        self._give()
        if not turn.given.done() and sum(map(len, self._queues.values())) > self.waiting():
            self._refuse_one(key)
        try:
            while not turn.given.done():
                await asyncio.wait({turn.given}, timeout=RECHECK)
                self._give()
            turn.given.result()
        except asyncio.CancelledError:
            if not turn.given.done():
                self._queues[key].remove(turn)
                self._forget_empty(key)
            elif turn.given.exception() is None:
                self.leave(turn)  # cancelled just when it had its place
            raise
        return turn

    def leave(self, turn: _Turn) -> None:
        """Give places back."""
        if self._queues:
            used = self._used[turn.key] + turn.weight * (self._now() - turn.begun)
            self._used[turn.key] = min(used, self._least() + DEBT)
        self._held[turn.key] -= turn.weight
        if not self._held[turn.key]:
            del self._held[turn.key]
        self._give()

    @asynccontextmanager
    async def place(self, key: str) -> AsyncIterator[None]:
        """Hold a place."""
        turn = await self.enter(key)
        try:
            yield
        finally:
            self.leave(turn)

    def _give(self) -> None:
        while self._queues and self._held.total() < self.places():
            key = min(self._queues, key=lambda k: (self._held[k], self._used[k]))
            turn = self._queues[key].popleft()
            turn.begun = self._now()
            turn.given.set_result(None)
            self._forget_empty(key)
            self._held[key] += turn.weight

    def _least(self) -> float:
        """Return the least that a key here has used."""
        return min((self._used[key] for key in {*self._queues, *self._held}), default=0.0)

    def _refuse_one(self, newcomer: str) -> None:
        key = max(self._queues, key=lambda k: (self._held[k] + len(self._queues[k]), k == newcomer))
        self._queues[key].pop().given.set_exception(FullError())
        self._forget_empty(key)

    def _forget_empty(self, key: str) -> None:
        if not self._queues[key]:
            del self._queues[key]


class Crowd:
    """Counts the requests of each key from their headers to their ends.

    One too many is refused before its body is read. A key with fewer requests than another is let
    in, up to twice as many in all: in a `FairQueue`, its request takes the place of one of the
    other's.
    """

    def __init__(self, bound: Callable[[], int]):
        self._bound = bound
        self._here: Counter[str] = Counter()

    @contextmanager
    def entered(self, key: str) -> Iterator[None]:
        """Count a request.

        Raises:
            FullError: there are too many.
        """
        here, bound = self._here.total(), self._bound()
        has_most = self._here[key] + 1 >= max(self._here.values(), default=0)
        if here >= 2 * bound or (here >= bound and has_most):
            raise FullError
        self._here[key] += 1
        try:
            yield
        finally:
            self._here[key] -= 1
            if not self._here[key]:
                del self._here[key]


class Returns:
    """Says when refused clients may return: one by one, at the rate at which requests end."""

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(1, JITTER),
    ):
        self._now, self._jitter = now, jitter
        self._ends: deque[float] = deque(maxlen=SAMPLE)
        self._next: dict[str, float] = {}
        """When the next refused client of a key may return."""

    def ended(self) -> None:
        """Count the end of a request."""
        self._ends.append(self._now())

    @property
    def rate(self) -> float:
        """Requests that end in a second; 1 before two have ended."""
        if len(self._ends) < 2:
            return 1.0
        return (len(self._ends) - 1) / max(self._now() - self._ends[0], 1e-3)

    def after(self, key: str) -> int:
        """Return the seconds for a Retry-After."""
        now = self._now()
        self._next = {k: at for k, at in self._next.items() if at > now} | {
            key: max(self._next.get(key, now), now)
        }
        at = self._next[key] + len(self._next) / self.rate  # keys with refused clients take turns
        self._next[key] = min(at, now + LONGEST_WAIT)
        return math.ceil((self._next[key] - now) * self._jitter())
