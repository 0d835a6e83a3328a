"""Checkpoints of an unfinished run: what Ray Train keeps, and what is in them.

A checkpoint holds the training state (`state`), a part of each worker, and the next step. The rest
(order of rows, alpha, learning rate) is a function of the step. So any number of workers goes on
from it, at any ZeRO stage. Each worker writes its part to a folder of its own; Ray Train copies
it to the run's storage while training goes on, and lists a checkpoint in its snapshot once all
parts are there. So a half-written one is never resumed from; what a lost worker had not
uploaded is trained again from the checkpoint before.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.train.state import INDEX, load_state, save_state
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

LAYOUT = "sharded"
"""Folder of a run's checkpoints; a format that this code cannot load needs another name."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of complete checkpoints (ray.train.v2, 2.60)."""


def save(engine: Any, key: str, next_step: int, metrics: dict[str, Any]) -> None:
    """Write a checkpoint and have Ray Train upload it meanwhile; all workers call it.

    `key` is that of the step, as a series of models has one place for checkpoints.

    It first waits until the one before is complete, so that no more than one is on the disk.
    Ray Train deletes it there once it is uploaded, and uploads the last before a run ends.
    """
    from ray import train

    train.get_all_reported_checkpoints(train.CheckpointConsistencyMode.COMMITTED)
    folder = _local_folder()
    if folder.exists():  # of a worker that was killed
        shutil.rmtree(folder)
    save_state(engine, folder, {"next_step": next_step, "step": key})
    train.report(
        metrics,
        checkpoint=train.Checkpoint.from_directory(str(folder)),
        checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _local_folder() -> Path:
    """The same for every worker of this rank and run, so that a killed one's is cleared away."""
    from ray import train

    context = train.get_context()
    name = f"{digest(context.get_storage().experiment_fs_path, 16)}-{context.get_world_rank()}"
    return Path(tempfile.gettempdir()) / f"wrpo-checkpoint-{name}"


def restore(engine: Any, key: str) -> int:
    """Load the newest complete checkpoint; returns the step to go on with, 0 without one.

    One of another model of the same series is none.

    Raises:
        WrpoError: the checkpoint is damaged.
    """
    from ray import train

    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{INDEX}") as index:
        if json.loads(index.read())["extra"].get("step", key) != key:
            return 0
    with checkpoint.as_directory() as folder:
        return load_state(engine, Path(folder))["next_step"]


def repair(folder: Folder, label: str) -> None:
    """Before a run starts: put aside a snapshot that a kill cut off in the middle.

    Ray Train writes it in place, and refuses to start with a broken one or one that names a
    checkpoint that is gone.
    """
    if not folder.exists(SNAPSHOT) or _is_whole(folder):
        return
    log(f"{label}: the list of checkpoints is damaged; starting from the first step")
    folder.delete(SNAPSHOT)


def committed(checkpoints: Folder) -> bytes:
    """Tells one state of a run's complete checkpoints from the next."""
    folder = checkpoints / LAYOUT
    return folder.read(SNAPSHOT) if folder.exists(SNAPSHOT) else b""


def _is_whole(folder: Folder) -> bool:
    try:
        listed = json.loads(folder.read(SNAPSHOT))["checkpoint_results"]
        return all(folder.exists(item["checkpoint_dir_name"]) for item in listed)
    except (ValueError, KeyError, TypeError):
        return False
