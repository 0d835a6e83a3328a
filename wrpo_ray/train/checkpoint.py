"""Checkpoints of an unfinished run: what Ray Train keeps, and what is in them.

A checkpoint holds each worker's shard of weights and optimizer, and the next step. The rest
(order of rows, alpha, learning rate) is a function of the step. Ray Train copies the files into
the run's storage and lists a checkpoint in its snapshot once all workers have handed theirs in,
so a half-written one is never resumed from. Not covered: another number of workers or ZeRO
stage, which starts anew in a folder of its own (`layout`).
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

from wrpo_ray.config import TrainConfig
from wrpo_ray.core.run import log
from wrpo_ray.core.storage import Folder

TAG = "state"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of complete checkpoints (ray.train.v2, 2.60)."""


def layout(config: TrainConfig) -> str:
    """Name of the folder of checkpoints that a run with this config can load."""
    return f"workers{config.workers}-zero{config.zero_stage}-{config.precision}"


def save(engine: Any, next_step: int, metrics: dict[str, Any]) -> None:
    """Hand a checkpoint to Ray Train; all workers call it."""
    from ray import train

    with tempfile.TemporaryDirectory() as scratch:
        engine.save_checkpoint(scratch, tag=TAG, client_state={"next_step": next_step})
        train.report(metrics, checkpoint=train.Checkpoint.from_directory(scratch))


def restore(engine: Any) -> int:
    """Load the newest complete checkpoint; returns the step to go on with, 0 without one."""
    from ray import train

    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        _, state = engine.load_checkpoint(folder, tag=TAG)
    return state["next_step"]


def repair(folder: Folder, label: str) -> None:
    """Before a run starts: put aside a snapshot that a kill cut off in the middle.

    Ray Train writes it in place, and refuses to start with a broken one or one that names a
    checkpoint that is gone.
    """
    if not folder.exists(SNAPSHOT) or _is_whole(folder):
        return
    log(f"{label}: the list of checkpoints is damaged; starting from the first step")
    folder.delete(SNAPSHOT)


def _is_whole(folder: Folder) -> bool:
    try:
        listed = json.loads(folder.read(SNAPSHOT))["checkpoint_results"]
        return all(folder.exists(item["checkpoint_dir_name"]) for item in listed)
    except (ValueError, KeyError, TypeError):
        return False
