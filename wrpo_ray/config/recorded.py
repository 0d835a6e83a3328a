"""Sections for recorded answers: a source, or the target, whose answers are in files."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, WrapValidator, model_validator

from wrpo_ray.config.base import PLACEMENT, Name, Section, without_unset
from wrpo_ray.config.data import Columns, InputFiles
from wrpo_ray.config.models import ModelConfig


class RecordedColumns(Columns):
    """Column names of a file of recorded answers; null for a column that it does not have.

    `reference` and `group` are read where the run has no `prompts`.
    """

    id: str | None = None
    """An id of the prompt, a text or a number: answers then belong to the prompt with the same
    value in `prompts.columns.id`. null compares the prompts themselves."""
    response: str = "response"
    """The answer's text, or a list of texts: several answers to the prompt. Where it is a list, the
    columns below are lists of the same length."""
    reward: str | None = None
    """The answer's score, a finite number, higher is better."""
    finish_reason: str | None = None
    """How the answer ended: `stop` (also `eos`, `eos_token`, `end_turn`, `stop_sequence`), `length`
    (also `max_tokens`) or null, in capitals or not."""
    token_ids: str | None = None
    """The token ids of the answer, with the end token. They are used for answers of the target."""
    reasoning: str | None = None
    """The reasoning before the answer, where a file has it apart; an empty or missing one is looked
    for in the answer's text. Needs `reasoning` beside `path`."""
    source: str | None = None
    """The model that answered, where a file holds the answers of several models."""

    @property
    def of_text(self) -> list[str]:
        """Columns whose values are converted to text."""
        return super().of_text + ([self.id] if self.id else [])

    @property
    def of_answer(self) -> list[str]:
        """Columns of the answers, and of what their prompt is known by."""
        key = self.id or self.prompt
        more = (self.reward, self.finish_reason, self.token_ids, self.source, self.reasoning)
        return [key, self.response, *(column for column in more if column)]

    def identity(self) -> dict[str, Any]:
        """As in every section; the column of the reasoning only where one is named."""
        return without_unset(super().identity(), "reasoning")


class RecordedAnswers(InputFiles):
    """Files of answers that a model gave earlier."""

    path: str
    """A JSONL or Parquet file, or a folder of them, also in subfolders, as `prompts.path`."""
    columns: RecordedColumns = RecordedColumns()
    """Column names in the files."""
    of: str | None = None
    """The value of `columns.source` in the rows to take; null is the name of the source or target.
    """
    reward: Literal["recorded"] | None = None
    """`recorded` uses the scores in `columns.reward` and compares them with the scores of other
    answers as they are; null scores these answers with the run's reward."""
    reasoning: Literal["keep", "strip"] | None = None
    """Reasoning before an answer, as <think>...</think>: `strip` trains on the answer only, `keep`
    on the reasoning too, as for models. Null reads no markers; of the target it is by default the
    target's own policy."""
    reasoning_parser: str | None = None
    """vLLM's name of the reasoning's format, as for models; null is <think> and </think>."""

    def identity(self) -> dict[str, Any]:
        """As in every section; a policy of reasoning only where one is set."""
        return without_unset(super().identity(), "reasoning", "reasoning_parser")

    @property
    def needed(self) -> list[str]:
        """Columns that the files must have."""
        return list(dict.fromkeys([*self.columns.of_answer, *self.columns.of_text]))

    @model_validator(mode="after")
    def _has_columns(self) -> Self:
        if self.reward and not self.columns.reward:
            raise ValueError("reward: recorded needs the column of the scores: columns.reward")
        if self.of is not None and not self.columns.source:
            raise ValueError("of: needs the column with the names of models: columns.source")
        if not self.reasoning and (self.reasoning_parser or self.columns.reasoning):
            name = "reasoning_parser" if self.reasoning_parser else "columns.reasoning"
            raise ValueError(f"{name}: set `reasoning` too, to keep or strip")
        return self


class RecordedConfig(Section):
    """A source whose answers are in files; it is not asked.

    Example:
        >>> RecordedConfig(name="gpt4", answers={"path": "gpt4.jsonl"}).answers.columns.response
        'response'
    """

    name: Name
    """Name of the source in tables and records."""
    answers: RecordedAnswers
    """Its answers."""
    license: str | None = Field(None, json_schema_extra=PLACEMENT)
    """The licence of the answers by its Hugging Face id, for the card of exported rows."""


class TargetConfig(ModelConfig):
    """The model to be improved: a model on vLLM, which is trained."""

    answers: RecordedAnswers | None = Field(None, json_schema_extra=PLACEMENT)
    """Recorded answers of the target, used for y_wt and y_l instead of samples of target-SFT; so
    preference training is off-policy. null samples target-SFT."""

    @model_validator(mode="before")
    @classmethod
    def _answers_think_alike(cls, given: Any) -> Any:
        """The recorded answers get the target's policy of reasoning unless they have their own."""
        answers = given.get("answers") if isinstance(given, dict) else None
        if isinstance(answers, RecordedAnswers):
            answers = answers.model_dump(exclude_unset=True)
        if not isinstance(answers, dict) or not given.get("reasoning"):
            return given
        names = ("reasoning", "reasoning_parser") if "reasoning" not in answers else ()
        return given | {"answers": {n: given.get(n) for n in names} | answers}


def _source(given: Any, _: Any) -> Any:
    """A source of the kind that its keys tell.

    Raises:
        ValueError: they tell no kind, or both.
    """
    kinds = (ModelConfig, RecordedConfig)
    if not isinstance(given, dict):
        return given if isinstance(given, kinds) else ModelConfig.model_validate(given)
    known = {name for kind in kinds for name in kind.model_fields}
    is_asked, is_recorded = "model" in given, "answers" in given
    if (is_asked and is_recorded) or not (is_asked or is_recorded or set(given) - known):
        raise ValueError(
            "give either `model`, which is asked, or `answers`, the files of its recorded answers"
        )
    return (RecordedConfig if is_recorded else ModelConfig).model_validate(given)


Source = Annotated[ModelConfig | RecordedConfig, WrapValidator(_source)]
