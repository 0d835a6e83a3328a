"""A plan before any answer exists: what the input files tell, and how wide its range is."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wrpo_ray.config import Config
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.planning import input_texts, lengths
from wrpo_ray.planning.estimate import plan as make_plan
from wrpo_ray.planning.input_texts import prompt_bytes, recorded_bytes
from wrpo_ray.planning.measured import TOKEN
from wrpo_ray.planning.text import plan_text
from wrpo_ray.planning.work import Plan, Work
from wrpo_ray.storage.folder import Folder

PROMPTS, BYTES = 50, 70
"""Different prompts in the file, and bytes of a recorded answer."""


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Answers of two models to 50 prompts of 40 bytes; rows in the order of the models."""
    texts = [f"{n:040}" for n in range(PROMPTS)]
    answers = {"prompt": texts * 2, "model": ["x"] * PROMPTS + ["y"] * PROMPTS}
    table = pa.table(answers | {"response": ["a" * BYTES] * (2 * PROMPTS)})
    pq.write_table(table, tmp_path / "answers.parquet")
    return tmp_path


def config_of(folder: Path, model: str = "none/m-135M", **changes) -> Config:
    path = str(folder / "answers.parquet")
    columns = {"prompt": "prompt", "response": "response", "source": "model"}
    sources = [{"name": n, "answers": {"path": path, "columns": columns}} for n in "xy"]
    settings = {
        "output": str(folder / "out"),
        "prompts": {"path": path, "limit": 30},
        "sources": sources,
        "target": {"name": "t", "model": model},
        "reward": {"function": "builtins:len"},
        "sampling": {"samples": 2, "max_tokens": 100},
        "evaluate": {
            "prompts": {"path": path},
            "sampling": {"samples": 1, "temperature": 0, "max_tokens": 100},
        },
        "cluster": {"num_cpus": 2},
    }
    return Config.model_validate(settings | changes)


def of(plan: Plan, step: str) -> Work:
    return next(w for w in plan.works if w.step == step)


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    """The run would start Ray itself."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_equal_prompts_are_one_and_those_trained_on_are_not_held_out(recorded):
    """30 of 50 are trained on, and 20 held out; each model has answers to the 30."""
    plan = make_plan(config_of(recorded))
    assert (of(plan, "prompts").rows, of(plan, "eval-prompts").rows) == (30, 20)
    assert of(plan, "score-reward-x").rows == 30
    assert of(plan, "generate-t").rows == 20
    assert of(plan, "generate-target-sft").rows == 20 * 2  # two thirds are for preferences


def test_texts_of_the_input_tell_lengths(recorded):
    """The trained target answers as its sources do: 70 bytes. Of the other one nothing is known.

    But its answers end at max_tokens, twice the guess; their rate is up to thrice as low.
    """
    works = make_plan(config_of(recorded)).works
    trained = next(w for w in works if w.step == "generate-target-sft")
    assert trained.lengths == "input"
    assert trained.output_tokens == round(trained.rows * BYTES / TOKEN)
    assert trained.prompt_tokens == round(trained.prompts * (40 / TOKEN + lengths.TEMPLATE))
    own = next(w for w in works if w.step == "generate-t")
    assert (own.lengths, own.output_tokens) == ("guess", own.rows * 50)  # half of max_tokens
    log = math.log
    most, least = math.hypot(log(3), log(2)), math.hypot(log(2), log(4))
    assert own.spread == pytest.approx((math.exp(least), math.exp(most)))


def test_what_the_config_gives_goes_before_the_input(recorded):
    plan = make_plan(config_of(recorded, plan={"prompt_tokens": 7, "output_tokens": 9}))
    trained = of(plan, "generate-target-sft")
    assert trained.lengths == "given"
    assert (trained.prompt_tokens, trained.output_tokens) == (7 * trained.prompts, 9 * trained.rows)


def test_answers_that_nothing_is_known_of_end_at_max_tokens(recorded):
    """A bound of 100 tokens holds for the mean of all answers, whatever else is unknown."""
    for most in (1, 10, 100, 1000):
        sampling = {"samples": 2, "max_tokens": most}
        found = make_plan(config_of(recorded, sampling=sampling))
        assert of(found, "generate-target-sft").output_tokens <= 40 * most


def test_the_range_is_less_than_a_factor_of_twelve_before_anything_was_measured(recorded):
    low, high = make_plan(config_of(recorded)).range()
    assert high < 12 * low


def test_a_model_of_unknown_size_is_told(recorded):
    told = "parameters are assumed; give plan.parameters"
    assert told not in plan_text(make_plan(config_of(recorded)))
    text = plan_text(make_plan(config_of(recorded, model="none/smollm")))
    assert f"generate-t: its model is not there and its name tells no size: 8B {told}" in text
    known = {"parameters": {"t": 1e8}}
    assert told not in plan_text(make_plan(config_of(recorded, model="none/m", plan=known)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"prompt": "abc"}\n{"prompt": [{"role": "user", "content": "12345"}]}\n', 4),
        ('{"prompt": "abc"}\nno json\n{"other": 1}\n{"prompt": null}\n', 3),  # a run tells
        ("no json\n", None),
        ("", None),
        (None, None),
    ],
)
def test_bytes_of_prompts_are_those_of_the_rows_that_can_be_read(content, expected, tmp_path):
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    given = {"path": str(tmp_path / "p.jsonl")}
    config = config_of(tmp_path, prompts=given, evaluate=None)
    assert prompt_bytes(config.prompt_files) == expected


def test_bytes_of_recorded_answers_in_lists(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "response": [["12", "1234"], ["12345"]]})
    pq.write_table(table, tmp_path / "answers.parquet")
    answers = config_of(tmp_path).recorded.values()
    assert recorded_bytes(answers) == (3 + 5) / 2


def write(path: Path, rows: list[Any]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


@pytest.mark.parametrize("bad", [None, [], [None], 3, {"text": "x"}, "\ud83d"])
def test_a_recorded_answer_that_is_no_text_tells_no_length(bad, tmp_path):
    rows = [{"prompt": "p", "response": response} for response in (bad, ["12", None], "1234")]
    sources = [{"name": "x", "answers": write(tmp_path / "a.jsonl", rows)}]
    config = config_of(tmp_path, prompts=None, sources=sources, evaluate=None)
    assert recorded_bytes(config.recorded.values()) == 3
    assert make_plan(config).totals()["output_tokens"] > 0


def test_rows_with_lists_have_more_answers_than_there_are_rows(tmp_path):
    rows = [{"prompt": f"{n:020}", "response": ["a", "b", "c"]} for n in range(40)]
    given = write(tmp_path / "a.jsonl", rows)
    sources = [{"name": "x", "answers": given}]
    changes = {"prompts": None, "sources": sources, "evaluate": None}
    plan = make_plan(config_of(tmp_path, **changes))
    assert of(plan, "prompts").rows == 40
    assert of(plan, "score-reward-x").rows == of(plan, "recorded-x").rows == 3 * 40
    half = make_plan(config_of(tmp_path, **changes | {"prompts": given | {"limit": 20}}))
    assert of(half, "score-reward-x").rows == 3 * 20


def test_the_prompts_of_several_recorded_files_are_counted_once(tmp_path):
    """Four models with two answers to each of 40 prompts of 20 bytes, in files of their own."""
    rows = [{"prompt": f"{n // 2:020}", "response": str(n)} for n in range(80)]
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name in "wxyz"}
    sources = [{"name": name, "answers": given} for name, given in files.items()]
    plan = make_plan(config_of(tmp_path, prompts=None, sources=sources, evaluate=None))
    assert of(plan, "prompts").rows == 40
    sampled = of(plan, "generate-target-sft")
    assert sampled.prompts == round(40 * 2 / 3)
    assert sampled.prompt_tokens == round(sampled.prompts * (20 / TOKEN + lengths.TEMPLATE))


def test_the_longest_row_of_padded_answers_has_its_prompt_with_each(tmp_path):
    rows = write(tmp_path / "p.jsonl", [{"prompt": "p", "response": "r"}])
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"hidden_size": 1024, "vocab_size": 64}))
    target = {"name": "t", "model": str(tmp_path / "m")}
    sources = [{"name": "x", "answers": rows}]

    def told(packing: bool) -> str:
        more = {"packing": packing, "max_length": 8192, "gradient_checkpointing": True}
        settings = {"prompts": rows, "sources": sources, "target": target, "evaluate": None}
        plan = make_plan(config_of(tmp_path, **settings, sft=None, wrpo=more))
        (line,) = plan.memory
        return line

    packed, padded = (float(re.search(r"activations ([\d.]+)", told(p))[1]) for p in (True, False))
    assert padded > 2 * packed


def test_the_plan_warns_of_workers_too_few_for_the_model_after_a_loss(tmp_path):
    """8B parameters with ZeRO-3 over 8 GPUs of 80 GB: two hold too little."""
    rows = write(tmp_path / "p.jsonl", [{"prompt": "p", "response": "r"}])
    sizes = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "vocab_size": 128256, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }  # fmt: skip
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(sizes))
    target = {"name": "t", "model": str(tmp_path / "m")}
    sources = [{"name": "x", "answers": rows}]

    def told(**more: Any) -> str:
        training = {"workers": 8, "num_gpus": 1, "zero_stage": 3, "gradient_checkpointing": True}
        settings = {"prompts": rows, "sources": sources, "target": target, "evaluate": None}
        plan = make_plan(config_of(tmp_path, **settings, sft=None, wrpo=training | more))
        (line,) = plan.memory
        return line

    warned = told(min_workers=2)
    (enough,) = re.findall(r"set min_workers: (\d+)$", warned)
    assert 2 < int(enough) <= 8
    for fits in ({}, {"min_workers": int(enough)}, {"min_workers": 8}):
        assert "min_workers" not in told(**fits)
    assert "of which 77.6 GB are free" in told(workers=int(enough) - 1)
    assert "min_workers" not in told(min_workers=2, num_gpus=0)
    assert "there are 77.6 GB" in told(workers=int(enough))


# --- prompts without an answer --------------------------------------------------------------------


def partly(tmp_path: Path, answered: dict[str, list[int]], **changes: Any) -> Config:
    """40 prompts, and files of two answers of each source to those with these numbers."""
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"{n:020}", "key": n} for n in range(40)])
    sources = []
    for name, numbers in answered.items():
        rows = [
            {"prompt": f"{n:020}", "key": n, "response": f"{n}{i}"} for n in numbers for i in "ab"
        ]
        sources.append({"name": name, "answers": write(tmp_path / f"{name}.jsonl", rows)})
    more = changes.pop("more", [])
    settings = {"prompts": prompts, "sources": [*sources, *more], "evaluate": None}
    return config_of(tmp_path, **settings | changes)


X, Y = [*range(10), *range(100, 130)], list(range(5, 20))
"""Numbers of prompts that sources have answers to; 30 of X's are none of the run's."""


def test_a_prompt_without_a_recorded_answer_gives_no_row(tmp_path):
    """Ten of 40 have one; 13 of the 40 are for SFT."""
    plan = make_plan(partly(tmp_path, {"x": X}))
    assert of(plan, "score-reward-x").rows == of(plan, "recorded-x").rows == 20
    assert (of(plan, "select").rows, of(plan, "pair").rows) == (10, round(27 / 4))
    assert (of(plan, "rows-sft").rows, of(plan, "rows-wrpo").rows) == (3, 7)
    assert of(plan, "sft").rows == 3
    assert of(plan, "generate-target-sft").prompts == 27  # it is asked all the same
    assert {of(plan, name).least for name in ("sft", "wrpo")} == {1.0}
    whole = make_plan(partly(tmp_path, {"x": list(range(40))}))
    assert of(whole, "select").rows == 40
    assert of(whole, "sft").prompt_tokens > 3 * of(plan, "sft").prompt_tokens


def test_sources_with_answers_to_parts_of_the_prompts_have_bounds(tmp_path):
    """X has 10, Y 15; both together have 15 to 25 of the 40."""
    plan = make_plan(partly(tmp_path, {"x": X, "y": Y}))
    assert (of(plan, "recorded-x").rows, of(plan, "recorded-y").rows) == (20, 30)
    assert of(plan, "select").rows == 20
    assert of(plan, "sft").least == pytest.approx(15 / 20)
    with_model = make_plan(partly(tmp_path, {"x": X}, more=[{"name": "m", "model": "none/m-1B"}]))
    assert of(with_model, "select").rows == 40
    assert of(with_model, "sft").least == 1


def test_answers_meet_prompts_by_their_ids(tmp_path):
    config = partly(tmp_path, {"x": X})
    for row in (settings := config.model_dump(exclude_unset=True))["sources"]:
        row["answers"]["columns"] = {"id": "key", "prompt": "none"}
    settings["prompts"]["columns"] = {"id": "key"}
    assert of(make_plan(Config.model_validate(settings)), "select").rows == 10


def test_prompts_that_are_limited_or_too_many_to_look_at(tmp_path, monkeypatch):
    config = partly(tmp_path, {"x": X, "y": Y})
    few = config.prompt_files[0].model_copy(update={"limit": 8})
    plan = make_plan(config.model_copy(update={"prompts": few}))
    assert (of(plan, "recorded-x").rows, of(plan, "recorded-y").rows) == (16, 6)
    assert of(plan, "select").rows == 8  # X has all
    monkeypatch.setattr(input_texts, "ALL", 39)
    assert of(make_plan(config), "recorded-x").rows == 80
    assert of(make_plan(config), "select").rows == 40


def test_what_was_matched_is_counted_when_the_answers_are_read(tmp_path, monkeypatch):
    config = partly(tmp_path, {"x": X})
    monkeypatch.setattr(input_texts, "ALL", 1)
    jobs = [job for stage in Chain(config, for_plan=True).build() for job in stage.jobs]
    (read,) = (job for job in jobs if job.step.name == "recorded-x")
    read.step.finish(Folder(config.output), {"rows": 20, "prompts": 10}, 0.0)
    plan = make_plan(config)
    assert (of(plan, "select").rows, of(plan, "score-reward-x").rows) == (10, 20)


def test_groups_that_models_answer_and_recorded_answers_add_up(tmp_path):
    """Models answer the half of group a, twice; X has 10 of 40 prompts."""
    rows = [{"prompt": f"{n:020}", "kind": "ab"[n % 2]} for n in range(40)]
    prompts = write(tmp_path / "q.jsonl", rows) | {"columns": {"group": "kind"}}
    models = [{"name": n, "model": "none/m-1B", "groups": ["a"]} for n in "mn"]
    plan = make_plan(partly(tmp_path, {"x": X}, more=models, prompts=prompts))
    assert of(plan, "select").rows == 25  # 20 to 30
    assert of(plan, "sft").least == pytest.approx(20 / 25)


def test_recorded_answers_of_the_target_are_to_part_of_the_prompts_too(tmp_path):
    own = write(tmp_path / "t.jsonl", [{"prompt": f"{n:020}", "response": "a"} for n in range(8)])
    target = {"name": "t", "model": "none/m-1B", "answers": own}
    plan = make_plan(partly(tmp_path, {"x": list(range(40))}, target=target))
    assert (of(plan, "select").rows, of(plan, "pair").rows) == (40, round(27 / 5))


def test_a_file_that_cannot_be_counted_is_told_in_a_line(tmp_path):
    (tmp_path / "p.parquet").write_text("no Parquet")
    given = {"path": str(tmp_path / "p.parquet")}
    sources = [{"name": "x", "model": "none/m-1B"}]
    with pytest.raises(UserError, match=r"^prompts: .*p.parquet cannot be read: "):
        make_plan(config_of(tmp_path, prompts=given, sources=sources, evaluate=None))
