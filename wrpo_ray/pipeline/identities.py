"""Fingerprints of rewards and chat templates, for step keys."""

import importlib
from typing import TypeVar

from wrpo_ray.config import RewardConfig, ScoreConfig
from wrpo_ray.config.base import required
from wrpo_ray.stages.score.verifiers import VERSIONS
from wrpo_ray.storage.fingerprints import data_fingerprint, digest, distinguish_bom
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.files import read_text

Part = TypeVar("Part", bound=ScoreConfig)


def _absolute(path: str | None) -> str | None:
    return None if path is None else Folder(path).path


def verifier_reward(name: str) -> RewardConfig:
    """The reward config of a verifier: a built-in one by name, or `module:function`."""
    kind = "function" if ":" in name else "verifier"
    given = {"name": "verifier", kind: name}
    reward: RewardConfig = RewardConfig.model_validate(given)
    return reward


def with_absolute_paths(reward: RewardConfig) -> RewardConfig:
    """The reward with absolute paths of its judges' templates: workers have other directories."""

    def moved(part: Part) -> Part:
        if not part.judge:
            return part
        template = _absolute(part.judge.template)
        return part.model_copy(
            update={"judge": part.judge.model_copy(update={"template": template})}
        )

    parts = tuple(moved(part) for part in reward.mixture)
    return moved(reward).model_copy(update={"mixture": parts})


def template_fingerprint(path: str) -> str:
    """A hash of a chat template file.

    Raises:
        UserError: it is not UTF-8.
    """
    content = data_fingerprint([path])
    read_text(path, "chat_template")
    return distinguish_bom(content, Folder(path))


def scorer_fingerprint(part: ScoreConfig) -> str:
    """A hash of the name and version of a reward without weights.

    The version of a function is its attribute `version`, else its module's source; that of a
    judge is its template.
    """
    if part.verifier:
        return digest([part.verifier, VERSIONS[part.verifier]], 16)
    if part.judge:
        from wrpo_ray.stages.score.judge import READING, template_text  # it imports a client

        return digest([part.judge.model, template_text(part.judge), READING], 16)
    path = required(part.function, "reward.function")
    module_name, _, name = path.partition(":")
    module = importlib.import_module(module_name)
    if (version := getattr(getattr(module, name, None), "version", None)) is not None:
        return digest([path, str(version)], 16)
    source = getattr(module, "__file__", None)  # a module built into Python has none
    return digest([path, data_fingerprint([source] if source else [])], 16)
