"""Metrics of each optimizer step: summed over rows and workers, kept as JSON lines, tracked."""

import importlib.util
import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wrpo_ray.errors import UserError
from wrpo_ray.stages.train.task import METRICS, Task
from wrpo_ray.storage.folder import Folder

Record = dict[str, Any]


class Sums:
    """Sums over the rows of a step, first on this worker, then over all of them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], is_real: bool) -> None:
        """Add per-row values, each (B,); a dummy adds zeros under the same names."""
        for name, value in values.items():
            total = (
                value.detach().double().sum() if is_real else torch.zeros((), dtype=torch.double)
            )
            self._sums[name] = self._sums.get(name, 0.0) + total.to(value.device)

    def reduce(self) -> dict[str, float]:
        """The sums over all workers, which call it together with the same names."""
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names])  # (metrics,)
        torch.distributed.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))


class MetricsFile:
    """`metrics.jsonl` of a step's folder, written by one worker.

    A local file grows line by line. In an object store it is rewritten every `every` seconds and at
    each `flush`. Lines of steps that a resumed run repeats are dropped.
    """

    def __init__(self, folder: Folder, first_step: int, every: float = 15.0):
        self.folder, self.every = folder, every
        self.records = [r for r in read_metrics(folder) if r["step"] < first_step]
        self._write()

    def append(self, record: Record) -> None:
        """Add the record of a step."""
        self.records.append(record)
        if not self.folder.is_remote:
            with (Path(self.folder.path) / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        elif time.monotonic() - self._written > self.every:
            self._write()

    def flush(self) -> None:
        """Make everything so far visible."""
        if self.folder.is_remote:
            self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        self.folder.write(METRICS, text.encode())
        self._written = time.monotonic()


def read_metrics(folder: Folder) -> list[Record]:
    """The records of a step's folder; a line cut off by a kill is skipped."""
    if not folder.exists(METRICS):
        return []
    return folder.read_records(METRICS)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this worker in GB: of the GPU, or of its process on a CPU."""
    if device.type == "cuda":
        return round(float(torch.cuda.max_memory_allocated(device)) / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)


# --- trackers -----------------------------------------------------------------------


@dataclass(frozen=True)
class Tracker:
    """A service that gets a run's metrics beside `metrics.jsonl`."""

    log: Callable[[Record], None]
    """Called with each step's record."""
    close: Callable[[], Any]
    """Ends the run there; the same process may train another model."""


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def check_trackers(task: Task) -> None:
    """Check the trackers on the driver, before the workers start.

    Raises:
        UserError: a tracker's package is missing, or it cannot write to this output.
    """
    for name in task.config.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            package = PACKAGES[name]
            raise UserError(f"trackers: {name} needs its package: pip install {package}")
        if name == "tensorboard" and task.folder.is_remote:
            raise UserError(
                "trackers: tensorboard writes to a local output only; use wandb or mlflow"
            )


def trackers(task: Task) -> list[Tracker]:
    """The trackers of the config."""
    makers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    return [makers[name](task) for name in task.config.trackers]


def _tensorboard(task: Task) -> Tracker:
    """Write each step at once: a SummaryWriter queues it, and its flush does not wait."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    folder = Path(task.folder.path) / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventsWriter(str(folder / "events"))

    def log(record: Record) -> None:
        values = [Summary.Value(tag=n, simple_value=v) for n, v in _numbers(record).items()]
        summary, step = Summary(value=values), record["step"]
        writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(task: Task) -> Tracker:
    import wandb

    run = wandb.init(
        project="wrpo-ray", name=task.step.folder, id=task.step.key, resume="allow",
        config=task.config.model_dump(mode="json"),
    )  # fmt: skip
    return Tracker(lambda r: run.log(_numbers(r), step=r["step"]), run.finish)


def _mlflow(task: Task) -> Tracker:
    import mlflow

    mlflow.start_run(run_name=task.step.folder)
    mlflow.log_params(task.config.identity())
    return Tracker(lambda r: mlflow.log_metrics(_numbers(r), step=r["step"]), mlflow.end_run)


def _numbers(record: Record) -> dict[str, float]:
    return {n: v for n, v in record.items() if n not in ("step", "steps") and v is not None}
