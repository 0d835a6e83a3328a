"""Metrics files, checkpoints' snapshots, DeepSpeed's config, and the model folder."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import make_model, make_tokenizer, write_model

from wrpo_ray.config import TrainConfig
from wrpo_ray.core.storage import Folder
from wrpo_ray.train import checkpoint, model, stage
from wrpo_ray.train.deepspeed import engine_config
from wrpo_ray.train.metrics import MetricsFile, read_metrics
from wrpo_ray.train.order import Order
from wrpo_ray.train.task import METRICS


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path))


def test_metrics_are_appended(folder):
    file = MetricsFile(folder, 0)
    for step in range(3):
        file.append({"step": step, "loss": 1.0})
        assert [r["step"] for r in read_metrics(folder)] == list(range(step + 1))


def test_a_resumed_run_has_no_line_twice(folder):
    text = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5))
    folder.write(METRICS, (text + '{"step": 5, "lo').encode())  # cut off by a kill
    file = MetricsFile(folder, 3)
    file.append({"step": 3, "loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(folder)] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "batch"), [(100, 128), (128, 128), (1, 1), (500, 30)])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_deepspeed_config_is_consistent(rows, batch, workers):
    config = TrainConfig(batch_size=batch, micro_batch=2, workers=workers)
    accumulation = Order(rows, 1, batch, 0).accumulation(workers, 2)
    got = engine_config(config, accumulation, workers)
    product = got["train_micro_batch_size_per_gpu"] * got["gradient_accumulation_steps"] * workers
    assert got["train_batch_size"] == product
    assert got["train_batch_size"] >= min(rows, batch)


GONE = '{"checkpoint_results": [{"checkpoint_dir_name": "x"}]}'


@pytest.mark.parametrize("text", ["", "{", GONE])
def test_a_damaged_snapshot_is_put_aside(folder, text):
    folder.write(checkpoint.SNAPSHOT, text.encode())
    checkpoint.repair(folder, "wrpo")
    assert not folder.exists(checkpoint.SNAPSHOT)


def test_a_whole_snapshot_stays(folder):
    folder.write("checkpoint_1/state", b"")
    listed = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}
    folder.write_json(checkpoint.SNAPSHOT, listed)
    checkpoint.repair(folder, "wrpo")
    assert folder.exists(checkpoint.SNAPSHOT)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_the_same_model(folder, tied):
    from transformers import AutoModelForCausalLM

    original = make_model(seed=4, tied=tied)
    target = folder / "model"
    target.write("stale.bin", b"of an interrupted upload")
    model.save(original, make_tokenizer(), target, write=True)
    assert not target.exists("stale.bin")
    loaded = AutoModelForCausalLM.from_pretrained(target.local())
    assert loaded.config.tie_word_embeddings == tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_dropout_is_off_but_stays_in_the_config(tmp_path):
    path = write_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    loaded = model.load(path, torch.float32, torch.device("cpu"))
    assert loaded.training
    assert loaded.model.layers[0].self_attn.attention_dropout == 0.0
    assert loaded.config.attention_dropout == 0.3


def test_stage_imports_neither_torch_nor_ray():
    import subprocess
    import sys

    code = "import sys, wrpo_ray.train.stage; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert stage.EVERY > 0
