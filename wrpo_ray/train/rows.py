"""Training rows: from Parquet records to token ids, in an order of their own.

A row is a prompt with its answers, in the order of `names` (`task.SFT_ANSWERS`,
`task.WRPO_ANSWERS`). Rows are indexed by the order of their prompt_id, whatever shards and
workers they came through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from wrpo_ray.core import chat
from wrpo_ray.core.records import failure
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import UserError

Record = dict[str, Any]


class TooLong(ValueError):  # noqa: N818 (the name is kept in the failure record)
    """Prompt and longest answer together exceed `max_length`."""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids, int32: of the prompt, and of each answer with its end of turn."""

    prompt_id: str
    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(prompt, answer) for each answer."""
        return [(self.prompt, answer) for answer in self.answers]


@dataclass
class Rows:
    """Tokenized rows, and FAILURE rows of those that are left out."""

    kept: list[Row] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        """How many rows were too long."""
        return sum(row["error"] == TooLong.__name__ for row in self.failed)


def read_part(folder: Folder, names: tuple[str, ...], part: int, parts: int) -> list[Record]:
    """The records in every `parts`-th shard from the shard `part`.

    Of SELECTION records (where `names` is the source's answer alone) those with the split
    `sft`; PREFERENCE records have no split.
    """
    is_selection = len(names) == 1
    columns = ["prompt_id", "messages", *names, *(["split"] if is_selection else [])]
    records: list[Record] = []
    for shard in folder.files(suffix=".parquet")[part::parts]:
        table = folder.read_table(shard, columns)
        if is_selection:
            table = table.filter(pc.equal(table["split"], "sft"))
        records += table.to_pylist()
    return records


def tokenize(
    tokenizer: Any,
    ends: frozenset[int],
    records: Iterable[Record],
    names: tuple[str, ...],
    *,
    stage: str,
    max_length: int,
) -> Rows:
    """Token ids of records; a record that fails or does not fit becomes a FAILURE row."""
    rows = Rows()
    for record in records:
        try:
            rows.kept.append(tokenize_row(tokenizer, ends, record, names, max_length))
        except Exception as error:  # a template may raise anything
            rows.failed.append(failure(stage, error, prompt_id=record["prompt_id"]))
    return rows


def tokenize_row(
    tokenizer: Any, ends: frozenset[int], record: Record, names: tuple[str, ...], max_length: int
) -> Row:
    """Token ids of one record.

    Raises:
        TooLong: the prompt with the longest of the answers exceeds `max_length` tokens.
        UserError: the chat template does not continue the prompt.
    """
    messages = record["messages"]
    prompt = chat.prompt_ids(tokenizer, messages)
    answers = [_answer(tokenizer, ends, messages, record[name], name) for name in names]
    longest = len(prompt) + max(len(answer) for answer in answers)
    if longest > max_length:
        raise TooLong(f"prompt and longest answer have {longest} tokens, max_length {max_length}")
    return Row(record["prompt_id"], _ids(prompt), tuple(_ids(answer) for answer in answers))


def _answer(
    tokenizer: Any, ends: frozenset[int], messages: list[Any], answer: Record, name: str
) -> list[int]:
    """The target's own answers keep the ids it sampled; a source's ids are of its own tokenizer."""
    if name != "source_chosen" and answer["token_ids"]:
        return answer["token_ids"]
    closed = answer["finish_reason"] != "length"
    return chat.answer_ids(tokenizer, messages, answer["text"].strip(), ends, closed=closed)


def _ids(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def merge(parts: Iterable[Rows]) -> Rows:
    """The parts as a whole, in the order of prompt_id, each prompt once."""
    parts = list(parts)
    kept = {row.prompt_id: row for part in parts for row in part.kept}
    failed = {row["prompt_id"]: row for part in parts for row in part.failed}
    # real faults first: the first row is what an error message quotes
    order = sorted(failed, key=lambda key: (failed[key]["error"] == TooLong.__name__, key))
    return Rows([kept[key] for key in sorted(kept)], [failed[key] for key in order])


def check_some(rows: Rows, section: str, folder: Folder, max_length: int) -> None:
    """Check that there is a row to train on; `section` is the config's: sft or wrpo.

    Raises:
        UserError: with what to do about it.
    """
    if rows.kept:
        return
    if rows.dropped:
        raise UserError(
            f"{section}: no row is left to train on: {rows.dropped} rows have more than "
            f"{max_length} tokens in prompt and answer; raise {section}.max_length"
        )
    raise UserError(
        f"{section}: {folder} holds no row to train on; give more prompts, or another `split.sft`"
    )
