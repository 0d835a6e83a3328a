"""Recorded answers: rows to answers, duplicates and contradictions, keys of steps, prompts."""

from __future__ import annotations

import collections
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wrpo_ray.config import Config, RecordedAnswers, TargetConfig
from wrpo_ray.data.published import RowError
from wrpo_ray.data.records import RESPONSE, prompt_id
from wrpo_ray.errors import UserError
from wrpo_ray.llm.reasoning import Format, Markers
from wrpo_ray.pipeline import inputs
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.planning.estimate import plan
from wrpo_ray.planning.text import plan_text
from wrpo_ray.stages.ingest import input_checks
from wrpo_ray.stages.ingest.answers import ENDS, merged_prompts, recorded_answers, settled
from wrpo_ray.stages.ingest.readers import exist, input_files

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


# --- reasoning -----------------------------------------------------------------------------------


def thought(policy: str | None, **row: Any) -> dict[str, Any]:
    """The answer of a row with the columns ALL and `why`, with its reasoning apart."""
    columns = ALL | ({"reasoning": "why"} if policy else {})
    (found,) = answers({"prompt": "p"} | row, columns=columns, reasoning=policy)
    return found


@pytest.mark.parametrize(("policy", "state"), [("keep", "kept"), ("strip", "stripped")])
def test_reasoning_of_a_recorded_answer_is_put_apart_as_that_of_a_model(policy, state):
    text = "<think>\n7\n</think>\n\n8"
    told = thought(policy, response=text)
    assert (told["text"], told["reasoning"]) == ("8", "<think>\n7\n</think>\n\n")
    assert (told["reasoning_state"], told["finish_reason"]) == (state, None)
    apart = thought(policy, response="8", why="7\n")
    assert {n: apart[n] for n in told} == told
    opened = thought(policy, response="7</think>8")  # by the prompt, which is not seen
    assert (opened["text"], opened["reasoning"]) == ("8", "<think>\n7</think>")
    assert "reasoning_state" not in thought(policy, response="8", why=" ")
    assert thought(None, response=text)["text"] == text


@pytest.mark.parametrize(
    "row",
    [
        {"response": "<think>\n7"},
        {"response": "<think>\n7", "f": "max_tokens"},
        {"response": None, "why": "7"},
        {"response": "", "why": "7"},
    ],
)
@pytest.mark.parametrize("policy", ["keep", "strip"])
def test_an_answer_that_ends_within_its_reasoning_was_cut_off(policy, row):
    found = thought(policy, **row)
    assert (found["text"], found["reasoning_state"]) == ("", "unfinished")
    assert found["finish_reason"] == "length"


def test_an_end_that_is_given_stays():
    assert thought("strip", response="<think>7", f="eos")["finish_reason"] == "stop"


def test_token_ids_are_kept_only_where_they_are_those_of_what_is_trained_on():
    text = "<think>7</think>8"
    assert thought("keep", response=text, t=[1, 2])["token_ids"] == [1, 2]
    assert thought("strip", response=text, t=[1, 2])["token_ids"] is None
    assert thought("strip", response=text, t=[1, 2])["output_tokens"] == 2
    assert thought("keep", response="8", why="7", t=[1])["token_ids"] is None
    assert thought("strip", response="8", t=[1])["token_ids"] == [1]


def test_lists_have_a_list_of_reasoning():
    columns = {"reasoning": "why"}
    row = {"prompt": "p", "response": ["x", None, "z"], "why": ["a", "b", None]}
    found = answers(row, columns=columns, reasoning="keep")
    assert [a["text"] for a in found] == ["x", "", "z"]
    assert [a.get("reasoning_state") for a in found] == ["kept", "unfinished", None]
    with pytest.raises(RowError, match="'why' has to hold a value for each of 3 answers"):
        answers(row | {"why": ["a"]}, columns=columns, reasoning="keep")
    for bad, told in ((3, "'why' has to be a text (got int)"), ("\ud83d", "no Unicode")):
        (error,) = answers(row | {"response": "x", "why": bad}, columns=columns, reasoning="keep")
        assert told in str(error)


def test_markers_are_those_of_the_parser():
    text = "[THINK]7[/THINK]8"
    (found,) = answers(
        {"prompt": "p", "response": text}, reasoning="strip", reasoning_parser="mistral"
    )
    assert found["text"] == "8"
    (found,) = answers({"prompt": "p", "response": text}, reasoning="strip")
    assert found["text"] == text


def test_answers_that_differ_in_their_reasoning_are_two():
    rows = [made("8", 1.0, reasoning=why) for why in ("a", "b", "a")] + [made("8", 2.0)]
    kept, failed = settled(rows, "s")
    assert [(r["reward"], r.get("reasoning"), r["sample"]) for r in kept] == [
        (2.0, None, 0),
        (1.0, "a", 1),
        (1.0, "b", 2),
    ]
    assert not failed


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
        {"prompt_id": key, "reference": reference, "group": group, "messages": [{"content": key}]}
        for key, reference, group in (
            ("a", None, "g"),
            ("a", "1", None),
            ("b", "1", None),
            ("b", "2", None),
            ("c", None, None),
        )
    ]
    kept, failed = merged_prompts(rows, "prompts")
    assert [(r["prompt_id"], r["reference"], r["group"]) for r in kept] == [
        ("a", "1", "g"),
        ("c", None, None),
    ]
    assert [(r["prompt_id"], r["message"]) for r in failed] == [
        ("b", "the prompt 'b' has two references, '1' and '2'; keep one")
    ]


# --- files ---------------------------------------------------------------------------------------


def names_of(path: Path | str) -> list[str]:
    return [Path(uri).name for uri in input_files(str(path), "prompts")]


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_files_of_a_data_set_of_the_hub_are_in_subfolders(tmp_path):
    touched(tmp_path, "data/a/0.parquet", "data/b/1.jsonl", ".cache/2.jsonl", "README.md")
    assert names_of(tmp_path) == ["0.parquet", "1.jsonl"]
    touched(tmp_path, "top.jsonl")  # then those in subfolders are left out, as before
    assert names_of(tmp_path) == ["top.jsonl"]


@pytest.mark.parametrize(
    ("names", "splits", "one"),
    [
        (["train-00000-of-00001.parquet", "test-0.parquet"], "test, train", "train-*"),
        (
            ["data/train-0.parquet", "data/validation-0.parquet"],
            "train, validation",
            "data/train-*",
        ),
        (["train/0.jsonl", "test/0.jsonl", "README.md"], "test, train", "train"),
        (["gsm8k_Train.jsonl", "gsm8k_test.jsonl"], "test, train", "gsm8k_Train*"),
        (["test_sft-00.parquet", "val.jsonl", "more.jsonl"], "test, validation", "test_sft-*"),
    ],
)
def test_a_folder_with_files_of_several_splits_is_refused(names, splits, one, tmp_path):
    """With a path for one, and a path for all."""
    touched(tmp_path, *names)
    with pytest.raises(UserError) as told:
        names_of(tmp_path)
    assert str(told.value) == (
        f"prompts: {tmp_path}: holds files of several splits ({splits}); give one, such as "
        f"{tmp_path}/{one}, or {tmp_path}/* for all"
    )
    assert names_of(tmp_path / one)
    every = sorted(Path(name).name for name in names if name != "README.md")
    assert sorted(names_of(tmp_path / "*")) == every


@pytest.mark.parametrize(
    "names",
    [
        ["train-0.parquet", "train-1.parquet", "train_more.parquet"],
        ["a.jsonl", "b.jsonl", "latest.jsonl", "strain.jsonl"],
        ["train.jsonl", "notes-on-test-time.jsonl"],
        ["train/test-tasks.jsonl", "train/dev-tasks.jsonl"],
        ["testing.jsonl", "a-test.jsonl", "evaluation.jsonl"],
    ],
)
def test_a_folder_with_files_of_one_split_is_read(names, tmp_path):
    assert len(names_of(touched(tmp_path, *names))) == len(names)


def test_a_pattern_names_files_of_a_folder(tmp_path, monkeypatch):
    touched(
        tmp_path, "train-0.parquet", "train-1.jsonl", "train-2.csv", "test-0.parquet", "[x]1.jsonl"
    )
    assert names_of(tmp_path / "train-*") == ["train-0.parquet", "train-1.jsonl"]
    assert names_of(f"file://{tmp_path}/*.parquet") == ["test-0.parquet", "train-0.parquet"]
    assert names_of(tmp_path / "[x]*") == ["[x]1.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert input_files("train-*", "prompts")[0] == f"{tmp_path}/train-0.parquet"
    assert exist("test-*")
    touched(tmp_path, "train-*")  # a file of that very name goes before the pattern
    with pytest.raises(UserError, match=r"train-\* is no \.jsonl"):
        names_of("train-*")
    for none in ("none-*", "none/train-*", "*.txt"):
        assert not exist(none)
        with pytest.raises(UserError, match="no such file"):
            names_of(none)


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
        {"name": "c", "answers": {"path": str(tmp_path / "b.jsonl"), "columns": {"reward": "s"}}},
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
    assert "recorded-c: the scores of c (column s) are not used" in text
    assert "recorded-a: " not in text
    assert "recorded-t: off-policy: y_wt and y_l are recorded answers of t" in text


def test_token_ids_of_the_target_are_those_of_its_recorded_answers(tmp_path):
    target = {"name": "t", "model": "none/t", "answers": {"path": str(tmp_path / "a.jsonl")}}
    for given, own in ((target, "t"), (target | {"answers": None}, "target-sft")):
        chain = Chain(config(tmp_path, target=given), "train", for_plan=True)
        (rows,) = (j for s in chain.build() for j in s.jobs if j.step.name == "rows-wrpo")
        assert rows.own == own


def test_a_policy_of_reasoning_is_another_store_of_the_same_answers(tmp_path):
    def keys(**more: Any) -> dict[str, str]:
        answers = {"path": str(tmp_path / "a.jsonl")} | more
        return steps(config(tmp_path, sources=[{"name": "a", "answers": answers}]))

    plain = keys()
    assert keys(reasoning=None, reasoning_parser=None, columns={"reasoning": None}) == plain
    policies: list[dict[str, Any]] = [
        {"reasoning": "strip"},
        {"reasoning": "strip", "columns": {"reasoning": "why"}},
        {"reasoning": "strip", "reasoning_parser": "mistral"},
    ]
    found = {keys(**policy)["recorded-a"] for policy in policies}
    assert len(found | {plain["recorded-a"]}) == 4


def test_recorded_answers_of_the_target_have_its_policy_unless_they_have_their_own(tmp_path):
    def policy(**more: Any) -> tuple[str | None, str | None]:
        answers = {"path": str(tmp_path / "a.jsonl")} | more
        own = {"reasoning": "keep", "reasoning_parser": "mistral"}
        target = {"name": "t", "model": "m", "answers": answers} | own
        found = config(tmp_path, target=target).target.answers
        return found.reasoning, found.reasoning_parser

    assert policy() == ("keep", "mistral")
    assert policy(reasoning="strip") == ("strip", None)
    assert policy(reasoning=None) == (None, None)
    given = RecordedAnswers(path=str(tmp_path / "a.jsonl"))
    target = TargetConfig(name="t", model="m", reasoning="strip", answers=given)
    assert target.answers == given.model_copy(update={"reasoning": "strip"})


def test_a_format_of_reasoning_that_does_not_fit_is_told_before_any_work(tmp_path, monkeypatch):
    """What the target's own template shows is the business of `model_folder`."""
    own = Markers("[THINK]", "[/THINK]")
    monkeypatch.setattr("wrpo_ray.pipeline.preflight.map_models", lambda given, _: given)
    monkeypatch.setattr(
        "wrpo_ray.pipeline.preflight.reasoning_format", lambda folder, template: Format(own)
    )
    answers = {"path": str(tmp_path / "a.jsonl"), "reasoning": "keep"}
    target = {"name": "t", "model": "m", "reasoning": "keep"}

    def told(**more: Any) -> str:
        sources = [{"name": "a", "answers": answers | more}]
        try:
            preflight(config(tmp_path, sources=sources, target=target))
        except UserError as error:
            return str(error)
        return ""

    assert told() == (
        "sources.a.answers.reasoning: its markers are <think> </think>, the target's [THINK] "
        "[/THINK]; set it to strip, or reasoning_parser to the format of the answers"
    )
    assert told(reasoning_parser="mistral") == told(reasoning="strip") == ""
    assert told(reasoning_parser="qwen33").startswith(
        "sources.a.answers: reasoning_parser: vLLM has no 'qwen33'; the closest is 'qwen3'"
    )


def test_a_file_of_several_models_is_listed_and_opened_once_by_each_check(tmp_path, monkeypatch):
    """Once before the work, once for the keys; and the target's job is made once."""
    path = jsonl(tmp_path / "all.jsonl", {"prompt": "p", "response": "x", "model": "a"})
    answers = {"path": path, "columns": {"source": "model", "prompt": "prompt"}}
    given = config(
        tmp_path,
        sources=[{"name": name, "answers": answers} for name in "abcd"],
        target={"name": "t", "model": "none/t", "answers": answers},
    )
    calls: collections.Counter[tuple[str, str]] = collections.Counter()

    def counting(module: Any, name: str, place: int) -> None:
        real = getattr(module, name)

        def call(*arguments: Any) -> Any:
            calls[name, Path(str(arguments[place])).name] += 1
            return real(*arguments)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr("wrpo_ray.pipeline.preflight.map_models", lambda given, _: given)
    counting(input_checks, "input_files", 0)
    counting(input_checks, "check_columns", 0)
    preflight(given)
    once = {(n, f): 1 for n in ("input_files", "check_columns") for f in ("all.jsonl", "p.jsonl")}
    assert calls == once
    calls.clear()
    counting(inputs, "input_files", 0)
    made: list[str] = []
    real = inputs.Inputs._recorded
    monkeypatch.setattr(
        inputs.Inputs, "_recorded", lambda own, name, *rest, **more: (
            made.append(name) or real(own, name, *rest, **more)
        ),
    )  # fmt: skip
    Chain(given, "pair", for_plan=True).build()
    assert calls == {("input_files", "all.jsonl"): 1, ("input_files", "p.jsonl"): 1}
    assert made == ["a", "b", "c", "d", "t"]


def test_each_section_with_a_bad_file_is_told(tmp_path):
    answers = {"path": str(tmp_path / "a.jsonl"), "columns": {"reward": "scor"}}
    sources = [{"name": name, "answers": answers} for name in "ab"]
    with pytest.raises(UserError) as caught:
        preflight(config(tmp_path, sources=sources))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["sources.a.answers", "sources.b.answers"]


NO_JSONL = {
    b"\n \n\n": "has no rows; give a file with at least one",
    b'[{"prompt": "p", "response": "x"}]': "the line is no JSON object); write one row in",
    b'{\n "prompt": "p",\n "response": "x"\n}\n': "Expecting property name",
    b'{"prompt": "p"}\r{"prompt": "q"}\r': "is no JSONL: none of its first lines is",
    '{"prompt": "\xe9"}\n'.encode("latin-1"): "in UTF-8 (such as a.jsonl:1: 'utf-8' codec can't",
    gzip.compress(b'{"prompt": "p", "response": "x"}\n'): "it is compressed; unpack it",
}


@pytest.mark.parametrize(("data", "told"), NO_JSONL.items(), ids=range(len(NO_JSONL)))
def test_a_file_without_a_row_that_can_be_read_is_told_before_any_work(tmp_path, data, told):
    given = config(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError) as caught:
        preflight(given)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"sources.a.answers: {tmp_path}/a.jsonl")
    assert told in line
    (tmp_path / "a.jsonl").write_bytes(data.replace(b"\r", b" ")[:1000] + b'\n{"prompt": "p"}\n')
    if not data.startswith(b"\x1f"):  # bad lines beside good rows are failed rows of the run
        with pytest.raises(UserError, match="no column 'response'"):
            preflight(given)


def test_a_column_that_a_parquet_file_has_twice_is_told_before_any_work(tmp_path):
    path = str(tmp_path / "a.parquet")
    cells = [pa.array([text]) for text in ("p", "x", "y", "z", "z")]
    names = ["prompt", "response", "response", "other", "other"]
    pq.write_table(pa.Table.from_arrays(cells, names=names), path)
    given = config(tmp_path, sources=[{"name": "a", "answers": {"path": path}}])
    told = "a.parquet has several columns 'response'; keep one of them"
    with pytest.raises(UserError, match=told):
        preflight(given)


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
