"""Overload: places for keys in turn, refusals before a body is read, when refused clients return.

All of it counts the requests of one event loop.
"""

import asyncio
import itertools
import math
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

LONGEST_WAIT = 20.0
"""Maximum seconds of a Retry-After, before jitter: about what a replica takes to start anew, after
which nobody should still wait for the rate at which the lost one ended nothing."""
JITTER = 1.25
"""A Retry-After is up to so many times what was computed, so that clients do not come together."""
RECHECK = 1.0
"""Seconds after which a waiting request looks for places that have come without an end."""
SAMPLE = 64
"""Ends of requests from which the rate is measured."""


class FullError(Exception):
    """More requests wait than may."""


class FairQueue:
    """Places that go to the key that holds the fewest, so that no backlog delays another key.

    Of several, it is the one that had its last place the longest ago. So a key that holds none
    gets the next place that becomes free, however many requests of others wait. Beyond `waiting`,
    the newest waiting request of the key with the most requests is refused.
    """

    def __init__(self, places: Callable[[], int], waiting: Callable[[], float] = lambda: math.inf):
        self.places, self.waiting = places, waiting
        self._held: Counter[str] = Counter()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        self._served: Counter[str] = Counter()
        """When each key last had a place, as a number that grows."""
        self._numbers = itertools.count(1)

    async def enter(self, key: str) -> None:
        """Wait for a place, which `leave` gives back.

        Raises:
            FullError: too many requests wait.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key, deque()).append(turn)
        self._give()
        if not turn.done() and sum(map(len, self._queues.values())) > self.waiting():
            self._refuse_one(key)
        try:
            while not turn.done():
                await asyncio.wait({turn}, timeout=RECHECK)
                self._give()
            turn.result()
        except asyncio.CancelledError:
            if not turn.done():
                self._queues[key].remove(turn)
                self._forget_empty(key)
            elif turn.exception() is None:
                self.leave(key)  # cancelled just when it had its place
            raise

    def leave(self, key: str) -> None:
        """Give a place back."""
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
        self._give()

    @asynccontextmanager
    async def place(self, key: str) -> AsyncIterator[None]:
        """Hold a place."""
        await self.enter(key)
        try:
            yield
        finally:
            self.leave(key)

    def _give(self) -> None:
        while self._queues and self._held.total() < self.places():
            key = min(self._queues, key=lambda k: (self._held[k], self._served[k]))
            self._queues[key].popleft().set_result(None)
            self._forget_empty(key)
            self._held[key] += 1
            self._served[key] = next(self._numbers)

    def _refuse_one(self, newcomer: str) -> None:
        key = max(self._queues, key=lambda k: (self._held[k] + len(self._queues[k]), k == newcomer))
        self._queues[key].pop().set_exception(FullError())
        self._forget_empty(key)

    def _forget_empty(self, key: str) -> None:
        if not self._queues[key]:
            del self._queues[key]


class Crowd:
    """Counts the requests of each key from their headers to their ends.

    One too many is refused before its body is read. A key with fewer requests than another is let
    in: in a `FairQueue`, its request takes the place of one of the other's.
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
        is_full = self._here.total() >= self._bound()
        if is_full and self._here[key] + 1 >= max(self._here.values(), default=0):
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
