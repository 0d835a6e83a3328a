"""Checks of a server's settings before anything starts."""

import os
import socket

from wrpo_ray.config import RewardConfig, ScoreConfig, ServeConfig, ServedModel
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import Use, telling_of
from wrpo_ray.llm.model_folder import opened
from wrpo_ray.llm.resolve import resolved_model
from wrpo_ray.serve.adapters import check_adapter
from wrpo_ray.serve.keys import ENVIRONMENT, Keys
from wrpo_ray.stages.score.check import resolved_reward
from wrpo_ray.stages.score.rewards import load_function
from wrpo_ray.storage.folder import Folder


def checked(settings: ServeConfig) -> ServeConfig:
    """Return the settings with absolute paths, and hub ids pinned to their current commits.

    Raises:
        UserError: a model, an adapter or the keys cannot be used.
    """
    if settings.keys is None and ENVIRONMENT not in os.environ:
        raise UserError(
            f"serve: no API keys; set `keys` to a file or {ENVIRONMENT} to its lines "
            f"(`wrpo serve --new-key NAME` makes one)"
        )
    if problems := Keys(lines(settings), settings.keys).problems:
        raise UserError(problems[0])
    models = tuple(_checked(model) for model in settings.models)
    found = {"models": models, "keys": _absolute(settings.keys)}
    return settings.model_copy(update=found | {"reward": _reward(settings.reward)})


def _reward(reward: RewardConfig | None) -> RewardConfig | None:
    """Return the reward with addresses of its weights that every replica can resolve."""
    if reward is None:
        return None
    parts = [_part(part) for part in reward.parts]
    found = {"mixture": tuple(parts)} if reward.mixture else {"model": parts[0].model}
    return reward.model_copy(update={**found, "revision": None})


def _part(part: ScoreConfig) -> ScoreConfig:
    if part.function:
        load_function(part.function)
    if part.verifier:
        raise UserError("serve: reward: a verifier needs a reference, which no client has")
    if part.model is None:
        return part
    found = resolved_reward("serve: reward", part)
    return found.model_copy(update={"model": Folder(found.model or "").absolute().uri})


def _checked(model: ServedModel) -> ServedModel:
    resolved = resolved_model(f"serve: {model.name}", model, Use.ANSWERS)
    folder = Folder(resolved.model)
    adapters = {name: Folder(place) for name, place in model.adapters.items()}
    for name, adapter in adapters.items():
        with telling_of(f"serve: {name}"):
            check_adapter(adapter, *opened(folder, model.trust), model.trust)
    found = {  # replicas have other working directories
        "model": folder.absolute().uri,
        "chat_template": _absolute(model.chat_template),
        "adapters": {name: adapter.absolute().uri for name, adapter in adapters.items()},
    }
    return resolved.model_copy(update=found)


def _absolute(path: str | None) -> str | None:
    return path and os.path.abspath(path)


def check_free(host: str, port: int) -> None:
    """Check that an address of this machine is free.

    Raises:
        UserError: a process listens at it, or it is not an address of this machine.
    """
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"serve: {host}:{port}: {error}; choose another --host or --port") from None


def lines(settings: ServeConfig) -> str | None:
    """Return the key lines of the environment, unless `keys` names a file."""
    return None if settings.keys else os.environ.get(ENVIRONMENT)
