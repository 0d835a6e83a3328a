"""Training rows: from Parquet records to token ids within the length limits, and to disk.

A row is a prompt with its answers, in the order of `TrainConfig.answers`. Prepared rows lie in
Arrow files, one per bucket, which workers map into memory: a node holds the data set once, whatever
the number of its workers, and reads a row when it trains on it. Rows are indexed in the order of
their prompt_id, whatever shards they came through.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.config import TrainConfig, WrpoConfig
from wrpo_ray.data.records import FailureRow, failure
from wrpo_ray.llm import chat
from wrpo_ray.llm.reasoning import Format, following
from wrpo_ray.stages.train import published_tokens as published
from wrpo_ray.storage.fingerprints import unit_interval
from wrpo_ray.storage.folder import Folder

Record = dict[str, Any]
SUFFIX = ".arrow"

PREPARED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("tokens", pa.list_(pa.int32())),  # prompt, then each answer
        ("lengths", pa.list_(pa.int32())),  # of the prompt and of each answer
        ("reference", pa.list_(pa.float64())),  # log pi_ref of each answer; empty without one
    ]
)


class RowTooLongError(ValueError):
    """The prompt, or prompt and longest answer together, exceed the length limits."""

    recorded_as = "TooLong"


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids, int32: of the prompt, and of each answer with its end of turn."""

    prompt_id: str
    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    reference: tuple[float, ...] = ()
    """log pi_ref of each answer, in nats; empty where it is not stored."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prompt and of each answer."""
        return [len(self.prompt), *map(len, self.answers)]


@dataclass
class Rows:
    """Tokenized rows, and FAILURE rows of the records that are left out."""

    kept: list[Row] = field(default_factory=list)
    failed: list[FailureRow] = field(default_factory=list)
    cut: int = 0
    """Answers that were cut to fit."""

    @property
    def too_long(self) -> list[FailureRow]:
        """The failed rows that exceed the length limits."""
        return [row for row in self.failed if row["error"] == RowTooLongError.recorded_as]

    @property
    def faults(self) -> list[FailureRow]:
        """The failed rows with any other error."""
        return [row for row in self.failed if row["error"] != RowTooLongError.recorded_as]


# --- records into rows -----------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizing:
    """Settings that turn records into rows."""

    tokenizer: Any
    ends: frozenset[int]
    """Token ids that end a turn."""
    names: tuple[str, ...]
    """The answers of a row."""
    config: TrainConfig
    own: str | None = None
    """The model that sampled with this tokenizer, so that its token ids are valid; null if none."""
    format: Format | None = None
    """How the model shows its reasoning; null if its answers are not read for it."""

    def rows(self, records: Iterable[Record], stage: str) -> Rows:
        """Rows of records; a record that fails or is too long becomes a FAILURE row of `stage`."""
        rows = Rows()
        for record in records:
            try:
                row, cut = self.row(record)
                rows.kept.append(row)
                rows.cut += cut
            except Exception as error:  # a template may raise anything
                rows.failed.append(failure(stage, error, prompt_id=record["prompt_id"]))
        return rows

    def row(self, record: Record) -> tuple[Row, int]:
        """The row of a record, and how many of its answers were cut.

        Raises:
            RowTooLongError: it exceeds the limits.
            UserError: the chat template does not continue the prompt.
        """
        messages = record["messages"]
        if self.config.compat == "published":
            texts = [record[name]["text"] for name in self.names]
            prompt, answers = published.tokenize(self.tokenizer, messages, texts)
        else:
            prompt = chat.prompt_ids(self.tokenizer, messages)
            answers = [self._answer(messages, record[name], prompt) for name in self.names]
        prompt, answers, cut = fit(prompt, answers, self.config)
        return Row(record["prompt_id"], _ids(prompt), tuple(map(_ids, answers))), cut

    def _answer(self, messages: list[Any], answer: Record, prompt: list[int]) -> list[int]:
        """Token ids of an answer: as sampled by the model `own`, else tokenized from its text."""
        closed, text = answer["finish_reason"] != "length", answer["text"]
        if self._may_use_ids(answer, prompt):
            ids = list(answer["token_ids"])
            chat.check_sampled(ids, self.ends, closed=closed)
            return ids
        return chat.answer_ids(
            self.tokenizer, messages, text, self.ends, closed=closed, format_=self.format
        )

    def _may_use_ids(self, answer: Record, prompt: list[int]) -> bool:
        """Whether an answer's token ids can follow the prompt.

        They are valid only for the tokenizer that made them. A recorded answer without reasoning
        cannot follow a prompt that opens it.
        """
        if self.own is None or answer["source"] != self.own or not answer["token_ids"]:
            return False
        if self.format is None or self.format.begins(answer["text"]):
            return True
        return not following(self.format, self.tokenizer, prompt).opening


def tokenize_pairs(
    pairs: pa.Table, tokenizer: Any, config: WrpoConfig | None = None, *, own: str | None = None
) -> Rows:
    """Token ids of preference rows, as a run with this config trains on them.

    Args:
        pairs: rows with `prompt_id`, `messages`, `source_chosen`, `target_chosen` and `rejected`,
            such as `select_pairs` or `read` give.
        tokenizer: of the model to train, with a chat template.
        config: the limits of length; the section `wrpo` of a config.
        own: the model in `source` whose `token_ids` are of this tokenizer, if one's are; all other
            answers are tokenized from their text.

    Returns:
        The rows that fit (`kept`), each with a prompt and three answers (y_ws, y_wt, y_l), and
        those that do not (`failed`) with their reasons.

    Example:
        >>> rows = tokenize_pairs(pairs, tokenizer)  # doctest: +SKIP
        >>> batch = pack(rows.kept)  # doctest: +SKIP
    """
    ends = chat.end_ids(tokenizer, Path(tokenizer.name_or_path or os.devnull))
    tokenizing = Tokenizing(tokenizer, ends, WrpoConfig.answers, config or WrpoConfig(), own)
    return tokenizing.rows(pairs.to_pylist(), "wrpo")


def fit(
    prompt: list[int], answers: list[list[int]], config: TrainConfig
) -> tuple[list[int], list[list[int]], int]:
    """Prompt and answers within the limits of length, and how many answers were cut.

    Raises:
        RowTooLongError: the prompt leaves no room, or an answer is too long and may not be cut.
    """
    if config.compat == "published":
        return published.fit(prompt, answers, config)
    longest = len(prompt) + max(map(len, answers))
    most = config.max_prompt_length or config.max_length - 1
    if len(prompt) > most:
        raise RowTooLongError(f"the prompt has {len(prompt)} tokens, of which {most} are allowed")
    if longest <= config.max_length:
        return prompt, answers, 0
    if config.overflow == "drop":
        raise RowTooLongError(
            f"prompt and longest answer have {longest} tokens, max_length {config.max_length}"
        )
    room = config.max_length - len(prompt)
    return prompt, [a[:room] for a in answers], sum(len(a) > room for a in answers)


def _ids(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


# --- prepared rows on disk -------------------------------------------------------------------


def write_rows(folder: Folder, name: str, rows: list[Row], counts: dict[str, int]) -> None:
    """Write a bucket's rows and counts to the file `name`."""
    columns = [
        [row.prompt_id for row in rows],
        [np.concatenate([row.prompt, *row.answers]) for row in rows],
        [row.lengths for row in rows],
        [list(row.reference) for row in rows],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, PREPARED, strict=True)]
    schema = PREPARED.with_metadata({"counts": json.dumps(counts)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(arrays, schema=schema))
    folder.write(name, sink.getvalue())


def read_counts(folder: Folder, name: str) -> dict[str, int] | None:
    """The counts of a bucket's file; None if it does not exist."""
    if not folder.exists(name):
        return None
    with folder.filesystem.open_input_file((folder / name).path) as file:
        counts: dict[str, int] = json.loads(pa.ipc.open_file(file).schema.metadata[b"counts"])
    return counts


class PreparedRows:
    """The rows of a local folder of Arrow files, mapped into memory and read one at a time."""

    def __init__(self, folder: Path):
        tables = [_mapped(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
        table = pa.concat_tables(tables) if tables else PREPARED.empty_table()
        batches = table.to_batches()
        self._batches = [_columns(batch) for batch in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        by_prompt = pc.sort_indices(table["prompt_id"])  # stable
        self._order: np.ndarray = by_prompt.to_numpy()
        self._ids = table["prompt_id"]
        self.reference: np.ndarray | None = None
        """(rows, answers): log pi_ref in place of what is in the files; None leaves that."""

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Row:
        batch, at = self._place(index)
        tokens, lengths, reference = (_at(column, at) for column in self._batches[batch])
        prompt, *answers = np.split(tokens, np.cumsum(lengths)[:-1])
        reference = reference if self.reference is None else self.reference[index]
        return Row(self.prompt_id(index), prompt, tuple(answers), tuple(reference.tolist()))

    def prompt_id(self, index: int) -> str:
        """The prompt_id of a row."""
        return str(self._ids[int(self._order[index])].as_py())

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows, 1 + answers): tokens of each row's prompt and answers."""
        parts = [values.reshape(len(starts) - 1, -1) for _, (starts, values), _ in self._batches]
        return np.concatenate(parts)[self._order] if parts else np.zeros((0, 2), np.int32)

    def held_out(self, share: float) -> np.ndarray:
        """(rows,), true for about that share of the rows, by a hash of their prompt_ids."""
        places = [
            unit_interval("holdout", self.prompt_id(i)) for i in range(len(self) if share else 0)
        ]
        return np.array(places) < share if places else np.zeros(len(self), bool)

    def _place(self, index: int) -> tuple[int, int]:
        row = int(self._order[index])
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return batch, row - int(self._starts[batch])


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().replace_schema_metadata()


def _columns(batch: pa.RecordBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(starts, values) of the columns tokens, lengths, reference."""
    columns = [batch.column(name) for name in ("tokens", "lengths", "reference")]
    return [(c.offsets.to_numpy(), c.values.to_numpy(zero_copy_only=False)) for c in columns]


def _at(column: tuple[np.ndarray, np.ndarray], row: int) -> np.ndarray:
    starts, values = column
    return values[starts[row] : starts[row + 1]]
