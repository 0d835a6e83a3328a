"""Rows of the user's files into records: what is usable, and what is kept with a reason."""

import datetime
import json
import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import hostile_lines

from wrpo_ray.config import Columns, ImportConfig, PromptsConfig
from wrpo_ray.data.published import ROLES, RowError, from_published, parse_messages
from wrpo_ray.data.records import FAILURE, PROMPT, SCORED
from wrpo_ray.stages.ingest.distribute import placed as parts_of
from wrpo_ray.stages.ingest.readers import prompt_record, read_rows, scored_records
from wrpo_ray.stages.ingest.stage import IngestPrompts, IngestResponses
from wrpo_ray.storage.steps import Step

SPLITS = {"sft": 0.5, "preference": 0.5}


def placed(job, path) -> tuple[list[dict], list[dict]]:
    """The records and the failures that a job makes of a file, as they cross to the writers."""
    found = [
        part
        for place, row in read_rows(str(path), job.columns)
        for part in parts_of(job.step.name, job.records, place, row, 4)
    ]
    records = {
        good: [json.loads(f["record"]) for f in found if f["good"] == good]
        for good in (True, False)
    }
    pa.Table.from_pylist(records[True], schema=job.schema)
    pa.Table.from_pylist(records[False], schema=FAILURE)
    return records[True], records[False]


def prompts_job(**columns: str) -> IngestPrompts:
    given = PromptsConfig(path="x", columns=Columns(**columns))
    return IngestPrompts(Step("prompts"), given, SPLITS, 0)


def test_a_prompt_given_twice_in_a_file_is_one_and_fails_if_its_rows_do_not_agree(tmp_path):
    lines = [
        {"prompt": "same", "r": 1, "g": "x"},
        {"prompt": "same", "r": 1.0},
        {"prompt": "Two answers?", "r": 1},
        {"prompt": "Two answers?", "r": 2},
        {"prompt": "Two groups?", "r": 1, "g": "x"},
        {"prompt": "Two groups?", "r": 1, "g": "y"},
    ]
    path, told = tmp_path / "p.jsonl", set()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for prompts in (PromptsConfig, ImportConfig):
        given = prompts(path="x", columns={"reference": "r", "group": "g"})
        job = IngestPrompts(Step("prompts"), given, SPLITS, 0)
        good, bad = placed(job, path)
        assert not bad
        for rows in (good, good[::-1]):
            parts, failed = job.finish_bucket(rows, None, None)
            assert [(r["reference"], r["group"]) for r in parts[""]] == [("1", "x")]
            told |= {row["message"] for row in failed}
    assert told == {
        "the prompt 'Two answers?' has two references, '1' and '2'; keep one",
        "the prompt 'Two groups?' has two groups, 'x' and 'y'; keep one",
    }


# --- hostile rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_every_hostile_line_is_a_record_or_a_failure_with_its_place(tmp_path, seed):
    lines = hostile_lines(400, seed, long=2**14)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(lines))
    good, bad = placed(prompts_job(reference="reference", group="group"), path)
    blank = sum(not line.strip() for line in lines)
    assert len(good) + len(bad) == 400 - blank
    assert len({row["where"] for row in bad}) == len(bad)
    assert {row["error"] for row in bad} >= {"RowError", "JSONDecodeError", "RecursionError"}
    good, bad = placed(prompts_job(), path)
    assert len(good) > 100
    assert all(m["role"] in ROLES for row in good for m in row["messages"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "\xff"}', "UnicodeDecodeError"),
        (b'{"prompt": "\\ud83d"}', "RowError: the text is no Unicode at character 0"),
        (b'{"prompt": "x", "r": "\\ud83d"}', "RowError: the text is no Unicode at character 0"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"r": 1}', "RowError: 'prompt' is missing"),
        (b'{"prompt": null, "r": 1}', "RowError: 'prompt' is null"),
        (b'{"prompt": "x", "r": null}', "RowError: 'r' is null"),
        (b'{"prompt": [{"role": "end", "content": "x"}], "r": 1}', "RowError: the role 'end' is"),
        (
            b'{"prompt": [{"role": "assistant", "content": "x"}], "r": 1}',
            "RowError: the prompt ends with an assistant message",
        ),
    ],
)
def test_a_bad_line_is_kept_with_its_reason(tmp_path, line, reason):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine", "r": 1}\n\n' + line)
    good, (bad,) = placed(prompts_job(reference="r"), path)
    assert [row["messages"][0]["content"] for row in good] == ["fine"]
    assert bad["where"] == "p.jsonl:3"
    assert f"{bad['error']}: {bad['message']}".startswith(reason)


@pytest.mark.parametrize("line", [b"\xef\xbb\xbf%s", b"%s\r", b"  %s  "])
def test_byte_order_mark_and_ends_of_lines_do_no_harm(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_bytes(line % b'{"prompt": "x"}' + b"\n")
    good, bad = placed(prompts_job(), path)
    assert (good[0]["messages"][0]["content"], bad) == ("x", [])


def test_bytes_that_are_no_text_cost_one_row_of_a_parquet_file(tmp_path):
    raw = pa.array([b"a", b"\xff", b"c", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": text, "unused": text}), path)
    good, bad = placed(prompts_job(), path)
    assert [row["messages"][0]["content"] for row in good] == ["a", "c"]
    assert [(row["where"], row["error"]) for row in bad] == [
        ("p.parquet:2", "UnicodeDecodeError"),
        ("p.parquet:4", "RowError"),
    ]


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(NESTED)
def test_any_prompt_is_a_conversation_or_a_row_error(prompt):
    try:
        messages = parse_messages(prompt)
    except RowError:
        return
    pa.array([messages], PROMPT.field("messages").type)


# --- all answers of a prompt in one row --------------------------------------------------------

ROW = {
    "prompt": "Why?",
    "prompt_id": "7",
    "all_generated_responses": ["because", "so", "hm"],
    "all_rm_scores": [0.3, 0.1, 1],
    "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "hm"}],
    "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "so"}],
}


def candidates(**changes) -> ImportConfig:
    return ImportConfig(**{"path": "x", "format": "candidates", "source": "llama"} | changes)


def test_one_row_becomes_a_scored_record_for_each_answer():
    rows = scored_records(ROW, candidates())
    assert [(r["text"], r["reward"]) for r in rows] == [("because", 0.3), ("so", 0.1), ("hm", 1.0)]
    assert {r["source"] for r in rows} == {"llama"}
    (prompt,) = {r["prompt_id"] for r in rows}
    assert prompt == prompt_record(ROW, Columns(), SPLITS, 0)["prompt_id"]
    pa.Table.from_pylist(rows, schema=SCORED)


def test_the_model_may_stand_in_a_column():
    config = candidates(source=None, columns={"source": "who"})
    assert config.needed == ["prompt", "all_generated_responses", "all_rm_scores", "who"]
    assert {r["source"] for r in scored_records(ROW | {"who": "b"}, config)} == {"b"}
    assert candidates().needed == ["prompt", "all_generated_responses", "all_rm_scores"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"all_rm_scores": [1, 2]}, "has 3 answers, 'all_rm_scores' 2"),
        ({"all_rm_scores": None}, "'all_rm_scores' is null"),
        ({"all_generated_responses": "because"}, "have to be lists, not empty"),
        ({"all_generated_responses": [], "all_rm_scores": []}, "have to be lists, not empty"),
        ({"prompt": ""}, "the prompt is empty"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_whole(change, reason):
    with pytest.raises(RowError, match=reason):
        scored_records(ROW | change, candidates())


@pytest.mark.parametrize("score", [None, math.nan, math.inf, "1", True, 10**400, [1]])
def test_an_answer_without_a_score_fails_alone(tmp_path, score):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(ROW | {"all_rm_scores": [0.3, score, 1]}))
    good, (bad,) = placed(IngestResponses(Step("import"), candidates()), path)
    assert [row["text"] for row in good] == ["because", "hm"]
    assert (bad["where"], bad["error"]) == ("c.jsonl:1[1]", "RowError")
    assert "has to be a finite number" in bad["message"]


# --- rewards of every type ---------------------------------------------------------------------

REWARDS: dict[pa.DataType, tuple[list[object], list[float | None]]] = {
    **{of: ([3, 0, None], [3.0, 0.0, None]) for of in (pa.int8(), pa.int16(), pa.int32())},
    **{of: ([3, 250, None], [3.0, 250.0, None]) for of in (pa.uint8(), pa.uint16(), pa.uint32())},
    pa.int64(): ([-(2**62), None], [-(2.0**62), None]),
    pa.uint64(): ([2**64 - 1, None], [2.0**64, None]),
    pa.float16(): ([np.float16(0.5), np.float16("nan"), None], [0.5, None, None]),
    pa.float32(): ([0.5, math.inf, None], [0.5, None, None]),
    pa.float64(): ([0.1, -math.inf, math.nan, None], [0.1, None, None, None]),
    pa.decimal128(5, 2): ([Decimal("0.93"), Decimal("-7"), None], [0.93, -7.0, None]),
    pa.decimal128(38, 0): ([Decimal(10**37), None], [1e37, None]),
    pa.decimal256(70, 10): ([Decimal("1e50"), None], [1e50, None]),
    pa.dictionary(pa.int8(), pa.float64()): ([0.25, None], [0.25, None]),
    pa.bool_(): ([True, False], [None, None]),  # right or wrong is no degree
    pa.string(): (["0.5", None], [None, None]),
    pa.null(): ([None], [None]),
    pa.date32(): ([datetime.date(2024, 1, 1)], [None]),
    pa.duration("s"): ([datetime.timedelta(1)], [None]),
    pa.binary(): ([b"1"], [None]),
    pa.struct([("a", pa.int64())]): ([{"a": 1}], [None]),
}


@pytest.mark.parametrize("of", REWARDS, ids=str)
@pytest.mark.parametrize("form", ["responses", "candidates"])
def test_a_reward_of_any_type_of_number_is_read_and_all_else_fails(tmp_path, of, form):
    cells, wanted = REWARDS[of]
    path, count = tmp_path / "r.parquet", len(cells)
    texts = [f"{i}" for i in range(count)]
    rewards = pa.array(cells, of) if of != pa.dictionary(pa.int8(), pa.float64()) else (
        pa.array(cells, pa.float64()).dictionary_encode()
    )  # fmt: skip
    if form == "candidates":  # all in one row
        offsets = pa.array([0, count], pa.int32())
        columns = {
            "prompt": ["x"],
            "all_generated_responses": [texts],
            "all_rm_scores": pa.ListArray.from_arrays(offsets, rewards),
        }
    else:
        columns = {"prompt": ["x"] * count, "response": texts, "reward": rewards}
    pq.write_table(pa.table(columns), path)
    given = ImportConfig(path="x", format=form, source="m")
    good, bad = placed(IngestResponses(Step("import"), given), path)
    found = {int(row["text"]): row["reward"] for row in good}
    assert found == {i: value for i, value in enumerate(wanted) if value is not None}
    assert len(good) + len(bad) == count
    assert {row["error"] for row in bad} <= {"RowError"}


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1", 1.0), ("0.5", 0.5), ("1e3", 1000.0), ("-7.25", -7.25), ("1e400", None), ("NaN", None),
     ("Infinity", None), ("-Infinity", None), ("true", None), ('"1"', None), ("null", None),
     ("[1]", None), ("9" * 400, None)],
)  # fmt: skip
def test_a_reward_in_json_is_a_finite_number(tmp_path, cell, value):
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"prompt": "x", "response": "y", "reward": {cell}}}')
    good, bad = placed(IngestResponses(Step("import"), ImportConfig(path="x", source="m")), path)
    assert [row["reward"] for row in good] == ([] if value is None else [value])
    assert len(bad) == (value is None)


# --- conversations ---------------------------------------------------------------------------


@pytest.mark.parametrize("last", ROLES)
@pytest.mark.parametrize("before", [(), *((role,) for role in ROLES), ("system", "user")])
def test_a_prompt_asks_something(before, last):
    """It ends with a user's or a tool's message, and has one of the user's."""
    roles = [*before, last]
    turns = [{"role": role, "content": "x"} for role in roles]
    if last in ("user", "tool") and "user" in roles:
        assert parse_messages(turns) == turns
        return
    with pytest.raises(RowError, match="so that nothing is asked"):
        parse_messages(turns)


def test_a_prompt_of_a_system_message_alone_is_kept_with_its_reason(tmp_path):
    path = tmp_path / "p.jsonl"
    alone = {"role": "system", "content": "be kind"}
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (alone, [alone], "x")))
    good, bad = placed(prompts_job(), path)
    assert len(good) == 1
    assert [row["message"] for row in bad] == [
        "the prompt ends with a system message, so that nothing is asked"
    ] * 2


HELD = {
    "tool_calls": [{"function": {"name": "f"}}],
    "function_call": {"name": "f"},
    "name": "zoe",
    "images": ["x.png"],
    "refusal": "no",
    "documents": [{}],
    "prefix": True,
    "thought": "hm",
    "0": 0,
}


@pytest.mark.parametrize("content", ["", "x", None])
@pytest.mark.parametrize("key", HELD)
def test_what_would_be_lost_of_a_message_fails_its_row(key, content):
    """So prompts that differ in it alone are not taken for one; in an answer, too."""
    asked = {"role": "user", "content": "x"}
    turn = {"role": "assistant", "content": content, key: HELD[key]}
    with pytest.raises(RowError, match=f"a message has `{key}`"):
        parse_messages([asked, turn, asked])
    answer = {"role": "assistant", "content": "x"}
    row = {"prompt": asked, "chosen": [answer, turn], "rejected": [answer]}
    with pytest.raises(RowError, match=f"a message has `{key}`"):
        from_published(row)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_a_thought_that_a_template_would_write_fails_its_row(key):
    """Templates write those behind the last message of the user; others they leave out."""
    asked, result = ({"role": role, "content": "hi"} for role in ("user", "tool"))
    turn, thinks = ({"role": "assistant", "content": "a"} | more for more in ({}, {key: "hm"}))
    for before in ([], [asked, turn], [asked, turn, result, turn]):
        kept = [*before, asked, turn, asked]
        assert parse_messages([*before, asked, thinks, asked]) == kept
        assert parse_messages([*before, asked, thinks, result, asked]) == [
            *kept[:-1],
            result,
            asked,
        ]
        for behind in ([result], [result, turn, result]):
            assert parse_messages([*before, asked, turn | {key: ""}, *behind])
            with pytest.raises(RowError, match=f"^a message has `{key}`, which no prompt"):
                parse_messages([*before, asked, thinks, *behind])


def test_what_is_no_part_of_a_message_is_passed_over():
    """Metadata of public data sets, and keys with nothing in them, as Parquet has them."""
    metadata = {"id": 3, "timestamp": "2024", "language": "English", "toxic": True, "weight": 1}
    empty = {"tool_calls": None, "function_call": {}, "images": [], "name": "", "prefix": False}
    turn = {"role": "user", "content": "x"}
    assert parse_messages([turn | metadata | empty]) == [turn]
    result = {"role": "tool", "content": "3"}
    assert parse_messages([turn, result | {"name": "f", "tool_call_id": "1"}]) == [turn, result]
