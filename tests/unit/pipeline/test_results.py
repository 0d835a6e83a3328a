"""Failed rows of an output, and what is done again when they get new attempts."""

import json
import time

import pytest

from wrpo_ray.config import Config
from wrpo_ray.data.buckets import Bucket
from wrpo_ray.data.failures import write_failures
from wrpo_ray.data.records import failure
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.failed_rows import failures, plan_retry, retry
from wrpo_ray.report.text import failures_text
from wrpo_ray.storage.fingerprints import digest

SOURCES = ("a", "b")


@pytest.fixture
def config(tmp_path) -> Config:
    """Two sources and a target, as folders that nothing loads."""
    models = [{"name": name, "model": str(tmp_path / name)} for name in (*SOURCES, "t")]
    for model in models:
        (tmp_path / model["name"]).mkdir()
        (tmp_path / model["name"] / "config.json").write_text(model["name"])
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}')
    return Config(
        output=str(tmp_path / "out"),
        prompts={"path": str(tmp_path / "p.jsonl")},
        sources=models[:2],
        target=models[2],
        reward={"function": "wrpo_ray.zoo.skills:verify"},
    )


def steps(config: Config) -> dict:
    return {step.name: step for stage in Chain(config).build() for step in stage.steps}


def finish(config: Config, *names: str) -> None:
    """As if those steps were done, all where no name is given."""
    for name, step in steps(config).items():
        if name in names or not names:
            step.finish(Chain(config).root, {"rows": 1}, time.time())


def fail(config: Config, step: str, *errors: Exception, part: str = "") -> None:
    folder = steps(config)[step].failures(Chain(config).root)
    rows = [failure("s", e, prompt_id=digest(i), sample=i) for i, e in enumerate(errors)]
    write_failures(folder / part if part else folder, Bucket(0, 1), rows, "all")


def test_failed_rows_by_step_and_error(config):
    fail(config, "prompts", ValueError("no JSON"))
    fail(config, "generate-a", KeyError("k"), ValueError("v"), KeyError("k"))
    fail(config, "rows-sft", ValueError("too long"), part="dropped")
    finish(config, "prompts")
    found = failures(config)
    assert [(g["step"], g["error"], g["rows"], g["done"], g["can_retry"]) for g in found] == [
        ("prompts", "ValueError", 1, True, False),
        ("generate-a", "KeyError", 2, False, True),
        ("generate-a", "ValueError", 1, False, True),
        ("rows-sft dropped", "ValueError", 1, False, False),
    ]
    json.dumps(found)
    text = failures_text(found)
    assert "prompt " + digest(1) + ": v" in text
    assert [g["error"] for g in failures(config, "generate")] == ["KeyError", "ValueError"]
    with pytest.raises(UserError, match="no such stage or step; there are prompts, generate, "):
        failures(config, "generat")


def test_a_retry_is_another_request_and_all_that_depends_on_it_is_done_again(config):
    finish(config)
    fail(config, "generate-a", ValueError("busy"))
    plan = plan_retry(config)
    assert plan.rows == {"generate-a": 1}
    depends = ["generate-a", "score-reward-a", "select", "rows-sft", "sft"]
    depends += ["generate-target-sft", "score-reward-target-sft", "pair", "rows-wrpo", "wrpo"]
    assert plan.again == depends
    assert plan.trained == ["sft", "wrpo"]

    before = steps(config)
    retry(config, plan)
    after = steps(config)
    assert {name for name in before if before[name].key != after[name].key} == set(depends)
    assert after["generate-a"].folder == before["generate-a"].folder
    assert after["generate-target-sft"].folder != before["generate-target-sft"].folder
    assert failures(config) == []

    fail(config, "generate-a", ValueError("busy still"))
    retry(config, plan_retry(config))
    assert steps(config)["generate-a"].retry == 2


def test_only_the_step_that_is_named_is_retried(config):
    finish(config)
    for source in SOURCES:
        fail(config, f"score-reward-{source}", ValueError("busy"))
    plan = plan_retry(config, "score-reward-b")
    assert plan.rows == {"score-reward-b": 1}
    assert not {"generate-b", "score-reward-a"} & set(plan.again)


def test_what_cannot_be_retried_is_told(config):
    fail(config, "prompts", ValueError("no JSON"))
    with pytest.raises(UserError, match="no failed answer or score to retry"):
        plan_retry(config)
