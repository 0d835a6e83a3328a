"""Sections of `evaluate`: held-out prompts, benchmarks, and pairwise comparisons."""

from typing import Literal

from pydantic import Field

from wrpo_ray.config.base import PLACEMENT, Name, Section
from wrpo_ray.config.data import PromptsConfig
from wrpo_ray.config.models import ModelConfig, SamplingConfig


class AlpacaEvalConfig(Section):
    """AlpacaEval 2: win rate and length-controlled win rate against GPT-4 Turbo's answers."""

    path: str
    """The folder that `wrpo fetch alpaca_eval` fills."""
    sampling: SamplingConfig = SamplingConfig(samples=1, temperature=0.0, top_p=1.0)
    """How models sample their answers. The benchmark prescribes nothing."""


class ArenaHardConfig(Section):
    """Arena-Hard v0.1: win rate against GPT-4-0314's answers, in two games a question."""

    path: str
    """The folder that `wrpo fetch arena_hard` fills."""
    sampling: SamplingConfig = SamplingConfig(
        samples=1, temperature=0.0, top_p=1.0, max_tokens=4096
    )
    """How models sample their answers. The benchmark's own runs are greedy."""
    style_control: bool = False
    """Also show the win rate adjusted for answer length and markdown, in a column of its own."""


class MTBenchConfig(Section):
    """MT-Bench: ratings from 1 to 10 of two turns. The temperature depends on the category."""

    path: str
    """The folder that `wrpo fetch mt_bench` fills."""
    max_tokens: int = Field(1024, ge=1)
    """Maximum length of an answer in tokens."""


class BenchmarksConfig(Section):
    """Public benchmarks, each judged by `evaluate.judge`."""

    alpaca_eval: AlpacaEvalConfig | None = None
    """AlpacaEval 2."""
    arena_hard: ArenaHardConfig | None = None
    """Arena-Hard v0.1."""
    mt_bench: MTBenchConfig | None = None
    """MT-Bench."""


class PairwiseConfig(Section):
    """Comparisons of two models on the held-out prompts: shares of wins, ties and losses."""

    pairs: tuple[tuple[Name, Name], ...] = ()
    """Pairs (model, opponent); empty compares the fused model with the target."""
    by: Literal["judge", "reward"] = "judge"
    """`judge`: the judge compares the answers twice, with their positions swapped; contradicting
    verdicts make a tie. `reward`: the answer with the higher reward wins."""
    margin: float = Field(0.0, ge=0, allow_inf_nan=False)
    """For `by: reward`: the greatest difference of rewards that counts as a tie."""
    template: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A Jinja file with the judge's prompt. It can use `messages`, `first` and `second` and must
    ask for [[A]], [[B]] or [[C]] (a tie). Results depend on its content, not its name. null uses
    the built-in prompt."""
    max_tokens: int = Field(1024, ge=1)
    """Maximum length of a judgment in tokens."""


class BaselinesConfig(Section):
    """Baselines that combine the sources without training. They are left out of MT-Bench."""

    best_of_sources: bool = False
    """Compare the source answer with the highest reward (LLM-Blender, arXiv 2306.02561)."""
    mixture: Name | None = None
    """The name of a compared model that reads the sources' answers to a prompt and writes its own
    from them (mixture of agents, arXiv 2406.04692)."""


class EvaluateConfig(Section):
    """Evaluation of the run's models, and of further ones, on held-out prompts and benchmarks."""

    prompts: PromptsConfig | None = None
    """Held-out prompts. Those that are also training prompts are removed and counted."""
    models: tuple[ModelConfig, ...] = ()
    """Further models to compare, such as a checkpoint or the fused model of another run."""
    judge: ModelConfig | None = None
    """The model that judges, behind an endpoint or on vLLM."""
    judged: tuple[Name, ...] = ()
    """The models to run on benchmarks; empty means all, with the baselines."""
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    """Public benchmarks."""
    pairwise: PairwiseConfig | None = None
    """Pairs of models on `prompts`."""
    baselines: BaselinesConfig = BaselinesConfig()
    """Baselines that combine the sources without training."""
    sampling: SamplingConfig = SamplingConfig(samples=1, temperature=0.0, top_p=1.0)
    """How answers are sampled; greedy by default."""
    verifier: str | None = Field(None, pattern=r"^(exact|number|code|[\w.]+:\w+)$")
    """How to tell a right answer: `exact`, `number` or `code`, as for `reward`, or a function
    `module:function`, called as f(messages, response, reference) -> 1.0 (right) or 0.0 (wrong)."""
    dpo_baseline: bool = True
    """Also train and evaluate plain DPO (alpha = 0) on (y_wt, y_l), the target's best and worst
    answers, from the same SFT model."""
