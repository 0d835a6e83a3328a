"""Rewards and sources by group of prompts: the config, the jobs, the check, the counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from rich.console import Console

from wrpo_ray.config import Config, RewardConfig, load
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, read_bucket, write_shard
from wrpo_ray.data.group_counts import read_counts, sums_by_group
from wrpo_ray.data.samples import Groups, Prompts, Samples
from wrpo_ray.errors import UserError
from wrpo_ray.kubernetes.resource_requests import of_config
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.groups import coverage
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.pipeline.summary import outline
from wrpo_ray.planning.estimate import plan
from wrpo_ray.report.group_table import by_group, tables
from wrpo_ray.report.status import _group_table
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.evaluate.comparison import Compare
from wrpo_ray.stages.evaluate.stage import ALL, Evaluate, ScoredModel, Summer, tabulate
from wrpo_ray.stages.evaluate.statistics import Sums
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.ingest.answers import merged_prompts
from wrpo_ray.stages.ingest.groups import FIRST, CheckGroups, GroupCounts, _count, first_groups
from wrpo_ray.stages.ingest.recorded import IngestRecorded
from wrpo_ray.stages.pair.stage import Select
from wrpo_ray.stages.score.stage import Score, Scorer
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

FUNCTION = "wrpo_ray.zoo.skills:verify"
BY_GROUP = {
    "chat": {"function": FUNCTION},
    "maths": {"verifier": "number"},
    "law": {"verifier": "exact"},
}
ROWS = [("chat", None), ("maths", "7"), ("maths", "8"), ("law", "no"), ("law", "yes")]
WHOLE = Bucket(0, 1)


def write_rows(path: Path, rows: Sequence[tuple[str | None, str | None]] = ROWS) -> Path:
    """A file of prompts with these groups and references."""
    lines = [{"prompt": f"q{i}", "group": g, "reference": r} for i, (g, r) in enumerate(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two endpoints as sources, the second for law only, and three rewards."""
    file = folder / "prompts.jsonl"
    if not file.exists():
        write_rows(file)
    endpoint = {"url": "http://127.0.0.1:9/v1"}
    return {
        "output": str(folder / "out"),
        "prompts": {"path": str(file), "columns": {"group": "group", "reference": "reference"}},
        "sources": [
            {"name": "a", "model": "m", "endpoint": endpoint},
            {"name": "b", "model": "m", "endpoint": endpoint, "groups": ["law"]},
        ],
        "reward": {"by_group": BY_GROUP},
        "storage": {"buckets": 1},
    } | changes


def config(folder: Path, **changes: Any) -> Config:
    return Config.model_validate(tree(folder, **changes))


def jobs(given: Config, kind: type[Any]) -> dict[str, Any]:
    """The jobs of a class by the name of their step."""
    chain = Chain(given, "select")
    return {j.step.name: j for s in chain.build() for j in s.jobs if isinstance(j, kind)}


# --- the config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ({"by_group": {}}, "give exactly one of"),
        ({"by_group": {"a b": {"verifier": "exact"}}}, "group 'a b': give its reward a `name`"),
        ({"by_group": {" ": {"verifier": "exact"}}}, "a group without a name"),
        ({"by_group": {"a": {}}}, "give exactly one of"),
        ({"by_group": {"a": {"by_group": {"b": {"verifier": "exact"}}}}}, "by_group"),
        ({"by_group": {"a": {"verifier": "exact"}}, "batch_size": 2}, "belongs to `model`"),
        ({"by_group": {"a": {"verifier": "exact"}}, "actors": {"max": 2}}, "rewards in `by_group`"),
        (
            {"by_group": {"a": {"verifier": "exact", "name": "x"}, "x": {"verifier": "number"}}},
            "the name 'x' is given to two rewards",
        ),
        ({"by_group": {"b": {"verifier": "exact"}}}, "the name 'b' is a model's"),
    ],
)
def test_rewards_by_group_that_cannot_be(tmp_path, reward, told):
    with pytest.raises(ValidationError, match=told):
        config(tmp_path, reward=reward)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": {"path": "p", "columns": {"reference": "r"}}}, "set columns.group of the"),
        ({"prompts": {"path": "p", "columns": {"group": "g"}}}, "set prompts.columns.reference"),
        ({"target": {"name": "t", "model": "m", "groups": ["law"]}}, "target.groups: only sources"),
        (
            {
                "target": {"name": "t", "model": "m"},
                "evaluate": {"prompts": {"path": "p", "columns": {"reference": "r"}}},
            },
            "set evaluate.prompts.columns.group",
        ),
        ({"sources": [{"name": "a", "model": "m", "groups": []}]}, "at least 1 item"),
    ],
)
def test_sections_that_groups_do_not_fit(tmp_path, changes, told):
    with pytest.raises(ValidationError, match=told):
        config(tmp_path, **changes)


def test_a_reward_has_its_groups_name_and_a_plain_one_is_taken_from_python(tmp_path):
    reward = config(tmp_path).reward
    assert [(own.name, own.verifier) for own in reward.each] == [
        ("chat", None),
        ("maths", "number"),
        ("law", "exact"),
    ]
    plain = config(tmp_path, reward=RewardConfig(verifier="number")).reward
    assert plain.default == RewardConfig(verifier="number")
    assert plain.each == (plain.default,)
    assert plain.default.identity() == RewardConfig(verifier="number").identity()


# --- prompts of some groups --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        (None, "abcd"),
        (Groups(("x",)), "a"),
        (Groups(("x", "y")), "ab"),
        (Groups(("x",), others=True), "bcd"),
        (Groups((), others=True), "abcd"),
        (Groups(()), ""),
    ],
)
def test_prompts_of_some_groups(tmp_path, groups, wanted):
    """b of y, c of no group, d of the group without a name; e is of another split."""
    root, step = Folder(str(tmp_path)), Step("prompts")
    given = {"a": "x", "b": "y", "c": None, "d": "", "e": "x"}
    rows = [
        {"prompt_id": f"{ord(n):032x}", "split": "eval" if n == "e" else "sft", "group": g}
        | {"reference": None if n == "b" else "1"}
        for n, g in given.items()
    ]
    write_shard(root / step.folder, WHOLE, records.PROMPT, rows, "all")
    prompts = Prompts(step, ("sft",), groups=groups)
    found = prompts.read(root, WHOLE, ["prompt_id", "split"])
    assert found.column_names == ["prompt_id", "split"]
    assert {chr(int(key, 16)) for key in found["prompt_id"].to_pylist()} == set(wanted)
    whole = Prompts(step, ("sft",), groups=groups, referenced=True).read(root, WHOLE)
    assert whole.schema == records.PROMPT
    assert {chr(int(key, 16)) for key in whole["prompt_id"].to_pylist()} == set(wanted) - {"b"}


def test_groups_of_a_source_within_those_of_a_reward():
    some, others = Groups(("x", "y")), Groups(("x",), others=True)
    assert some.only(("y", "z")) == Groups(("y",))
    assert others.only(("x", "z", "y")) == Groups(("y", "z"))
    assert others.only(("x",)) == Groups(())
    assert some.only(None) == some


# --- jobs --------------------------------------------------------------------------------------


def test_each_reward_scores_the_sources_answers_of_its_groups(tmp_path):
    given = config(tmp_path)
    made = {name: job.prompts.groups for name, job in jobs(given, Generate).items()}
    assert made == {"generate-a": None, "generate-b": Groups(("law",))}
    found = {name: job.answers.prompts.groups for name, job in jobs(given, Score).items()}
    assert found == {
        "score-chat-a": Groups(("chat",)),
        "score-maths-a": Groups(("maths",)),
        "score-law-a": Groups(("law",)),
        "score-law-b": Groups(("law",)),
    }
    (select,) = jobs(given, Select).values()
    assert [s.step.name for s in select.sources.samples] == list(found)
    assert select.groups == ("chat", "law", "maths")


def test_a_reward_beside_by_group_is_that_of_all_other_prompts(tmp_path):
    by_group = {"chat": {"function": FUNCTION}, "talk": {"function": FUNCTION, "name": "chat"}}
    given = config(tmp_path, reward={"verifier": "exact", "by_group": by_group})
    found = {name: job.answers.prompts.groups for name, job in jobs(given, Score).items()}
    others = Groups(("chat", "talk"), others=True)
    assert found == {
        "score-chat-a": Groups(("chat", "talk")),  # one reward, which is given twice
        "score-reward-a": others,
        "score-reward-b": Groups(("law",)),
    }


def test_jobs_of_one_reward_are_a_phase_and_those_with_a_model_the_first(tmp_path):
    model = tmp_path / "reward"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer_config.json").write_text('{"chat_template": "", "pad_token": "p"}')
    by_group = BY_GROUP | {"z": {"model": str(model)}}
    stages = Chain(config(tmp_path, reward={"by_group": by_group}), "score").build()
    (score,) = (stage for stage in stages if stage.name == "score")
    names = [[job.step.name for job in phase] for phase in score.phases]
    assert names == [
        ["score-z-a"],
        ["score-chat-a"],
        ["score-maths-a"],
        ["score-law-a", "score-law-b"],
    ]


def folders_and_keys(given: Config) -> dict[str, tuple[str, str]]:
    found = jobs(given, Generate) | jobs(given, Score)
    return {name: (job.step.folder, job.step.key) for name, job in found.items()}


def test_another_groups_reward_changes_no_other_score(tmp_path):
    before = folders_and_keys(config(tmp_path))
    changed = BY_GROUP | {"maths": {"verifier": "exact"}}
    after = folders_and_keys(config(tmp_path, reward={"by_group": changed}))
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"score-maths-a"}
    more = BY_GROUP | {"physics": {"verifier": "number"}}
    added = folders_and_keys(config(tmp_path, reward={"by_group": more}))
    assert before.items() <= added.items()
    assert added.keys() - before.keys() == {"score-physics-a"}


def test_a_group_that_leaves_the_common_reward_has_no_answer_scored_again(tmp_path):
    """Its store is asked for fewer prompts; so is that of a source for more."""
    some = {name: BY_GROUP[name] for name in ("chat", "maths")}
    common = {"function": FUNCTION, "name": "common"}
    before = folders_and_keys(config(tmp_path, reward=common | {"by_group": some}))
    after = folders_and_keys(config(tmp_path, reward=common | {"by_group": BY_GROUP}))
    folder, key = after["score-common-a"]
    assert folder == before["score-common-a"][0]
    assert key != before["score-common-a"][1]
    sources = tree(tmp_path)["sources"]
    sources[1]["groups"] = ["maths", "law"]
    wider = folders_and_keys(config(tmp_path, sources=sources))
    narrow = folders_and_keys(config(tmp_path))
    assert wider["generate-b"][0] == narrow["generate-b"][0]
    assert wider["generate-b"][1] != narrow["generate-b"][1]
    sources[1]["groups"] = ["law", "maths"]
    assert folders_and_keys(config(tmp_path, sources=sources)) == wider


def test_pairs_of_the_sources_own_answers_keep_their_groups(tmp_path):
    given = config(
        tmp_path,
        pair={"policy": "fusechat3", "max_margin": 1},
        wrpo={"alpha": {"end": 0}},
        sft=None,
    )
    (pair,) = (s for s in Chain(given, "pair").build() if s.name == "pair")
    (job,) = pair.jobs
    assert job.prompts == Prompts(job.select.prompts.step, ("preference",))
    asked = {s.step.name: (s.prompts.splits, s.prompts.groups) for s in job.answers.samples}
    assert asked["score-law-b"] == (("preference",), Groups(("law",)))
    assert asked["score-chat-a"] == (("preference",), Groups(("chat",)))


def test_verdicts_are_of_prompts_with_a_reference(tmp_path):
    found = jobs(config(tmp_path, pair={"verifier": FUNCTION}), Score)
    assert found["score-verifier-b"].answers.prompts.referenced
    assert found["score-verifier-b"].answers.prompts.groups == Groups(("law",))
    assert not found["score-law-b"].answers.prompts.referenced
    plain = jobs(config(tmp_path, pair={"verifier": FUNCTION}, reward={"verifier": "exact"}), Score)
    assert not plain["score-verifier-b"].answers.prompts.referenced


def evaluated(folder: Path, **changes: Any) -> Config:
    """With a held-out comparison, also of the best of the sources, by the rewards."""
    columns = {"group": "group", "reference": "reference"}
    pairs = {"pairs": [["best-of-sources", "t"]], "by": "reward"}
    asked = {
        "prompts": {"path": str(write_rows(folder / "heldout.jsonl")), "columns": columns},
        "pairwise": pairs,
        "baselines": {"best_of_sources": True},
    }
    target = {"name": "t", "model": "none/t"}
    return config(
        folder, target=target, sft=None, evaluate=asked | changes.pop("evaluate", {}), **changes
    )


def test_all_models_answer_all_held_out_prompts_and_the_best_is_of_the_sources_groups(tmp_path):
    chain = Chain(evaluated(tmp_path), for_plan=True)
    every = [job for stage in chain.build() for job in stage.jobs]
    (own,) = [j for j in every if isinstance(j, Evaluate)]
    b = next(model for model in own.models if model.name == "b")
    assert [s.prompts.groups for s in b.rewarded] == [Groups((g,)) for g in BY_GROUP]
    assert own.has_scales("reward")
    (compare,) = [j for j in every if isinstance(j, Compare)]
    (pair,) = compare.reward_pairs
    best, target = ({(s.step.source, s.prompts.groups) for s in side} for side in pair.rewards)
    assert best == {
        *(("a", Groups((g,))) for g in BY_GROUP),
        ("b", Groups(("law",))),
    }
    assert target == {("t", Groups((g,))) for g in BY_GROUP}
    checks = [j for j in every if isinstance(j, CheckGroups)]
    assert [j.step.name for j in checks] == ["groups", "eval-groups"]
    assert [j.coverage.named != () for j in checks] == [True, False]


def test_a_study_has_no_mean_of_rewards_on_different_scales(tmp_path):
    chain = Chain(evaluated(tmp_path), for_plan=True)
    chain.build()
    with pytest.raises(UserError, match="rewards by_group have scales of their own"):
        chain.compared("t")
    chain = Chain(evaluated(tmp_path, evaluate={"verifier": "exact"}), for_plan=True)
    chain.build()
    _, model, _ = chain.compared("t")
    assert (model.rewarded, len(model.verified)) == ((), 1)


def test_each_reward_asks_a_cluster_for_its_actors(tmp_path):
    by_group = BY_GROUP | {"chat": {"function": FUNCTION, "actors": {"min": 3, "max": 3}}}
    found = {r.what: r.count for r in of_config(config(tmp_path, reward={"by_group": by_group}))}
    assert {k: v for k, v in found.items() if "score" in k} == {
        "score with chat": 3,
        "score with maths": 1,
        "score with law": 1,
    }


# --- the check ---------------------------------------------------------------------------------


def told(given: Config, counts: dict[str | None, int], **more: Any) -> list[str]:
    bare = Counter(more.pop("bare", {}))
    found = GroupCounts(Counter(counts), bare)
    needed = coverage(given, is_held_out=more.pop("is_held_out", False))
    return list(needed.problems("prompts", found, given.failure_limit, **more))


def test_prompts_without_a_reward_are_told_with_their_number(tmp_path):
    given = config(tmp_path)
    there = {"chat": 5, "maths": 900, "law": 5}
    assert told(given, there) == []
    (line,) = told(given, there | {"physics": 1200, None: 17, "Law": 2})
    assert line == (
        "prompts: no reward covers the prompts of group 'physics' (1,200), of no group (17), of "
        "group 'Law' (2); add the groups to reward.by_group, or give `reward` a kind beside it for "
        "all other prompts"
    )
    assert told(given, there | {"physics": 3}, is_held_out=True)
    with_default = config(tmp_path, reward={"function": FUNCTION, "by_group": BY_GROUP})
    assert told(with_default, there | {"physics": 3, None: 2}) == []


def test_prompts_that_no_source_answers(tmp_path):
    sources = tree(tmp_path)["sources"]
    sources[0]["groups"] = ["chat", "maths"]
    there = {"chat": 5, "maths": 9, "law": 1}
    reward = {"function": FUNCTION}
    assert told(config(tmp_path, sources=sources, reward=reward), there) == []
    (line,) = told(config(tmp_path, sources=sources, reward=reward), there | {None: 3})
    assert line.startswith("prompts: no source answers the prompts of no group (3); add the groups")
    assert told(config(tmp_path, sources=sources, reward=reward), {None: 3}, is_held_out=True) == []


def test_a_group_that_no_prompt_is_of_is_told_with_the_closest(tmp_path):
    given = config(tmp_path)
    lines = told(given, {"chat": 1, "maths": 1, "laws": 1})
    assert [line for line in lines if "no prompt" in line] == [
        "reward.by_group: no prompt is of group 'law'; did you mean 'laws'?",
        "sources.b.groups: no prompt is of group 'law'; did you mean 'laws'?",
    ]
    assert not any("no prompt" in line for line in told(given, {"laws": 1}, is_complete=False))
    assert not any("no prompt" in line for line in told(given, {"laws": 1}, is_held_out=True))


def test_verified_prompts_without_a_reference_up_to_the_limit(tmp_path):
    there = {"chat": 100, "maths": 100, "law": 200}
    assert told(config(tmp_path), there, bare={"chat": 100, "maths": 1, "law": 2}) == []
    (line,) = told(config(tmp_path), there, bare={"maths": 2})
    assert line.startswith("prompts: 2 of 100 prompts of group 'maths' have no reference")
    mixed = {"verifier": "exact", "by_group": {"chat": BY_GROUP["chat"]}}
    (line,) = told(config(tmp_path, reward=mixed), there | {None: 1}, bare={"chat": 9, None: 1})
    assert "1 of 1 prompts of no group have no reference" in line


def test_a_dry_run_reads_the_first_rows(tmp_path):
    file = write_rows(tmp_path / "prompts.jsonl", [*ROWS, (None, None), ("chat", None)])
    with pytest.raises(UserError, match=r"the prompts of no group \(1\)"):
        preflight(config(tmp_path))
    write_rows(file, [*ROWS, ("maths", None)])
    with pytest.raises(UserError, match="1 of 3 prompts of group 'maths' have no reference"):
        preflight(config(tmp_path))
    write_rows(file, [r for r in ROWS if r[0] != "law"])
    with pytest.raises(UserError, match="reward.by_group: no prompt is of group 'law'; there are"):
        preflight(config(tmp_path))
    write_rows(file, [*ROWS * (FIRST // len(ROWS)), ("physics", "1")])
    preflight(config(tmp_path))  # the first rows are right
    write_rows(file)
    preflight(config(tmp_path))


def test_a_bucket_counts_its_groups(tmp_path):
    run, step = Run(Folder(str(tmp_path / "out")), 1), Step("prompts")
    rows = [
        {"prompt_id": f"{i:032x}", "split": "sft", "group": g, "reference": r}
        for i, (g, r) in enumerate([*ROWS, ("maths", None), (None, None)])
    ]
    write_shard(run.root / step.folder, WHOLE, records.PROMPT, rows, "all")
    given = config(tmp_path)
    job = CheckGroups(
        Prompts(step, ("sft",)), given.prompts, coverage(given, is_held_out=False), ("maths",)
    )
    found = json.loads(_count(run, job, {"index": 0, "count": 1})["groups"])
    assert found[0] == ["maths", 3, 1]  # the named first: a bucket tells only so many
    assert sorted(found[1:], key=str) == [["chat", 1, 1], ["law", 2, 0], [None, 1, 1]]


def test_a_plan_takes_each_groups_share(tmp_path):
    """Of 5 prompts 2 are of law, with 5 answers each."""
    works = {work.step: work.rows for work in plan(config(tmp_path), "score").works}
    assert works["generate-a"] == 25
    assert works["generate-b"] == 10
    assert works["score-law-b"] == 10
    assert works["score-chat-a"] == 5


def test_the_outline_holds_the_groups_of_a_step(tmp_path):
    given = config(tmp_path, reward={"verifier": "exact", "by_group": {"chat": BY_GROUP["chat"]}})
    chain = Chain(given, "score")
    made = outline(given, "score", [(s.name, j) for s in chain.build() for j in s.jobs], {})
    found = {step.name: (step.groups, step.other_groups) for step in made.steps}
    assert found["generate-a"] == (None, False)
    assert found["score-reward-a"] == (("chat",), True)
    assert found["score-reward-b"] == (("law",), False)


def test_margins_by_group(tmp_path):
    """FuseChat-3.0 keeps pairs up to 0.1, and a verifier's rewards differ by 1."""
    changes: dict[str, Any] = {"wrpo": {"alpha": {"end": 0}}, "sft": None}
    pair = {"policy": "fusechat3"}
    with pytest.raises(ValidationError, match="set pair.by_group.maths.max_margin: 1"):
        config(tmp_path, pair=pair, **changes)
    limits = {"maths": {"max_margin": 1}, "law": {"min_margin": 1, "max_margin": 1}}
    given = config(tmp_path, pair=pair | {"by_group": limits}, **changes).pair
    assert given.margins == (0.01, 0.1)
    assert [given.margins_of(g) for g in ("maths", "law", "chat")] == [
        (0.01, 1),
        (1, 1),
        (0.01, 0.1),
    ]
    with pytest.raises(ValidationError, match=r"by_group.law: max_margin \(1\) must be at least"):
        config(tmp_path, pair={"by_group": {"law": {"min_margin": 2, "max_margin": 1}}})
    plain = config(tmp_path).pair
    assert "by_group" not in plain.identity()
    assert "by_group" in given.identity()
    (line,) = told(
        config(tmp_path, pair={"by_group": {"mats": {"min_margin": 1}}}),
        {"chat": 1, "maths": 1, "law": 1},
    )
    assert line == "pair.by_group: no prompt is of group 'mats'; did you mean 'maths'?"


# --- rows --------------------------------------------------------------------------------------


def prompt_rows(rows: Sequence[tuple[str | None, str | None]]) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "?"}]
    return [
        {"prompt_id": f"{i:032x}", "split": "sft", "messages": turns, "group": g, "reference": r}
        for i, (g, r) in enumerate(rows)
    ]


def test_a_reward_scores_its_groups_only_and_a_missing_reference_is_a_failed_row(tmp_path):
    run, step, made = Run(Folder(str(tmp_path)), 1), Step("prompts"), Step("generate-a")
    given = prompt_rows([*ROWS, ("maths", None)])
    write_shard(run.root / step.folder, WHOLE, records.PROMPT, given, "all")
    answers = [
        {"prompt_id": row["prompt_id"], "source": "a", "sample": 0, "text": "It is 7."}
        for row in given
    ]
    write_shard(run.root / made.folder, WHOLE, records.RESPONSE, answers, "all")
    prompts = Prompts(step, ("sft",), groups=Groups(("maths",)))
    reward = RewardConfig(verifier="number", name="maths")
    job = Score(Samples(made, prompts, 1), reward, (None,), ("number",))
    counts = Scorer(run, [job])({"job": 0, "bucket": 0})
    assert (counts["new"], counts["failed"]) == (2, 1)
    scored = job.samples.read(run.root, WHOLE, records.SCORED).to_pylist()
    assert {row["prompt_id"]: row["reward"] for row in scored} == {
        given[1]["prompt_id"]: 1.0,
        given[2]["prompt_id"]: 0.0,
    }
    (failed,) = read_bucket(job.step.failures(run.root), WHOLE, records.FAILURE).to_pylist()
    assert (failed["prompt_id"], failed["error"]) == (f"{5:032x}", "MissingReferenceError")


def test_counts_by_group_are_told_as_tables():
    groups = pa.chunked_array([["x", "y", None, "x", "a/b"]])
    columns = {"rows": np.ones(5, int), "reward": np.array([1, 2, 4, 8, 16.0])}
    wins = {"wins/q.1": np.array([True, False, True, False, True])}
    counts = sums_by_group(groups, ["x", "a/b"], columns | wins)
    assert counts["group/rows/x"] == 2
    assert read_counts(counts | {"rows": 5, "wins.q": 1}) == {
        "x": {"rows": 2, "reward": 9.0, "wins/q.1": 1},
        "a/b": {"rows": 1, "reward": 16.0, "wins/q.1": 1},
        "": {"rows": 2, "reward": 6.0, "wins/q.1": 1},
    }
    select = counts | sums_by_group(groups, ["x", "a/b"], {"prompts": np.ones(5, int)})
    pair = {"group/rows/x": 1, "group/target_chosen/x": 0.5, "group/rejected/x": -0.25}
    found = by_group(select, pair)
    assert found["x"] == {
        "prompts": 2, "selected": 2, "wins": {"q.1": 1}, "not_asked": [], "rows": 1,
        "y_ws": 4.5, "y_wt": 0.5, "y_l": -0.25,
    }  # fmt: skip
    (_, first), (_, second) = tables(found)
    assert first[1:] == [
        ["x", "2", "2", "1", "4.5", "0.5", "-0.25"],
        ["a/b", "1", "1", "0", "16", "-", "-"],
        ["others", "2", "2", "0", "3", "-", "-"],
    ]
    assert second == [["group", "q.1"], ["x", "50.0%"], ["a/b", "100.0%"], ["others", "50.0%"]]
    assert tables(by_group({"rows": 3}, {})) == []
    sources = [{"name": "q.1"}, {"name": "z", "groups": ["x"]}, {"name": "y", "groups": None}]
    (_, (_, second)) = tables(by_group(select, pair, {"sources": sources}))
    told = {row[0]: row[1:] for row in second}
    assert told == {  # y was asked and never best
        "group": ["q.1", "z"], "x": ["50.0%", "0.0%"], "a/b": ["100.0%", "not asked"],
        "others": ["50.0%", "not asked"],
    }  # fmt: skip


def test_tables_by_group_show_all_numbers_beside_long_names(tmp_path):
    """Others come last; a group without prompts has no means; a wide terminal is not needed."""
    long = {f"a name that many groups begin with, {end}": end for end in ("one", "two")}
    row = {"prompts": 1234, "selected": 4, "wins": {"a": 1, "b": 3}, "not_asked": []}
    row |= {"rows": 2, "y_ws": 0.5, "y_wt": 0.25, "y_l": -0.125}
    empty = (
        dict.fromkeys(row, 0)
        | {"wins": {}, "not_asked": []}
        | dict.fromkeys(("y_ws", "y_wt", "y_l"))
    )
    groups = {"": row, **dict.fromkeys(long, row), "empty": empty}
    (title, first), (_, second) = tables(groups)
    names = [own[0] for own in first[1:]]
    assert [name[-3:] for name in names[:2]] == ["one", "two"]
    assert names[2:] == ["empty", "others"]
    assert all(len(name) <= 32 for name in names)
    assert first[3] == ["empty", "0", "0", "0", "-", "-", "-"]
    assert second[:1] + second[3:] == [
        ["group", "a", "b"], ["empty", "-", "-"], ["others", "25.0%", "75.0%"],
    ]  # fmt: skip
    few = tables({"x": row, "": row})[1][1]
    assert few == [["source", "x", "others"], ["a", "25.0%", "25.0%"], ["b", "75.0%", "75.0%"]]
    console = Console(width=80, file=StringIO())
    console.print(_group_table((title, first)))
    shown = console.file.getvalue()
    assert shown.count("1,234") == 3
    assert shown.count("-0.125") == 3


def test_rewards_of_different_groups_have_no_common_mean(tmp_path):
    """Two rewards: 1 and 3 for chat against 2 and 2, 100 for maths against 50, 7 without group."""
    run, step = Run(Folder(str(tmp_path)), 1), Step("eval-prompts")
    given = prompt_rows([("chat", None), ("chat", None), ("maths", "1"), (None, None)])
    write_shard(run.root / step.folder, WHOLE, records.PROMPT, given, "all")
    values = {"new": [1.0, 3.0, 100.0, 7.0], "old": [2.0, 2.0, 50.0, 7.0]}
    prompts = Prompts(step, ("sft",))
    models = []
    for name, own in values.items():
        stores = []
        for groups in (Groups(("maths",)), Groups(("maths",), others=True)):
            store = Step(f"score-{groups.others}-{name}")
            scored = [
                {"prompt_id": row["prompt_id"], "source": name, "sample": 0, "reward": value}
                | {"text": name}
                for row, value in zip(given, own, strict=True)
            ]  # each store holds the scores of all, as after a change of the config
            write_shard(run.root / store.folder, WHOLE, records.SCORED, scored, "all")
            stores.append(Samples(store, Prompts(step, ("sft",), groups=groups), 1))
        models.append(ScoredModel(name, tuple(stores), ()))
    job = Evaluate(prompts, tuple(models), (("new", "old"),))
    part = json.loads(Summer(run, job)({"bucket": 0})["part"])
    sums = {tuple(key): Sums(*own) for key, own in part["sums"]}
    assert sums["reward", "new", ALL].n == 4
    table = tabulate(job, sums)["reward"]
    new = table["models"]["new"]
    assert new[ALL]["mean"] is None
    assert (new["chat"]["mean"], new["maths"]["mean"], new["no group"]["mean"]) == (2, 100, 7)
    means = {name: own["mean"] for name, own in table["contrasts"].items()}
    assert means == {"new - old, chat": 0, "new - old, maths": 50, "new - old, no group": 0}


# --- files of one group ------------------------------------------------------------------------


def several(folder: Path, **changes: Any) -> dict[str, Any]:
    """A file of chat without references, one of maths, and one with a column of groups."""
    rows = {
        "chat": [{"q": "hi"}, {"q": "ho"}],
        "maths": [{"prompt": "1+1", "reference": "2"}, {"prompt": "2+2", "reference": "4"}],
        "mixed": [{"prompt": "law?", "reference": "no", "group": "law"}],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    referenced = {"columns": {"reference": "reference"}}
    files = [
        {"path": str(folder / "chat.jsonl"), "group": "chat", "columns": {"prompt": "q"}},
        {"path": str(folder / "maths.jsonl"), "group": "maths"} | referenced,
        {
            "path": str(folder / "mixed.jsonl"),
            "columns": {"reference": "reference", "group": "group"},
        },
    ]
    return tree(folder, prompts=files) | changes


def prompts_job(given: Config) -> Any:
    made = [job for stage in Chain(given, "prompts").build() for job in stage.jobs]
    return next(job for job in made if job.step.name == "prompts")


def test_each_file_of_prompts_has_its_columns_and_its_group(tmp_path):
    given = preflight(Config.model_validate(several(tmp_path)))
    parts = prompts_job(given).parts
    rows = [
        part.records(json.loads(line))[0]
        for part in parts
        for line in Path(part.input.path).read_text().splitlines()
    ]
    found = [(r["messages"][0]["content"], r["group"], r["reference"]) for r in rows]
    assert found == [
        ("hi", "chat", None),
        ("ho", "chat", None),
        ("1+1", "maths", "2"),
        ("2+2", "maths", "4"),
        ("law?", "law", "no"),
    ]
    counts, is_all = first_groups(given.prompt_files, "prompts")
    assert (counts.prompts, is_all) == ({"chat": 2, "maths": 2, "law": 1}, True)
    assert counts.bare == {"chat": 2, "maths": 0, "law": 0}
    works = {work.step: work.rows for work in plan(given, "score").works}
    assert works["generate-a"] == 25
    assert works["score-maths-a"] == 10


def test_the_key_of_prompts_in_several_files_is_that_of_their_content_groups_and_limits(tmp_path):
    def key(change: dict[str, Any] | None = None, *, is_turned: bool = False) -> str:
        own = several(tmp_path)
        own["prompts"][1] |= change or {}
        own["prompts"] = own["prompts"][::-1] if is_turned else own["prompts"]
        return prompts_job(Config.model_validate(own)).step.key

    known = key()
    assert key(is_turned=True) == known
    changes: list[dict[str, Any]] = [{"group": "law"}, {"group": None}, {"limit": 1}]
    assert len({known, *map(key, changes)}) == 4
    one = tree(tmp_path)
    plain = prompts_job(Config.model_validate(one)).step.key
    one["prompts"] |= {"group": None}
    assert prompts_job(Config.model_validate(one)).step.key == plain
    one["prompts"] |= {"group": "law", "columns": {"reference": "reference"}}
    assert prompts_job(Config.model_validate(one)).step.key != plain


@pytest.mark.parametrize(
    ("number", "change", "told"),
    [
        (1, {"columns": {"group": "g"}}, "prompts.1: group: is that of all prompts, and columns"),
        (1, {"group": " "}, "prompts.1: group: a group without a name"),
        (1, {"group": ""}, "prompts.1: group: a group without a name"),
        (1, {"grup": "a"}, "prompts.1.grup: "),
        (1, {"path": None}, "prompts.1.path: "),
    ],
)
def test_a_group_of_a_file_that_cannot_be_is_told_with_its_place(tmp_path, number, change, told):
    own = several(tmp_path)
    own["prompts"][number] |= change
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(own))
    with pytest.raises(UserError) as caught:
        load(path)
    (line,) = str(caught.value).splitlines()
    assert f"{path}: {told}" in line


def test_files_of_prompts_that_do_not_fit_the_rewards(tmp_path):
    own = several(tmp_path)
    own["prompts"][1]["group"] = "math"
    with pytest.raises(UserError) as caught:
        preflight(Config.model_validate(own))
    assert str(caught.value).splitlines() == [
        "prompts: no reward covers the prompts of group 'math' (2); add the groups to "
        "reward.by_group, or give `reward` a kind beside it for all other prompts",
        "reward.by_group: no prompt is of group 'maths'; did you mean 'math'?",
    ]
    own["prompts"][1] |= {"group": "maths", "columns": {"reference": "answer"}}
    (tmp_path / "maths.jsonl").unlink()
    with pytest.raises(UserError, match=r"prompts.1: no such file"):
        preflight(Config.model_validate(own))
    with pytest.raises(ValidationError, match="set prompts.0.columns.reference"):
        Config.model_validate(several(tmp_path, reward={"verifier": "exact"}))
    own = several(tmp_path)
    bare = [{n: v for n, v in one.items() if n != "columns"} for one in own["prompts"][:2]]
    with pytest.raises(ValidationError, match="set prompts.0.columns.reference"):
        Config.model_validate(own | {"prompts": bare})


@pytest.mark.parametrize("column", ["prompt", "reference", "group", "id"])
def test_a_column_of_prompts_that_no_row_has_is_told_before_any_work(tmp_path, column):
    own = tree(tmp_path)
    own["prompts"]["columns"][column] = "nope"
    with pytest.raises(UserError) as caught:
        preflight(Config.model_validate(own))
    assert str(caught.value).splitlines()[0] == (
        f"prompts: {tmp_path}/prompts.jsonl has no column 'nope' in its first rows; they have "
        f"prompt, group, reference; set `columns`"
    )


def test_a_prompt_in_files_of_two_groups_is_a_failed_row():
    prompt = {"prompt_id": "a", "reference": None, "messages": [{"content": "Why?"}]}
    rows = [prompt | {"group": group} for group in ("chat", "maths", None)]
    assert merged_prompts(rows[::2], "prompts")[0] == [rows[0]]
    kept, (failed,) = merged_prompts(rows, "prompts")
    assert not kept
    assert failed["message"] == "the prompt 'Why?' has two groups, 'chat' and 'maths'; keep one"


def test_recorded_answers_are_found_by_the_ids_of_several_files(tmp_path):
    own = several(tmp_path)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"uid": 1, "response": "x"}\n')
    own["sources"] += [{"name": "r", "answers": {"path": str(answers), "columns": {"id": "uid"}}}]
    told = "sources.r.answers: columns.id needs `prompts` with the same ids"
    with pytest.raises(ValidationError, match=told):
        Config.model_validate(own)
    for one in own["prompts"]:
        one["columns"] = one.get("columns", {}) | {"id": "n"}
    given = Config.model_validate(own)
    job = jobs(given, IngestRecorded)["recorded-r"]
    assert job.by_id == given.prompt_files
    assert len(job.step.store["ids"]) == 3


def test_verdicts_are_of_prompts_with_a_reference_also_in_several_files(tmp_path):
    given = Config.model_validate(several(tmp_path, pair={"verifier": FUNCTION}))
    checks = {n: j for n, j in jobs(given, Score).items() if j.outcome == "verdict"}
    assert {job.answers.prompts.referenced for job in checks.values()} == {True}
