"""Checkpoints of an unfinished run, saved and resumed through Ray Train.

A checkpoint holds the training state (`state`), one part per worker, the next step, and the choice
of micro-batches. The rest (order of rows, alpha, learning rate) is a function of the step. So any
number of workers can resume from it, at any ZeRO stage. Each worker writes its part to a local
folder, with a GPU from a copy while training continues. Ray Train uploads it to the run's storage
meanwhile, and lists a checkpoint in its snapshot once all parts are uploaded. So a run never
resumes from an incomplete checkpoint: if a worker is lost before its upload ends, training resumes
from the one before.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from wrpo_ray.runtime.node_memory import node_memory
from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.train.memory import Choice
from wrpo_ray.stages.train.state import INDEX, bytes_of, load_state, part_of
from wrpo_ray.storage.cache import node_cache
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

LAYOUT = "sharded"
"""Folder of a run's checkpoints; a format that this code cannot load needs another name."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of complete checkpoints (ray.train.v2, 2.60)."""


NOTICE_INTERVAL = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))
"""Seconds between two questions whether a node is about to leave, as often as Ray Train looks."""


class Saver:
    """Saves the state of one engine; every worker has one and calls it after the same steps."""

    def __init__(self, engine: Any, key: str, chosen: Choice, device: torch.device):
        """`key` is the step's key, as a series of models shares one folder of checkpoints."""
        self._engine, self._device = engine, device
        self._extra = {"step": key, "chosen": chosen._asdict()}
        self._copies: dict[str, Tensor] | None = {} if has_room_for_copies(engine, device) else None
        self._asked = time.monotonic()
        self._saved_for = ""

    def save(self, next_step: int, metrics: dict[str, Any]) -> None:
        """Save a checkpoint; training goes on while it is uploaded, with a GPU also while written.

        It first waits until the checkpoint before is complete, so that at most one is on the local
        disk. Ray Train deletes it after the upload, and uploads the last one before a run ends.
        """
        from ray import train

        train.get_all_reported_checkpoints(train.CheckpointConsistencyMode.COMMITTED)
        folder, storage = _local_folder(), train.get_context().get_storage()
        if folder.exists():  # of a worker that was killed
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        part = part_of(self._engine, {"next_step": next_step} | self._extra, self._copies)
        if self._copies is None:
            part.write(folder)

        def upload(local: Any, name: str) -> Any:
            if self._copies is not None:
                part.write(folder)
            return storage.persist_current_checkpoint(local, name)

        train.report(
            metrics,
            checkpoint=train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=True,
        )

    def is_node_leaving(self) -> bool:
        """Whether a node of the workers is newly announced to end, such as a spot node.

        The answer is the same on all workers. It is asked every `NOTICE_INTERVAL`, since the
        question itself waits for all of them. Without Ray, as in a benchmark, nobody tells.
        """
        import ray
        from ray import train

        if not ray.is_initialized():
            return False
        waited = torch.tensor([time.monotonic() - self._asked], device=self._device)
        dist.all_reduce(waited, dist.ReduceOp.MAX)
        if waited.item() < NOTICE_INTERVAL:
            return False
        self._asked = time.monotonic()
        notice = train.get_preemption_info()
        nodes = ",".join(notice.preempted_node_ids) if notice else ""
        is_new, self._saved_for = nodes not in ("", self._saved_for), nodes
        return is_new


def has_room_for_copies(engine: Any, device: torch.device) -> bool:
    """Whether the node has twice the memory of the copies that are written while training goes on.

    On a CPU they would take the memory of training itself; the state is written at once there.
    """
    from ray import train

    if device.type == "cpu":
        return False
    workers = train.get_context().get_local_world_size()
    return node_memory().among(workers).free > 2 * bytes_of(engine)


def _local_folder() -> Path:
    """A path that depends on run and rank alone, so that a killed worker's files are deleted."""
    from ray import train

    context = train.get_context()
    name = f"{digest(context.get_storage().experiment_fs_path, 16)}-{context.get_world_rank()}"
    return node_cache().folder / f"checkpoint-{name}"


def chosen_before(key: str) -> Choice | None:
    """The choice of the newest complete checkpoint; None without one, as of an earlier version."""
    _, extra = _newest(key)
    return Choice(**extra["chosen"]) if "chosen" in extra else None


def restore(engine: Any, key: str) -> int:
    """Load the newest complete checkpoint; returns the step to go on with, 0 without one.

    Raises:
        WrpoError: the checkpoint is damaged.
    """
    checkpoint, _ = _newest(key)
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return int(load_state(engine, Path(folder))["next_step"])


def _newest(key: str) -> tuple[Any, dict[str, Any]]:
    """The newest complete checkpoint and what it holds beside tensors; None without one.

    A checkpoint of another model of the same series does not count.
    """
    from ray import train

    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return None, {}
    with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{INDEX}") as index:
        extra: dict[str, Any] = json.loads(index.read())["extra"]
    return (checkpoint, extra) if extra.get("step", key) == key else (None, {})


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
