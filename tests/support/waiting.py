"""Waits that end with an event, never with a guess at how long something takes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

LIMIT = 900.0
"""Seconds after which a test gives up: only what hangs takes so long, on a machine however busy."""


def wait_until(is_true: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: `process`, which has to bring it about, ended first.
        TimeoutError: it did not hold within `LIMIT`.
    """
    deadline = time.monotonic() + LIMIT
    while not is_true():
        if process is not None and process.poll() is not None:
            assert is_true(), f"the process ended with {process.returncode} before that"
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {LIMIT:.0f} s")
        time.sleep(0.05)


def start_patiently(start: Callable[[], T]) -> T:
    """Start a node of Ray, which gives each one 30 s: too little on a machine with other work."""
    for _ in range(4):
        with suppress(Exception):
            return start()
    return start()
