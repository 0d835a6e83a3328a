"""Applies a change, such as pinning to a commit, to every section that names a model."""

from collections.abc import Callable
from typing import Any, TypeVar

from wrpo_ray.config import Config, ModelConfig, RewardConfig, ScoreConfig
from wrpo_ray.llm import resolve
from wrpo_ray.llm.architecture import Use
from wrpo_ray.llm.resolve import resolved_model
from wrpo_ray.stages.score.check import resolved_reward

Reward = TypeVar("Reward", bound=RewardConfig)


def pinned(config: Config) -> Config:
    """The config with every hub id pinned to its current commit.

    Raises:
        UserError: a model cannot be found.
    """
    return map_models(config, resolve.pinned)


def map_models(config: Config, change: Callable[[str, Any], Any]) -> Config:
    """The config with each section that names a model changed: `change(what, section)`."""
    models: dict[str, Any] = {
        "sources": tuple(_changed(change, f"sources.{m.name}", m) for m in config.sources)
    }
    if config.target:
        models["target"] = change("target", config.target)
    if asked := config.evaluate:
        own: dict[str, Any] = {
            "models": tuple(_changed(change, f"evaluate.models.{m.name}", m) for m in asked.models)
        }
        own |= {"judge": _changed(change, "evaluate.judge", asked.judge)} if asked.judge else {}
        models["evaluate"] = asked.model_copy(update=own)
    if reward := config.reward:
        by_group = {
            group: _changed_reward(change, f"reward.by_group.{group}", own)
            for group, own in reward.by_group.items()
        }
        changed = _changed_reward(change, "reward", reward)
        models["reward"] = changed.model_copy(update={"by_group": by_group})
    return config.model_copy(update=models)


def _changed_reward(change: Callable[[str, Any], Any], what: str, reward: Reward) -> Reward:
    if reward.mixture:
        parts = [
            change(f"{what}.mixture.{i}", part) if part.model else part
            for i, part in enumerate(reward.mixture)
        ]
        return reward.model_copy(update={"mixture": tuple(parts)})
    changed: Reward = change(what, reward) if reward.model else reward
    return changed


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
