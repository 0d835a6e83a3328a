"""Sections for input files, their columns, the split of prompts, and the storage of outputs."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, WrapValidator, model_validator

from wrpo_ray.config.base import PLACEMENT, Name, Section, without_unset
from wrpo_ray.text.addresses import without_secrets


class Columns(Section):
    """Column names of the user's file; null for a column that it does not have."""

    prompt: str = "prompt"
    """The prompt: a string, a {role, content} record, or a list of such records."""
    reference: str | None = None
    """The right answer: a text, a number (compared as written; a float such as 42.0 as 42), true or
    false, a date, or a list of these, any of which is right. Nulls are rejected, unless rewards are
    given by group: some groups' rewards need none."""
    group: str | None = None
    """A category, such as a skill, by which evaluation tables are split, and by which rewards,
    margins and the sources that answer can differ."""
    id: str | None = Field(None, json_schema_extra=PLACEMENT)
    """An id of the prompt, a text or a number, by which recorded answers find it
    (`sources.answers.columns.id`); for `prompts`."""

    @property
    def of_prompt(self) -> list[str]:
        """Columns of a prompt: its text, reference and group."""
        return [c for c in (self.prompt, self.reference, self.group) if c]

    @property
    def of_text(self) -> list[str]:
        """Columns whose values are converted to text."""
        return [c for c in (self.reference, self.group) if c]


class InputFiles(Section):
    """Files of rows."""

    path: str
    """A JSONL or Parquet file, or a folder of them."""
    revision: str | None = Field(None, json_schema_extra=PLACEMENT)
    """Branch, tag or commit of a data set on the hub (`path: hf://datasets/org/name`); null is the
    main branch. An output keeps the commit that its first run began with."""

    @model_validator(mode="after")
    def _revision_of_hub(self) -> Self:
        if self.revision is not None and not self.path.startswith("hf://"):
            raise ValueError(
                f"revision: {without_secrets(self.path)} is no data set of the hub; only "
                f"hf://datasets/org/name has one"
            )
        return self


class PromptsConfig(InputFiles):
    """The file of prompts that the models answer.

    Example:
        >>> PromptsConfig(path="prompts.jsonl", columns={"prompt": "question"}).columns.prompt
        'question'
    """

    path: str
    """A JSONL or Parquet file, a folder of them, or a pattern of names such as `data/train-*`;
    local, in an object store, or of a data set on the Hugging Face hub, such as
    `hf://datasets/org/name/data/train-*.parquet`. A folder with files of several splits is refused.
    Write the name without URL escapes."""
    columns: Columns = Columns()
    """Column names in the file."""
    group: str | None = None
    """The group of all prompts of the file, instead of a column with the group of each
    (`columns.group`)."""
    limit: int | None = Field(None, ge=1)
    """Use only the first rows, up to this number, with files in the order of their names; null
    uses all."""

    @property
    def needed(self) -> list[str]:
        """Columns that the files must have."""
        return self.columns.of_prompt + ([self.columns.id] if self.columns.id else [])

    def identity(self) -> dict[str, Any]:
        """As in every section; the group only where one is set."""
        return without_unset(super().identity(), "group")

    @model_validator(mode="after")
    def _one_group(self) -> Self:
        if self.group is not None and self.columns.group:
            raise ValueError(
                "group: is that of all prompts, and columns.group a column with that of each; "
                "leave one of them out"
            )
        if self.group is not None and not self.group.strip():
            raise ValueError("group: a group without a name; leave it out")
        return self


def _one_or_several(given: Any, _: Any) -> Any:
    """A section, or a list of them; an error names its place in the list."""
    if isinstance(given, list | tuple):
        return TypeAdapter(tuple[PromptsConfig, ...]).validate_python(tuple(given))
    is_section = given is None or isinstance(given, PromptsConfig)
    return given if is_section else PromptsConfig.model_validate(given)


OneOrSeveral = Annotated[
    PromptsConfig | tuple[PromptsConfig, ...] | None, WrapValidator(_one_or_several)
]


class ResponseColumns(Columns):
    """Column names of a file of existing responses."""

    response: str = "response"
    """The answer's text; with `format: candidates` a list of texts."""
    source: str = "model"
    """The name of the model that answered."""
    reward: str = "reward"
    """The answer's score, a finite number, higher is better; with `format: candidates` a list."""


class ImportConfig(InputFiles):
    """Existing scored answers or preference rows, used instead of generated ones."""

    path: str
    """A JSONL or Parquet file, or a folder of them, as `prompts.path`."""
    format: Literal["responses", "candidates", "preferences"] = "responses"
    """`responses`: one scored answer per row. `candidates`: all answers of a model to a prompt in
    one row, {prompt, all_generated_responses: [text, ...], all_rm_scores: [number, ...]}, as in
    princeton-nlp/llama3-ultrafeedback-armorm. `preferences`: finished rows in the format that `wrpo
    export` writes, {prompt_id, prompt, chosen: [y_ws, y_wt], rejected: [y_l]}: the source's chosen,
    the target's chosen and the rejected answer."""
    columns: ResponseColumns = ResponseColumns()
    """Column names for `responses` and `candidates`; the latter's defaults are the names above."""
    source: Name | None = None
    """The model that gave all answers; null if a column names the model."""
    target: str | None = None
    """The name of the target in the source column: its answers become y_wt and y_l."""

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
    """How prompts are divided between SFT and preference training, by a hash of the prompt."""

    sft: float = Field(1 / 3, ge=0, le=1)
    """Share of the prompts for SFT on y_ws (the best answer of all sources); the rest are for
    preference training."""


class StorageConfig(Section):
    """How data is stored in the output folder."""

    buckets: int = Field(64, ge=1, le=65536)
    """Number of buckets, a power of two. A bucket is a hash partition of the prompts, and the unit
    of parallel work."""
    commit_seconds: float | None = Field(None, gt=0, le=86400, json_schema_extra=PLACEMENT)
    """Age in seconds at which answers and scores are written, if there are not enough for a file
    of about 64 MB before: a kill loses at most this much work of each actor. Null is 30 on a local
    disk, where a file costs next to nothing, and 300 in an object store, about what the start of
    an engine takes (`docs/scale.md` has its requests in numbers)."""

    @model_validator(mode="before")
    @classmethod
    def _without_chunk(cls, given: Any) -> Any:
        if isinstance(given, dict) and "chunk" in given:
            raise ValueError(
                "chunk: answers are no longer written by their number of prompts, but by their "
                "size and age; remove it, or set commit_seconds, the seconds of work that a kill "
                "may lose"
            )
        return given

    def commit_age(self, *, is_remote: bool) -> float:
        """`commit_seconds`, or what null stands for."""
        if self.commit_seconds is not None:
            return self.commit_seconds
        return 300 if is_remote else 30

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.buckets & (self.buckets - 1):
            raise ValueError(f"buckets must be a power of two, such as 64 (got {self.buckets})")
        return self
