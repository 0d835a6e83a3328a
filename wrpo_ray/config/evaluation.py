"""Sections for the evaluation on held-out prompts and on benchmarks."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from wrpo_ray.config.base import PLACEMENT, Name, Section
from wrpo_ray.config.data import PromptsConfig
from wrpo_ray.config.models import ModelConfig, SamplingConfig


class AlpacaEvalConfig(Section):
    """AlpacaEval 2: win rate and length-controlled win rate against GPT-4 Turbo's answers."""

    path: str
    """The folder that `wrpo fetch alpaca_eval` fills."""
    sampling: SamplingConfig = SamplingConfig(samples=1, temperature=0.0, top_p=1.0)
    """How models answer; the benchmark leaves it to each."""


class ArenaHardConfig(Section):
    """Arena-Hard v0.1: win rate against GPT-4-0314's answers, in two games a question."""

    path: str
    """The folder that `wrpo fetch arena_hard` fills."""
    sampling: SamplingConfig = SamplingConfig(
        samples=1, temperature=0.0, top_p=1.0, max_tokens=4096
    )
    """How models answer; greedily in the benchmark's own runs."""
    style_control: bool = False
    """Also the win rate without what length and markdown win, in a column of its own."""


class MTBenchConfig(Section):
    """MT-Bench: ratings from 1 to 10 of two turns; the temperature goes by the category."""

    path: str
    """The folder that `wrpo fetch mt_bench` fills."""
    max_tokens: int = Field(1024, ge=1)
    """Longest answer in tokens."""


class BenchmarksConfig(Section):
    """Public benchmarks, each judged by `evaluate.judge`."""

    alpaca_eval: AlpacaEvalConfig | None = None
    """AlpacaEval 2."""
    arena_hard: ArenaHardConfig | None = None
    """Arena-Hard v0.1."""
    mt_bench: MTBenchConfig | None = None
    """MT-Bench."""


class PairwiseConfig(Section):
    """Pairs of models on the held-out prompts: win, tie and loss."""

    pairs: tuple[tuple[Name, Name], ...] = ()
    """(model, against which); none is the fused model against the target."""
    by: Literal["judge", "reward"] = "judge"
    """`judge`: two games with the answers' positions swapped, a contradiction is a tie.
    `reward`: the higher reward wins."""
    margin: float = Field(0.0, ge=0, allow_inf_nan=False)
    """For `by: reward`: rewards that differ by no more are a tie."""
    template: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A Jinja file with the question to the judge, of `messages`, `first` and `second`, that asks
    for [[A]], [[B]] or [[C]] (a tie). Its content is what counts; null takes our own."""
    max_tokens: int = Field(1024, ge=1)
    """Longest judgment in tokens."""


class BaselinesConfig(Section):
    """Collective models that need no training, compared like the others (not on MT-Bench)."""

    best_of_sources: bool = False
    """Of the sources' answers the one with the highest reward (LLM-Blender, arXiv 2306.02561)."""
    mixture: Name | None = None
    """A model that is given the sources' answers to a prompt and writes its own from them
    (mixture of agents, arXiv 2406.04692); the name of one of the compared models."""


class EvaluateConfig(Section):
    """Held-out evaluation of every model of the run, and of others."""

    prompts: PromptsConfig | None = None
    """Held-out prompts; those that are also training prompts are left out and counted."""
    models: tuple[ModelConfig, ...] = ()
    """Further models to compare, such as a checkpoint or another run's fused model."""
    judge: ModelConfig | None = None
    """The model that judges, behind an endpoint or on vLLM."""
    judged: tuple[Name, ...] = ()
    """Which models benchmarks look at; none is all, the baselines too."""
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    """Public benchmarks."""
    pairwise: PairwiseConfig | None = None
    """Pairs of models on `prompts`."""
    baselines: BaselinesConfig = BaselinesConfig()
    """Collective models."""
    sampling: SamplingConfig = SamplingConfig(samples=1, temperature=0.0, top_p=1.0)
    """How answers are drawn; greedy by default."""
    verifier: str | None = Field(None, pattern=r"^(exact|number|code|[\w.]+:\w+)$")
    """What tells a right answer: `exact`, `number` or `code`, as for `reward`, or
    `module:function` called as f(messages, response, reference) -> 1.0 or 0.0."""
    dpo_baseline: bool = True
    """Also train and evaluate plain DPO (alpha = 0) on (y_wt, y_l) from the same SFT model."""
