"""Prompts that are derived from other prompts and answers when they are read.

They are not stored. A judge's prompt, a second turn or a mixture's prompt keeps the id of the
prompt it is derived from; `asks` distinguishes the stores of their answers.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from wrpo_ray.data.buckets import Bucket, read_bucket
from wrpo_ray.data.records import ITEM, PROMPT, RESPONSE, Message
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.stages.evaluate.answers import Answer, Answers
from wrpo_ray.stages.evaluate.arena_hard import is_unfinished
from wrpo_ray.stages.evaluate.protocols import Item, Judging, Judgment
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

AnswersByModel = list[dict[str, Answer]]
"""For each model {prompt id: answer}."""

CONTINUE = "continue your judgment and finish by outputting a final verdict label"
"""Arena-Hard's second message to a judge whose judgment has no verdict."""

MIXTURE = """\
You are given answers of several assistants to the user's last message. Some may be wrong or
incomplete. Weigh them against each other and give one answer of your own: accurate, complete and
well ordered. Answer the user; do not speak of these answers.

{answers}"""


@dataclass(frozen=True)
class Derived(Prompts):
    """Prompts with new conversations; those that lack an answer are left out."""

    answers: tuple[Answers, ...]

    kind = "Derived"
    """The class's name in `asks`, and so in step keys: it never changes."""
    schema = PROMPT

    @property
    def inputs(self) -> tuple[Step, ...]:
        """The prompts' step, and those of the answers."""
        return (self.step, *(step for answers in self.answers for step in answers.steps))

    @property
    def asks(self) -> str:
        """A hash of everything that determines the conversations."""
        return digest([self.kind, [a.identity for a in self.answers], self._how()], 16)

    def read(self, root: Folder, bucket: Bucket, columns: list[str] | None = None) -> pa.Table:
        """The bucket's prompts with their new conversations."""
        found = self.found(root, bucket)
        rows = [
            {**item, "messages": self._messages(item, found)} for item in self.items(root, bucket)
        ]
        kept = [row for row in rows if row["messages"]]
        table = pa.Table.from_pylist(kept, schema=PROMPT)
        return table.select(columns or PROMPT.names)

    def items(self, root: Folder, bucket: Bucket) -> list[Item]:
        """Return the underlying prompts."""
        return items(self, self.schema, root, bucket)

    def found(self, root: Folder, bucket: Bucket) -> AnswersByModel:
        """Return the answers that the conversations are built from."""
        return [answers.read(root, bucket) for answers in self.answers]

    def _how(self) -> Any:
        """Return whatever else determines the conversations, for `asks`."""
        return None

    def _messages(self, item: Item, found: AnswersByModel) -> list[Message] | None:
        raise NotImplementedError


def items(prompts: Prompts, schema: pa.Schema, root: Folder, bucket: Bucket) -> list[Item]:
    """Read the bucket's prompts with all columns of their schema."""
    rows: list[Item] = read_bucket(root / prompts.step.folder, bucket, schema).to_pylist()
    return [row for row in rows if row["split"] in prompts.splits]


def texts_of(item: Item, found: AnswersByModel) -> list[str] | None:
    """Return each model's answer to a prompt; None if one is missing."""
    given = [answers.get(item["prompt_id"]) for answers in found]
    return None if None in given else [answer.text for answer in given if answer]


@dataclass(frozen=True)
class SecondTurn(Derived):
    """The conversation up to a benchmark's second user message."""

    kind = "SecondTurn"
    schema = ITEM

    def _messages(self, item: Item, found: AnswersByModel) -> list[Message] | None:
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
    """The prompts together with all sources' answers, for the model that merges them."""

    kind = "Mixture"

    def _how(self) -> Any:
        return MIXTURE

    def _messages(self, item: Item, found: AnswersByModel) -> list[Message] | None:
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
    """The judge's prompts for one game or one turn."""

    kind = "Questions"

    judging: Judging
    position: int

    @property
    def schema(self) -> pa.Schema:
        """ITEM for benchmarks, PROMPT for the run's own prompts."""
        return self.judging.schema

    def _how(self) -> Any:
        return [self.judging.identity, self.position]

    def _messages(self, item: Item, found: AnswersByModel) -> list[Message] | None:
        texts = texts_of(item, found)
        return None if texts is None else self.judging.question(item, texts, self.position)


@dataclass(frozen=True)
class Continued(Questions):
    """The judge's prompts, extended by a judgment without a verdict and the request to continue."""

    kind = "Continued"

    judgments: Samples

    @property
    def inputs(self) -> tuple[Step, ...]:
        """The steps of `Questions`, and that of the first judgments."""
        return (*super().inputs, self.judgments.step)

    def _how(self) -> Any:
        return [super()._how(), self.judgments.step.folder, CONTINUE]

    def found(self, root: Folder, bucket: Bucket) -> AnswersByModel:
        """Return the models' answers and, last, the judge's."""
        return [*super().found(root, bucket), judgments_of(self.judgments, root, bucket)]

    def _messages(self, item: Item, found: AnswersByModel) -> list[Message] | None:
        *answers, judged = found
        question, judgment = super()._messages(item, answers), judged.get(item["prompt_id"])
        if question is None or judgment is None or not is_unfinished(judgment.text):
            return None
        return [
            *question,
            {"role": "assistant", "content": judgment.text},
            {"role": "user", "content": CONTINUE},
        ]


def judgments_of(judgments: Samples, root: Folder, bucket: Bucket) -> dict[str, Answer]:
    """Read a judge's texts by prompt id."""
    return Answers("judge", (judgments,)).read(root, bucket)


def rows_of(judgments: Samples, root: Folder, bucket: Bucket) -> dict[str, Judgment]:
    """Read a judge's RESPONSE rows by prompt id."""
    columns = ["prompt_id", "source", "sample", "text", "finish_reason", "logprobs"]
    rows = judgments.read(root, bucket, RESPONSE, columns).to_pylist()
    return {row["prompt_id"]: row for row in rows}
