"""Training on Ray: the driver starts TorchTrainer runs and reports their progress.

The only module of this package that uses Ray on the driver. torch and ray are imported when a run
starts, so that a config can be checked without them.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from wrpo_ray.config import Actors, TrainConfig
from wrpo_ray.errors import WrpoError
from wrpo_ray.llm.rendering import OWN, Template
from wrpo_ray.runtime import metrics
from wrpo_ray.runtime.allocator import ALLOCATOR
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.cores import Machine, share, this_machine
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.ledger import Usage
from wrpo_ray.runtime.placement import (
    MALLOC,
    Pool,
    capacity_for,
    check_capacity,
    is_own_ray,
    selector_for,
    thread_env,
)
from wrpo_ray.runtime.prefetch import PREFETCH
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.tasks import run_in_threads
from wrpo_ray.runtime.worker_errors import summarize_error
from wrpo_ray.stages.train.task import CHECKPOINTS, MEMORY, TRAINED, Task, TrainedCounts
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import MANIFEST, Step, read_manifest

PROGRESS_INTERVAL = 5.0
"""Seconds between lines of progress."""
DRIVER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a finished or lost worker is seen
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # an elastic run asks for its old size first, as Ray sees a lost node only every 20 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
"""Environment variables of Ray Train's controller, unless the user has set them."""


@dataclass(frozen=True)
class Train(BaseJob):
    """One model to train."""

    kind = JobKind.TRAIN

    step: Step
    """Its result is the folder `model` in the step's folder."""
    rows: Step
    """Its folder holds the prepared rows (`prepare`)."""
    base: Folder
    """The model folder to start from, and the reference of preference training."""
    fingerprint: str
    """Fingerprint of the base."""
    config: TrainConfig
    """Decides the objective (`objectives.training_objective`)."""
    seed: int
    """Decides the order of the rows."""
    template: Template = OWN
    """Replacement of the base's own chat template, saved with the trained model."""
    in_series: bool = False
    """Whether its workers may train other models before and after: their start takes longer than
    a short training."""

    @property
    def loads(self) -> Pool:
        """The workers."""
        config = self.config
        actors = Actors(
            max=config.workers,
            num_cpus=config.cpus,
            num_gpus=float(config.num_gpus),
            resources=config.resources,
        )
        return Pool(self.step.name, actors, models=((self.base, self.fingerprint),))

    @property
    def needs(self) -> dict[str, float]:
        """All workers."""
        return _needs(self, self.config.workers)

    @classmethod
    def run(cls, run: Run, jobs: list[Train]) -> None:
        """Train the jobs, as many at once as resources allow, and write each one's manifest.

        Raises:
            UserError: no rows to train on, or not enough resources for the workers.
            WrpoError: the workers failed more often than `max_failures` allows.
        """
        most = min(capacity_for(_needs(job, job.config.workers)) for job in jobs)
        series = [
            part for alike in _grouped_by_workers(jobs) for part in _split_into_series(alike, most)
        ]
        series = _with_shares(series, min(most, len(series)), this_machine())
        run_in_threads([partial(_train, run, part) for part in series], most)


def _with_shares(series: list[list[Train]], at_once: int, machine: Machine) -> list[list[Train]]:
    """The series with the CPUs of their workers decided, where the config names none."""
    workers = at_once * max(part[0].config.workers for part in series)
    given = {"num_cpus": share(machine, workers)}

    def decided(job: Train) -> Train:
        if job.config.num_cpus is not None or job.config.num_gpus:
            return job
        return replace(job, config=job.config.model_copy(update=given))

    return [[decided(job) for job in part] for part in series]


def _grouped_by_workers(jobs: list[Train]) -> list[list[Train]]:
    """Group jobs that the same workers can train."""
    found: dict[Any, list[Train]] = {}
    for job in jobs:
        config = job.config
        needs = (config.workers, config.min_workers, tuple(sorted(_needs(job, 1).items())))
        how = (config.zero_stage, config.offload, config.precision)
        found.setdefault((needs, how) if job.in_series else job.step.key, []).append(job)
    return list(found.values())


def _split_into_series(jobs: list[Train], most: int) -> list[list[Train]]:
    """Split the jobs into at most `most` series."""
    return [part for first in range(most) if (part := jobs[first::most])]


def _train(run: Run, jobs: list[Train]) -> None:
    """Train a series; its checkpoints are in the folder of the first model."""
    started = time.time()
    _check_room(jobs[0])
    tasks = [_task(run, job) for job in jobs]
    checkpoints = tasks[0].folder / CHECKPOINTS
    try:
        fitted = _fit(tasks, checkpoints)
    except WrpoError:
        for job, task in zip(jobs, tasks, strict=True):  # models trained before the error
            if task.folder.exists(TRAINED):
                _finish(run, job, task, task.folder.read_json(TRAINED))
        raise
    for job, task, counts in zip(jobs, tasks, fitted, strict=True):
        _finish(run, job, task, counts, started if len(jobs) == 1 else None)
    tasks[0].folder.delete(CHECKPOINTS)


def _finish(
    run: Run, job: Train, task: Task, counts: TrainedCounts, started: float | None = None
) -> None:
    """Write the manifest of a trained model; `started` is None for one of a series."""
    _log_result(task, counts)
    kept = {name: value for name, value in counts.items() if name != "seconds"}
    job.step.finish(run.root, kept, started or time.time() - counts["seconds"])
    task.folder.delete(TRAINED)


def _task(run: Run, job: Train) -> Task:
    rows = run.root / job.rows.folder
    return Task(run, job.step, rows, job.base, job.fingerprint, job.config, job.seed, job.template)


def _check_room(job: Train) -> None:
    config = job.config
    workers = config.min_workers or config.workers
    check_capacity(job.step.name, workers, "workers", _needs(job, 1))


def _needs(job: Train, workers: int) -> dict[str, float]:
    """Resources of this number of workers."""
    return _needs_of(job.config, workers)


def _needs_of(config: TrainConfig, workers: int) -> dict[str, float]:
    each = {"CPU": config.cpus, "GPU": float(config.num_gpus)} | config.resources
    return {name: workers * n for name, n in each.items()}


# --- one run ---------------------------------------------------------------------------------


def _fit(tasks: list[Task], checkpoints: Folder) -> list[TrainedCounts]:
    """Run the workers to the end; returns the first worker's counts of each model."""
    from wrpo_ray.stages.train import checkpoint
    from wrpo_ray.stages.train.metrics import check_trackers

    for task in tasks:
        check_trackers(task)
    for name, value in DRIVER_ENV.items():
        os.environ.setdefault(name, value)
    if is_own_ray():  # its node is never preempted, so one process less
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    label = tasks[0].step.name
    checkpoint.repair(checkpoints / checkpoint.LAYOUT, label)
    PREFETCH.wait((task.base, task.fingerprint) for task in tasks)
    models = f" for {len(tasks)} models" if len(tasks) > 1 else ""
    log(f"{label}: starting {tasks[0].config.workers} workers{models}")
    trainer = _trainer(tasks, checkpoints)
    ALLOCATOR.keep(label, _needs_of(tasks[0].config, 1), tasks[0].config.workers)
    try:
        result = _watch(tasks, trainer, checkpoints)
    finally:
        ALLOCATOR.leave(label)
    if isinstance(result, WrpoError):
        raise result
    return result


def _trainer(tasks: list[Task], checkpoints: Folder) -> Any:
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    from wrpo_ray.stages.train.checkpoint import LAYOUT

    config = tasks[0].config
    is_elastic = config.min_workers not in (None, config.workers)
    resources = {"CPU": config.cpus} | ({"GPU": 1} if config.num_gpus else {})
    resources |= config.resources
    return TorchTrainer(
        _work,
        train_loop_config={"tasks": tasks},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config.num_gpus else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=(config.min_workers, config.workers) if is_elastic else config.workers,
            resources_per_worker=resources,
            use_gpu=config.num_gpus > 0,
            label_selector=selector_for(config.num_gpus, config.resources),
        ),
        run_config=train.RunConfig(
            name=LAYOUT,
            storage_path=checkpoints.path,
            storage_filesystem=checkpoints.filesystem,
            failure_config=train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
            worker_runtime_env={"env_vars": worker_env(config)},
        ),
    )


def worker_env(config: TrainConfig) -> dict[str, str]:
    """Environment of a worker."""
    env = thread_env(config.cpus)
    if config.num_gpus:
        return env
    # DeepSpeed's import compiles an optimizer that is not used: more than a second a worker
    return env | MALLOC | {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}


def _work(config: dict[str, Any]) -> Any:
    """The function that Ray Train runs on each worker."""
    from wrpo_ray.stages.train import loop

    return loop.work(config["tasks"])


def _watch(tasks: list[Task], trainer: Any, checkpoints: Folder) -> list[TrainedCounts] | WrpoError:
    """Fit in a thread, and log progress meanwhile.

    In the main thread Ray Train would replace the SIGINT handler for good, and Ctrl-C would not
    reach the caller.
    """
    from wrpo_ray.stages.train.checkpoint import committed

    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["value"] = trainer.fit().return_value
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    waiting = list(tasks)
    task, ledger = waiting.pop(0), tasks[0].run.ledger
    shown, known, untold = _progress(task, None), 0, list(tasks)
    held = committed(checkpoints), known
    while thread.is_alive():
        started = time.monotonic()
        thread.join(PROGRESS_INTERVAL)
        tasks[0].run.check_goes_on()
        _count(task, time.monotonic() - started)
        untold = [t for t in untold if not _tell_memory(t)]
        if len(untold) < len(tasks):  # all workers run, so Ray shows what they hold
            ALLOCATOR.leave(tasks[0].step.name)
        shown = _progress(task, shown)
        known = _tell_reference(task, known) if shown == -1 else known
        while waiting and task.folder.exists(TRAINED):  # its workers train the next model
            task = waiting.pop(0)
            shown, known = _progress(task, -1), 0
        is_new = held != (held := (committed(checkpoints), known))
        if thread.is_alive() and is_new and ledger:
            ledger.check()  # a checkpoint is complete, so stopping here loses no work
    if "error" in outcome:
        raise summarize_error(outcome["error"], f"{task.step.name}: training") from outcome["error"]
    fitted: list[TrainedCounts] | WrpoError = outcome["value"]
    return fitted


def _tell_memory(task: Task) -> bool:
    """Log the estimate that the workers wrote, and delete it; whether it was there."""
    if task.folder.exists(MEMORY):
        log(str(task.folder.read_json(MEMORY)))
        task.folder.delete(MEMORY)
        return True
    return False


def _tell_reference(task: Task, shown: int) -> int:
    """Log how many rows have log-probs under a split reference, unless so many are `shown`."""
    from wrpo_ray.stages.train.split_reference import folder_of, rows_done

    if task.config.reference_mode != "split":
        return 0
    done = rows_done(folder_of(task.rows, task.config))
    if done != shown:
        rows = read_manifest(task.rows, MANIFEST)["counts"]["rows"]
        log(f"{task.step.name}  reference of {done:,} of {rows:,} rows")
    return done


def _count(task: Task, seconds: float) -> None:
    """Count the seconds of all workers in the config, even if some are lost."""
    held = seconds * task.config.workers
    gpu_seconds = held * task.config.num_gpus
    metrics.add_counts(task.step, actor_seconds=held, gpu_seconds=gpu_seconds)
    if task.run.ledger:
        spent = Usage(actor_seconds=held, gpu_seconds=gpu_seconds)
        task.run.ledger.add(task.step, task.step.name, spent)


def _progress(task: Task, shown: int | None) -> int:
    """Log and export the newest step unless it is `shown`; returns its number, or -1 without one.

    With `shown` None it logs nothing, as the metrics are of an earlier, interrupted run.
    """
    from wrpo_ray.stages.train.metrics import read_metrics

    records = read_metrics(task.folder)
    last = records[-1] if records else {"step": -1}
    if shown is None or last["step"] in (shown, -1):
        return last["step"]
    _export(task, last, [record for record in records if record["step"] > shown])
    accuracy = last.get("rewards/accuracies")
    log(
        f"{task.step.name}  step {last['step'] + 1}/{last['steps']}  loss {last['loss']:.4f}"
        + ("" if accuracy is None else f"  accuracy {accuracy:.2f}")
        + f"  {last['tokens_per_s']:,.0f} tokens/s"
    )
    return last["step"]


def _export(task: Task, last: dict[str, Any], new: list[dict[str, Any]]) -> None:
    rows, tokens = (sum(record[name] for record in new) for name in ("rows", "tokens"))
    metrics.add_counts(task.step, rows=rows, tokens=tokens)
    metrics.set_gauges(
        task.step,
        train_step=last["step"] + 1,
        train_steps=last["steps"],
        train_loss=last["loss"],
        train_accuracy=last.get("rewards/accuracies"),
        train_alpha=last.get("alpha"),
        train_learning_rate=last["lr"],
        train_grad_norm=last["grad_norm"],
        train_tokens_per_second=last["tokens_per_s"],
    )


def _log_result(task: Task, counts: TrainedCounts) -> None:
    label = task.step.name
    if counts["resumed_at"]:
        log(f"{label}: resumed at step {counts['resumed_at']}")
    log(f"{label}: {counts['steps']} steps on {counts['rows']:,} rows")
    if lost := counts.get("lost_in_bf16"):
        log(f"{label}: {_rounding_note(task.config, lost)}")


def _rounding_note(config: TrainConfig, lost: float) -> str:
    """A sentence on the changes of a trained model that bf16 loses."""
    if config.lora:
        return (
            f"its weights are in fp32, as in bf16 {lost:.1%} of those that changed would be as "
            "before; so it is with what computes in bf16 from here"
        )
    return (
        f"its weights are in bf16, as they were trained; {lost:.1%} of those that the optimizer "
        "changed, in fp32, show no change there (precision: fp32 trains with all)"
    )
