"""Limits of our own calls to an endpoint: calls in flight, requests and tokens a minute.

Starts are spaced evenly: any stretch of time has its share of the minute's limit and no more. Not
an `aiolimiter.AsyncLimiter`: that lets a burst of a whole minute start at once, takes no charge
above its capacity, cannot be refunded what an answer did not use, and cannot be paused.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from wrpo_ray.config import EndpointConfig

SLACK = 0.05
"""Seconds of a limit that a late wake-up may make up for."""
POLL_INTERVAL = 0.1
"""Seconds between checks whether answers with fewer tokens than charged have eased a limit."""


class RateLimits:
    """All limits of one endpoint; used by one event loop.

    A call takes 60 / requests_per_minute seconds, and for its tokens 60 / tokens_per_minute
    each: the next one starts when these are over. Tokens are charged by an estimate, which is
    corrected by the answer's usage. A call that fails stays charged.
    """

    def __init__(self, config: EndpointConfig):
        self._slots = asyncio.Semaphore(config.concurrency)
        self._turn = asyncio.Lock()
        self._requests = Pace(config.requests_per_minute)
        self._tokens = Pace(config.tokens_per_minute)

    @asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[None]:
        """Wait until a call of so many tokens may start, and hold its slot while it runs."""
        async with self._slots:
            async with self._turn:
                while (wait := max(self._requests.wait, self._tokens.wait)) > 0:
                    await asyncio.sleep(min(wait, POLL_INTERVAL))
                self._requests.charge(1)
                self._tokens.charge(tokens)
            yield

    def correct_tokens(self, difference: int) -> None:
        """Charge so many tokens more, or refund them where the number is negative."""
        self._tokens.correct(difference)

    def pause(self, seconds: float) -> None:
        """Start no call for so many seconds."""
        self._requests.pause(seconds)


class Pace:
    """The time at which the next call may start, by one limit; None is no limit."""

    def __init__(self, per_minute: int | None):
        self._seconds_each = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    @property
    def wait(self) -> float:
        """Seconds until the next start; 0 or less if it may start now."""
        return self._free_at - time.monotonic()

    def charge(self, count: int) -> None:
        """Reserve the time of so many requests or tokens from now on."""
        self._free_at = max(self._free_at, time.monotonic() - SLACK) + count * self._seconds_each

    def correct(self, count: int) -> None:
        """Add the time of so many, or refund it where the count is negative."""
        self._free_at += count * self._seconds_each

    def pause(self, seconds: float) -> None:
        """Start nothing for so many seconds."""
        self._free_at = max(self._free_at, time.monotonic() + seconds)
