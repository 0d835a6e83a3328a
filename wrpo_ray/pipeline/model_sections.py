"""Applies a change, such as pinning to a commit, to every section that names a model."""

from collections.abc import Callable
from typing import Any

from wrpo_ray.config import Config, ModelConfig, ScoreConfig
from wrpo_ray.llm import resolve
from wrpo_ray.llm.architecture import Use
from wrpo_ray.llm.resolve import resolved_model
from wrpo_ray.stages.score.check import resolved_reward


def pinned(config: Config) -> Config:
    """The config with every hub id pinned to its current commit.

    Raises:
        UserError: a model cannot be found.
    """
    return map_models(config, resolve.pinned)


def map_models(config: Config, change: Callable[[str, Any], Any]) -> Config:
    """The config with each section that names a model changed: `change(what, section)`."""
    models: dict[str, Any] = {
        "sources": tuple(
            _changed(change, f"sources.{m.name}", m) if isinstance(m, ModelConfig) else m
            for m in config.sources
        )
    }
    if config.target:
        models["target"] = change("target", config.target)
    if asked := config.evaluate:
        own: dict[str, Any] = {
            "models": tuple(_changed(change, f"evaluate.models.{m.name}", m) for m in asked.models)
        }
        own |= {"judge": _changed(change, "evaluate.judge", asked.judge)} if asked.judge else {}
        models["evaluate"] = asked.model_copy(update=own)
    if config.reward and config.reward.mixture:
        parts = [
            change(f"reward.mixture.{i}", part) if part.model else part
            for i, part in enumerate(config.reward.mixture)
        ]
        models["reward"] = config.reward.model_copy(update={"mixture": tuple(parts)})
    elif config.reward and config.reward.model:
        models["reward"] = change("reward", config.reward)
    return config.model_copy(update=models)


def _changed(change: Callable[[str, Any], Any], what: str, model: ModelConfig) -> ModelConfig:
    return model if model.endpoint else change(what, model)


def resolved(what: str, section: Any) -> Any:
    """The section with its model pinned to a commit, and checked for its use in the chain.

    Raises:
        UserError: the model cannot be found or used.
    """
    if isinstance(section, ScoreConfig):
        return resolved_reward(what, section)
    return resolved_model(what, section, Use.TRAINED if what == "target" else Use.ANSWERS)
