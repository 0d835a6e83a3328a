"""What all rewards share: the answer to be scored, the interface, and why a score can fail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from wrpo_ray.data.records import Message
from wrpo_ray.data.references import Reference, unpack_reference


@dataclass(frozen=True)
class Item:
    """An answer to be scored."""

    messages: list[Message]
    text: str
    reference: str | None
    """As the prompt's record has it."""

    @property
    def right(self) -> Reference | None:
        """The right answer; of a list any is right."""
        return unpack_reference(self.reference)


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


class ListOfTestsError(ValueError):
    """Programs cannot be verified by a list: whether any or all tests are meant is not known."""


def finite(value: float) -> Outcome:
    """The value, or the error that it is not finite."""
    return value if math.isfinite(value) else NotFiniteError(f"the reward is {value}")
