"""The needs of groups of prompts by the config: a reward, a reference, for training a source."""

from wrpo_ray.config import Config, GroupedRewardConfig, RewardConfig
from wrpo_ray.data.samples import Groups, Prompts
from wrpo_ray.errors import UserError
from wrpo_ray.stages.ingest.groups import CheckGroups, Coverage, PromptFiles, first_groups

TRAINING, HELD_OUT = "prompts", "evaluate.prompts"
"""Sections of prompts; without `prompts`, those of recorded answers stand for them."""


def group_check(
    config: Config, prompts: Prompts, *, is_held_out: bool = False
) -> tuple[CheckGroups, ...]:
    """The job that checks the groups of the prompts; none where there is nothing to check.

    Answers that are imported have their rewards.
    """
    given = prompt_files(config).get(HELD_OUT if is_held_out else TRAINING)
    if not config.group_names or not given:
        return ()
    needed = coverage(config, is_held_out=is_held_out)
    return (CheckGroups(prompts, given, needed, config.group_names),)


def prompt_files(config: Config) -> dict[str, tuple[PromptFiles, ...]]:
    """The inputs that hold the prompts to train on, and the held-out ones; imported ones not."""
    recorded = {} if config.existing else config.recorded
    files = {(given.path, *given.columns.of_prompt): given for given in recorded.values()}
    training: tuple[PromptFiles, ...] = config.prompt_files or tuple(files.values())
    held_out = config.evaluate.prompts if config.evaluate else None
    found = {TRAINING: training, HELD_OUT: (held_out,) if held_out else ()}
    return {what: given for what, given in found.items() if given}


def check_first_groups(config: Config, what: str, given: tuple[PromptFiles, ...]) -> None:
    """Check the groups of the first rows of inputs, as `prompt_files` has them.

    Raises:
        UserError: some prompts lack a reward, a source or a reference; a name is of no group.
    """
    if not config.group_names:
        return
    counts, is_complete = first_groups(given, what)
    needed = coverage(config, is_held_out=what == HELD_OUT)
    problems = needed.problems(what, counts, config.failure_limit, is_complete=is_complete)
    if found := list(problems):
        raise UserError("\n".join(found))


def coverage(config: Config, *, is_held_out: bool) -> Coverage:
    """Which groups of the training prompts, or of the held-out ones, have what they need."""
    reward, sources = config.reward, config.models
    by_group = tuple(sorted(reward.by_group)) if reward else ()
    rewarded = Groups(by_group) if reward and by_group and not reward.default else None
    verified = _verified(reward) if reward and by_group else Groups(())
    if is_held_out:  # all models answer all of them, and a group may be missing
        return Coverage(rewarded, None, verified)
    some = [(source.name, tuple(sorted(source.groups))) for source in sources if source.groups]
    of_margins = tuple(sorted(config.pair.by_group))
    named = (
        ("reward.by_group", by_group),
        ("pair.by_group", of_margins),
        *((f"sources.{n}.groups", own) for n, own in some),
    )
    answered = Groups(tuple(sorted({name for _, own in some for name in own})))
    return Coverage(
        rewarded, answered if len(some) == len(config.sources) else None, verified, named
    )


def _verified(reward: GroupedRewardConfig) -> Groups:
    """The groups whose reward compares with the reference."""
    others = bool(reward.default and _verifies(reward.default))
    names = (name for name, own in reward.by_group.items() if _verifies(own) != others)
    return Groups(tuple(sorted(names)), others)


def _verifies(reward: RewardConfig) -> bool:
    return any(part.verifier for part in reward.parts)
