"""Recorded answers: rows to answers, duplicates and contradictions, keys of steps, prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wrpo_ray.config import Config, RecordedAnswers
from wrpo_ray.data.published import RowError
from wrpo_ray.data.records import RESPONSE, prompt_id
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.planning.estimate import plan
from wrpo_ray.planning.text import plan_text
from wrpo_ray.stages.ingest.answers import ENDS, merged_prompts, recorded_answers, settled
from wrpo_ray.stages.ingest.readers import input_files

ALL = {"reward": "r", "finish_reason": "f", "token_ids": "t"}


def given(**more: Any) -> RecordedAnswers:
    return RecordedAnswers.model_validate({"path": "x"} | more)


def answers(row: dict[str, Any], **more: Any) -> list[Any]:
    return recorded_answers(row, given(**more), "m", "f.jsonl:1")


# --- rows ----------------------------------------------------------------------------------------


def test_a_row_with_a_text_and_one_with_a_list_give_the_same_answers():
    single = [
        answers({"prompt": "p", "response": a, "r": r, "f": "stop", "t": [i]}, columns=ALL)[0]
        for i, (a, r) in enumerate([("x", 1), ("y", 0.5)])
    ]
    lists = {"response": ["x", "y"], "r": [1, 0.5], "f": ["stop", "stop"], "t": [[0], [1]]}
    assert answers({"prompt": "p"} | lists, columns=ALL) == single
    assert single[0]["prompt_id"] == prompt_id([{"role": "user", "content": "p"}])
    assert [(a["text"], a["reward"], a["token_ids"]) for a in single] == [
        ("x", 1.0, [0]),
        ("y", 0.5, [1]),
    ]
    assert single[0]["output_tokens"] == 1
    settled_rows, _ = settled(single, "s")
    assert pa.Table.from_pylist(settled_rows, schema=RESPONSE)["sample"].to_pylist() == [0, 1]


@pytest.mark.parametrize("missing", [{}, {"r": None, "f": None, "t": None}])
def test_what_a_row_does_not_have_is_null(missing):
    (found,) = answers({"prompt": "p", "response": "x"} | missing, columns=ALL)
    assert (found["reward"], found["finish_reason"], found["token_ids"]) == (None, None, None)


@pytest.mark.parametrize("name", [*ENDS, *(name.upper() for name in ENDS)])
def test_ends_have_the_names_of_servers(name):
    (found,) = answers({"prompt": "p", "response": "x", "f": name}, columns=ALL)
    assert found["finish_reason"] == ENDS[name.lower()]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"response": 3}, "'response' has to be a text (got int)"),
        ({"response": [None]}, "'response' has to be a text (got NoneType)"),
        ({"response": "\ud83d"}, "the text is no Unicode at character 0"),
        ({"response": "x", "f": "content_filter"}, "'f' has to be one of stop, eos"),
        ({"response": "x", "f": 1}, "'f' has to be one of stop, eos"),
        ({"response": "x", "t": [1, -1]}, "'t' has to be a list of token ids"),
        ({"response": "x", "t": [True]}, "'t' has to be a list of token ids"),
        ({"response": "x", "t": [2**31]}, "'t' has to be a list of token ids"),
        ({"response": "x", "t": "1 2"}, "'t' has to be a list of token ids"),
        ({"response": "x", "r": float("nan")}, "'r' has to be a finite number"),
        ({"response": "x", "r": "1"}, "'r' has to be a finite number"),
    ],
)
def test_a_bad_answer_is_kept_with_its_reason(row, reason):
    (found,) = answers({"prompt": "p"} | row, columns=ALL)
    assert isinstance(found, RowError)
    assert str(found).startswith(reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"response": None}, "'response' is null"),
        ({}, "'response' is missing"),
        ({"response": []}, "'response' is an empty list"),
        ({"response": ["x", "y"], "r": [1]}, "'r' has to hold a value for each of 2 answers"),
        ({"response": ["x"], "t": 3}, "'t' has to hold a value for each of 1 answers"),
        ({"response": "x", "prompt": None}, "'prompt' is null"),
    ],
)
def test_a_bad_row_is_refused_as_a_whole(row, reason):
    with pytest.raises(RowError, match=reason.replace("[", r"\[")):
        answers({"prompt": "p"} | row, columns=ALL)


def test_scores_that_are_used_have_to_be_there():
    columns = {"reward": "r"}
    (found,) = answers({"prompt": "p", "response": "x"}, columns=columns, reward="recorded")
    assert "'r' has to be a finite number" in str(found)
    (found,) = answers({"prompt": "p", "response": "x"}, columns=columns)
    assert found["reward"] is None


@pytest.mark.parametrize("value", ["7", 7, 7.0])
def test_an_id_is_the_same_as_text_and_as_number(value):
    (found,) = answers({"uid": value, "response": "x"}, columns={"id": "uid"})
    assert found["id"] == "7"
    assert "prompt_id" not in found


# --- all answers of a prompt ---------------------------------------------------------------------


def made(text: str, reward: float | None = None, where: str = "f:1", **more: Any) -> dict[str, Any]:
    row = {"prompt_id": "p", "source": "m", "text": text, "reward": reward, "where": where}
    return row | {"finish_reason": None, "token_ids": None} | more


def test_an_answer_with_two_scores_fails_in_all_its_rows_and_no_other():
    rows = [made("x", 1, "f:1"), made("x", 2, "f:2"), made("y", 1, "f:3"), made("x", 1, "f:4")]
    kept, failed = settled(rows, "recorded-m")
    assert [(row["text"], row["sample"]) for row in kept] == [("y", 0)]
    assert sorted(row["where"] for row in failed) == ["f:1", "f:2", "f:4"]
    assert {row["message"] for row in failed} == {
        "the same answer to the prompt has 2 scores (1, 2); keep one"
    }


def test_the_same_row_twice_is_one_answer_in_any_order():
    rows = [
        made("x", 1.0),
        made("x", None),
        made("x", 1.0),
        made("x", 1.0, token_ids=[1]),
        made("a", 0.5),
        made("x", 1.0, finish_reason="length"),
    ]
    wanted, _ = settled(rows, "s")
    assert [(r["text"], r["reward"], r["token_ids"], r["sample"]) for r in wanted] == [
        ("a", 0.5, None, 0),
        ("x", 1.0, None, 1),
        ("x", 1.0, [1], 2),
        ("x", 1.0, None, 3),
    ]
    for seed in range(5):
        mixed = random.Random(seed).sample(rows, len(rows))
        assert settled(mixed, "s")[0] == wanted


def test_prompts_of_several_files_are_one_and_two_references_fail():
    rows = [
        {"prompt_id": "a", "reference": None, "group": "g"},
        {"prompt_id": "a", "reference": "1", "group": None},
        {"prompt_id": "b", "reference": "1", "group": None},
        {"prompt_id": "b", "reference": "2", "group": None},
        {"prompt_id": "c", "reference": None, "group": None},
    ]
    kept, failed = merged_prompts(rows, "prompts")
    assert [(r["prompt_id"], r["reference"], r["group"]) for r in kept] == [
        ("a", "1", "g"),
        ("c", None, None),
    ]
    assert [(r["prompt_id"], r["message"]) for r in failed] == [
        ("b", "the prompt has two references, '1' and '2'; keep one")
    ]


# --- files ---------------------------------------------------------------------------------------


def test_files_of_a_data_set_of_the_hub_are_in_subfolders(tmp_path):
    for name in ("data/train/0.parquet", "data/test/1.jsonl", ".cache/2.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [Path(uri).name for uri in input_files(str(tmp_path), "x")]
    assert found == ["1.jsonl", "0.parquet"]
    (tmp_path / "top.jsonl").touch()  # then those in subfolders are left out, as before
    assert [Path(uri).name for uri in input_files(str(tmp_path), "x")] == ["top.jsonl"]


# --- the chain -----------------------------------------------------------------------------------


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tmp_path: Path, **changes: Any) -> Config:
    answer = {"prompt": "p", "response": "x", "s": 1}
    files = {name: jsonl(tmp_path / f"{name}.jsonl", answer) for name in "ab"}
    tree = {
        "output": str(tmp_path / "out"),
        "prompts": {"path": jsonl(tmp_path / "p.jsonl", {"prompt": "p"})},
        "sources": [{"name": name, "answers": {"path": path}} for name, path in files.items()],
        "reward": {"function": "wrpo_ray.zoo.skills:verify"},
    }
    made = {name: value for name, value in (tree | changes).items() if value is not None}
    return Config.model_validate(made)


def steps(settings: Config) -> dict[str, str]:
    stages = Chain(settings, "select").build()
    return {step.name: step.key for stage in stages for step in stage.steps}


def test_a_second_recorded_source_changes_only_the_selection(tmp_path):
    both = config(tmp_path)
    first = steps(both.model_copy(update={"sources": both.sources[:1]}))
    second = steps(both)
    assert {name for name in first if first[name] != second[name]} == {"select"}
    assert second.keys() - first.keys() == {"recorded-b", "score-reward-b"}


def test_the_key_is_that_of_the_content_and_columns_not_of_the_path_or_licence(tmp_path):
    settings = config(tmp_path)

    def key(**changes: Any) -> str:
        (source, other), one = settings.sources, changes.pop("license", None)
        answers = source.answers.model_copy(update=changes)
        changed = source.model_copy(update={"answers": answers, "license": one})
        return steps(settings.model_copy(update={"sources": (changed, other)}))["recorded-a"]

    known = key()
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "moved" / "a.jsonl").resolve()
    moved.write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert key(path=str(moved), license="mit") == known
    assert (
        key(columns=settings.sources[0].answers.columns.model_copy(update={"group": "g"})) != known
    )
    moved.write_text(moved.read_text() + "\n")
    assert key(path=str(moved)) != known


def test_more_prompts_leave_the_stores_of_answers_and_scores(tmp_path):
    def folders(settings: Config) -> dict[str, str]:
        stages = Chain(settings, "select", for_plan=True).build()
        return {step.name: step.folder for stage in stages for step in stage.steps}

    changes = {"reward": {"model": "none/r"}}
    before = folders(config(tmp_path, **changes))
    more = jsonl(tmp_path / "more.jsonl", {"prompt": "p"}, {"prompt": "q"})
    after = folders(config(tmp_path, prompts={"path": more}, **changes))
    assert {name for name in before if before[name] != after[name]} == {"prompts", "select"}


def test_prompts_of_one_file_are_the_same_for_more_of_its_sources(tmp_path):
    path = jsonl(tmp_path / "all.jsonl", {"prompt": "p", "response": "x", "model": "a"})
    answers = {"path": path, "columns": {"source": "model"}}
    sources = [{"name": name, "answers": answers} for name in ("a", "b", "c")]
    keys = [steps(config(tmp_path, prompts=None, sources=sources[:n])) for n in (1, 3)]
    assert keys[0]["prompts"] == keys[1]["prompts"]
    other = {"path": path, "columns": {"source": "model", "reference": "model"}}
    assert steps(config(tmp_path, prompts=None, sources=[{"name": "a", "answers": other}]))[
        "prompts"
    ] != keys[0]["prompts"]  # fmt: skip


def test_a_plan_has_no_tokens_for_recorded_answers_and_says_what_is_special(tmp_path):
    recorded = {"columns": {"reward": "s"}, "reward": "recorded"}
    sources = [
        {"name": "a", "answers": {"path": str(tmp_path / "a.jsonl")}},
        {"name": "b", "answers": {"path": str(tmp_path / "b.jsonl")} | recorded},
    ]
    own = {"path": str(tmp_path / "a.jsonl")}
    target = {"name": "t", "model": "none/t", "answers": own}
    found = plan(config(tmp_path, sources=sources, target=target), "pair")
    works = {work.step: work for work in found.works}
    assert {name for name, work in works.items() if work.output_tokens} == set()
    assert works["score-reward-a"].rows == 1
    assert "score-reward-b" not in works
    assert "generate-target-sft" not in works
    text = plan_text(found)
    assert "recorded-b: b has scores of its own (column s), on another scale" in text
    assert "recorded-t: off-policy: y_wt and y_l are recorded answers of t" in text


def test_token_ids_of_the_target_are_those_of_its_recorded_answers(tmp_path):
    target = {"name": "t", "model": "none/t", "answers": {"path": str(tmp_path / "a.jsonl")}}
    for given, own in ((target, "t"), (target | {"answers": None}, "target-sft")):
        chain = Chain(config(tmp_path, target=given), "train", for_plan=True)
        (rows,) = (j for s in chain.build() for j in s.jobs if j.step.name == "rows-wrpo")
        assert rows.own == own


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("where", ["sources.a.answers", "target.answers"])
def test_a_column_that_is_not_there_is_told_before_any_work(tmp_path, suffix, where):
    row, path = {"prompt": "p", "response": "x", "score": 1}, tmp_path / f"bad{suffix}"
    if suffix == ".jsonl":
        jsonl(path, row, {"prompt": "q"})
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    answers = {"path": str(path), "columns": {"reward": "scor", "prompt": "question"}}
    changes: dict[str, Any] = {"sources": [{"name": "a", "answers": answers}]}
    if where.startswith("target"):
        changes = {"target": {"name": "t", "model": "none/t", "answers": answers}}
    with pytest.raises(UserError) as caught:
        preflight(config(tmp_path, **changes))
    (line,) = (line for line in str(caught.value).splitlines() if line.startswith(f"{where}: "))
    assert "has no column 'question', 'scor'" in line
    assert "set `columns`" in line
