"""Steps that one thread of the driver finishes and another one waits for."""

import threading
from collections.abc import Iterable

from wrpo_ray.storage.steps import Step


class Awaited:
    """Steps that are not finished, until all are or the wait is given up."""

    def __init__(self, steps: Iterable[Step]):
        self._left = {step.key for step in steps}
        self._lock, self._over = threading.Lock(), threading.Event()
        self.is_given_up = False
        """Whether the branches have ended, with all done or by an error in one."""
        self._settle()

    def _settle(self) -> None:
        if not self._left:
            self._over.set()

    def finished(self, step: Step) -> None:
        """Note that a step is finished; others than those awaited are ignored."""
        with self._lock:
            self._left.discard(step.key)
            self._settle()

    def give_up(self) -> None:
        """End the wait, as the rest will not be finished."""
        self.is_given_up = True
        self._over.set()

    def wait(self) -> bool:
        """Whether all steps are finished, once that is known."""
        self._over.wait()
        with self._lock:
            return not self._left
