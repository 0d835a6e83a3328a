"""Right answers of every type, from a file's cell to what verifiers, functions and judges see."""

from __future__ import annotations

import datetime
import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray.config import (
    Columns,
    Config,
    EndpointConfig,
    JudgeConfig,
    PromptsConfig,
    RewardConfig,
)
from wrpo_ray.data.published import RowError
from wrpo_ray.data.references import JSON_MARK, pack_reference, show_reference, unpack_reference
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.report.text import _example
from wrpo_ray.stages.ingest import distribute
from wrpo_ray.stages.ingest.cells import exact_text
from wrpo_ray.stages.ingest.readers import read_rows
from wrpo_ray.stages.ingest.stage import IngestPrompts
from wrpo_ray.stages.score.base import Item
from wrpo_ray.stages.score.judge import Question
from wrpo_ray.stages.score.rewards import load_reward
from wrpo_ray.storage.steps import Step

COLUMNS = Columns(reference="r", group="g")
BAD = "BAD"
"""A failed row, in place of a reference."""


def read(path) -> list[Any]:
    """The reference of each row as rewards get it, or BAD."""
    job = IngestPrompts(Step("p"), PromptsConfig(path="x", columns=COLUMNS), {"sft": 1.0}, 0)
    found = []
    for place, row in read_rows(str(path), job.columns, COLUMNS.of_text):
        (placed,) = distribute.placed(job.step.name, job.records, place, row, 4)
        record = json.loads(placed["record"])
        assert placed["good"] or record["error"] in ("RowError", "ValueError", "OverflowError")
        found.append(unpack_reference(record["reference"]) if placed["good"] else BAD)
    return found


JSON = {
    '"Paris"': "Paris",
    '"42"': "42",
    '" x "': " x ",
    '""': "",
    '"[1]"': "[1]",
    '"\\u001e[]"': "\x1e[]",
    "42": "42",
    "-7": "-7",
    "42.0": "42",
    "4.2e1": "42",
    "-0.0": "0",
    "-0": "0",
    "0e5000": "0",
    "-0.00e-5000": "0",
    "42.000": "42",
    "9" * 1000: "9" * 1000,
    "9" * 1001: BAD,
    "9" * 1001 + ".0": BAD,
    "0.1": "0.1",
    "1.50": "1.50",
    "3.14159265358979323846264338327950288": "3.14159265358979323846264338327950288",
    "9223372036854775808": "9223372036854775808",
    "9223372036854775807.0": "9223372036854775807",
    "123456789012345678901234567890123456789.0": "123456789012345678901234567890123456789",
    "1e25": "1" + "0" * 25,
    "1.5e-7": "1.5e-7",
    "1e400": "1" + "0" * 400,
    "1e999999999": BAD,
    "9" * 5001: BAD,
    "true": "true",
    "false": "false",
    "null": BAD,
    "NaN": BAD,
    "Infinity": BAD,
    '["Paris", "paris"]': ["Paris", "paris"],
    '["Paris"]': ["Paris"],
    "[1, 2.0, true]": ["1", "2", "true"],
    "[18446744073709551616]": ["18446744073709551616"],
    "[]": BAD,
    '["a", null]': BAD,
    '["a", " "]': BAD,
    '[["a"]]': BAD,
    '[{"a": 1}]': BAD,
    "[NaN]": BAD,
    '{"a": 1}': BAD,
    "{}": BAD,
    '"\\ud83d"': BAD,
    '["\\ud83d"]': BAD,
}


def test_every_kind_of_json(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(f'{{"prompt": "x", "r": {cell}}}' for cell in JSON))
    assert dict(zip(JSON, read(path), strict=True)) == JSON
    path.write_text('{"prompt": "x"}')
    assert read(path) == [BAD]


def test_a_number_with_too_many_digits_fails_with_its_reason(tmp_path):
    with pytest.raises(RowError, match="'r' is a number of more than 1000 digits"):
        exact_text(10**5001, "r")
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "x", "r": {"9" * 5001}}}')
    ((_, row),) = read_rows(str(path), ["prompt", "r"], COLUMNS.of_text)
    assert isinstance(row, ValueError)
    assert "digits" in str(row)


DAY = datetime.date(2024, 2, 29)
NOON = datetime.datetime(2024, 2, 29, 12)
ARROW: dict[pa.DataType, tuple[list[Any], list[Any]]] = {
    **{
        of: ([42, -1, None], ["42", "-1", BAD])
        for of in (pa.int8(), pa.int16(), pa.int32(), pa.int64())
    },
    **{of: ([42, None], ["42", BAD]) for of in (pa.uint8(), pa.uint16(), pa.uint32())},
    pa.uint64(): ([2**63, 2**64 - 1, None], [str(2**63), str(2**64 - 1), BAD]),
    pa.float64(): (
        [42.0, -0.0, 0.1, 1e-7, 2.0**53, 2.0**63, math.nan, math.inf, None],
        ["42", "0", "0.1", "1e-07", str(2**53), BAD, BAD, BAD, BAD],
    ),
    pa.float32(): ([42, 0.1, 16777216, math.nan, None], ["42", "0.1", "16777216", BAD, BAD]),
    pa.float16(): ([np.float16(42), np.float16(0.1), None], ["42", "0.1", BAD]),
    pa.bool_(): ([True, False, None], ["true", "false", BAD]),
    pa.decimal128(38, 2): (
        [Decimal("42.50"), Decimal("42.00"), Decimal("-0.00"), Decimal(10**30), None],
        ["42.50", "42", "0", f"{10**30}", BAD],
    ),
    pa.decimal128(20, 0): ([Decimal(2**63), None], [str(2**63), BAD]),
    pa.decimal256(60, 3): ([Decimal("0.001"), None], ["0.001", BAD]),
    pa.date32(): ([DAY, None], ["2024-02-29", BAD]),
    pa.date64(): ([DAY, None], ["2024-02-29", BAD]),
    **{pa.timestamp(unit): ([NOON, None], [BAD, BAD]) for unit in ("s", "ms", "us", "ns")},
    pa.timestamp("us", "UTC"): ([NOON, None], [BAD, BAD]),
    pa.time32("s"): ([datetime.time(1), None], [BAD, BAD]),
    pa.duration("s"): ([datetime.timedelta(1), None], [BAD, BAD]),
    **{of: (["Paris", "", None], ["Paris", "", BAD]) for of in (pa.string(), pa.large_string())},
    pa.binary(): ([b"x", None], [BAD, BAD]),
    pa.null(): ([None], [BAD]),
    pa.dictionary(pa.int8(), pa.string()): (["a", None], ["a", BAD]),
    **{
        of: (
            [["Paris", "paris"], ["a"], [], [None], [""], None],
            [["Paris", "paris"], ["a"], *[BAD] * 4],
        )
        for of in (pa.list_(pa.string()), pa.large_list(pa.string()))
    },
    pa.list_(pa.string(), 2): ([["a", "b"], ["a", None], None], [["a", "b"], BAD, BAD]),
    pa.list_(pa.int64()): ([[2**62, 1], [None]], [[str(2**62), "1"], BAD]),
    pa.list_(pa.float32()): ([[0.1, 2]], [["0.1", "2"]]),
    pa.list_(pa.decimal128(5, 1)): ([[Decimal("0.5")]], [["0.5"]]),
    pa.list_(pa.list_(pa.string())): ([[["a"]]], [BAD]),
    pa.struct([("a", pa.string())]): ([{"a": "x"}, None], [BAD, BAD]),
    pa.map_(pa.string(), pa.string()): ([[("a", "x")], None], [BAD, BAD]),
    pa.list_(pa.struct([("a", pa.string())])): ([[{"a": "x"}]], [BAD]),
}  # fmt: skip


@pytest.mark.parametrize("of", ARROW, ids=str)
def test_every_type_of_a_parquet_column(tmp_path, of):
    cells, wanted = ARROW[of]
    path, prompts = tmp_path / "p.parquet", pa.array(["x"] * len(cells))
    pq.write_table(pa.table({"prompt": prompts, "r": pa.array(cells, of), "g": prompts}), path)
    assert read(path) == wanted


def test_a_date_that_python_has_not_costs_one_row(tmp_path):
    path, days = tmp_path / "p.parquet", pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"prompt": ["x", "y"], "r": days, "g": ["", ""]}), path)
    assert read(path) == ["1970-01-01", BAD]


@pytest.mark.parametrize(
    ("cell", "name"),
    [("a", "a"), (3, "3"), (3.0, "3"), (None, None), (math.nan, None), (True, "true"), ([1], BAD)],
)
def test_groups_are_named_by_the_same_rules(tmp_path, cell, name):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "x", "r": "y", "g": cell}))
    job = IngestPrompts(Step("p"), PromptsConfig(path="x", columns=COLUMNS), {"sft": 1.0}, 0)
    ((place, row),) = read_rows(str(path), job.columns, COLUMNS.of_text)
    (placed,) = distribute.placed(job.step.name, job.records, place, row, 4)
    assert (json.loads(placed["record"])["group"] if placed["good"] else BAD) == name


@given(st.text() | st.lists(st.text()))
def test_packed_and_back(reference):
    assert unpack_reference(pack_reference(reference)) == reference
    if isinstance(reference, str) and not reference.startswith(JSON_MARK):
        assert pack_reference(reference) == reference  # as records have had it
    assert unpack_reference(None) is show_reference(None) is None


# --- what sees them ----------------------------------------------------------------------------


def item(text: str, reference: Any) -> Item:
    return Item([{"role": "user", "content": "q"}], text, pack_reference(reference))


ANY = {
    ("exact", "paris"): (["Rome", "Paris"], 1.0),
    ("exact", "Paris."): (["Paris"], 1.0),
    ("exact", "Bonn"): (["Rome", "Paris"], 0.0),
    ("exact", "['Rome', 'Paris']"): (["Rome", "Paris"], 0.0),
    ("number", "It is 7."): (["6", "7.0"], 1.0),
    ("number", "It is 8."): (["6", "7.0"], 0.0),
    ("number", "It is 7"): (["seven", "7"], 1.0),
    ("number", "It is 8"): (["seven", "7"], 0.0),
    ("number", "8"): (["seven"], "BadReferenceError"),
    ("code", "```python\nx = 1\n```"): (["assert x == 1", "assert x == 2"], "ListOfTestsError"),
}


@pytest.mark.parametrize(("asked", "wanted"), ANY.items(), ids=str)
def test_verifiers_take_any_of_a_list(asked, wanted):
    (name, text), (reference, outcome) = asked, wanted
    config = RewardConfig(verifier=name)
    plain = item("42", "42") if name != "code" else item("```python\nx = 1\n```", "assert x == 1")
    scores = load_reward(config, [None]).score([plain, item(text, reference), plain])
    assert scores[0] == scores[2] == 1.0
    assert outcome == (scores[1] if isinstance(scores[1], float) else type(scores[1]).__name__)


def sees(messages: Any, response: str, reference: Any) -> float:
    """A reward of the user's."""
    return {"str": 0.0, "list": float(len(reference or "")), "NoneType": -1.0}[
        type(reference).__name__
    ]


def test_a_function_gets_the_text_or_the_list():
    reward = load_reward(RewardConfig(function=f"{__name__}:sees"), [None])
    items = [item("", "a"), item("", ["a", "b"]), item("", ["a"]), item("", JSON_MARK)]
    assert reward.score([*items, Item([], "", None)]) == [0.0, 2.0, 1.0, 0.0, -1.0]


def test_a_judge_is_shown_all():
    question = Question(JudgeConfig(model="j", endpoint=EndpointConfig(url="http://h/v1")))
    assert "comparison]\nParis\nor\nLutetia\n\n" in question.about(item("x", ["Paris", "Lutetia"]))
    assert "comparison]\nParis\n\n" in question.about(item("x", "Paris"))


def test_an_example_is_right_by_any():
    example = {
        "messages": [{"content": "q"}],
        "reference": ["a", "b"],
        "answers": {"m": "b", "n": "c"},
    }
    told = list(_example(example))
    assert [("right" in line) for line in told] == [False, True, False]


# --- keys --------------------------------------------------------------------------------------


def key(tmp_path, columns: dict[str, str]) -> str:
    tree = {
        "output": str(tmp_path / "out"),
        "prompts": {"path": str(tmp_path), "columns": columns},
        "sources": [{"name": "a", "model": "m"}],
        "reward": {"function": "math:dist"},
    }
    return Chain(Config.model_validate(tree), "prompts", {}, for_plan=True).build()[0].steps[0].key


@pytest.mark.parametrize("name", ["r", "g", "é", "ü", '"'])
@pytest.mark.parametrize(
    ("cell", "changes"), [("a", False), (None, False), (1, True), ([1], True), (True, True)]
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_only_prompts_with_cells_that_were_read_otherwise_have_a_new_key(
    tmp_path, monkeypatch, name, cell, changes, suffix
):
    rows = [{"prompt": "x", name: "n"}, {"prompt": "y", name: cell}]
    rows = rows if isinstance(cell, str | None) or suffix == "jsonl" else rows[1:]
    path = tmp_path / f"p.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=name != "ü") for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    columns = {"group" if name == "g" else "reference": name}
    without = key(tmp_path, {}), key(tmp_path, columns)
    monkeypatch.setattr("wrpo_ray.pipeline.inputs.READING", 99)
    assert key(tmp_path, {}) == without[0]
    assert (key(tmp_path, columns) != without[1]) == changes
