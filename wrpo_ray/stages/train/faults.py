"""Find the weight, row or gradient that is not finite, once a loss or gradient norm is not.

All workers call it together and get the same text. The weights are still those before the failed
step (`deepspeed.end_micro_batch` keeps them), so a second pass over its rows finds the cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from wrpo_ray.errors import UserError
from wrpo_ray.stages.train import model
from wrpo_ray.stages.train.objectives import Objective
from wrpo_ray.stages.train.rows import Row

if TYPE_CHECKING:
    from wrpo_ray.stages.train.loop import Trainer

LOOK = "; look at the row"
"""Remedy for a row whose log-prob under the reference is not finite."""
Parts = Sequence[tuple[list[Row], bool]]
"""This worker's micro-batches, and whether each is real and not a dummy."""


def first_not_finite(numbers: Mapping[str, float]) -> str:
    """Describe the first of the named numbers that is not finite; empty if all are finite."""
    return next((f"{n} is {v}" for n, v in numbers.items() if not math.isfinite(v)), "")


def find(trainer: Trainer, parts: Parts, objective: Objective) -> str:
    """Return the first cause that any worker finds, with a remedy."""
    checks: tuple[Callable[[], str], ...] = (
        lambda: _weight(trainer),
        lambda: _first(_row(trainer, rows, objective) for rows, _ in parts),
        lambda: _first(_gradient(trainer, rows, objective) for rows, _ in parts),
    )
    for check in checks:
        if cause := _of_any_worker(check()):
            return cause
    return (
        "computed again it is finite, so a device's memory may be at fault; run again, which goes "
        "on from the last checkpoint"
    )


def check_weights(trainer: Trainer) -> None:
    """Raise UserError on all workers if a weight to be saved is not finite."""
    if cause := _of_any_worker(_weight(trainer)):
        raise UserError(f"{trainer.task.step.name}: after the last step {cause}")


def check_reference(trainer: Trainer, first: int, logps: np.ndarray) -> None:
    """Raise UserError on all workers if a log-prob under the reference is not finite.

    `logps` (rows, answers) are those of the rows from `first` on, the same on all workers.
    """
    for row, answer in np.argwhere(~np.isfinite(logps))[:1]:
        name, value = trainer.task.config.answers[answer], logps[row, answer]
        cause = _of_any_worker(_weight(trainer)) or (
            f"the log-prob of {name} under the reference of prompt "
            f"{trainer.rows.prompt_id(first + row)} is {value}{LOOK}"
        )
        raise UserError(f"{trainer.task.step.name}: {cause}")


def _of_any_worker(own: str) -> str:
    causes = [""] * dist.get_world_size()
    dist.all_gather_object(causes, own)
    return _first(iter(causes))


def _first(causes: Iterator[str]) -> str:
    """The first that is not empty; all are computed, so that workers run equal forward passes."""
    return next(filter(None, list(causes)), "")


def _weight(trainer: Trainer) -> str:
    for name, parameter in trainer.policy.module.named_parameters():
        if not bool(torch.isfinite(_share(parameter)).all()):
            place = name.removeprefix("model.")
            return f"the weight {place} is not finite; lower learning_rate, or mend the model"
    return ""


def _share(parameter: Any) -> Tensor:
    """With ZeRO-3 this worker's share, without the padding at its end, which may hold anything."""
    share = getattr(parameter, "ds_tensor", parameter).detach().view(-1)
    if not hasattr(parameter, "ds_tensor"):
        return share
    start = share.numel() * dist.get_rank(parameter.ds_process_group)
    return share[: max(0, parameter.ds_numel - start)]


def _row(trainer: Trainer, rows: list[Row], objective: Objective) -> str:
    """Name the first row with a log-prob or loss that is not finite."""
    config = trainer.task.config
    with torch.no_grad():
        batch = model.collate(rows, config).to(trainer.device)
        logps = trainer.policy(batch)
        reference = trainer.reference_logps(rows, batch, logps)
        losses = trainer.losses(rows, objective)[0]
    stored = f"; delete {trainer.task.rows} and run again"
    again = stored if config.reference_mode == "stored" else LOOK
    for what, values, remedy in (
        ("log-prob of {} under the reference", reference, again),
        ("log-prob of {}", logps, "; lower learning_rate"),
        ("loss", losses, "; lower learning_rate"),
    ):
        for row, found in zip(rows, values.reshape(len(rows), -1).tolist(), strict=True):
            for name, value in zip(objective.answers, found, strict=False):
                if not math.isfinite(value):
                    return f"the {what.format(name)} of prompt {row.prompt_id} is {value}{remedy}"
    return ""


def _gradient(trainer: Trainer, rows: list[Row], objective: Objective) -> str:
    """Name the first tensor, in backward order, whose gradient of these rows is not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            if not bool(torch.isfinite(gradient).all()):
                found.append(name)

        return hook

    trained = [(n, p) for n, p in trainer.policy.module.named_parameters() if p.requires_grad]
    hooks = [p.register_hook(watch(name.removeprefix("model."))) for name, p in trained]
    trainer.policy.set_gradient_accumulation_boundary(False)
    trainer.policy.backward(trainer.losses(rows, objective)[0].sum(), scale_wrt_gas=False)
    for hook in hooks:
        hook.remove()
    if not found:
        return ""
    others = f" and {len(rows) - 1} others" if len(rows) > 1 else ""
    return (
        f"the gradient of {found[0]} is not finite for prompt {rows[0].prompt_id}{others}; lower "
        "learning_rate, or take those prompts out"
    )
