"""Sections for input files, their columns, the split of prompts, and the layout of outputs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from wrpo_ray.config.base import PLACEMENT, Name, Section


class Columns(Section):
    """Which columns of the user's file hold what; null where the file has no such column."""

    prompt: str = "prompt"
    """The prompt: a string, a {role, content} record, or a list of them."""
    reference: str | None = None
    """The right answer: a text, a number (written exactly as it is; a whole float as 42), true or
    false, a date, or a list of these of which any is right. Nulls are not allowed in it."""
    group: str | None = None
    """What to split evaluation tables by, such as a skill or category."""

    @property
    def of_prompt(self) -> list[str]:
        """Columns that hold a prompt and what belongs to it."""
        return [c for c in (self.prompt, self.reference, self.group) if c]

    @property
    def of_text(self) -> list[str]:
        """Columns whose cells become text."""
        return [c for c in (self.reference, self.group) if c]


class PromptsConfig(Section):
    """The prompts to fuse on."""

    path: str
    """A JSONL or Parquet file, or a folder of them, local or in an object store; the name as it
    is, with nothing escaped."""
    columns: Columns = Columns()
    """Column names in the file."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many rows, files in the order of their names; null uses all."""

    @property
    def needed(self) -> list[str]:
        """Columns that the files must have."""
        return self.columns.of_prompt


class ResponseColumns(Columns):
    """Column names of a file of existing responses."""

    response: str = "response"
    """The answer's text; in the format `candidates` a list of them."""
    source: str = "model"
    """The name of the model that answered."""
    reward: str = "reward"
    """The answer's score, a finite number, higher is better; in `candidates` a list of them."""


class ImportConfig(Section):
    """Existing answers that enter the chain instead of generated ones."""

    path: str
    """A JSONL or Parquet file, or a folder of them."""
    format: Literal["responses", "candidates", "preferences"] = "responses"
    """`responses`: one scored answer a row. `candidates`: all of a model's answers to a prompt in
    one row, {prompt, all_generated_responses: [text, ...], all_rm_scores: [number, ...]}, as in
    princeton-nlp/llama3-ultrafeedback-armorm. `preferences`: the published rows
    {prompt_id, prompt, chosen: [y_ws, y_wt], rejected: [y_l]}."""
    columns: ResponseColumns = ResponseColumns()
    """Column names, for `responses` and `candidates` (whose defaults are the names above)."""
    source: Name | None = None
    """The model that gave all answers; null where a column names it."""
    target: str | None = None
    """The model whose answers are the target's own (y_wt, y_l), by its name in `source`."""

    @model_validator(mode="before")
    @classmethod
    def _columns_of_candidates(cls, given: Any) -> Any:
        columns = given.get("columns", {}) if isinstance(given, dict) else None
        if not isinstance(columns, dict) or given.get("format") != "candidates":
            return given
        names = {"response": "all_generated_responses", "reward": "all_rm_scores"}
        return given | {"columns": names | columns}

    @property
    def needed(self) -> list[str]:
        """Columns that the files must have."""
        if self.format == "preferences":
            return ["prompt", "chosen", "rejected"]
        of_answer = [self.columns.response, self.columns.reward]
        return self.columns.of_prompt + of_answer + [self.columns.source] * (self.source is None)


class SplitConfig(Section):
    """How prompts are divided, by a hash of the prompt."""

    sft: float = Field(1 / 3, ge=0, le=1)
    """Share of the prompts for SFT on y_ws; the rest are for preferences."""


class StorageConfig(Section):
    """How data lies in the output folder."""

    buckets: int = Field(64, ge=1, le=65536)
    """Parts that prompts are hashed into, a power of two: the unit of parallel work."""
    chunk: int = Field(64, ge=1, json_schema_extra=PLACEMENT)
    """Prompts committed at once, and batches of scores: what a crash can lose, for each actor."""

    @model_validator(mode="after")
    def _power_of_two(self) -> StorageConfig:
        if self.buckets & (self.buckets - 1):
            raise ValueError(f"buckets must be a power of two, such as 64 (got {self.buckets})")
        return self
