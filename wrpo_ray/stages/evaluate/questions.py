"""Prompts that are made from others and from answers to them, when they are read.

Nothing of them is stored: a judge's question, a second turn or a mixture's prompt keeps the id of
the prompt that it comes from, and `asks` tells its answers' store from others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from wrpo_ray.data.records import (
    ITEM,
    PROMPT,
    RESPONSE,
    Message,
)
from wrpo_ray.data.shards import (
    Bucket,
    Prompts,
    Samples,
    read_bucket,
)
from wrpo_ray.stages.evaluate.answers import Answer, Answers
from wrpo_ray.stages.evaluate.arena_hard import is_unfinished
from wrpo_ray.stages.evaluate.protocols import Judging
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]
Found = list[dict[str, Answer]]
"""Each model's answers by prompt id."""

GO_ON = "continue your judgment and finish by outputting a final verdict label"
"""What Arena-Hard asks a judge that has given no verdict, once."""

MIXTURE = """\
You are given answers of several assistants to the user's last message. Some may be wrong or
incomplete. Weigh them against each other and give one answer of your own: accurate, complete and
well ordered. Answer the user; do not speak of these answers.

{answers}"""


@dataclass(frozen=True)
class Derived(Prompts):
    """Prompts with other conversations; a prompt that lacks an answer is not among them."""

    answers: tuple[Answers, ...]

    kind = "Derived"
    """Its name in `asks`, and so in the keys of steps: it never changes, whatever the class is
    called."""
    schema = PROMPT

    @property
    def inputs(self) -> tuple[Step, ...]:
        """The prompts' step, and those of the answers."""
        return (self.step, *(step for answers in self.answers for step in answers.steps))

    @property
    def asks(self) -> str:
        """A hash of what decides the conversations."""
        return digest([self.kind, [a.identity for a in self.answers], self._how()], 16)

    def read(self, root: Folder, bucket: Bucket, columns: list[str] | None = None) -> pa.Table:
        """The bucket's prompts with their new conversations."""
        found = self.found(root, bucket)
        rows = [
            item | {"messages": self._messages(item, found)} for item in self.items(root, bucket)
        ]
        kept = [row for row in rows if row["messages"]]
        table = pa.Table.from_pylist(kept, schema=PROMPT)
        return table.select(columns or PROMPT.names)

    def items(self, root: Folder, bucket: Bucket) -> list[Row]:
        """The prompts themselves."""
        return items(self, self.schema, root, bucket)

    def found(self, root: Folder, bucket: Bucket) -> Found:
        """The answers."""
        return [answers.read(root, bucket) for answers in self.answers]

    def _how(self) -> Any:
        """What else decides the conversations."""
        return None

    def _messages(self, item: Row, found: Found) -> list[Message] | None:
        raise NotImplementedError


def items(prompts: Prompts, schema: pa.Schema, root: Folder, bucket: Bucket) -> list[Row]:
    """The bucket's prompts with all columns of their schema."""
    rows = read_bucket(root / prompts.step.folder, bucket, schema).to_pylist()
    return [row for row in rows if row["split"] in prompts.splits]


def texts_of(item: Row, found: Found) -> list[str] | None:
    """Each model's answer to a prompt; None where one is lacking."""
    given = [answers.get(item["prompt_id"]) for answers in found]
    return None if None in given else [answer.text for answer in given if answer]


@dataclass(frozen=True)
class SecondTurn(Derived):
    """What a benchmark's user says after the model's first answer."""

    kind = "SecondTurn"
    schema = ITEM

    def _messages(self, item: Row, found: Found) -> list[Message] | None:
        texts = texts_of(item, found)
        if texts is None or len(item["turns"]) < 2:
            return None
        return [
            *item["messages"],
            {"role": "assistant", "content": texts[0]},
            {"role": "user", "content": item["turns"][1]},
        ]


@dataclass(frozen=True)
class Mixture(Derived):
    """The prompts with all sources' answers before them, for the model that mixes them."""

    kind = "Mixture"

    def _how(self) -> Any:
        return MIXTURE

    def _messages(self, item: Row, found: Found) -> list[Message] | None:
        given = [answers[item["prompt_id"]] for answers in found if item["prompt_id"] in answers]
        if not given:
            return None
        listed = "\n\n".join(f"[Answer {i}]\n{a.text}" for i, a in enumerate(given, start=1))
        *before, last = item["messages"]
        # Not every template takes a system message, so all of it is the user's.
        asked = f"{MIXTURE.format(answers=listed)}\n\n[The user's message]\n{last['content']}"
        return [*before, last | {"content": asked}]


@dataclass(frozen=True)
class Questions(Derived):
    """What a judge is asked in one game, or about one turn."""

    kind = "Questions"

    judging: Judging
    position: int

    @property
    def schema(self) -> pa.Schema:
        """Own prompts have no more than PROMPT."""
        return self.judging.schema

    def _how(self) -> Any:
        return [self.judging.identity, self.position]

    def _messages(self, item: Row, found: Found) -> list[Message] | None:
        texts = texts_of(item, found)
        return None if texts is None else self.judging.question(item, texts, self.position)


@dataclass(frozen=True)
class Continued(Questions):
    """The same, after a judgment without a verdict."""

    kind = "Continued"

    judgments: Samples

    @property
    def inputs(self) -> tuple[Step, ...]:
        """The first judgments too."""
        return (*super().inputs, self.judgments.step)

    def _how(self) -> Any:
        return [super()._how(), self.judgments.step.folder, GO_ON]

    def found(self, root: Folder, bucket: Bucket) -> Found:
        """The models' answers, and last the judge's."""
        return [*super().found(root, bucket), said(self.judgments, root, bucket)]

    def _messages(self, item: Row, found: Found) -> list[Message] | None:
        *answers, judged = found
        question, judgment = super()._messages(item, answers), judged.get(item["prompt_id"])
        if question is None or judgment is None or not is_unfinished(judgment.text):
            return None
        return [
            *question,
            {"role": "assistant", "content": judgment.text},
            {"role": "user", "content": GO_ON},
        ]


def said(judgments: Samples, root: Folder, bucket: Bucket) -> dict[str, Answer]:
    """A judge's texts by prompt id."""
    return Answers("judge", (judgments,)).read(root, bucket)


def rows_of(judgments: Samples, root: Folder, bucket: Bucket) -> dict[str, Row]:
    """A judge's RESPONSE rows by prompt id."""
    columns = ["prompt_id", "source", "sample", "text", "finish_reason", "logprobs"]
    rows: Sequence[Row] = judgments.read(root, bucket, RESPONSE, columns).to_pylist()
    return {row["prompt_id"]: row for row in rows}
