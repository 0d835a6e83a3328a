"""Prometheus metrics of a run, exported by the Ray node of its driver.

The driver counts what its actors and tasks report: each finished bucket, and what engines have made
of others every few seconds. So series do not come and go with actors; of a lost actor's bucket only
answers that it had told and not committed count twice. A series is
labelled by `stage` and, for a stage that generates or scores one model's answers, `source`.
"""

from functools import cache
from typing import Any

from wrpo_ray.storage.steps import Step

COUNTERS = {
    "rows": "Rows made by this driver",
    "failures": "Failed rows of finished buckets, with those that reached max_attempts before",
    "tokens": "Tokens generated, or trained on",
    "prompt_tokens": "Prompt tokens read by engines, of each request once",
    "actor_seconds": "Seconds for which actors or workers held their resources",
    "idle_seconds": "Of the actors' seconds, those without work",
    "gpu_seconds": "GPUs of these actors or workers, times seconds",
}
GAUGES = {
    "train_step": "Optimizer steps done",
    "train_steps": "Optimizer steps in all",
    "train_loss": "Loss of the last step",
    "train_accuracy": "Share of the last step's rows whose chosen answer has the higher reward",
    "train_alpha": "Weight of the source's chosen answer",
    "train_learning_rate": "Learning rate of the last step",
    "train_grad_norm": "Norm of the last step's gradient before clipping",
    "train_tokens_per_second": "Tokens of the last step per second",
}
LABELS = ("stage", "source")


def add_counts(step: Step, **amounts: float) -> None:
    """Add amounts to the step's counters, by name."""
    for name, amount in amounts.items():
        if amount > 0:  # Ray rejects 0
            _metric("Counter", name, COUNTERS[name]).inc(amount, _labels(step))


def set_gauges(step: Step, **values: float | None) -> None:
    """Set the step's gauges, by name; None leaves a gauge unchanged."""
    for name, value in values.items():
        if value is not None:
            _metric("Gauge", name, GAUGES[name]).set(value, _labels(step))


def _labels(step: Step) -> dict[str, str]:
    return {"stage": step.stage, "source": step.source}


@cache
def _metric(kind: str, name: str, description: str) -> Any:
    from ray.util import metrics

    return getattr(metrics, kind)(f"wrpo_{name}", description, LABELS)
