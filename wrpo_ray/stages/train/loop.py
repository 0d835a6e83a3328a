"""The training loop of each Ray Train worker: rows, engines, optimizer steps, the trained model.

The gradient of a step is the sum of the losses of its rows (preferences) or answer tokens (SFT)
over all workers, divided by their real number: the same for every number of workers, packing,
micro-batch and ZeRO stage, but for the loss of a router (`router_loss`).

Not covered: the driver (`stage`).
"""

import functools
import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from wrpo_ray.errors import UserError, WrpoError
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.runtime.weights import use_peers
from wrpo_ray.stages.train import (
    checkpoint,
    deepspeed,
    faults,
    fitting,
    model,
    packing,
    probe,
    split_reference,
)
from wrpo_ray.stages.train.memory import Choice
from wrpo_ray.stages.train.metrics import MetricsFile, Sums, Tracker, peak_memory, trackers
from wrpo_ray.stages.train.objectives import Losses, Objective, training_objective
from wrpo_ray.stages.train.order import Order, learning_rate_at
from wrpo_ray.stages.train.packing import Batch
from wrpo_ray.stages.train.rows import PreparedRows, Row
from wrpo_ray.stages.train.task import ADAPTERS, MODEL, TRAINED, Task, TrainedCounts


def work(tasks: Sequence[Task]) -> list[TrainedCounts] | WrpoError:
    """Train one model after another on this worker.

    The project's own errors rise on all workers at once, and a retry would fail again. So they are
    returned: Ray Train restarts the workers after an error that is raised.
    """
    use_peers()
    try:
        return [_train(task, in_series=len(tasks) > 1) for task in tasks]
    except WrpoError as error:
        return error


def _train(task: Task, *, in_series: bool) -> TrainedCounts:
    counts: TrainedCounts
    if task.folder.exists(TRAINED):  # before the workers were restarted
        counts = task.folder.read_json(TRAINED)
        return counts
    started = time.time()
    torch.set_num_threads(max(1, int(task.config.cpus)))
    deepspeed.prepare(task.config)
    trainer = Trainer.create(task, checkpoint.chosen_before(task.step.key))
    first_step = checkpoint.restore(trainer.policy, task.step.key)
    final_loss = trainer.run(first_step)
    lost_in_bf16 = trainer.save()
    counts = {
        "rows": len(trainer.train_rows),
        "held_out": len(trainer.held_rows),
        "steps": trainer.order.steps,
        "final_loss": final_loss,
        "lost_in_bf16": lost_in_bf16,
        "resumed_at": first_step,
        "workers": dist.get_world_size(),
        "seconds": time.time() - started,
    }
    if in_series:
        dist.barrier()  # the model is written
        if dist.get_rank() == 0:
            task.folder.write_json(TRAINED, counts)
        trainer.close()
    return counts


@dataclass
class Trainer:
    """The engines and rows of one worker."""

    task: Task
    rows: PreparedRows
    train_rows: np.ndarray
    """Indices of the rows to train on."""
    held_rows: np.ndarray
    """Indices of the rows to measure the loss on."""
    order: Order
    policy: Any
    reference: Any
    """A frozen second model; None if log-probs are in `rows`, or the policy without adapters is it.
    """
    device: torch.device

    @classmethod
    def create(cls, task: Task, before: Choice | None = None) -> Self:
        """Load the policy and, if the objective needs a live one, the reference model.

        `before` is the choice of the checkpoint that training will resume from.

        Raises:
            UserError: no row is left to train on, or the memory is too small.
        """
        config, base = task.config, task.base.local(task.fingerprint)
        torch.manual_seed(task.seed)  # adapters start at random
        rows = PreparedRows(task.rows.local())
        held = rows.held_out(config.holdout)
        train_rows = np.flatnonzero(~held)
        if not len(train_rows):
            raise UserError(
                f"{task.step.name}: all {len(rows)} rows are held out; lower holdout to 0, "
                f"or give more prompts"
            )
        order = Order(len(train_rows), config.epochs, config.batch_size, task.seed)
        device = torch.device("cuda" if config.num_gpus else "cpu")
        task = fitting.fitted(task, base, rows.lengths, device, before)
        config = task.config
        settings = deepspeed.engine_config(config, dist.get_world_size())
        with deepspeed.partitioned_loading(settings):
            load = functools.partial(model.load_policy, base, config, device)
            policy, reference = load(), load() if config.has_second_model else None
        engine = deepspeed.policy_engine(policy, config, settings)
        probe.check_forward(policy, config, device)
        if reference is not None:
            reference = deepspeed.reference_engine(reference, settings)
        held_rows = np.flatnonzero(held)
        trainer = cls(task, rows, train_rows, held_rows, order, engine, reference, device)
        if config.reference_mode == "split":  # the policy is the reference until its first step
            rows.reference = split_reference.logps_of_all(trainer)
        return trainer

    def run(self, first_step: int) -> float | None:
        """Run all steps from `first_step`; returns the last step's loss on the first worker.

        Raises:
            UserError: the loss or the gradient is not finite, at any step.
        """
        is_first = dist.get_rank() == 0
        file = MetricsFile(self.task.folder, first_step) if is_first else None
        with ExitStack() as stack:
            active = trackers(self.task) if is_first else []
            for tracker in active:
                stack.callback(tracker.close)
            self._steps(first_step, file, active)
        if file is None:
            return None
        file.flush()
        return file.records[-1]["loss"] if file.records else None

    def _steps(self, first_step: int, file: MetricsFile | None, active: list[Tracker]) -> None:
        saver = checkpoint.Saver(self.policy, self.task.step.key, self._chosen, self.device)
        for step in range(first_step, self.order.steps):
            record = self.step(step) | self._held_out(step)
            if file:
                file.append(record)
            for tracker in active:
                tracker.log(record)
            if step + 1 < self.order.steps and (
                (step + 1) % self.task.config.checkpoint_every == 0 or saver.is_node_leaving()
            ):
                if file:
                    file.flush()
                saver.save(step + 1, {"step": step, "loss": record["loss"]})

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its metrics, which are the same on all workers."""
        started, sums = time.monotonic(), Sums()
        config, steps = self.task.config, self.order.steps
        batch = self.train_rows[list(self.order.batch(step))]
        rate = learning_rate_at(config, step, steps)
        deepspeed.set_learning_rate(self.policy, rate)
        objective = training_objective(config).at(self.order.consumed(step))
        divisor = objective.divisor(self.rows.lengths[batch])
        scale = dist.get_world_size() / divisor  # DeepSpeed averages over workers
        parts = self._micro_batches(batch)
        norm = 0.0
        for number, (part, is_real) in enumerate(parts, start=1):
            is_last = number == len(parts)
            self.policy.set_gradient_accumulation_boundary(is_last)
            losses, metrics = self.losses(part, objective)
            self.policy.backward(losses.sum() * (is_real * scale), scale_wrt_gas=False)
            norm = deepspeed.end_micro_batch(self.policy, is_last=is_last)
            sums.add(metrics | {"loss": losses}, is_real)
        totals, seconds = sums.reduce(), time.monotonic() - started
        loss = totals.pop("loss") / divisor
        self._check(
            {"the loss": loss, "the gradient's norm": norm} | totals, step, parts, objective
        )
        tokens, size = totals.pop("tokens"), totals.pop("size")
        return {
            "step": step,
            "steps": steps,
            "rows": len(batch),
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            **objective.coefficients,
            **{name: total / len(batch) for name, total in totals.items()},
            "tokens": round(tokens),
            "tokens_per_s": round(tokens / seconds, 1),
            "padding": round(1 - tokens / size, 4),
            "peak_memory_gb": peak_memory(self.device),
        }

    def save(self) -> float | None:
        """Write the trained model; all workers call it.

        Returns the share of the changed weights whose change is lost in bf16; None if that is not
        known or does not matter.

        Raises:
            UserError: a weight is not finite.
        """
        faults.check_weights(self)
        task, base = self.task, self.task.base.local(self.task.fingerprint)
        tokenizer = load_tokenizer(base, task.template)
        is_writer = dist.get_rank() == 0
        rounding = model.save(
            self.policy.module, base, task.config, tokenizer, task.folder / MODEL,
            write=is_writer, adapters=task.folder / ADAPTERS,
        )  # fmt: skip
        return rounding.share

    def close(self) -> None:
        """Free the memory of the engines for the next model."""
        for engine in (self.policy, self.reference):
            if hasattr(engine, "destroy"):
                engine.destroy()
        self.policy = self.reference = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _check(
        self, numbers: dict[str, float], step: int, parts: faults.Parts, objective: Objective
    ) -> None:
        """Raise UserError with the cause, on all workers, if a number is not finite."""
        if problem := faults.first_not_finite(numbers):
            cause = faults.find(self, parts, objective)
            raise UserError(f"{self.task.step.name}: {problem} at step {step}: {cause}")

    @property
    def _chosen(self) -> Choice:
        tokens = self.task.config.micro_batch_tokens
        assert tokens != "auto"  # `fitted` has chosen
        return Choice(tokens, dist.get_world_size())

    def _micro_batches(self, batch: np.ndarray) -> list[tuple[list[Row], bool]]:
        """This worker's micro-batches, and whether each is real and not a dummy.

        A dummy adds nothing to loss or gradient.
        """
        config = self.task.config
        costs = packing.costs(self.rows.lengths[batch], packed=config.packing)
        parts = packing.micro_batches_of(
            dist.get_rank(), costs, dist.get_world_size(), self._chosen.tokens
        )
        return [([self.rows[batch[i]] for i in part], is_real) for part, is_real in parts]

    def losses(self, rows: Sequence[Row], objective: Objective) -> Losses:
        """The losses of a micro-batch, with metrics."""
        batch = model.collate(rows, self.task.config).to(self.device)
        logps = self.policy(batch)  # (A,)
        routed = self.policy.module.take_router_loss()  # the reference may be another pass
        reference = self.reference_logps(rows, batch, logps)
        losses, metrics = objective.losses(logps, reference, batch.lengths)
        if routed is not None:
            share = objective.divisor(np.array([row.lengths for row in rows])) / len(rows)
            losses = losses + share * routed
            metrics |= {"router_loss": routed.detach().expand(len(rows))}
        sizes = {"tokens": batch.tokens, "size": batch.size}
        return losses, metrics | {
            n: torch.tensor([float(v)], device=self.device) for n, v in sizes.items()
        }

    def reference_logps(self, rows: Sequence[Row], batch: Batch, logps: Tensor) -> Tensor:
        """The log-probs of the batch's answers under the reference, (A,); 0 without one."""
        if not self.task.config.has_reference:
            return torch.zeros_like(logps)
        if self.task.config.reference_mode != "live":
            known = [value for row in rows for value in row.reference]
            return torch.tensor(known, dtype=logps.dtype, device=logps.device)
        if self.reference is None:
            return self.logps_without_adapters(batch)
        with torch.no_grad():
            return self.reference(batch)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def logps_without_adapters(self, batch: Batch) -> Tensor:
        """The log-probs of the batch's answers under the policy without its adapters, (A,)."""
        with self.policy.module.without_adapters():
            return self.policy(batch)

    def _held_out(self, step: int) -> dict[str, float]:
        """Loss and accuracy on the rows held out, at the last alpha, so that steps compare."""
        config, is_last = self.task.config, step == self.order.steps - 1
        if not len(self.held_rows) or not (is_last or (step + 1) % config.holdout_every == 0):
            return {}
        sums, objective = Sums(), training_objective(config).at(1)
        parts = self._micro_batches(self.held_rows)
        with torch.no_grad():
            for part, is_real in parts:
                losses, metrics = self.losses(part, objective)
                sums.add(metrics | {"loss": losses}, is_real)
        totals, rows = sums.reduce(), len(self.held_rows)
        loss = totals.pop("loss") / objective.divisor(self.rows.lengths[self.held_rows])
        self._check({"the loss of the rows held out": loss} | totals, step, parts, objective)
        measures = {"holdout/loss": loss}
        if "rewards/accuracies" in totals:
            measures["holdout/accuracies"] = totals["rewards/accuracies"] / rows
        return measures
