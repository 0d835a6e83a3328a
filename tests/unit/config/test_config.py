"""The config tree: everything documented, all errors at once, closest matches."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from wrpo_ray.config import (
    Config,
    ImportConfig,
    ModelConfig,
    PairConfig,
    SamplingConfig,
    Section,
    ServeConfig,
    SplitConfig,
    load,
)
from wrpo_ray.config.reference import config_text
from wrpo_ray.errors import UserError

ROOT = Path(__file__).parents[3]
FUSION = ROOT / "cluster" / "overlays" / "job" / "fusion.yaml"
OTHERS = {
    ROOT / "jobs" / "runtime_env.yaml",
    ROOT / "jobs" / "serve.yaml",
    ROOT / "jobs" / "study.yaml",
}
JOBS = sorted({*(ROOT / "jobs").glob("*.yaml"), FUSION} - OTHERS)
BASE = {
    "output": "out",
    "prompts": {"path": "p.jsonl"},
    "sources": [{"name": "a", "model": "m"}],
    "reward": {"model": "r"},
}


def write(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def problems(tmp_path: Path, tree: object, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, tree), overrides)
    return str(caught.value).splitlines()


def sections() -> list[type[Section]]:
    found, queue = [], [Section]
    while queue:
        queue += (children := queue.pop().__subclasses__())
        found += children
    return found


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    load(path)


def test_the_shipped_config_of_serving_loads():
    ServeConfig.model_validate(yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text()))


@pytest.mark.parametrize("section", sections(), ids=lambda s: s.__name__)
def test_every_field_is_documented(section):
    undocumented = [n for n, f in section.model_fields.items() if not f.description]
    assert not undocumented


def test_all_errors_at_once_with_nearest_name(tmp_path):
    tree = BASE | {"sampling": {"sampels": 3, "top_p": 2}, "seed": "x", "sauces": []}
    lines = problems(tmp_path, tree)
    assert len(lines) == 4
    text = "\n".join(lines)
    assert "sampling.sampels: unknown key; did you mean 'samples'?" in text
    assert "sampling.top_p: input should be less than or equal to 1 (got 2)" in text
    assert "seed: input should be a valid integer" in text
    assert "sauces: unknown key; did you mean 'sources'?" in text


def test_a_name_that_yaml_reads_as_no_text_is_to_be_quoted(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "output: out\nprompts: {path: p, group: 3}\n"
        "sources: [{name: m, model: m, groups: [1, yes]}]\n"
        "reward: {by_group: {2: {verifier: exact}, no: {verifier: exact}}}\n"
        "pair: {by_group: {2020-01-01: {min_margin: 1}}}\n"
    )
    with pytest.raises(UserError) as caught:
        load(tmp_path / "c.yaml")
    told = [line.removeprefix(f"{tmp_path}/c.yaml: ") for line in str(caught.value).splitlines()]
    text = "has to be a text, and YAML reads it as {}; put it in quotes"
    found = {"prompts.group": "3", "sources.0.groups.0": "1", "sources.0.groups.1": "true"}
    found |= {"reward.by_group.2": "2", "reward.by_group.0": "false"}
    assert told[:5] == [f"{where}: {text.format(read)}" for where, read in found.items()]
    assert told[5].endswith(text.format('"2020-01-01"'))


def test_a_key_that_is_a_python_keyword_is_given_by_the_fields_name(tmp_path):
    tree = {"output": "out", "import": {"path": "answers.jsonl"}}
    config = load(write(tmp_path, tree))
    assert Config(output="out", existing=ImportConfig(path="answers.jsonl")) == config
    assert Config(**tree) == config
    assert Config(**config.model_dump()) == config
    with pytest.raises(ValidationError, match=r"existing\.path\n  Field required"):
        Config(output="out", existing={})
    (line,) = problems(tmp_path, {"output": "out", "import": {}})
    assert line.endswith("import.path: missing; it is required")
    (line,) = problems(tmp_path, tree | {"existing": {"path": "answers.jsonl"}})
    assert "existing: unknown key; known here: output, seed, prompts, import, sources," in line
    assert "import" in config_text("")
    assert "existing" not in config_text("")


def test_unknown_key_in_a_list_element_is_named_with_its_place(tmp_path):
    tree = BASE | {"sources": [{"name": "a", "modle": "m"}]}
    assert any(
        "sources.0.modle: unknown key; did you mean 'model'?" in p for p in problems(tmp_path, tree)
    )


def test_zero_sources_and_missing_reward_are_told_together(tmp_path):
    (line,) = problems(tmp_path, {"output": "o", "prompts": {"path": "p"}})
    assert "zero sources" in line
    assert "reward: missing" in line


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["pair.policy=fusechat3"], "set wrpo.alpha.end: 0"),
        (["pair.policy=fusechat3", "pair.source_below_target=drop"], "belongs to policy: wrpo"),
        (["pair.policy=fusechat3", "pair.min_margin=0.5"], "max_margin (0.1) must be at least"),
        (["pair.min_margin=0.5", "pair.max_margin=0.4"], "max_margin (0.4) must be at least"),
    ],
)
def test_pair_policies_that_do_not_fit(tmp_path, overrides, reason):
    (line,) = problems(tmp_path, BASE, *overrides)
    assert reason in line


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_revision", "skip_tokenizer_init"])
@pytest.mark.parametrize("section", ["sources.0", "target"])
def test_an_engine_has_the_tokenizer_of_the_models_folder(tmp_path, section, name):
    """The trainer takes the token ids that it samples."""
    tree = BASE | {"target": {"name": "t", "model": "m"}}
    (line,) = problems(tmp_path, tree, f"{section}.engine.{name}=other")
    assert f"engine.{name}: the tokenizer is that of the model folder" in line


@pytest.mark.parametrize(
    ("performance", "reason"),
    [
        ({"kv_cache_dtype": "fp8"}, "performance.kv_cache_dtype: not among async_scheduling, "),
        ({"seed": 1}, "others go into `engine`"),
        ({"load_format": "dummy"}, "performance.load_format: 'dummy' is not among auto, "),
        ({"max_num_seqs": 2}, "performance.max_num_seqs: it is in `engine` too"),
    ],
)
def test_settings_of_performance_that_may_change_answers(tmp_path, performance, reason):
    source = {"name": "a", "model": "m", "engine": {"max_num_seqs": 1}, "performance": performance}
    (line,) = problems(tmp_path, BASE | {"sources": [source]})
    assert reason in line


def test_performance_is_no_part_of_the_identity_and_seeds_are_where_they_are_the_runs():
    fast = ModelConfig(name="a", model="m", performance={"max_num_seqs": 2})
    assert fast.identity() == ModelConfig(name="a", model="m").identity()
    assert "seeds" not in SamplingConfig().identity()
    assert SamplingConfig(seeds="run").identity() == SamplingConfig().identity() | {"seeds": "run"}


def test_fusechat3_has_its_own_margins():
    assert PairConfig().margins == (0, float("inf"))
    assert PairConfig(policy="fusechat3").margins == (0.01, 0.1)
    assert PairConfig(policy="fusechat3", max_margin=2).margins == (0.01, 2)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seed", "write it as a.b=value"),
        ("seed=[", "not valid YAML"),
        ("sources.7.name=b", "no such place"),
        ("seed.a=1", "valid integer"),
    ],
)
def test_bad_override(tmp_path, override, reason):
    assert reason in problems(tmp_path, BASE, override)[0]


def test_overrides_reach_nested_and_listed_values(tmp_path):
    config = load(write(tmp_path, BASE), ["sources.0.name=b", "wrpo.alpha.end=0.5", "seed=7"])
    assert (config.sources[0].name, config.wrpo.alpha.end, config.seed) == ("b", 0.5, 7)


@pytest.mark.parametrize("text", ["a: [", "- a", "", "\x00"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load(path)


def test_placement_stays_out_of_identity():
    model = ModelConfig(name="a", model="m")
    moved = ModelConfig(name="a", model="m", actors={"max": 8, "num_gpus": 1})
    assert model.identity() == moved.identity()
    assert model.identity() != ModelConfig(name="a", model="m", dtype="float32").identity()


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        SplitConfig().sft = 0.5


def test_reserved_and_repeated_names(tmp_path):
    twice = [{"name": "a", "model": "m"}, {"name": "a", "model": "n"}]
    assert "given twice" in problems(tmp_path, BASE | {"sources": twice})[0]
    fused = [{"name": "fused", "model": "m"}]
    assert "is taken" in problems(tmp_path, BASE | {"sources": fused})[0]


def test_defaults_are_the_papers():
    config = Config.model_validate(BASE)
    assert (config.sampling.samples, config.sampling.temperature, config.sampling.top_p) == (
        5,
        0.8,
        0.95,
    )
    wrpo = config.wrpo
    assert (wrpo.beta, wrpo.alpha.end, wrpo.learning_rate, wrpo.batch_size) == (
        0.01,
        0.1,
        3e-7,
        128,
    )


# --- recorded answers ------------------------------------------------------------------------


RECORDED = {"name": "a", "answers": {"path": "a.jsonl"}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sources": [{"name": "a"}]}, "sources.0: give either `model`, which is asked, or `answ"),
        ({"sources": [RECORDED | {"model": "m"}]}, "sources.0: give either `model`, which is ask"),
        ({"sources": [RECORDED | {"dtype": "auto"}]}, "sources.0.dtype: unknown key"),
        (
            {"sources": [{"name": "a", "answer": {"path": "x"}}]},
            "sources.0.answer: unknown key; did you mean 'answers'?",
        ),
        (
            {"sources": [{"name": "a", "answers": {"path": "x", "colums": {}}}]},
            "sources.0.answers.colums: unknown key; did you mean 'columns'?",
        ),
        (
            {"sources": [{"name": "a", "answers": {"path": "x", "reward": "recorded"}}]},
            "sources.0.answers: reward: recorded needs the column of the scores: columns.reward",
        ),
        (
            {"sources": [{"name": "a", "answers": {"path": "x", "of": "b"}}]},
            "sources.0.answers: of: needs the column with the names of models: columns.source",
        ),
        (
            {"sources": [{"name": "a", "answers": {"path": "x", "columns": {"id": "n"}}}]},
            "sources.a.answers: columns.id needs `prompts` with the same ids (prompts.columns.id)",
        ),
        ({"sources": [RECORDED], "reward": None}, "reward: missing"),
        (
            {
                "sources": [{"name": "a", "answers": {"path": "x", "columns": {"reward": "s"}}}],
                "reward": None,
            },
            "or set sources.a.answers.reward: recorded to use the scores in its file",
        ),
        ({"sources": [RECORDED, {"name": "a", "model": "m"}]}, "the name 'a' is given twice"),
        (
            {"sources": [RECORDED], "prompts": None, "import": {"path": "x"}},
            "import: it brings its own answers; leave out `answers`, or `import`",
        ),
        (
            {"sources": [RECORDED], "prompts": None, "reward": {"verifier": "exact"}},
            "set sources.a.answers.columns.reference to the column with the right ones",
        ),
        (
            {
                "sources": [RECORDED],
                "target": {"name": "t", "model": "m"},
                "evaluate": {"prompts": {"path": "e"}, "baselines": {"best_of_sources": True}},
            },
            "evaluate.baselines: need `sources` that are asked ({name, model})",
        ),
    ],
)
def test_recorded_answers_that_do_not_fit(tmp_path, changes, reason):
    tree = {name: value for name, value in (BASE | changes).items() if value is not None}
    assert any(reason in line for line in problems(tmp_path, tree))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sources": [{"name": "a"}]}, "sources.0: give either `model`, which is asked, or `answ"),
        (
            {"sources": [RECORDED | {"reasoning": "strip"}]},
            "sources.0.reasoning: unknown key; did you mean 'answers.reasoning'?",
        ),
        (
            {"sources": [RECORDED | {"groups": ["x"]}]},
            "sources.0.groups: unknown key; it belongs to a section with 'model'",
        ),
        (
            {"sources": [RECORDED | {"licence": "mit"}]},
            "sources.0.licence: unknown key; did you mean 'license'?",
        ),
        (
            {"sources": [{"name": "a", "answers": "a.jsonl"}]},
            "sources.0.answers: write it as {path: ...} (got 'a.jsonl')",
        ),
        ({"prompts": "p.jsonl"}, "prompts: write it as {path: ...} (got 'p.jsonl')"),
        ({"prompts": ["p.jsonl"]}, "prompts.0: write it as {path: ...} (got 'p.jsonl')"),
        ({"prompts": 3}, "prompts: has to be a section of keys and values (got 3)"),
        ({"storage": "x"}, "storage: has to be a section of keys and values (got 'x')"),
    ],
)
def test_a_section_that_is_none_or_of_another_kind_is_told_with_the_remedy(tmp_path, changes, line):
    (found,) = problems(tmp_path, BASE | changes)
    assert found.partition(".yaml: ")[2].startswith(line)


def test_a_reward_is_needed_only_where_answers_have_no_recorded_score(tmp_path):
    scored = {"path": "a.jsonl", "columns": {"reward": "s"}, "reward": "recorded"}
    tree = {"output": "out", "sources": [{"name": "a", "answers": scored}]}
    assert load(write(tmp_path, tree)).recorded.keys() == {"a"}
    target = {"name": "t", "model": "m"}
    assert "reward: missing" in problems(tmp_path, tree | {"target": target})[0]
    load(write(tmp_path, tree | {"target": target | {"answers": scored}}))


def test_the_reference_has_both_kinds_of_sources():
    text = config_text("sources")
    assert "max_model_len: " in text
    assert "answers: section, required (wrpo config sources.answers)" in text
    assert "finish_reason: " in config_text("sources.answers.columns")
    assert "off-policy" in config_text("target.answers")


def test_a_target_given_from_python_is_any_model():
    tree = {"output": "out", "prompts": {"path": "p"}, "sources": [{"name": "a", "model": "m"}]}
    made = Config(**tree, reward={"model": "r"}, target=ModelConfig(name="t", model="m"))
    assert (made.target.name, made.target.answers) == ("t", None)


def test_a_policy_of_reasoning_is_part_of_the_identity_only_where_it_is_set():
    plain = ModelConfig(name="a", model="m").identity()
    assert not {"reasoning", "reasoning_parser"} & plain.keys()
    set_ = ModelConfig(name="a", model="m", reasoning="keep", reasoning_parser="qwen3").identity()
    assert set_ == plain | {"reasoning": "keep", "reasoning_parser": "qwen3"}


CUT = {"wrpo.max_prompt_length": 60, "wrpo.overflow": "cut"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sources.0.reasoning_parser": "qwen3"}, "set `reasoning` too, to keep or strip"),
        ({"sources.0.reasoning": "keep"}, "sources.a.reasoning: keep trains the target to reason"),
        ({"sources.0.reasoning": "keep", "target.reasoning": "strip"}, "set target.reasoning to k"),
        (
            {"target.reasoning": "keep", "wrpo.compat": "published", **CUT},
            "published` knows no reasoning",
        ),
        ({"target.reasoning": "drop"}, "target.reasoning"),
        (
            {"sources": '[{"name": "b", "answers": {"path": "x", "reasoning": "keep"}}]'},
            "sources.b.answers.reasoning: keep trains the target to reason; set target.reasoning",
        ),
        ({"target.answers": '{"path": "x", "reasoning_parser": "qwen3"}'}, "set `reasoning` too"),
        ({"target.answers": '{"path": "x", "columns": {"reasoning": "r"}}'}, "columns.reasoning: "),
        ({"target.answers": '{"path": "x", "reasoning": "keep"}'}, "target.answers.reasoning: ke"),
    ],
)
def test_a_policy_of_reasoning_that_cannot_be_followed_is_refused(tmp_path, changes, problem):
    tree = BASE | {"target": {"name": "t", "model": "m"}}
    overrides = [f"{name}={value}" for name, value in changes.items()]
    assert any(problem in line for line in problems(tmp_path, tree, *overrides))


@pytest.mark.parametrize(
    ("source", "target"), [("keep", "keep"), ("strip", None), ("strip", "keep"), (None, "keep")]
)
def test_policies_of_reasoning_that_fit(source, target):
    models = {"sources": [{"name": "a", "model": "m", "reasoning": source}]}
    Config.model_validate(
        BASE | models | {"target": {"name": "t", "model": "m"} | {"reasoning": target}}
    )


def test_the_former_number_of_prompts_of_a_file_is_refused_with_its_successor(tmp_path):
    (line,) = problems(tmp_path, BASE | {"storage": {"buckets": 4, "chunk": 64}})
    assert "storage" in line
    assert "remove it, or set commit_seconds" in line
    given = Config.model_validate(BASE | {"storage": {"commit_seconds": 30}})
    assert given.storage.commit_seconds == 30
    assert problems(tmp_path, BASE | {"storage": {"commit_seconds": 0}})
