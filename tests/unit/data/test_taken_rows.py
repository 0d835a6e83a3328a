"""Rows of tables and of stores of several shards: selected, sorted, and taken without copies."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray.data import shards as shards_module
from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.data.records import SCORED
from wrpo_ray.data.samples import dense_ranks, joint_ranks, sorted_by_prompt, unique_rows
from wrpo_ray.data.shards import OpenShards, encoded, in_one, take_rows
from wrpo_ray.storage.folder import Folder

ALL = Bucket(0, 1)
KEYS = st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 2**31 - 1))


def chunked(parts: list[list[str]]) -> pa.Table:
    arrays = [pa.array(part, pa.string()) for part in parts]
    column = pa.chunked_array(arrays, pa.string())
    return pa.table({"text": column, "code": column.dictionary_encode()})


@given(st.lists(st.lists(st.sampled_from("abcdé"), max_size=4), max_size=4), st.data())
def test_rows_are_taken_in_the_order_that_was_asked_for(parts, data):
    table, texts = chunked(parts), [text for part in parts for text in part]
    places = st.integers(0, len(texts) - 1) if texts else st.nothing()
    rows = data.draw(st.lists(places, max_size=9) if texts else st.just([]))
    taken = take_rows(table, np.array(rows, int))
    assert taken.schema == table.schema
    assert taken.to_pydict() == {name: [texts[row] for row in rows] for name in ("text", "code")}
    assert take_rows(table, np.arange(len(table))) is table


@given(st.lists(KEYS, max_size=30), st.data())
def test_each_answer_is_once_the_first_in_order_whatever_its_number(keys, data):
    """Numbers near 2^31 do not fit a product of all ranks in a float."""
    inside = np.array([data.draw(st.booleans()) for _ in keys], bool)
    columns = list(zip(*keys, strict=True)) or [(), (), ()]
    types = (pa.string(), pa.string(), pa.int32())
    arrays = [pa.array(column, type_) for column, type_ in zip(columns, types, strict=True)]
    names = ["prompt_id", "source", "sample"]
    first: dict = {}
    for row in np.flatnonzero(inside).tolist():
        first.setdefault(keys[row], row)
    expected = [first[key] for key in sorted(first)]
    assert unique_rows(pa.table(arrays, names), inside).tolist() == expected
    coded = [pa.chunked_array([array]) for array in arrays]
    coded[:2] = [column.dictionary_encode() for column in coded[:2]]
    assert unique_rows(pa.table(coded, names), inside).tolist() == expected


BIG = st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 4), max_size=20)


@given(BIG)
def test_joint_ranks_sort_like_tuples_though_their_product_is_above_64_bits(rows):
    columns = [np.array(column, np.int32) for column in zip(*rows, strict=True)]
    ranks = joint_ranks(columns or [np.array([], np.int32)])
    assert np.argsort(ranks, kind="stable").tolist() == sorted(
        range(len(rows)), key=rows.__getitem__
    )
    assert len(set(ranks.tolist())) == len(set(rows))


def test_ranks_are_those_of_the_distinct_texts():
    texts = pa.chunked_array([["b", "a"], ["c", "b"]])
    assert dense_ranks(texts).tolist() == [2, 1, 3, 2]
    parts = [pa.array(part).dictionary_encode() for part in (["b", "a"], ["c", "b"])]
    assert dense_ranks(pa.chunked_array(parts)).tolist() == [2, 1, 3, 2]


def test_a_table_in_order_is_not_copied():
    table = pa.table({"prompt_id": ["a", "b", "b"]})
    assert sorted_by_prompt(table) is table
    assert sorted_by_prompt(pa.table({"prompt_id": ["b", "a"]}))["prompt_id"].to_pylist() == [
        "a",
        "b",
    ]
    column = table["prompt_id"]
    assert in_one(column).buffers()[2].address == column.chunk(0).buffers()[2].address


def scored(sample: int) -> dict:
    row = {"prompt_id": f"p{sample % 2}", "source": "m", "sample": sample, "text": str(sample)}
    return row | {"token_ids": [sample] * 3, "reward": 1.0}


@pytest.fixture
def stored(tmp_path: Path) -> Folder:
    """Three shards of two answers each; the last as an earlier version wrote it."""
    folder = Folder(str(tmp_path))
    for key in (0, 2, 4):
        table = pa.Table.from_pylist([scored(key), scored(key + 1)], schema=SCORED)
        table = table.drop_columns(["reasoning", "reasoning_state"]) if key == 4 else table
        write_shard(folder, ALL, SCORED, table, key)
    return folder


def test_columns_of_some_rows_are_read_from_their_shards_alone(stored, monkeypatch):
    opened = OpenShards(stored, ALL.shards(stored), SCORED)
    samples = opened.read_all(["sample"])["sample"].to_pylist()
    read, files = shards_module._read, []

    def recording(fragment, wanted):
        files.append(fragment.path)
        return read(fragment, wanted)

    monkeypatch.setattr(shards_module, "_read", recording)
    rows = np.array([5, 0, 1])
    taken = opened.take(["token_ids", "reasoning"], rows)
    assert taken["token_ids"].to_pylist() == [[samples[row]] * 3 for row in rows]
    assert taken["reasoning"].to_pylist() == [None] * 3
    assert sorted(files) == sorted(f"{stored.path}/{opened.shards[i].path}" for i in (0, 2))
    assert opened.take(["text"], np.array([], int)).to_pydict() == {"text": []}


def test_columns_with_codes_hold_the_same_values(stored):
    names = ["prompt_id", "source", "reasoning_state", "text"]
    schema = encoded(SCORED, ("prompt_id", "source", "reasoning_state"))
    found = [OpenShards(stored, ALL.shards(stored), s).read_all(names) for s in (SCORED, schema)]
    assert found[0].to_pydict() == found[1].to_pydict()
    assert [pa.types.is_dictionary(t) for t in found[1].schema.types] == [True, True, True, False]
