"""The answers that an evaluation compares: one text for each model (or group) and prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wrpo_ray.data.buckets import Bucket
from wrpo_ray.data.records import RESPONSE, SCORED
from wrpo_ray.data.samples import Samples
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

COLUMNS = ["prompt_id", "source", "sample", "text", "output_tokens"]


@dataclass(frozen=True)
class Answer:
    """A text, and the output tokens of all models that contributed to it."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Answers:
    """The answers that are compared under one name."""

    name: str
    samples: tuple[Samples, ...]
    """Answers to different prompts; with `best`, scored answers to the same prompts."""
    best: bool = False
    """Whether to take the answer with the highest reward; of equal ones the first."""
    parts: tuple[Answers, ...] = ()
    """Answers that these were made from: their tokens are added."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that write the answers."""
        return tuple(s.step for s in self.samples) + tuple(s for p in self.parts for s in p.steps)

    @property
    def identity(self) -> list[Any]:
        """Everything that determines the texts, except the prompts."""
        stores = [
            [s.step.folder, s.count if self.best else 1]
            + ([s.prompts.narrowing] if s.prompts.narrowing else [])
            for s in self.samples
        ]
        return [self.best, stores]

    def read(self, root: Folder, bucket: Bucket) -> dict[str, Answer]:
        """Return the bucket's answers by prompt id, without failed ones."""
        found = self._best(root, bucket) if self.best else self._first(root, bucket)
        for part in self.parts:
            tokens = {key: answer.tokens for key, answer in part.read(root, bucket).items()}
            found = {k: Answer(a.text, a.tokens + tokens.get(k, 0)) for k, a in found.items()}
        return found

    def _first(self, root: Folder, bucket: Bucket) -> dict[str, Answer]:
        """Sample 0 of each prompt."""
        rows = [
            row
            for samples in self.samples
            for row in samples.read(root, bucket, RESPONSE, COLUMNS).to_pylist()
        ]
        return {
            r["prompt_id"]: Answer(r["text"], r["output_tokens"] or 0)
            for r in rows
            if r["sample"] == 0
        }

    def _best(self, root: Folder, bucket: Bucket) -> dict[str, Answer]:
        best: dict[str, tuple[float, str]] = {}
        tokens: dict[str, int] = {}
        for samples in self.samples:
            for row in samples.read(root, bucket, SCORED, [*COLUMNS, "reward"]).to_pylist():
                key = row["prompt_id"]
                tokens[key] = tokens.get(key, 0) + (row["output_tokens"] or 0)
                if key not in best or row["reward"] > best[key][0]:
                    best[key] = row["reward"], row["text"]
        return {key: Answer(text, tokens[key]) for key, (_, text) in best.items()}
