"""Live report: writes the page during a run, in a thread that cannot stop or slow the run."""

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Self

from wrpo_ray.runtime.progress import log

EVERY = 20.0
"""Minimum seconds between two reports."""
SHARE = 20
"""Minimum time between two reports, as a multiple of the time that one took."""
PATIENCE = 60.0
"""Timeout of the last report at the end of a run, in seconds."""


class Reporter:
    """Writes the report of a run after each change.

    `make(is_running)` writes it. Within the `with` block a thread calls it.
    """

    def __init__(self, make: Callable[[bool], Any], every: float = EVERY):
        self._make, self._every = make, every
        self._changed, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def tell(self) -> None:
        """Report a change, such as a finished step."""
        self._changed.set()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._changed.set()

    @property
    def has_begun(self) -> bool:
        """Whether the run has reached its first step."""
        return self._thread.ident is not None

    def finish(self) -> None:
        """Write the last report; wait for it at most `PATIENCE` seconds."""
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
    """Log an error of the block in one line, and go on."""
    try:
        yield
    except Exception as error:  # a report must never stop a run
        log(f"{what}: not written: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
