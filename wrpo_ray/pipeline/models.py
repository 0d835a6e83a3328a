"""Resolving the models that a config names: hub ids to commits, folders to checked models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from wrpo_ray.config import (
    Config,
    ModelConfig,
    ScoreConfig,
)
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import Use
from wrpo_ray.llm.model_folder import check_model_folder
from wrpo_ray.llm.rendering import Template
from wrpo_ray.stages.score.check import check_reward_folder
from wrpo_ray.storage.folder import HUB_SCHEME, Folder
from wrpo_ray.storage.hub import resolve_address


def pinned(config: Config) -> Config:
    """The config with every hub id at the commit that it is at now.

    Raises:
        UserError: a model cannot be found.
    """
    return map_models(config, _pinned)


def map_models(config: Config, change: Callable[[str, Any], Any]) -> Config:
    """The config with each section that names a model changed: `change(what, section)`."""
    models: dict[str, Any] = {
        "sources": tuple(
            model if model.endpoint else change(f"sources.{model.name}", model)
            for model in config.sources
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


def _pinned(what: str, model: Any) -> Any:
    """The section with a hub id at the commit that it is at now."""
    with naming_key(what):
        return model.model_copy(
            update={"model": resolve_address(model.model, model.revision), "revision": None}
        )


def checked_model(what: str, model: Any) -> Any:
    """The pinned section, once it holds a model that can be talked to."""
    found = _pinned(what, model)
    folder = Folder(found.model)
    name = model.model if folder.uri.startswith(HUB_SCHEME) else ""
    if isinstance(model, ScoreConfig):
        check_reward_folder(folder, model, what, name)
    else:
        use = Use.TRAINED if what == "target" else Use.ANSWERS
        check_model_folder(folder, what, use, Template.of(model), name)
    return found


@contextmanager
def naming_key(what: str) -> Iterator[None]:
    """Puts the config's key in front of a problem."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
