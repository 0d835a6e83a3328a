"""Three workers give the losses, gradient norms and weights of one: real DeepSpeed, gloo.

Gradients are not clipped: neither clipped ones nor Adam's steps show by what they were scaled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_tokenizer, preference_rows, write_model
from test_train_faults import STEPS, WRPO
from test_train_state import join, spawn
from torch.multiprocessing import ProcessExitedException

from wrpo_ray.config import ReferenceConfig, TrainConfig
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.train import deepspeed, split_reference
from wrpo_ray.stages.train.loop import Trainer
from wrpo_ray.stages.train.model import Reference
from wrpo_ray.stages.train.rows import SUFFIX, Tokenizing, write_rows
from wrpo_ray.stages.train.task import METRICS, SFT_ANSWERS, WRPO_ANSWERS, Task
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

CHANGE = {"clip": 0, "micro_batch_tokens": 1, "reference": ReferenceConfig(mode="live")}
CASES = [("wrpo", 3), ("sft", 2), ("split", 3)]
WORKERS = 3
SAME = ("loss", "grad_norm", "alpha", "lr", "rows", "tokens", "rewards/margins", "holdout/loss")


def config_of(kind: str, stage: int) -> TrainConfig:
    """A row a micro-batch, so that three workers have dummies in a step of four rows."""
    change = CHANGE | {"zero_stage": stage, "holdout": 0.2, "holdout_every": 1}
    config = WRPO.model_copy(update=change)
    if kind == "split":
        return config.model_copy(update={"reference": ReferenceConfig(mode="split")})
    if kind == "wrpo":
        return config
    names = TrainConfig.model_fields
    return TrainConfig(**{n: getattr(config, n) for n in names})


def train(folder: Path, kind: str, stage: int, workers: int) -> None:
    trainer = create(folder, kind, stage, f"{kind}-{stage}-{workers}")
    trainer.run(0)
    spoil_padding(trainer)
    trainer.save()


def spoil_padding(trainer: Trainer) -> None:
    """What follows the last worker's share of a weight is memory that nobody has written."""
    for weight in trainer.policy.module.parameters():
        if hasattr(weight, "ds_tensor"):
            share = weight.ds_tensor.data.view(-1)
            start = share.numel() * torch.distributed.get_rank()
            share[max(0, weight.ds_numel - start) :] = math.nan


def create(folder: Path, kind: str, stage: int, name: str) -> Trainer:
    config = config_of(kind, stage)
    deepspeed.prepare(config)
    out, base = folder / name, Folder(str(folder / "base"))
    rows = Folder(str(out / "rows" if kind == "split" else folder / kind))
    task = Task(Run(Folder(str(out)), 1), Step("wrpo"), rows, base, "base", config, seed=3)
    return Trainer.create(task)


def train_all(rank: int, workers: int, port: int, folder: Path) -> None:
    join(rank, workers, port)
    for kind, stage in CASES:
        if kind == "split":
            count_weights(folder / f"held-{rank}.json")
        train(folder, kind, stage, workers)


def count_weights(to: Path) -> None:
    """Have the pass over the rows count the weights that this worker holds in any module's forward.

    DeepSpeed keeps gathered what is small, comes next or comes again soon: all of a tiny model.
    Here it keeps nothing, as with a model of billions of weights.
    """
    zero, fill, found = deepspeed._zero, split_reference._fill, {"share": 0, "most": 0, "all": 0}
    names = ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")
    deepspeed._zero = lambda *args: zero(*args) | {f"stage3_{name}": 0 for name in names}

    def filling(part: Any, trainer: Trainer, *args: Any) -> None:
        weights = list(trainer.policy.module.parameters())
        found["all"] = sum(w.ds_numel for w in weights)
        found["share"] = sum(w.ds_tensor.numel() for w in weights)

        def count(*_: Any) -> None:
            found["most"] = max(found["most"], sum(w.numel() for w in weights))

        hooks = [m.register_forward_pre_hook(count) for m in trainer.policy.module.modules()]
        fill(part, trainer, *args)
        for hook in hooks:
            hook.remove()
        to.write_text(json.dumps(found))

    split_reference._fill = filling


def die_in_the_pass(rank: int, workers: int, port: int, folder: Path) -> None:
    """One of the workers is killed in the third part; each has a row for each of them."""
    join(rank, workers, port)
    fill, calls = split_reference._fill, iter(range(99))

    def filling(*args: Any) -> None:
        if next(calls) == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        fill(*args)

    split_reference._fill, split_reference.PART = filling, 1
    create(folder, "split", 3, "killed")


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
    for name in ("split-3-1", f"split-3-{WORKERS}", "killed"):  # log-probs will lie beside them
        shutil.copytree(folder / "wrpo", folder / name / "rows")
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


def test_a_split_reference_gives_the_losses_of_a_live_one(folder):
    """Also of the rows held out; what the loop's test with a plain loop holds for the latter."""
    for workers in (1, WORKERS):
        (split, weights), (live, same) = (
            result(folder, kind, 3, workers) for kind in ("split", "wrpo")
        )
        assert [line["loss"] for line in split] == pytest.approx([line["loss"] for line in live])
        assert split[-1]["holdout/loss"] == pytest.approx(live[-1]["holdout/loss"])
        assert split[-1]["loss"] != pytest.approx(split[0]["loss"], abs=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(same[name], value, rtol=0, atol=1e-5)


def test_no_worker_holds_a_split_reference_whole(folder):
    """A third each, with at most a quarter of the weights gathered for the module at work."""
    for rank in range(WORKERS):
        found = json.loads((folder / f"held-{rank}.json").read_text())
        assert found["all"] / WORKERS <= found["share"] < 1.01 * found["all"] / WORKERS
        assert 0 < found["most"] < found["all"] / 4


def test_one_worker_goes_on_after_a_kill_of_three_in_the_pass(folder, monkeypatch):
    """The parts that are there stay as they are; the rows are those of a stored reference."""
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(die_in_the_pass, WORKERS, folder)
    rows = folder / "killed" / "rows"
    parts = split_reference.folder_of(Folder(str(rows)), config_of("split", 3)).local()
    kept = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert sorted(path.name for path in kept) == [f"{n:012}-{n + 3:012}.npy" for n in (0, 3)]
    made: list[int] = []
    fill = split_reference._fill
    monkeypatch.setattr(
        split_reference, "_fill", lambda part, *args: made.append(len(part)) or fill(part, *args)
    )
    trainer = create(folder, "split", 3, "killed")
    assert sum(made) == len(trainer.rows) - 6 > 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    everything = [trainer.rows[i] for i in range(len(trainer.rows))]
    want = Reference(folder / "base", trainer.task.config, on_gpu=False)(everything)
    got = [value for row in everything for value in row.reference]
    assert got == pytest.approx([value for row in want for value in row.reference], abs=1e-4)
