"""Whether the connection to Ray is open, for threads that call it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from wrpo_ray.errors import WrpoError


class ClosedError(WrpoError):
    """The connection to Ray is closed, or is another one: the run has come to its end."""


class _Connection:
    """Whether threads may call Ray: in the midst of a call they must not lose it.

    Ray waits for a minute then, and ends the process.
    """

    def __init__(self) -> None:
        self._calls, self._changed, self._is_closed = 0, threading.Condition(), False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Calls of Ray that end within seconds.

        Raises:
            ClosedError: the connection was closed.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError("the connection to Ray was closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def open(self) -> None:
        """It is there."""
        self._is_closed = False

    def close(self, seconds: float) -> None:
        """No more calls; those under way are waited for so long."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._calls, seconds)


CONNECTION = _Connection()
