"""Check before any work that a folder holds a reward model that the config can use."""

from functools import partial
from pathlib import Path
from typing import TypeVar

from wrpo_ray.config import ScoreConfig
from wrpo_ray.llm.architecture import Use, check_tensors
from wrpo_ray.llm.model_folder import check_model_folder
from wrpo_ray.llm.resolve import hub_id, pinned
from wrpo_ray.stages.score.reward_models import check_reward_model, is_armorm, use_of
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.hub import Pins
from wrpo_ray.storage.tensors import Tensors

Part = TypeVar("Part", bound=ScoreConfig)


def resolved_reward(what: str, part: Part, pins: Pins | None = None) -> Part:
    """The section of a reward model, pinned to a commit and checked; `what` is its key.

    Raises:
        UserError: it cannot be found, or it is no reward model that the config can use.
    """
    found = pinned(what, part, pins)
    place = found.model or ""
    check_reward_folder(Folder(place), part, what, hub_id(part, place))
    return found


def check_reward_folder(folder: Folder, part: ScoreConfig, what: str, name: str = "") -> None:
    """Check without loading that a folder holds the reward model of `part`.

    `what` and `name` are those of `check_model_folder`.

    Raises:
        UserError: it does not.
    """
    check_model_folder(
        folder,
        what,
        use_of(part),
        name=name,
        check_config=partial(check_reward_model, part=part),
        compare=_compare,
        trust=part.trust,
    )


def _compare(folder: Path, tensors: Tensors, use: Use) -> None:
    if is_armorm(folder):
        from wrpo_ray.stages.score import armorm  # it imports torch

        armorm.check_tensors(folder, tensors)
    else:
        check_tensors(folder, tensors, use)
