"""Fuses several LLMs into one: Weighted-Reward Preference Optimization (WRPO) on Ray.

The names in `__all__` are the public Python API; the guide "From Python" shows them at work.
`import wrpo_ray` is instant: a name is imported when it is first used, so neither torch nor ray is
loaded before something needs it.

Example:
    >>> import wrpo_ray
    >>> wrpo_ray.WrpoConfig(beta=0.1).beta
    0.1
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # type checkers take it for true; typing need not be loaded
if TYPE_CHECKING:
    from typing import Any

    from wrpo_ray.config import (
        AnswersConfig,
        Config,
        ModelConfig,
        PairConfig,
        PromptsConfig,
        RewardConfig,
        SftConfig,
        WrpoConfig,
        load,
    )
    from wrpo_ray.errors import UserError, WrpoError
    from wrpo_ray.export.read import read
    from wrpo_ray.llm.rendering import render
    from wrpo_ray.pipeline.chain import Chain
    from wrpo_ray.pipeline.runner import fuse
    from wrpo_ray.planning.estimate import plan
    from wrpo_ray.stages.evaluate.alpaca_eval import alpaca_eval
    from wrpo_ray.stages.evaluate.arena_hard import arena_hard
    from wrpo_ray.stages.evaluate.mt_bench import mt_bench
    from wrpo_ray.stages.evaluate.pairwise import pairwise
    from wrpo_ray.stages.evaluate.statistics import crossed_interval, wilson_interval
    from wrpo_ray.stages.pair.pairs import select_pairs
    from wrpo_ray.stages.train.loss import Answers, Ipo, Simpo, Wrpo, preference_loss, row_metrics
    from wrpo_ray.stages.train.model import packed_policy
    from wrpo_ray.stages.train.packing import pack, pad
    from wrpo_ray.stages.train.rows import tokenize_pairs

__version__ = "0.1.0"

_MODULES = {
    # a run
    "Config": "config",
    "PromptsConfig": "config",
    "ModelConfig": "config",
    "RewardConfig": "config",
    "AnswersConfig": "config",
    "PairConfig": "config",
    "SftConfig": "config",
    "WrpoConfig": "config",
    "load": "config",
    "plan": "planning.estimate",
    "Chain": "pipeline.chain",
    "fuse": "pipeline.runner",
    "read": "export.read",
    "WrpoError": "errors",
    "UserError": "errors",
    # from scored answers to preference rows to token ids
    "select_pairs": "stages.pair.pairs",
    "render": "llm.rendering",
    "tokenize_pairs": "stages.train.rows",
    "pack": "stages.train.packing",
    "pad": "stages.train.packing",
    # training
    "packed_policy": "stages.train.model",
    "preference_loss": "stages.train.loss",
    "row_metrics": "stages.train.loss",
    "Answers": "stages.train.loss",
    "Wrpo": "stages.train.loss",
    "Ipo": "stages.train.loss",
    "Simpo": "stages.train.loss",
    # statistics of the benchmarks
    "alpaca_eval": "stages.evaluate.alpaca_eval",
    "arena_hard": "stages.evaluate.arena_hard",
    "mt_bench": "stages.evaluate.mt_bench",
    "pairwise": "stages.evaluate.pairwise",
    "wilson_interval": "stages.evaluate.statistics",
    "crossed_interval": "stages.evaluate.statistics",
}
"""{public name: the module that defines it}"""
__all__ = [
    "Answers",
    "AnswersConfig",
    "Chain",
    "Config",
    "Ipo",
    "ModelConfig",
    "PairConfig",
    "PromptsConfig",
    "RewardConfig",
    "SftConfig",
    "Simpo",
    "UserError",
    "Wrpo",
    "WrpoConfig",
    "WrpoError",
    "__version__",
    "alpaca_eval",
    "arena_hard",
    "crossed_interval",
    "fuse",
    "load",
    "mt_bench",
    "pack",
    "packed_policy",
    "pad",
    "pairwise",
    "plan",
    "preference_loss",
    "read",
    "render",
    "row_metrics",
    "select_pairs",
    "tokenize_pairs",
    "wilson_interval",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'wrpo_ray' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wrpo_ray.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, for completion."""
    return sorted(__all__)
