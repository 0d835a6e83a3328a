"""Guards Ray calls of threads against the end of the connection."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from wrpo_ray.errors import WrpoError


class ClosedError(WrpoError):
    """The connection to Ray was closed, because the run ends."""


class _Connection:
    """Counts the calls of Ray under way: the connection is closed between calls only.

    A call that loses its connection waits for a minute, and Ray then ends the process.
    """

    def __init__(self) -> None:
        self._calls, self._changed, self._is_closed = 0, threading.Condition(), False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the connection open for a block of calls that take seconds at most.

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
        """Allow calls."""
        self._is_closed = False

    def close(self, seconds: float) -> None:
        """Refuse new calls, and wait so long for those under way."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._calls, seconds)


CONNECTION = _Connection()
