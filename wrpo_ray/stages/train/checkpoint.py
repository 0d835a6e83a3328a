"""Checkpoints of an unfinished run, saved and resumed through Ray Train.

A checkpoint holds the training state (`state`), one part per worker, and the next step. The rest
(order of rows, alpha, learning rate) is a function of the step. So any number of workers can
resume from it, at any ZeRO stage. Each worker writes its part to a local folder; Ray Train uploads
it to the run's storage while training continues, and lists a checkpoint in its snapshot once all
parts are uploaded. So a run never resumes from an incomplete checkpoint: if a worker is lost before
its upload ends, training resumes from the checkpoint before.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.train.state import INDEX, load_state, save_state
from wrpo_ray.storage.cache import node_cache
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

LAYOUT = "sharded"
"""Folder of a run's checkpoints; a format that this code cannot load needs another name."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of complete checkpoints (ray.train.v2, 2.60)."""


def save(engine: Any, key: str, next_step: int, metrics: dict[str, Any]) -> None:
    """Write a checkpoint; Ray Train uploads it in the background. All workers call it.

    `key` is the step's key, as a series of models shares one folder of checkpoints.

    It first waits until the checkpoint before is complete, so that at most one is on the local
    disk. Ray Train deletes it after the upload, and uploads the last one before a run ends.
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
    """A path that depends on run and rank alone, so that a killed worker's files are deleted."""
    from ray import train

    context = train.get_context()
    name = f"{digest(context.get_storage().experiment_fs_path, 16)}-{context.get_world_rank()}"
    return node_cache().folder / f"checkpoint-{name}"


def restore(engine: Any, key: str) -> int:
    """Load the newest complete checkpoint; returns the step to go on with, 0 without one.

    A checkpoint of another model of the same series does not count.

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
        return int(load_state(engine, Path(folder))["next_step"])


def repair(folder: Folder, label: str) -> None:
    """Delete a damaged snapshot before a run starts.

    Ray Train writes it in place, so a kill can truncate it. It does not start with a damaged one,
    or one that lists a deleted checkpoint.
    """
    if not folder.exists(SNAPSHOT) or _is_whole(folder):
        return
    log(f"{label}: the list of checkpoints is damaged; starting from the first step")
    folder.delete(SNAPSHOT)


def committed(checkpoints: Folder) -> bytes:
    """The snapshot of a run's complete checkpoints; it changes with each new one."""
    folder = checkpoints / LAYOUT
    return folder.read(SNAPSHOT) if folder.exists(SNAPSHOT) else b""


def _is_whole(folder: Folder) -> bool:
    try:
        listed = json.loads(folder.read(SNAPSHOT))["checkpoint_results"]
        return all(folder.exists(item["checkpoint_dir_name"]) for item in listed)
    except (ValueError, KeyError, TypeError):
        return False
