"""The memory that a config's trainings need, against that of a GPU or of this node."""

import os
from dataclasses import replace

from wrpo_ray.config import Config
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.node_memory import Room, node_memory
from wrpo_ray.stages.train.memory import Estimate, Shape
from wrpo_ray.stages.train.sizes import Sizes
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.storage.folder import Folder

GPU_FREE = 0.97
"""Share of a GPU's memory that its driver leaves free."""


def training_memory(
    config: Config, job: Train, base: Folder, prompt: float, answer: float
) -> str | None:
    """A line on the peak of a training's workers; None if the model's sizes are not known.

    It warns if the fewest GPUs (`min_workers`) hold too much: ZeRO splits the model over fewer.

    Args:
        config: the whole config.
        job: the training.
        base: a model folder with the sizes of the model to train.
        prompt: mean tokens of a prompt.
        answer: mean tokens of an answer.
    """
    if not base.exists("config.json"):
        return None
    shape = Shape(prompt, answer, len(job.config.answers))
    copies = 1 if job.config.packing else shape.answers  # padded, each answer has its prompt
    longest = max(round(shape.tokens), copies * job.config.max_length)
    sizes = Sizes.of(base.read_json("config.json"))
    estimate = Estimate(sizes, job.config, shape, longest, job.config.workers)
    room = _room(config, job)
    try:
        line = estimate.check(room or Room(float("inf"), float("inf")), job.step.name)[1]
    except UserError as error:
        return str(error)
    if room is None:
        return line
    line = f"{line}; there are {room.free / 1e9:.1f} GB"
    enough = _enough_workers(estimate, room) if job.config.num_gpus else 0
    if enough <= (job.config.min_workers or job.config.workers):
        return line
    less = f"after a loss of nodes, that is too little for fewer than {enough} workers"
    return f"{line}; {less}: set min_workers: {enough}"


def _enough_workers(estimate: Estimate, room: Room) -> int:
    """The fewest workers whose parts of the model fit; 0 if they do not fit for all workers."""

    def fits(workers: int) -> bool:
        fewer = replace(estimate, workers=workers)
        return fewer.at(fewer.tokens(room.free)).total <= room.free

    return next(filter(fits, range(1, estimate.workers + 1)), 0)


def _room(config: Config, job: Train) -> Room | None:
    """The memory for a worker: a GPU's, or its part of this node's if the run starts Ray here."""
    if job.config.num_gpus:
        size = config.plan.gpu_memory * 1e9
        return Room(size, GPU_FREE * size)
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        return None
    return node_memory().among(job.config.workers)
