"""Writing the report while a run is under way, in a thread that never stops or slows the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from wrpo_ray.runtime.progress import log

EVERY = 20.0
"""Seconds between two reports at the least."""
SHARE = 20
"""The time between two reports is at least so many times what one took."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for a report that is being made."""


class Reporter:
    """Makes the report of a run when it is told that something has changed.

    `make(is_running)` writes it; within the `with` block it is called in a thread.
    """

    def __init__(self, make: Callable[[bool], Any], every: float = EVERY):
        self._make, self._every = make, every
        self._changed, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def tell(self) -> None:
        """A step is finished."""
        self._changed.set()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._changed.set()

    @property
    def has_begun(self) -> bool:
        """Whether the run has got as far as its first step."""
        return self._thread.ident is not None

    def finish(self) -> None:
        """The last report, which the caller waits for, though not for ever."""
        last = threading.Thread(target=self._last, name="report", daemon=True)
        last.start()
        last.join(PATIENCE)

    def _last(self) -> None:
        if self.has_begun:
            self._thread.join()
        self._write(False)

    def _work(self) -> None:
        pause = self._every
        while not self._ended.wait(pause):
            self._changed.wait()
            if self._ended.is_set():
                return
            self._changed.clear()
            started = time.monotonic()
            self._write(True)
            pause = max(self._every, SHARE * (time.monotonic() - started))

    def _write(self, is_running: bool) -> None:
        with best_effort("report"):
            self._make(is_running)


@contextmanager
def best_effort(what: str) -> Any:
    """Whatever goes wrong in the block is told in a line."""
    try:
        yield
    except Exception as error:  # nobody shall lose a run for its report
        log(f"{what}: not written: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
