"""The code that runs inside a pool's actors: one worker, its errors as results, and its times."""

import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from wrpo_ray.runtime.ready_queue import Row
from wrpo_ray.runtime.worker_errors import capture_error


class ErrorCapturingWorker:
    """Run a worker and return its errors as results.

    Ray would wrap a raised error in errors of its own, with long traces.
    """

    def __init__(self, what: str, worker: type, arguments: dict[str, Any]):
        self.what, self.worker, self.arguments = what, worker, arguments
        self._loading = threading.Lock()
        self._clock = BusyClock()

    def answers(self) -> None:
        """Return at once: the call itself shows that the actor is up."""

    @cached_property
    def _loaded(self) -> Callable[[Row], Row]:
        made: Callable[[Row], Row] = self.worker(**self.arguments)
        return made

    def work(self, row: Row) -> Row:
        """Return the worker's result, or the captured error, with `seconds` and `idle`."""
        self._clock.begin()
        return capture_error(self.what, self._work, row) | self._clock.end()

    def _work(self, row: Row) -> Row:
        with self._loading:
            worker = self._loaded
        return worker(row)


class BusyClock:
    """How many seconds an actor existed, and how many of them it was idle. Thread-safe."""

    def __init__(self) -> None:
        self._lock, self._running, self._idle = threading.Lock(), 0, 0.0
        self._reported = self._ended = time.monotonic()

    def begin(self) -> None:
        """Note that a row starts."""
        with self._lock:
            if not self._running:
                self._idle += time.monotonic() - self._ended
            self._running += 1

    def end(self) -> dict[str, float]:
        """Note that a row ends; return the `seconds` since the last row ended, and `idle` ones."""
        with self._lock:
            self._running -= 1
            self._ended = time.monotonic()
            times = {"seconds": self._ended - self._reported, "idle": self._idle}
            self._reported, self._idle = self._ended, 0.0
            return times
