"""Reasoning in selection and pairing: trained on where it is kept, never read, never unfinished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from wrpo_ray.config import AnswersConfig
from wrpo_ray.data.buckets import Bucket, read_bucket, write_shard
from wrpo_ray.data.records import RESPONSE, SCORED, prompt_id
from wrpo_ray.stages.pair.candidates import read_candidates
from wrpo_ray.stages.pair.pairs import select_pairs
from wrpo_ray.storage.folder import Folder

THOUGHT = "<think>\nhm\n</think>\n\n"
KEY = prompt_id([{"role": "user", "content": "?"}])
ALL = Bucket(0, 1)


def answer(source: str, text: str, reward: float, state: str | None, **more: Any) -> dict[str, Any]:
    reasoning = None if state is None else THOUGHT
    row = {"prompt_id": KEY, "source": source, "text": text, "reward": reward}
    return row | {"reasoning": reasoning, "reasoning_state": state} | more


def paired(*answers: dict[str, Any], **config: Any) -> list[dict[str, Any]]:
    table = pa.Table.from_pylist(list(answers))
    rows: list[dict[str, Any]] = select_pairs(
        table, answers_config=AnswersConfig(**config)
    ).to_pylist()
    return rows


@pytest.mark.parametrize(
    ("state", "text"), [("kept", f"{THOUGHT}8"), ("stripped", "8"), (None, "8")]
)
def test_only_kept_reasoning_is_trained_on(state: str | None, text: str) -> None:
    (row,) = paired(
        answer("source", "8", 3, state),
        answer("target", "9", 2, "stripped"),
        answer("target", "7", 1, "kept"),
    )
    texts = [row[name]["text"] for name in ("source_chosen", "target_chosen", "rejected")]
    assert texts == [text, "9", f"{THOUGHT}7"]


def test_an_answer_that_ends_within_its_reasoning_is_never_used() -> None:
    """Not even where empty answers and those cut off are kept, whatever their reward."""
    everything = {"empty": "keep", "cut_off": "keep"}
    best = answer("source", "", 9, "unfinished", finish_reason="length")
    right = answer("source", "8", 3, "kept")
    own = [answer("target", text, i, "kept") for i, text in enumerate(("a", "b"), 1)]
    unfinished = [answer("target", "", reward, "unfinished") for reward in (9, -9)]
    (row,) = paired(best, right, *own, *unfinished, **everything)
    names = ("source_chosen", "target_chosen", "rejected")
    assert [row[name]["reward"] for name in names] == [3, 2, 1]
    assert paired(best, *own, **everything) == []
    assert len(paired(best | {"reasoning_state": None}, *own, **everything)) == 1


def test_texts_are_compared_without_their_reasoning() -> None:
    first, second = (answer("target", "9", reward, "kept") for reward in (2, 1))
    assert paired(answer("source", "8", 3, None), first, second | {"reasoning": "<think>"}) == []


# --- stores -------------------------------------------------------------------------------------


def scored(sample: int, state: str | None) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(SCORED.names)
    row |= answer("a", "8", float(sample), state, sample=sample, token_ids=[sample])
    return row


def test_answers_of_an_earlier_version_are_read_beside_those_of_this_one(tmp_path: Path) -> None:
    """Their files lack the columns of the reasoning."""
    folder = Folder(str(tmp_path))
    write_shard(folder, ALL, SCORED, [scored(1, "kept")], "new")
    old = pa.Table.from_pylist([scored(0, None)], schema=SCORED)
    write_shard(folder, ALL, SCORED, old.drop_columns(["reasoning", "reasoning_state"]), "old")
    rows = sorted(read_bucket(folder, ALL, SCORED).to_pylist(), key=lambda row: row["sample"])
    assert [row["reasoning"] for row in rows] == [None, THOUGHT]
    narrow = read_bucket(folder, ALL, RESPONSE, ["reasoning_state", "text"])
    assert narrow.column_names == ["reasoning_state", "text"]

    class Stored:
        def find(self, *_: Any) -> Any:
            from wrpo_ray.data.samples import ANSWER_KEY, RowSelection
            from wrpo_ray.data.shards import OpenShards
            from wrpo_ray.stages.pair.candidates import DECIDING

            shards = OpenShards(folder, ALL.shards(folder), SCORED)
            table = shards.read_all([*ANSWER_KEY, *DECIDING])
            return RowSelection(shards, table, np.arange(len(table)))

    stored: Any = Stored()
    candidates = read_candidates([stored], folder, ALL, pa.array([KEY]))
    answers = candidates.answers(np.arange(2)).to_pylist()
    assert [(a["text"], a["token_ids"]) for a in answers] == [("8", [0]), (f"{THOUGHT}8", [1])]


def test_a_damaged_file_is_still_an_error(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    table = pa.Table.from_pylist([scored(0, None)], schema=SCORED)
    write_shard(folder, ALL, SCORED, table.drop_columns(["text"]), "x")
    with pytest.raises(pa.ArrowInvalid):
        read_bucket(folder, ALL, SCORED)
