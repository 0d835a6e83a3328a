"""The interface that every reward implements: item, outcome, and errors of an item."""

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
    """As in the prompt's record."""

    @property
    def right(self) -> Reference | None:
        """The right answer; if it is a list, any of them is right."""
        return unpack_reference(self.reference)


Outcome = float | Exception
"""A score, or the error of an answer that cannot be scored."""


class Reward(Protocol):
    """A scorer of answers: a reward, or a verifier, whose scores are 1.0 and 0.0."""

    def score(self, items: list[Item]) -> list[Outcome]:
        """Return one score or error for each item, in order."""


class TooLongError(ValueError):
    """Prompt and answer do not fit the reward model."""


class NotFiniteError(ValueError):
    """The reward is not a finite number."""


class MissingReferenceError(ValueError):
    """The prompt has no reference that a verifier could compare the answer with."""


class ListOfTestsError(ValueError):
    """A list of tests is ambiguous: it does not say whether any or all of them must pass."""


def finite(value: float) -> Outcome:
    """Return the value, or a NotFiniteError."""
    return value if math.isfinite(value) else NotFiniteError(f"the reward is {value}")
