"""Sections for prices, the budget, and what `wrpo plan` assumes."""

from __future__ import annotations

from pydantic import (
    Field,
)

from wrpo_ray.config.base import Name, NotNegative, Positive, Section


class PricesConfig(Section):
    """What work costs, in any one currency.

    A pool has the name of its model or reward, or of its step: `rows-sft`, `rows-wrpo`, `sft`,
    `wrpo`, `dpo`.
    """

    gpu_hour: NotNegative = 0.0
    """One GPU for an hour, in pools that `pools` does not name."""
    pools: dict[Name, NotNegative] = {}
    """One GPU for an hour, by pool: for clusters with several kinds of GPUs."""
    input_tokens: dict[Name, NotNegative] = {}
    """A million prompt tokens, by source: for endpoints."""
    output_tokens: dict[Name, NotNegative] = {}
    """A million answer tokens, by source: for endpoints."""


class BudgetConfig(Section):
    """When to stop, over all calls on this output together; null is no bound.

    A run stops at the next finished bucket, or checkpoint in training, with exit code 3. What
    actors had in hand since they last committed is done again when a higher budget goes on.
    """

    output_tokens: int | None = Field(None, ge=1)
    """Tokens that sources and target-SFT may answer."""
    money: float | None = Field(None, gt=0)
    """Money by `prices`; with `gpu_hour: 1` it is a budget of GPU-hours."""
    hours: float | None = Field(None, gt=0)
    """Hours on the clock."""


class PlanConfig(Section):
    """What `wrpo plan` cannot know; what the output already shows is measured there instead."""

    prompts: int | None = Field(None, ge=1)
    """Number of prompts (or imported rows), where their file is not there yet."""
    prompt_tokens: float = Field(200, gt=0)
    """Mean tokens of a prompt."""
    output_tokens: float = Field(400, gt=0)
    """Mean tokens of an answer."""
    rates: dict[Name, Positive] = {}
    """By pool (see `prices`) and for one actor or worker: a model's output tokens a second, the
    reward's answers a second, the tokens a second of `rows-wrpo`, `sft`, `wrpo` and `dpo`."""
    parameters: dict[Name, Positive] = {}
    """Weights that a token meets, by model, for guessed rates of models that are not there."""
    startup: dict[Name, NotNegative] = {}
    """Seconds until an engine of a model answers; else guessed by its size."""
    gpu_tflops: float = Field(990, gt=0)
    """Dense bf16 TFLOP/s of a GPU, for guessed rates; the default is an H100's."""
