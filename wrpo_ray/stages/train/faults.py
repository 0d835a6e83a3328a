"""Which weight, row or gradient is not finite, once a loss or gradient norm is not.

All workers call it alike, and get the same words. The weights are those before the step that
failed (`deepspeed.act` leaves them), so a second pass over its rows shows what went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from wrpo_ray.errors import UserError
from wrpo_ray.stages.train import model
from wrpo_ray.stages.train.objectives import Objective
from wrpo_ray.stages.train.rows import Row

if TYPE_CHECKING:
    from wrpo_ray.stages.train.loop import Trainer

Parts = Sequence[tuple[list[Row], bool]]
"""This worker's micro-batches, and whether each is real and no dummy."""


def told(numbers: Mapping[str, float]) -> str:
    """The first of some named numbers that is not finite, in words; empty where all are."""
    return next((f"{n} is {v}" for n, v in numbers.items() if not math.isfinite(v)), "")


def find(trainer: Trainer, parts: Parts, objective: Objective) -> str:
    """The cause, and what to do about it: the first of any worker."""
    looks = (
        lambda: _weight(trainer),
        lambda: _first(_row(trainer, rows, objective) for rows, _ in parts),
        lambda: _first(_gradient(trainer, rows, objective) for rows, _ in parts),
    )
    for look in looks:
        if cause := _of_any_worker(look()):
            return cause
    return (
        "computed again it is finite, so a device's memory may be at fault; run again, which goes "
        "on from the last checkpoint"
    )


def check_weights(trainer: Trainer) -> None:
    """Raise UserError, on all workers, where a weight to be saved is not finite."""
    if cause := _of_any_worker(_weight(trainer)):
        raise UserError(f"{trainer.task.step.name}: after the last step {cause}")


def _of_any_worker(own: str) -> str:
    causes = [""] * dist.get_world_size()
    dist.all_gather_object(causes, own)
    return _first(iter(causes))


def _first(causes: Iterator[str]) -> str:
    """The first that is not empty; all are asked for, as each takes the same forward passes."""
    return next(filter(None, list(causes)), "")


def _weight(trainer: Trainer) -> str:
    for name, parameter in trainer.policy.module.named_parameters():
        part = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3: this worker's share
        if not bool(torch.isfinite(part.detach()).all()):
            place = name.removeprefix("model.")
            return f"the weight {place} is not finite; lower learning_rate, or mend the model"
    return ""


def _row(trainer: Trainer, rows: list[Row], objective: Objective) -> str:
    """The first row with a log-prob or loss that is not finite, and which."""
    config = trainer.task.config
    with torch.no_grad():
        batch = model.collate(rows, config).to(trainer.device)
        logps = trainer.policy(batch)
        reference = trainer.reference_logps(rows, batch, logps)
        losses = trainer.losses(rows, objective)[0]
    stored = f"; delete {trainer.task.rows} and run again"
    again = stored if config.stores_reference else "; look at the row"
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
    """The first tensor, from the loss on, whose gradient by these rows is not finite."""
    found: list[str] = []

    def look_at(name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if not bool(torch.isfinite(gradient).all()):
                found.append(name)

        return look

    trained = [(n, p) for n, p in trainer.policy.module.named_parameters() if p.requires_grad]
    hooks = [p.register_hook(look_at(name.removeprefix("model."))) for name, p in trained]
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
