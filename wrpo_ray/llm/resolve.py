"""Pins one model to a commit and checks its folder; for the chain and for the server.

A hub id is pinned to a commit, and the folder is checked for its use. Reward
models are checked by `stages.score.check`, which knows their architectures.
"""

from typing import TypeVar, cast

from wrpo_ray.config import ModelConfig, ScoreConfig
from wrpo_ray.llm.architecture import Use, telling_of
from wrpo_ray.llm.model_folder import check_model_folder
from wrpo_ray.llm.rendering import Template
from wrpo_ray.storage.folder import HUB_SCHEME, Folder
from wrpo_ray.storage.hub import Pins, resolve_address

Model = TypeVar("Model", bound=ModelConfig)
Named = TypeVar("Named", bound=ModelConfig | ScoreConfig)


def pinned(what: str, section: Named, pins: Pins | None = None) -> Named:
    """The section with a hub id at its commit (`hub.commit_of`); `what` is its key, for messages.

    Raises:
        UserError: the hub does not know the model, or a folder has a revision.
    """
    assert section.model is not None
    with telling_of(what):
        place = resolve_address(section.model, section.revision, pins)
    return cast(Named, section.model_copy(update={"model": place, "revision": None}))


def resolved_model(what: str, model: Model, use: Use, pins: Pins | None = None) -> Model:
    """The pinned section of a model that can be put to a use.

    Raises:
        UserError: it cannot be found, or its folder cannot be used.
    """
    found = pinned(what, model, pins)
    folder = Folder(found.model)
    name = hub_id(model, found.model)
    check_model_folder(folder, what, use, Template.of(model), name, trust=model.trust)
    return found


def hub_id(section: ModelConfig | ScoreConfig, place: str) -> str:
    """The hub id by which the user knows a resolved model; empty for a folder."""
    return (section.model or "") if place.startswith(HUB_SCHEME) else ""
