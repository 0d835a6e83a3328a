"""The records that stages pass to each other, as versioned Arrow schemas.

A record is keyed by `prompt_id`, a hash of the conversation, and, for an answer, by
(prompt_id, source, sample). Every Parquet shard of a step has one of these schemas.
"""

from typing import TypedDict

import pyarrow as pa

from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.steps import FORMAT
from wrpo_ray.text.addresses import redact

Message = dict[str, str]
"""{role, content}"""


class CandidateRow(TypedDict):
    """A row of CANDIDATES."""

    source: str
    sample: int
    reward: float


class AnswerRow(TypedDict):
    """A row of ANSWER; of an imported answer all but the text may be None."""

    text: str
    token_ids: list[int] | None
    finish_reason: str | None
    source: str | None
    sample: int | None
    reward: float | None


class PreferenceRow(TypedDict):
    """A row of PREFERENCE."""

    prompt_id: str
    messages: list[Message]
    source_chosen: AnswerRow
    target_chosen: AnswerRow
    rejected: AnswerRow
    source_margin: float | None
    target_margin: float | None
    candidates: list[CandidateRow]


class FailureRow(TypedDict):
    """A row of FAILURE."""

    stage: str
    prompt_id: str | None
    source: str | None
    sample: int | None
    where: str | None
    error: str
    message: str
    attempts: int


def _list(of: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", of))  # the name that Parquet uses


MESSAGES = _list(pa.struct([("role", pa.string()), ("content", pa.string())]))
TOKENS = _list(pa.int32())
LOGPROBS = _list(pa.struct([("token", pa.string()), ("logprob", pa.float64())]))


def _schema(name: str, fields: list[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(fields, metadata={"record": name, "format": str(FORMAT)})


PROMPT = _schema(
    "prompt",
    [
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("split", pa.string()),  # sft | preference | eval
        ("reference", pa.string()),  # the correct answer, see `pack_reference`; may be null
        ("group", pa.string()),  # a skill or category, for tables and rewards; may be null
    ],
)
KEPT, STRIPPED, UNFINISHED = "kept", "stripped", "unfinished"
"""Reasoning that is trained on with the answer, that is not, and that an answer ended within."""
ADDED = frozenset({"reasoning", "reasoning_state"})
"""Columns that files of earlier versions lack, where they are null."""
RESPONSE = _schema(
    "response",
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("token_ids", TOKENS),  # as the engine produced them, with the end token; null if imported
        ("finish_reason", pa.string()),  # stop | length; null if imported
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("seed", pa.int64()),
        ("model", pa.string()),  # fingerprint of the weights and tokenizer
        ("engine", pa.string()),
        ("logprobs", LOGPROBS),  # of the most likely first tokens; null if not requested
        ("reasoning", pa.string()),  # all before the text, with its markers; null if not put apart
        ("reasoning_state", pa.string()),  # kept | stripped | unfinished; null without reasoning
    ],
)
SCORED = _schema(
    "scored",
    [
        *zip(RESPONSE.names, RESPONSE.types, strict=True),
        ("reward", pa.float64()),
        ("reward_model", pa.string()),
    ],
)
ANSWER = pa.struct(
    [
        ("text", pa.string()),
        ("token_ids", TOKENS),
        ("finish_reason", pa.string()),
        ("source", pa.string()),
        ("sample", pa.int32()),
        ("reward", pa.float64()),
    ]
)
CANDIDATES = _list(
    pa.struct([("source", pa.string()), ("sample", pa.int32()), ("reward", pa.float64())])
)
SELECTION = _schema(
    "selection",
    [
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("split", pa.string()),
        ("source_chosen", ANSWER),  # y_ws
        ("candidates", CANDIDATES),  # the score of every source answer
    ],
)
PREFERENCE = _schema(
    "preference",
    [
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("source_chosen", ANSWER),  # y_ws
        ("target_chosen", ANSWER),  # y_wt
        ("rejected", ANSWER),  # y_l
        ("source_margin", pa.float64()),  # reward of y_ws - reward of y_wt
        ("target_margin", pa.float64()),  # reward of y_wt - reward of y_l
        ("candidates", CANDIDATES),  # the score of every answer, sources' and target's
    ],
)
ITEM = _schema(
    "item",
    [
        *zip(PROMPT.names, PROMPT.types, strict=True),
        ("index", pa.int32()),  # of the question in the benchmark, from 0
        ("turns", _list(pa.string())),  # the user's messages; `messages` has the first
        ("references", _list(pa.string())),  # a correct answer to each turn; may be empty
        ("baseline", pa.string()),  # the answer to compare a model's with; may be null
    ],
)
"""A question of a benchmark."""
JUDGMENT = _schema(
    "judgment",
    [
        ("prompt_id", pa.string()),
        ("model", pa.string()),
        ("against", pa.string()),  # the other model, where two of the run are compared
        ("judge", pa.string()),
        ("position", pa.int32()),  # of games, or of turns, from 1
        ("label", pa.string()),  # the verdict in the judge's words; null if it is a number
        ("value", pa.float64()),  # the verdict as a number; null if judging failed
        ("index", pa.int32()),
        ("group", pa.string()),
        ("length", pa.int32()),  # characters of the model's answer
        ("other_length", pa.int32()),  # of the baseline's or the other model's answer
        ("tokens", pa.int32()),  # used by all models that contributed to the answer
    ],
)
NGRAMS = _schema("ngrams", [("hash", pa.uint64())])
"""The distinct n-grams of the evaluation prompts."""
OVERLAP = _schema(
    "overlap",
    [
        ("prompt_id", pa.string()),
        ("overlap", pa.float64()),  # share of the prompt's n-grams that evaluation prompts have
    ],
)
FAILURE = _schema(
    "failure",
    [
        ("stage", pa.string()),
        ("prompt_id", pa.string()),  # null where the row has not even a prompt
        ("source", pa.string()),
        ("sample", pa.int32()),
        ("where", pa.string()),  # file and line or row, for input rows
        ("error", pa.string()),  # type of the error
        ("message", pa.string()),
        ("attempts", pa.int32()),
    ],
)


def prompt_id(messages: list[Message]) -> str:
    """The prompt's key: a hash of its roles and contents (32 hex digits)."""
    return digest([[m["role"], m["content"]] for m in messages])


def error_name(error: Exception) -> str:
    """The name of an error in failure rows.

    It is the class's name, or the class attribute `recorded_as`: outputs hold these names, so a
    renamed class keeps its old one.
    """
    return getattr(error, "recorded_as", type(error).__name__)


def failure(
    stage: str,
    error: Exception,
    *,
    attempts: int = 1,
    prompt_id: str | None = None,
    source: str | None = None,
    sample: int | None = None,
    where: str | None = None,
) -> FailureRow:
    """Return a FAILURE row, with what is known of its prompt, source, sample or place in a file."""
    text = redact(" ".join(str(error).split())[:2000]).encode(errors="backslashreplace").decode()
    return {
        "stage": stage,
        "prompt_id": prompt_id,
        "source": source,
        "sample": sample,
        "where": where,
        "error": error_name(error),
        "message": text,
        "attempts": attempts,
    }
