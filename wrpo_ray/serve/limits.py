"""Limits of each key: requests a minute, and concurrent requests."""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wrpo_ray.serve.errors import ClientError

WINDOW = 60.0
"""Seconds of the sliding window."""


class Limits:
    """Counts the requests of each key; not thread-safe, for one event loop."""

    def __init__(self, per_minute: int, concurrent: int, now: Callable[[], float] = time.monotonic):
        self.per_minute, self.concurrent, self._now = per_minute, concurrent, now
        self._begun: defaultdict[str, deque[float]] = defaultdict(deque)
        self._running: Counter[str] = Counter()

    @contextmanager
    def admit(self, key: str) -> Iterator[None]:
        """Reserve a slot for one request of a key.

        Raises:
            ClientError: 429, with the seconds until a slot is free. A rejected request does not
                count.
        """
        begun, now = self._begun[key], self._now()
        while begun and begun[0] <= now - WINDOW:
            begun.popleft()
        if len(begun) >= self.per_minute:
            wait = max(1, math.ceil(begun[0] + WINDOW - now))
            message = f"more than {self.per_minute} requests in a minute"
            raise ClientError(429, message, code="rate_limit_exceeded", retry_after=wait)
        if self._running[key] >= self.concurrent:
            message = f"more than {self.concurrent} requests at once"
            raise ClientError(429, message, code="concurrency_limit_exceeded", retry_after=1)
        begun.append(now)
        self._running[key] += 1
        try:
            yield
        finally:
            self._running[key] -= 1
