"""Check on the workers, before a model is loaded, that training fits; choose the micro-batches."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import distributed as dist

from wrpo_ray.runtime.node_memory import Room, node_memory
from wrpo_ray.stages.train import packing
from wrpo_ray.stages.train.memory import Choice, Estimate, Shape
from wrpo_ray.stages.train.sizes import Sizes
from wrpo_ray.stages.train.slimming import keeps_less
from wrpo_ray.stages.train.task import MEMORY, Task


def fitted(
    task: Task,
    base: Path,
    lengths: np.ndarray,
    device: torch.device,
    before: Choice | None = None,
) -> Task:
    """The task with its micro-batch tokens; all workers get the same.

    `lengths` (R, 1 + answers) are those of all rows; `before` is the choice of the checkpoint that
    training resumes from. The first worker writes the estimate to the step's folder, for the driver
    to log.

    Raises:
        UserError: it does not fit; the message says what to change. On all workers.
    """
    config = task.config
    longest = lengths[lengths.sum(1).argmax()]
    estimate = Estimate(
        Sizes.of(json.loads((base / "config.json").read_text())),
        config,
        Shape(float(longest[0]), float(longest[1:].mean()), len(longest) - 1),
        max(packing.costs(lengths, packed=config.packing)),
        dist.get_world_size(),
        is_slim=keeps_less(base),
    )
    estimate.check_node(_least_of_all(_of_node()), task.step.name)
    room = _least_of_all(_room(device))
    chosen, told = estimate.check(room, task.step.name, before)
    if dist.get_rank() == 0:
        task.folder.write_json(MEMORY, told)
    config = config.model_copy(update={"micro_batch_tokens": chosen.tokens})
    return replace(task, config=config)


def _room(device: torch.device) -> Room:
    """The memory for this worker: of its GPU, or its part of the node's, with what it holds now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(float(total), float(free))
    return _of_node()


def _of_node() -> Room:
    part = node_memory().among(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return Room(part.total, part.free + psutil.Process().memory_info().rss)


def _least_of_all(room: Room) -> Room:
    """The smallest room of all workers, so that all choose alike."""
    values = torch.tensor(room, dtype=torch.double)
    dist.all_reduce(values, dist.ReduceOp.MIN)
    total, free = values.tolist()
    return Room(total, free)
