"""Applies a change, such as pinning to a commit, to every section that names models or files."""

from collections.abc import Callable
from typing import Any, TypeVar

from wrpo_ray.config import Config, ModelConfig, RecordedConfig, RewardConfig, ScoreConfig
from wrpo_ray.llm import resolve
from wrpo_ray.llm.architecture import Use, telling_of
from wrpo_ray.llm.resolve import resolved_model
from wrpo_ray.runtime.job import AnyInput
from wrpo_ray.stages.score.check import resolved_reward
from wrpo_ray.storage.folder import HUB_SCHEME, Folder
from wrpo_ray.storage.hub import Pins

PINS = "pins.json"
"""File of an output: the commits that its first run began with, for later ones (`hub.Pins`)."""


def read_pins(output: str) -> Pins:
    """The pins of an output; none if it has no run.

    Raises:
        BrokenFileError: the file holds something else.
    """
    root = Folder(output)
    return root.read_record(PINS) if root.exists(PINS) else {}


def keep_pins(root: Folder, pins: Pins) -> None:
    """Add pins to those of an output."""
    if pins and not root.holds_json(PINS, known := read_pins(root.uri) | pins):
        root.write_json(PINS, known)


Reward = TypeVar("Reward", bound=RewardConfig)


def pinned(config: Config) -> Config:
    """The config with models and data sets of the hub pinned to the commits of its output.

    Raises:
        UserError: a model or data set cannot be found.
    """
    pins = read_pins(config.output)
    config = map_models(config, lambda what, model: resolve.pinned(what, model, pins))
    return map_inputs(config, lambda what, given: pinned_input(what, given, pins))


def map_inputs(config: Config, change: Callable[[str, Any], Any]) -> Config:
    """The config with each section that names files of rows changed: `change(what, section)`."""
    inputs: dict[str, Any] = {}
    if config.prompts:
        changed = [change(what, given) for what, given in config.prompt_sections.items()]
        is_list = isinstance(config.prompts, tuple)
        inputs["prompts"] = tuple(changed) if is_list else changed[0]
    if config.existing:
        inputs["existing"] = change("import", config.existing)
    if config.evaluate and config.evaluate.prompts:
        held_out = change("evaluate.prompts", config.evaluate.prompts)
        inputs["evaluate"] = config.evaluate.model_copy(update={"prompts": held_out})
    inputs["sources"] = tuple(
        _with_answers(change, f"sources.{s.name}", s) if isinstance(s, RecordedConfig) else s
        for s in config.sources
    )
    if config.target and config.target.answers:
        inputs["target"] = _with_answers(change, "target", config.target)
    return config.model_copy(update=inputs)


def _with_answers(change: Callable[[str, Any], Any], what: str, section: Any) -> Any:
    answers = change(f"{what}.answers", section.answers)
    return section.model_copy(update={"answers": answers})


def pinned_input(what: str, given: AnyInput, pins: Pins | None = None) -> AnyInput:
    """The section of input files with a data set of the hub at its commit (`hub.commit_of`).

    Raises:
        UserError: the hub does not know the data set, or denies access.
    """
    if not given.path.startswith(HUB_SCHEME):
        return given
    from wrpo_ray.storage.hub_data import pinned_path

    with telling_of(what):
        path = pinned_path(given.path, given.revision, pins)
    return given.model_copy(update={"path": path, "revision": None})


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


def resolved(what: str, section: Any, pins: Pins | None = None) -> Any:
    """The section with its model pinned to a commit, and checked for its use in the chain.

    Raises:
        UserError: the model cannot be found or used.
    """
    if isinstance(section, ScoreConfig):
        return resolved_reward(what, section, pins)
    use = Use.TRAINED if what == "target" else Use.ANSWERS
    return resolved_model(what, section, use, pins)
