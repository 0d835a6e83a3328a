"""Rows of a run's output in Python: only this run's, only what is asked for, and clear errors."""

from dataclasses import replace

import pyarrow as pa
import pytest
from support.made_run import MadeRun

from wrpo_ray.data import records
from wrpo_ray.data.buckets import buckets, write_shard
from wrpo_ray.data.failures import write_failures
from wrpo_ray.data.outline import Outline
from wrpo_ray.errors import UserError
from wrpo_ray.export.read import read
from wrpo_ray.storage.folder import Folder

PAIRS = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[MadeRun, Outline]:
    run = MadeRun(tmp_path_factory.mktemp("made"), rows=PAIRS, buckets=4)
    return run, run.write()


@pytest.fixture
def output(made) -> str:
    return str(made[0].folder)


def test_preferences_are_a_table_in_the_schema_of_their_records(output):
    table = read(output)
    assert table.schema == records.PREFERENCE
    assert table.num_rows == PAIRS
    assert table["prompt_id"].to_pylist() == read(output, columns=["prompt_id"])[0].to_pylist()
    assert read(output, columns=["source_margin", "prompt_id"]).column_names == [
        "source_margin",
        "prompt_id",
    ]


def test_splits_are_told_apart(output):
    assert read(output, "prompts").num_rows == PAIRS * 3 // 2
    assert read(output, "prompts", split="sft").num_rows == PAIRS // 2
    assert read(output, "selection", split="preference").num_rows == PAIRS
    assert read(output, "prompts", split="eval").num_rows == 0
    with pytest.raises(UserError, match=r"has no scored of split eval; it has the stages prompts,"):
        read(output, "scored", split="eval")


def test_scored_answers_are_of_one_step_or_of_all(output):
    assert read(output, "scored", columns=["reward"]).num_rows == PAIRS * 4 * 2
    table = read(output, "scored", columns=["source"], step="score-reward-qwen")
    assert table["source"].unique().to_pylist() == ["qwen"]
    assert table.num_rows == PAIRS * 2
    assert read(output, "scored", step="sample").num_rows == PAIRS * 2


def test_a_verifiers_outcomes_are_not_taken_for_rewards(tmp_path):
    run = MadeRun(tmp_path, rows=PAIRS, buckets=4)
    outline = run.write()
    scored = next(s for s in outline.steps if s.name == "score-reward-qwen")
    checked = replace(scored, name="score-verifier-qwen", outcome="verdict")
    replace(outline, steps=(*outline.steps, checked)).write(Folder(str(tmp_path)))
    assert read(tmp_path, "scored").num_rows == PAIRS * 4 * 2
    assert read(tmp_path, "scored", step="score-verifier-qwen").num_rows == PAIRS * 2


def test_a_named_step_gives_all_its_splits(output):
    splits = [
        read(output, "prompts", split=name).num_rows for name in ("sft", "preference", "eval")
    ]
    assert read(output, "prompts", step="prompts").num_rows == sum(splits)
    assert read(output, "prompts", step="prompts", split="sft").num_rows == PAIRS // 2


def test_a_store_that_holds_more_gives_only_what_the_run_asked_for(made, output):
    run, outline = made
    step = next(s for s in outline.steps if s.name == "generate-llama")
    answers = read(output, "scored", step="score-reward-llama").select(records.RESPONSE.names)
    more = answers.to_pylist()
    again, third = more[:3], [row | {"sample": 2} for row in more[:5]]
    other = [row | {"prompt_id": "0" * 31 + "1"} for row in more[:1]]
    folder = run.root / step.folder
    for bucket in buckets(4):
        rows = [[r for r in part if r["prompt_id"] in bucket] for part in (more, again)]
        write_shard(folder, bucket, records.RESPONSE, rows[0], "first")
        write_shard(folder, bucket, records.RESPONSE, rows[1], "again")
        unasked = [r for r in [*third, *other] if r["prompt_id"] in bucket]
        write_shard(folder, bucket, records.RESPONSE, unasked, "unasked")
    found = read(output, "answers", step="generate-llama")
    keys = [(r["prompt_id"], r["source"], r["sample"]) for r in found.to_pylist()]
    assert sorted(keys) == sorted((r["prompt_id"], r["source"], r["sample"]) for r in more)


def test_a_reader_loads_bucket_by_bucket(output, monkeypatch):
    from wrpo_ray.export import read as module

    loaded = []
    real = module.read_bucket
    monkeypatch.setattr(module, "read_bucket", lambda *a: loaded.append(a[1]) or real(*a))
    reader = read(output, "preferences", as_="reader")
    assert isinstance(reader, pa.RecordBatchReader)
    assert len(reader.read_next_batch()) == PAIRS // 4
    assert len(loaded) == 1
    assert reader.read_all().num_rows == PAIRS * 3 // 4


def test_failures_are_those_of_every_step(made, output):
    run, outline = made
    step = next(s for s in outline.steps if s.name == "score-reward-qwen")
    row = records.failure("score", ValueError("no"), prompt_id="1" * 32, source="qwen", sample=0)
    write_failures(step.failures(run.root), buckets(4)[1], [row], "all")
    assert sorted(read(output, "failures")["source"].to_pylist()) == ["llama", "qwen"]
    assert read(output, "failures", step="score-reward-qwen")["message"].to_pylist() == ["no"]


def test_a_dataset_has_the_same_rows(output):
    datasets = pytest.importorskip("datasets")
    rows = read(output, as_="dataset")
    assert isinstance(rows, datasets.Dataset)
    assert rows.to_list() == read(output).to_pylist()


def test_what_cannot_be_read_is_named(made, output, tmp_path):
    with pytest.raises(UserError, match=r"no run is there \(no chain.json\)"):
        read(tmp_path)
    with pytest.raises(UserError, match="there are no rows 'pairs'; give one of prompts, answers"):
        read(output, "pairs")
    with pytest.raises(UserError, match="preferences have no column 'margin'; there are prompt_id"):
        read(output, columns=["margin"])
    with pytest.raises(UserError, match="as_='pandas': give one of arrow, reader, dataset"):
        read(output, as_="pandas")
    with pytest.raises(UserError, match="has no scored of step pair; it has the stages prompts,"):
        read(output, "scored", step="pair")


def test_a_step_that_is_not_done_is_named_with_its_command(tmp_path):
    run = MadeRun(tmp_path / "run", rows=8, buckets=2)
    step = next(s for s in run.write().steps if s.kind == "pair")
    (run.root / step.folder).delete(step.manifest)
    with pytest.raises(UserError, match="the step pair of .*run is not done; run `wrpo pair`"):
        read(run.folder)
