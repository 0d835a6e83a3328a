"""What all rewards share: the answer to be scored, the interface, and why a score can fail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from wrpo_ray.core.records import Message


@dataclass(frozen=True)
class Item:
    """An answer to be scored."""

    messages: list[Message]
    text: str
    reference: str | None


Outcome = float | Exception
"""An answer that cannot be scored gets the error in place of a number."""


class Reward(Protocol):
    """Scores answers."""

    def score(self, items: list[Item]) -> list[Outcome]:
        """One number or error for each item, in order."""
        ...


class TooLongError(ValueError):
    """Prompt and answer do not fit the reward model."""


class NotFiniteError(ValueError):
    """The reward is not a finite number."""


class MissingReferenceError(ValueError):
    """A verifier has nothing to compare the answer with."""


def finite(value: float) -> Outcome:
    """The value, or the error that it is not finite."""
    return value if math.isfinite(value) else NotFiniteError(f"the reward is {value}")
