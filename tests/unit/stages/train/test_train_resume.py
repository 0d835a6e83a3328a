"""A run that goes on from a checkpoint takes each batch once, and ends with the same weights.

Real DeepSpeed and the real files of `checkpoint`, in this process; only what Ray Train would be
asked is answered here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import make_tokenizer, preference_rows, write_model
from test_train_faults import STEPS, WRPO, create, records

from wrpo_ray.stages.train import checkpoint
from wrpo_ray.stages.train.loop import Trainer, _train
from wrpo_ray.stages.train.memory import Choice, Estimate
from wrpo_ray.stages.train.rows import Tokenizing
from wrpo_ray.stages.train.state import INDEX
from wrpo_ray.stages.train.task import WRPO_ANSWERS
from wrpo_ray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("alone")
EVERY = 2
LONG = WRPO.model_copy(update={"epochs": 2, "checkpoint_every": EVERY, "weight_decay": 0.1})


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    for name in ("DS_ACCELERATOR", "LOCAL_RANK", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}.get(name, "1"))


@pytest.fixture
def kept(tmp_path, monkeypatch) -> list[Path]:
    """Checkpoints in the order in which they were reported; `get_checkpoint` gives the newest."""
    from ray import train

    folders: list[Path] = []
    uploads: list[Callable[[], Any]] = []

    def report(_: Any, *, checkpoint: Any, checkpoint_upload_fn: Any, **__: Any) -> None:
        folders.append(tmp_path / f"checkpoint-{len(folders)}")
        shutil.rmtree(folders[-1], ignore_errors=True)  # of a run before
        uploads.append(partial(checkpoint_upload_fn, checkpoint, folders[-1].name))

    def wait_for_uploads(_: Any = None) -> list[Any]:
        """As late as it can be: the steps after a checkpoint are over by then."""
        while uploads:
            uploads.pop(0)()
        return []

    def persist(checkpoint: Any, name: str) -> Any:
        return shutil.copytree(checkpoint.path, tmp_path / name)

    def newest() -> Any:
        wait_for_uploads()
        return train.Checkpoint.from_directory(str(folders[-1])) if folders else None

    monkeypatch.setattr(train, "report", report)
    monkeypatch.setattr(train, "get_checkpoint", newest)
    monkeypatch.setattr(train, "get_all_reported_checkpoints", wait_for_uploads)
    storage = SimpleNamespace(persist_current_checkpoint=persist)
    context = SimpleNamespace(get_storage=lambda: storage)
    monkeypatch.setattr(train, "get_context", lambda: context)
    monkeypatch.setattr(checkpoint, "_local_folder", lambda: tmp_path / "written")
    return folders


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.policy.module.named_parameters()}


@pytest.mark.parametrize("copies", [False, True], ids=["written", "copied"])
@pytest.mark.parametrize("stage", [0, 1])
def test_each_batch_is_taken_once(tmp_path, kept, stage, copies, monkeypatch):
    """Six steps with checkpoints behind the second and fourth; the run ends behind each of them."""
    monkeypatch.setattr(checkpoint, "has_room_for_copies", lambda engine, device: copies)
    base = write_model(tmp_path / "base", tied=True)
    tokenizing = Tokenizing(make_tokenizer(), frozenset({1}), WRPO_ANSWERS, WRPO)
    rows = tokenizing.rows(preference_rows(4 * STEPS), "rows").kept
    config = LONG.model_copy(update={"zero_stage": stage})
    whole = create(tmp_path / "whole", base, rows, config)
    assert checkpoint.restore(whole.policy, whole.task.step.key) == 0
    whole.run(0)
    assert len(kept) == 2
    want = [(r["step"], r["loss"], r["alpha"], r["lr"]) for r in records(whole)]
    assert [step for step, *_ in want] == list(range(2 * STEPS))
    for count, last in ((2, 4), (1, 2)):
        del kept[count:]
        again = create(tmp_path / f"again-{last}", base, rows, config)
        assert checkpoint.restore(again.policy, "another model of the series") == 0
        assert checkpoint.restore(again.policy, again.task.step.key) == last
        again.run(last)
        got = [(r["step"], r["loss"], r["alpha"], r["lr"]) for r in records(again)]
        assert got == want[last:]
        for name, value in weights(whole).items():
            assert torch.equal(weights(again)[name], value), name


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_resumed_training_has_the_micro_batches_of_its_checkpoint(
    tmp_path, kept, is_kept, monkeypatch
):
    """Those that `auto` would choose now would add the numbers in another order."""
    monkeypatch.setattr(Estimate, "tokens", lambda estimate, free: 16)
    base = write_model(tmp_path / "base", tied=True)
    tokenizing = Tokenizing(make_tokenizer(), frozenset({1}), WRPO_ANSWERS, WRPO)
    rows = tokenizing.rows(preference_rows(4 * STEPS), "rows").kept
    config = LONG.model_copy(update={"micro_batch_tokens": "auto"})
    whole = create(tmp_path / "whole", base, rows, config)
    whole.run(0)
    assert checkpoint.chosen_before(whole.task.step.key) == Choice(16, workers=1)
    monkeypatch.setattr(Estimate, "tokens", lambda estimate, free: 1024)
    if not is_kept:  # of an earlier version
        for folder in kept:
            index = json.loads((folder / INDEX).read_text())
            del index["extra"]["chosen"]
            (folder / INDEX).write_text(json.dumps(index))
    task = replace(
        whole.task, config=config, run=replace(whole.task.run, root=Folder(str(tmp_path / "again")))
    )
    found = []
    monkeypatch.setattr(Trainer, "save", lambda trainer: found.append(trainer))
    assert _train(task, in_series=False)["resumed_at"] == 4
    assert [trainer.task.config.micro_batch_tokens for trainer in found] == [
        16 if is_kept else 1024
    ]
    same = [torch.equal(weights(found[0])[name], value) for name, value in weights(whole).items()]
    assert all(same) is is_kept


def test_a_leaving_node_makes_one_checkpoint_more(tmp_path, kept, monkeypatch):
    """Ray Train tells of one node behind the fourth step, and of another one behind the eighth."""
    from ray import train

    notices = [*[None] * 3, *[("a",)] * 4, ("a", "b")]
    monkeypatch.setattr(checkpoint, "NOTICE_INTERVAL", 0.0)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(
        train,
        "get_preemption_info",
        lambda: (n := notices.pop(0)) and SimpleNamespace(preempted_node_ids=n),
    )
    base = write_model(tmp_path / "base", tied=True)
    tokenizing = Tokenizing(make_tokenizer(), frozenset({1}), WRPO_ANSWERS, WRPO)
    rows = tokenizing.rows(preference_rows(4 * STEPS), "rows").kept
    config = LONG.model_copy(update={"checkpoint_every": 1000, "epochs": 3})
    trainer = create(tmp_path / "run", base, rows, config)
    trainer.run(0)
    assert len(kept) == 2
    assert not notices
    for last in (8, 4):
        assert checkpoint.restore(trainer.policy, trainer.task.step.key) == last
        kept.pop()
