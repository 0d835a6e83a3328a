"""Builds the reward that a config asks for; a new kind of reward is registered here."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from wrpo_ray.config import RewardConfig, ScoreConfig
from wrpo_ray.data.records import Message
from wrpo_ray.data.references import Reference
from wrpo_ray.errors import UserError
from wrpo_ray.stages.score.base import Item, ListOfTestsError, Outcome, Reward, finite

Function = Callable[[list[Message], str, Reference | None], float]


def load_function(path: str) -> Function:
    """Import the function that `module:function` names.

    Raises:
        UserError: it cannot be imported.
    """
    module, _, name = path.partition(":")
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module can raise anything
        raise UserError(
            f"{path}: cannot be imported ({type(error).__name__}: {error}); put the module right, "
            f"or give `module:function`"
        ) from None
    if not callable(function):
        raise UserError(f"{path}: not a function")
    return function


class FunctionReward:
    """A function f(messages, response, reference) -> float."""

    def __init__(self, path: str):
        self.function = load_function(path)

    def score(self, items: list[Item]) -> list[Outcome]:
        """Call the function for each item; whatever it raises is the item's error."""
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Outcome:
        try:
            return finite(float(self.function(item.messages, item.text, item.right)))
        except Exception as error:  # the user's code can raise anything; the row keeps it
            return error


class AnyReference:
    """A verifier for references that may be lists: an answer is right if one of the list is."""

    def __init__(self, verifier: Reward):
        self.verifier = verifier

    def score(self, items: list[Item]) -> list[Outcome]:
        """Return each item's best outcome over its references; an error only if all fail."""
        by_item = [list(_each(item)) for item in items]
        outcomes = iter(self.verifier.score([one for each in by_item for one in each]))
        return [_best(list(islice(outcomes, len(each)))) for each in by_item]


def _each(item: Item) -> Iterator[Item]:
    """Yield the item once for each of its right answers."""
    for right in item.right if isinstance(item.right, list) else [item.right]:
        yield replace(item, reference=right)


def _best(outcomes: list[Outcome]) -> Outcome:
    return max((o for o in outcomes if isinstance(o, float)), default=outcomes[0])


class OneTest:
    """A verifier that rejects lists of references: any or all of the tests could be meant."""

    def __init__(self, verifier: Reward):
        self.verifier = verifier

    def score(self, items: list[Item]) -> list[Outcome]:
        """Return the verifier's outcomes; an item whose reference is a list gets an error."""
        asked = [item for item in items if not isinstance(item.right, list)]
        outcomes = iter(self.verifier.score(asked))
        return [
            ListOfTestsError("the reference is a list of tests; join them into one text")
            if isinstance(item.right, list)
            else next(outcomes)
            for item in items
        ]


class MixtureReward:
    """The weighted sum of other rewards, which are not normalized."""

    def __init__(self, weights: Sequence[float], parts: Sequence[Reward]):
        self.weights, self.parts = weights, parts

    def score(self, items: list[Item]) -> list[Outcome]:
        """Return the sums; an item that a part cannot score gets the first such part's error.

        Later parts do not score it.
        """
        scores: dict[int, Outcome] = dict.fromkeys(range(len(items)), 0.0)
        terms: dict[int, list[float]] = {i: [] for i in scores}
        for weight, part in zip(self.weights, self.parts, strict=True):
            left = list(terms)
            for i, value in zip(left, part.score([items[i] for i in left]), strict=True):
                if isinstance(value, Exception):
                    scores[i] = value
                    del terms[i]
                else:
                    terms[i].append(weight * value)
        scores |= {i: finite(sum(values)) for i, values in terms.items()}
        return list(scores.values())


def load_reward(config: RewardConfig, folders: Sequence[Path | None]) -> Reward:
    """Load the reward that the config describes; `folders` contain the weights of its parts.

    Raises:
        UserError: a part does not work on this machine.
    """
    parts = [_load(*pair, config) for pair in zip(config.parts, folders, strict=True)]
    if not config.mixture:
        return parts[0]
    return MixtureReward([part.weight for part in config.mixture], parts)


def _load(part: ScoreConfig, folder: Path | None, whole: RewardConfig) -> Reward:
    """Load one part, on the devices of the whole; imports only what the part needs."""
    if part.function:
        return FunctionReward(part.function)
    if part.verifier:
        from wrpo_ray.stages.score.verifiers import load_verifier

        threads = max(1, int(whole.actors.cpus))
        verifier = load_verifier(part.verifier, part.code, threads)
        return OneTest(verifier) if part.verifier == "code" else AnyReference(verifier)
    if part.judge:
        from wrpo_ray.stages.score.judge import JudgeReward

        return JudgeReward(part.judge)
    from wrpo_ray.stages.score.reward_models import load_classifier

    assert folder is not None
    return load_classifier(part, folder, on_gpu=whole.actors.num_gpus > 0)
