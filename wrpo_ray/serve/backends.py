"""The interfaces between the endpoint and what runs behind it: models, a reward, metrics."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from wrpo_ray.config import ServeConfig, ServedModel
from wrpo_ray.data.records import Message

Call = Literal["chat", "completions"]
DONE = "[DONE]"
"""The last text of a complete answer."""
MAX_BATCH = 32
"""Answers that a replica of the reward scores in one batch; it takes no more at a time."""


def ongoing(model: ServedModel, settings: ServeConfig) -> int:
    """Return how many requests a replica takes: as many as its engine works on at a time."""
    return int(model.engine.get("max_num_seqs", settings.ongoing))


@dataclass(frozen=True)
class Rejection:
    """An HTTP error that a model returns instead of an answer, such as 400 for a long prompt.

    503 means that its engine is dead, so another replica may answer; 500 is not retried.
    """

    status: int
    message: str
    param: str | None = None


Replies = AsyncGenerator[list[str] | Rejection, None]
"""JSON texts of an answer as they come; the last text of a complete answer is `DONE`."""


class LostError(Exception):
    """A replica died before it had answered."""


class Backend(Protocol):
    """A model."""

    def ask(self, call: Call, body: dict[str, object], key: str) -> Replies:
        """Yield the answer to a request of a key, or the chunks of its stream.

        Raises:
            LostError: the replica died.
        """

    def places(self) -> int:
        """Return how many requests may be at its replicas at a time."""

    async def ready(self) -> bool:
        """Whether a replica is running."""


class Scorer(Protocol):
    """A reward."""

    async def score(self, messages: list[Message], text: str) -> float | Rejection:
        """Return the reward of an answer.

        Raises:
            LostError: the replica died.
        """

    def places(self) -> int:
        """Return how many answers may be at its replicas at a time."""


class Recorder(Protocol):
    """Metrics."""

    def finished(self, model: str, outcome: str, seconds: float) -> None:
        """Record the end of a request: an HTTP status, or `broken` or `left` during a stream."""

    def first_token(self, model: str, seconds: float) -> None:
        """Record the time to a stream's first tokens."""

    def tokens(self, model: str, prompt: int, answer: int) -> None:
        """Record the token counts of a request."""
