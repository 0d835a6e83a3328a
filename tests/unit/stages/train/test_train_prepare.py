"""Buckets of rows ready to train on: what is in them, and when they are made again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import (
    make_tokenizer,
    preference_rows,
    write_model,
    write_preferences,
    write_selection,
)

from wrpo_ray.config import Actors, ReferenceConfig, TrainConfig, WrpoConfig
from wrpo_ray.data.buckets import buckets
from wrpo_ray.data.shards import list_shards
from wrpo_ray.errors import FailureLimitError, UserError
from wrpo_ray.llm import chat
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.train import prepare
from wrpo_ray.stages.train.model import Reference
from wrpo_ray.stages.train.prepare import Prepare, Preparer
from wrpo_ray.stages.train.rows import SUFFIX, PreparedRows
from wrpo_ray.stages.train.task import WRPO_ANSWERS
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

PAIRS, SELECTION = Step("pair"), Step("select")
SETTINGS: dict[str, Any] = {"max_length": 64, "precision": "fp32"}
WRPO = WrpoConfig(**SETTINGS)
LIVE, SPLIT = (ReferenceConfig(mode=mode) for mode in ("live", "split"))
COUNT = 4
"""Buckets of a run."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), seed=2)


@pytest.fixture
def root(tmp_path) -> Folder:
    """An output folder with 21 preference rows, in the same buckets as a run's."""
    folder = Folder(str(tmp_path / "out"))
    write_preferences(folder / PAIRS.folder, preference_rows(21), COUNT)
    write_selection(folder / SELECTION.folder, preference_rows(21), COUNT)
    return folder


def job(base: Path | str, config: TrainConfig = WRPO, fingerprint: str = "base") -> Prepare:
    rows = PAIRS if isinstance(config, WrpoConfig) else SELECTION
    return Prepare("wrpo", rows, Folder(str(base)), fingerprint, config, own="target-sft")


def fill(root: Folder, job: Prepare, count: int = COUNT) -> list[dict[str, Any]]:
    """All buckets by one actor; returns their counts."""
    preparer = Preparer(Run(root, count), [job])
    filled = [preparer({"job": 0, "bucket": bucket.index}) for bucket in buckets(count)]
    return [{n: value for n, value in made.items() if n != "start"} for made in filled]


def read(root: Folder, job: Prepare) -> PreparedRows:
    return PreparedRows((root / job.step.folder).local())


def failures(root: Folder, job: Prepare, part: str = "") -> list[dict[str, Any]]:
    folder = job.step.failures(root) / part if part else job.step.failures(root)
    return [row for s in list_shards(folder) for row in folder.read_table(s.path).to_pylist()]


# --- what is in a bucket ----------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_stored_log_probs_are_the_plain_models(root, base, packing):
    """transformers alone, an answer at a time, all logits."""
    from transformers import AutoModelForCausalLM

    config = WRPO.model_copy(update={"packing": packing, "micro_batch_tokens": 50})
    fill(root, job(base, config))
    rows, plain = read(root, job(base, config)), AutoModelForCausalLM.from_pretrained(base)
    for row in (rows[i] for i in range(len(rows))):
        for answer, stored in zip(row.answers, row.reference, strict=True):
            ids = torch.tensor([[*row.prompt, *answer]])
            with torch.no_grad():
                table = plain(input_ids=ids).logits[0, :-1].log_softmax(-1)
            want = table.gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :].sum()
            assert stored == pytest.approx(want.item(), rel=1e-5)


def test_counts_tell_what_lies_there(root, base):
    counts, rows = fill(root, job(base)), read(root, job(base))
    assert [c["bucket"] for c in counts] == list(range(COUNT))
    assert sum(c["rows"] for c in counts) == len(rows) == 21
    assert sum(c["tokens"] for c in counts) == rows.lengths.sum()
    assert not any(c[name] for c in counts for name in ("dropped", "failed", "cut"))
    ids = [rows.prompt_id(i) for i in range(21)]
    assert ids == sorted(record["prompt_id"] for record in preference_rows(21))


@pytest.mark.parametrize("count", [1, 2, 16])
def test_shards_of_another_number_of_buckets_are_found(root, base, count):
    live = job(base, WRPO.model_copy(update={"reference": LIVE}))
    counts = fill(root, live, count)
    assert len(counts) == count
    rows = read(root, live)
    wanted = sorted(record["prompt_id"] for record in preference_rows(21))
    assert [rows.prompt_id(i) for i in range(len(rows))] == wanted


def test_sft_takes_the_prompts_of_its_split_and_no_reference(root, base):
    sft = job(base, TrainConfig(**SETTINGS))
    fill(root, sft)
    rows = read(root, sft)
    wanted = {r["prompt_id"] for i, r in enumerate(preference_rows(21)) if i % 4 != 3}
    assert {rows.prompt_id(i) for i in range(len(rows))} == wanted
    assert len(rows) == len(wanted)
    assert {(len(row.answers), row.reference) for row in (rows[i] for i in range(len(rows)))} == {
        (1, ())
    }


@pytest.mark.parametrize(
    "update", [{"objective": "simpo"}, {"reference": LIVE}, {"reference": SPLIT}]
)
def test_no_reference_is_stored_and_no_model_loaded(root, tmp_path, update):
    """The base folder has a tokenizer and no weights."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    without = job(tmp_path / "tokenizer", WRPO.model_copy(update=update))
    fill(root, without)
    rows = read(root, without)
    assert {rows[i].reference for i in range(len(rows))} == {()}


def test_a_bucket_without_rows_loads_no_model(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    empty, root = job(tmp_path / "tokenizer"), Folder(str(tmp_path / "out"))
    assert [c["rows"] for c in fill(root, empty)] == [0] * COUNT
    assert len(read(root, empty)) == 0


def test_the_references_pool_is_the_configs():
    pool = Actors(max=3, num_gpus=1)
    assert job("base", WrpoConfig(reference=ReferenceConfig(actors=pool))).actors == pool
    assert job("base", TrainConfig()).actors == Actors()


# --- what fails or is there already -----------------------------------------------------------


def test_failed_and_dropped_rows_are_kept_with_their_reasons(tmp_path, base):
    records = preference_rows(6)
    records[0]["messages"] = []  # no template continues that
    records[1]["messages"] = [{"role": "user", "content": "w1 " * 70}]
    root = Folder(str(tmp_path / "out"))
    write_preferences(root / PAIRS.folder, records, 1)
    (counts,) = fill(root, job(base), 1)
    assert (counts["rows"], counts["failed"], counts["dropped"]) == (4, 1, 1)
    (fault,), (dropped,) = failures(root, job(base)), failures(root, job(base), "dropped")
    assert fault["prompt_id"] == records[0]["prompt_id"]
    assert dropped["prompt_id"] == records[1]["prompt_id"]
    assert dropped["error"] == "TooLong"


@pytest.mark.parametrize("answer", ["source_chosen", "target_chosen", "rejected"])
def test_a_row_whose_reference_is_not_finite_is_kept_as_a_failure(tmp_path, answer):
    """The model's embedding of one word is NaN, so every answer with it has no log-prob."""
    from transformers import AutoModelForCausalLM

    base = write_model(tmp_path / "base", seed=2)
    broken = AutoModelForCausalLM.from_pretrained(base)
    word = make_tokenizer().convert_tokens_to_ids("w38")
    broken.get_input_embeddings().weight.data[word] = torch.nan
    broken.save_pretrained(base)
    records, root = preference_rows(20), Folder(str(tmp_path / "out"))
    for record in records:
        for part in (record["messages"][0], *(record[n] for n in WRPO_ANSWERS)):
            name = "text" if "text" in part else "content"
            part |= {name: part[name].replace("w38", "w37"), "token_ids": None}
    records[3][answer]["text"] = "w1 w38 w2"
    write_preferences(root / PAIRS.folder, records, 1)
    (counts,) = fill(root, job(base), 1)
    assert (counts["rows"], counts["failed"]) == (19, 1)
    (fault,) = failures(root, job(base))
    assert fault["prompt_id"] == records[3]["prompt_id"]
    told = f"log-probs under the reference are not finite: {answer} nan"
    assert fault["message"] == told
    rows = read(root, job(base))
    assert all(math.isfinite(value) for i in range(19) for value in rows[i].reference)


def test_a_model_without_finite_log_probs_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    base = write_model(tmp_path / "base", seed=2)
    broken = AutoModelForCausalLM.from_pretrained(base)
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    broken.save_pretrained(base)
    told = r"log-probs are not finite.*the weight model.layers.0.mlp.up_proj.weight is not finite"
    with pytest.raises(UserError, match=told):
        Reference(base, WRPO, on_gpu=False)


def test_a_bucket_that_is_there_is_passed_over(root, base):
    """With its counts; nothing of the base is read again, and the bucket stays."""
    first = fill(root, job(base))
    files = root / job(base).step.folder
    before = [files.read(name) for name in files.files(suffix=SUFFIX)]
    assert fill(root, job("/nowhere")) == first
    assert [files.read(name) for name in files.files(suffix=SUFFIX)] == before


def test_a_bucket_that_a_kill_left_out_is_filled_alone(root, base):
    first = fill(root, job(base))
    files = root / job(base).step.folder
    lost = files.files(suffix=SUFFIX)[1]
    before = files.read(lost)
    files.delete(lost)
    assert fill(root, job(base)) == first
    assert files.read(lost) == before


def test_another_try_forgets_the_failures_of_the_first(tmp_path, base):
    root, records = Folder(str(tmp_path / "out")), preference_rows(3)
    broken = [record | {"messages": []} for record in records]
    write_preferences(root / PAIRS.folder, broken, 1)
    fill(root, job(base), 1)
    assert len(failures(root, job(base))) == 3
    write_preferences(root / PAIRS.folder, records, 1)
    (root / job(base).step.folder).delete(f"00000-of-00001{SUFFIX}")
    fill(root, job(base), 1)
    assert failures(root, job(base)) == []


# --- the stage, in this process ---------------------------------------------------------------


@pytest.fixture
def without_ray(monkeypatch) -> None:
    def map_rows(_: Any, rows: Any, worker: Any, arguments: dict[str, Any]) -> Any:
        work = worker(**arguments)
        return (work(row) | {"seconds": 0.0, "idle": 0.0} for row in rows)

    monkeypatch.setattr(prepare, "map_rows", map_rows)


@pytest.mark.usefixtures("without_ray")
def test_the_stage_sums_counts_into_the_manifest(root, base):
    Prepare.run(Run(root, COUNT), [job(base)])
    tokens = int(read(root, job(base)).lengths.sum())
    expected = {"rows": 21, "dropped": 0, "cut": 0, "failed": 0, "tokens": tokens}
    assert job(base).step.read_manifest(root)["counts"] == expected


@pytest.mark.usefixtures("without_ray")
@pytest.mark.usefixtures("without_ray")
def test_too_many_failures_end_the_stage(tmp_path, base):
    """One of four rows, of which a tenth is allowed, and then half.

    Dropped rows do not count, and are no example of what failed.
    """
    records, root = preference_rows(5), Folder(str(tmp_path / "out"))
    records[0]["messages"] = []
    records[1]["messages"] = [{"role": "user", "content": "w1 " * 70}]
    write_preferences(root / PAIRS.folder, records, COUNT)
    with pytest.raises(FailureLimitError, match="1 of 4 rows failed") as caught:
        Prepare.run(Run(root, COUNT, failure_limit=0.1), [job(base)])
    assert records[0]["prompt_id"] in str(caught.value)
    assert not job(base).step.is_done(root)
    Prepare.run(Run(root, COUNT, failure_limit=0.5), [job(base)])
    assert job(base).step.is_done(root)


@pytest.mark.usefixtures("without_ray")
def test_no_row_is_an_error_with_a_remedy(root, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for settings, told in (
        ({"max_length": 8}, r"wrpo: .* 21 rows have more than 8 tokens .*raise wrpo.max_length"),
        ({"max_prompt_length": 1}, "64 tokens in prompt and answer or 1 in the prompt"),
    ):
        short = job(tmp_path / "tokenizer", WrpoConfig(**(SETTINGS | settings)))
        with pytest.raises(UserError, match=told):
            Prepare.run(Run(root, COUNT), [short])
    root.delete(PAIRS.folder)
    with pytest.raises(UserError, match=rf"wrpo: {PAIRS.folder} holds no row .*give more prompts"):
        Prepare.run(Run(root, COUNT), [job(tmp_path / "tokenizer")])


# --- the step's key ---------------------------------------------------------------------------


OTHER: list[dict[str, Any]] = [
    {"max_length": 65},
    {"max_prompt_length": 30},
    {"overflow": "cut"},
    {"precision": "bf16"},
    {"objective": "simpo"},
    {"reference": LIVE},
]
SAME: list[dict[str, Any]] = [
    {"learning_rate": 1e-3},
    {"beta": 0.5},
    {"alpha": {"end": 0.9}},
    {"objective": "ipo"},
    {"epochs": 3},
    {"batch_size": 7},
    {"holdout": 0.1},
    {"lora": {}},
    {"packing": False},
    {"micro_batch_tokens": 99},
    {"zero_stage": 1},
    {"sft_weight": 0.1},
    {"reference": {"actors": {"max": 4}}},
]


@pytest.mark.parametrize("change", OTHER, ids=str)
def test_what_rows_depend_on_is_in_the_key(change):
    assert job("base", WrpoConfig(**(SETTINGS | change))).step.folder != job("base").step.folder


@pytest.mark.parametrize("change", SAME, ids=str)
def test_what_optimization_alone_depends_on_is_not(change):
    """So WRPO and its DPO baseline share their rows."""
    assert job("base", WrpoConfig(**(SETTINGS | change))).step.folder == job("base").step.folder


def test_another_base_or_other_rows_are_another_step():
    same = job("base").step
    assert job("base", fingerprint="other").step.key != same.key
    assert job("elsewhere").step.key == same.key  # the fingerprint tells what lies there
    other = Prepare("wrpo", Step("pair", {"x": 1}), Folder("base"), "base", WRPO, own="target-sft")
    assert other.step.key != same.key
    assert job("base", TrainConfig(**SETTINGS)).step.key != same.key


def test_compat_is_in_the_key():
    """It needs a max_prompt_length, which is in the key by itself."""
    kinds = [WrpoConfig(**SETTINGS, max_prompt_length=30, compat=c) for c in ("none", "published")]
    assert len({job("base", config).step.key for config in kinds}) == 2


@pytest.mark.parametrize(
    ("config", "matters"),
    [
        (WRPO, True),
        (WrpoConfig(**SETTINGS, max_prompt_length=30, compat="published"), False),  # texts alone
        (TrainConfig(**SETTINGS), False),  # SFT, on the sources' answers
    ],
    ids=["wrpo", "published", "sft"],
)
def test_rows_without_own_answers_are_other_rows(config, matters):
    """Their token ids are of other vocabularies; the key of rows with own ones stays as it was."""
    own = [replace(job("base", config), own=name) for name in ("target-sft", "target", None)]
    keys = [one.step.key for one in own]
    assert keys[0] == keys[1]
    assert (keys[2] != keys[0]) == matters


def test_precision_matters_only_to_what_is_computed():
    simpo = [WrpoConfig(objective="simpo", precision=p) for p in ("fp32", "bf16")]
    assert len({job("base", config).step.key for config in simpo}) == 1


def test_a_bucket_with_a_fault_is_tried_again(root, base, monkeypatch):
    """The cause was put right: what failed is made, and is a failure no more."""
    broken, answer_ids = [], chat.answer_ids

    def once(*arguments: Any, **options: Any) -> list[int]:
        if not broken:
            broken.append(1)
            raise OSError("a moment's fault")
        return answer_ids(*arguments, **options)

    monkeypatch.setattr(chat, "answer_ids", once)
    assert sum(c["failed"] for c in fill(root, job(base))) == 1
    assert sum(c["failed"] for c in fill(root, job(base))) == 0
    assert len(read(root, job(base))) == 21
    assert failures(root, job(base)) == []


def test_the_reference_has_the_trainers_resources_unless_it_is_given_others(base):
    config = WRPO.model_copy(update={"workers": 8, "num_gpus": 1, "num_cpus": 4})
    assert job(base, config).actors == Actors(max=8, num_gpus=1, num_cpus=4)
    own = ReferenceConfig(actors=Actors(max=2))
    assert job(base, config.model_copy(update={"reference": own})).actors == Actors(max=2)
    assert job(base, config.model_copy(update={"reference": LIVE})).actors.num_gpus == 0
