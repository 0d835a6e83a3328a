"""Three workers give the losses, gradient norms and weights of one: real DeepSpeed, gloo.

Gradients are not clipped: neither clipped ones nor Adam's steps show by what they were scaled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_tokenizer, preference_rows, write_model
from test_train_faults import STEPS, WRPO
from test_train_state import join, spawn

from wrpo_ray.config import ReferenceConfig, TrainConfig
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.train import deepspeed
from wrpo_ray.stages.train.loop import Trainer
from wrpo_ray.stages.train.rows import SUFFIX, Tokenizing, write_rows
from wrpo_ray.stages.train.task import METRICS, SFT_ANSWERS, WRPO_ANSWERS, Task
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

CHANGE = {"clip": 0, "micro_batch_tokens": 1, "reference": ReferenceConfig(mode="live")}
CASES = [("wrpo", 3), ("sft", 2)]
WORKERS = 3
SAME = ("loss", "grad_norm", "alpha", "lr", "rows", "tokens", "rewards/margins", "holdout/loss")


def config_of(kind: str, stage: int) -> TrainConfig:
    """A row a micro-batch, so that three workers have dummies in a step of four rows."""
    change = CHANGE | {"zero_stage": stage, "holdout": 0.2, "holdout_every": 1}
    config = WRPO.model_copy(update=change)
    if kind == "wrpo":
        return config
    names = TrainConfig.model_fields
    return TrainConfig(**{n: getattr(config, n) for n in names})


def train(folder: Path, kind: str, stage: int, workers: int) -> None:
    config = config_of(kind, stage)
    deepspeed.prepare(config)
    out, base = folder / f"{kind}-{stage}-{workers}", Folder(str(folder / "base"))
    rows = Folder(str(folder / kind))
    task = Task(Run(Folder(str(out)), 1), Step("wrpo"), rows, base, "base", config, seed=3)
    trainer = Trainer.create(task)
    trainer.run(0)
    trainer.save()


def train_all(rank: int, workers: int, port: int, folder: Path) -> None:
    join(rank, workers, port)
    for kind, stage in CASES:
        train(folder, kind, stage, workers)


def result(folder: Path, kind: str, stage: int, workers: int) -> tuple[list[Any], Any]:
    """The metrics of each step, and the weights."""
    from transformers import AutoModelForCausalLM

    step = folder / f"{kind}-{stage}-{workers}" / Step("wrpo").folder
    lines = [json.loads(line) for line in (step / METRICS).read_text().splitlines()]
    return lines, AutoModelForCausalLM.from_pretrained(step / "model").state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, alone) -> Iterator[Path]:
    """All cases by three workers, and by one in this process."""
    folder = tmp_path_factory.mktemp("workers")
    write_model(folder / "base", tied=True)
    for kind, names in (("wrpo", WRPO_ANSWERS), ("sft", SFT_ANSWERS)):
        tokenizing = Tokenizing(make_tokenizer(), frozenset({1}), names, WRPO)
        rows = tokenizing.rows(preference_rows(4 * STEPS), "rows").kept
        write_rows(Folder(str(folder / kind)), f"00000-of-00001{SUFFIX}", rows, {})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DS_ACCELERATOR", "TORCHDYNAMO_DISABLE", "LOCAL_RANK"):
            patch.setenv(name, {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}.get(name, "1"))
        spawn(train_all, WORKERS, folder)
        for kind, stage in CASES:
            train(folder, kind, stage, 1)
        yield folder


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_three_workers_do_what_one_does(folder, kind, stage):
    (one, weights), (many, same) = (result(folder, kind, stage, n) for n in (1, WORKERS))
    assert len(one) == len(many) > 1
    for want, got in zip(one, many, strict=True):
        for name in SAME:
            if name in want:
                assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=0, atol=1e-4)
