"""What each Ray Train worker does: rows, engines, optimizer steps, the trained model.

The gradient of a step is the sum of the losses of its rows (WRPO) or answer tokens (SFT) over
all workers, divided by their real number: the same for every number of workers, micro-batch
and ZeRO stage. Not covered: the driver's side (`stage`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from wrpo_ray.config import WrpoConfig
from wrpo_ray.core.chat import end_ids, load_tokenizer
from wrpo_ray.core.shards import Bucket, write_failures
from wrpo_ray.errors import UserError, WrpoError
from wrpo_ray.train import checkpoint, deepspeed, model, schedule
from wrpo_ray.train.logprobs import Batch, answer_logps, collate
from wrpo_ray.train.loss import Logps, row_metrics, wrpo_loss
from wrpo_ray.train.metrics import MetricsFile, Sums
from wrpo_ray.train.order import MicroBatch, Order
from wrpo_ray.train.rows import Row, Rows, check_some, merge, read_part, tokenize
from wrpo_ray.train.task import MODEL, Task

Counts = dict[str, Any]


def work(task: Task) -> Counts | WrpoError:
    """Train on this worker.

    The project's own errors rise on all workers alike, and another try would meet them again.
    So they are returned: what is raised makes Ray Train start over.
    """
    try:
        return _train(task)
    except WrpoError as error:
        return error


def _train(task: Task) -> Counts:
    torch.set_num_threads(max(1, int(task.config.num_cpus)))
    deepspeed.prepare(task.config)
    base = task.base.local()
    tokenizer = load_tokenizer(base, task.chat_template)
    rows = load_rows(task, tokenizer, end_ids(tokenizer, base))
    trainer = Trainer.create(task, rows.kept, tokenizer.pad_token_id or 0)
    first_step = checkpoint.restore(trainer.policy)
    final_loss = trainer.run(first_step)
    is_writer = dist.get_rank() == 0
    model.save(trainer.policy.module, tokenizer, task.folder / MODEL, write=is_writer)
    return {
        "rows": len(rows.kept),
        "dropped": rows.dropped,
        "failed": len(rows.failed) - rows.dropped,
        "steps": trainer.order.steps,
        "final_loss": final_loss,
        "resumed_at": first_step,
    }


def load_rows(task: Task, tokenizer: Any, ends: frozenset[int]) -> Rows:
    """All rows on every worker, each having read and tokenized its part of the shards.

    Raises:
        UserError: there is no row to train on.
        FailureLimitError: more rows failed than `failure_limit` allows.
    """
    records = read_part(task.rows, task.answers, dist.get_rank(), dist.get_world_size())
    limit = task.config.max_length
    own = tokenize(tokenizer, ends, records, task.answers, stage=task.step.name, max_length=limit)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    rows = merge(parts)
    if dist.get_rank() == 0:
        write_failures(task.step.failures(task.run.root), Bucket(0, 1), rows.failed, "rows")
    dist.barrier()
    task.run.check_failures(task.step, len(rows.failed) - rows.dropped, len(rows.kept))
    check_some(rows, "wrpo" if task.is_preference else "sft", task.rows, limit)
    return rows


@dataclass
class Trainer:
    """The engines and rows of one worker."""

    task: Task
    rows: list[Row]
    order: Order
    policy: Any
    reference: Any
    pad: int
    device: torch.device

    @classmethod
    def create(cls, task: Task, rows: list[Row], pad: int) -> Trainer:
        """Load the policy and, for preference training, the reference."""
        config, base = task.config, task.base.local()
        order = Order(len(rows), config.epochs, config.batch_size, task.seed)
        workers = dist.get_world_size()
        accumulation = order.accumulation(workers, config.micro_batch)
        settings = deepspeed.engine_config(config, accumulation, workers)
        dtype = deepspeed.DTYPES[config.precision]
        device = torch.device("cuda" if config.num_gpus else "cpu")
        with deepspeed.partitioned_loading(settings):
            policy = model.load(base, dtype, device)
            reference = model.load(base, dtype, device) if task.is_preference else None
        engine = deepspeed.policy_engine(policy, config, settings)
        if reference is not None:
            reference = deepspeed.reference_engine(reference, settings)
        return cls(task, rows, order, engine, reference, pad, device)

    def run(self, first_step: int) -> float | None:
        """All steps from `first_step`; returns the last step's loss (on the first worker).

        Raises:
            UserError: the loss is no longer a number.
        """
        folder, every = self.task.folder, self.task.config.checkpoint_every
        file = MetricsFile(folder, first_step) if dist.get_rank() == 0 else None
        for step in range(first_step, self.order.steps):
            record = self.step(step)
            if file:
                file.append(record)
            if (step + 1) % every == 0:
                if file:
                    file.flush()
                checkpoint.save(self.policy, step + 1, {"step": step, "loss": record["loss"]})
        if file is None:
            return None
        file.flush()
        return file.records[-1]["loss"] if file.records else None

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its metrics, which are the same on all workers."""
        started, sums = time.monotonic(), Sums()
        config, steps = self.task.config, self.order.steps
        rate = schedule.learning_rate_at(config, step, steps)
        deepspeed.set_learning_rate(self.policy, rate)
        objective = self._objective(step)
        scale = dist.get_world_size() / self._divisor(step)  # DeepSpeed averages over workers
        for part in self._micro_batches(step):
            losses, metrics = objective([self.rows[i] for i in part.rows])
            self.policy.backward(losses.sum() * (part.weight * scale), scale_wrt_gas=False)
            self.policy.step()  # acts on the last micro-batch
            sums.add(metrics | {"loss": losses}, part.weight)
        totals = sums.reduce()
        tokens, seconds = totals.pop("tokens"), time.monotonic() - started
        loss = totals.pop("loss") / self._divisor(step)
        if not math.isfinite(loss):
            raise UserError(
                f"{self.task.step.name}: the loss is {loss} at step {step}; lower learning_rate"
            )
        rows = len(self.order.batch(step))
        return {
            "step": step,
            "steps": steps,
            "rows": rows,
            "loss": loss,
            "lr": rate,
            "grad_norm": _number(self.policy.get_global_grad_norm()),
            **self._alpha(step),
            **{name: total / rows for name, total in totals.items()},
            "tokens_per_s": round(tokens / seconds, 1),
        }

    # --- inside

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        workers, size = dist.get_world_size(), self.task.config.micro_batch
        return self.order.micro_batches(step, dist.get_rank(), workers, size)

    def _divisor(self, step: int) -> int:
        """What the summed losses of a step are divided by: its rows, or answer tokens in SFT."""
        batch = self.order.batch(step)
        if self.task.is_preference:
            return len(batch)
        return max(1, sum(len(self.rows[i].answers[0]) for i in batch))

    def _alpha(self, step: int) -> dict[str, float]:
        config = self.task.config
        if not isinstance(config, WrpoConfig):
            return {}
        return {"alpha": schedule.alpha_at(config.alpha, step, self.order.steps)}

    def _objective(self, step: int) -> Any:
        """The function from rows to (losses (B,), metrics, each (B,)) at a step."""
        config = self.task.config
        if not isinstance(config, WrpoConfig):
            return self._sft
        weights = self._alpha(step) | {"beta": config.beta}
        return lambda rows: self._wrpo(rows, weights)

    def _sft(self, rows: list[Row]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self._collate([row.pairs()[0] for row in rows])
        logps = answer_logps(self.policy, batch)
        return -logps, {"logps/source_chosen": logps, "tokens": _tokens(batch)}

    def _wrpo(self, rows: list[Row], weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self._collate([row.pairs()[a] for a in range(3) for row in rows])  # (3B, T)
        with torch.no_grad():
            reference = Logps(*answer_logps(self.reference, batch).chunk(3))
        policy = Logps(*answer_logps(self.policy, batch).chunk(3))
        losses = wrpo_loss(policy, reference, **weights)
        metrics = row_metrics(policy, reference, **weights)
        return losses, metrics | {"tokens": _tokens(batch)}

    def _collate(self, pairs: list[Any]) -> Batch:
        return collate(pairs, self.pad).to(self.device)


def _tokens(batch: Batch) -> Tensor:
    """Tokens of a batch, in the form of a metric."""
    return batch.attention_mask.sum().float()[None]


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
