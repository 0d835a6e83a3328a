"""Checks before any work: everything that can be checked without starting Ray or an engine."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from wrpo_ray.config import Config, EndpointConfig, ImportConfig, PromptsConfig, ScoreConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import telling_of
from wrpo_ray.pipeline.groups import check_first_groups
from wrpo_ray.pipeline.identities import verifier_reward
from wrpo_ray.pipeline.model_sections import map_models, resolved
from wrpo_ray.stages.ingest.readers import check_columns, check_some_rows, input_files
from wrpo_ray.stages.pair.eligibility import check_patterns
from wrpo_ray.stages.score.rewards import load_function
from wrpo_ray.storage.folder import Folder, check_writable
from wrpo_ray.text.addresses import redact


def preflight(config: Config) -> Config:
    """Run all checks, and return the config with every hub id pinned to its current commit.

    Raises:
        UserError: with one line for each problem.
    """
    problems: list[str] = []

    def attempt(check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except UserError as error:
            problems.append(str(error))
        except (OSError, ValueError) as error:  # a store that does not answer, a broken JSON file
            problems.append(f"cannot be read: {' '.join(redact(str(error)).split())}")
        return None

    config = map_models(config, lambda what, model: attempt(resolved, what, model) or model)
    for check in _checks(config):
        attempt(check)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return config


def _checks(config: Config) -> Iterator[Callable[[], None]]:
    for model in config.sources:
        if model.endpoint:
            yield partial(_check_key, f"sources.{model.name}", model.endpoint)
    asked = config.evaluate
    others = [*asked.models, *([asked.judge] if asked.judge else [])] if asked else []
    for model in others:
        if model.endpoint:
            yield partial(_check_key, f"evaluate.{model.name}", model.endpoint)
    scorers = [part for own in config.reward.each for part in own.parts] if config.reward else []
    verifiers = (config.evaluate.verifier if config.evaluate else None, config.pair.verifier)
    for part in [*scorers, *(verifier_reward(name) for name in verifiers if name)]:
        yield partial(_check_scorer, part)
    yield partial(check_patterns, config.answers.refusal_patterns)
    if config.existing:
        yield partial(_check_input, "import", config.existing)
    if config.prompts:
        yield partial(_check_prompts, config, "prompts", config.prompts)
    if asked and (held_out := asked.prompts):
        yield partial(_check_prompts, config, "evaluate.prompts", held_out)
    yield partial(check_writable, Folder(config.output))


def _check_scorer(part: ScoreConfig) -> None:
    """Check that a reward's function, or its judge's key and template, can be loaded."""
    if part.function:
        load_function(part.function)
    if part.judge:
        from wrpo_ray.stages.score.judge import Question  # it imports a client

        _check_key("reward.judge", part.judge.endpoint)
        Question(part.judge)


def _check_key(what: str, endpoint: EndpointConfig) -> None:
    from wrpo_ray.llm.endpoint_client import read_key

    with telling_of(f"{what}.endpoint"):
        read_key(endpoint)


def _check_prompts(config: Config, what: str, given: PromptsConfig) -> None:
    _check_input(what, given)
    check_first_groups(config, what, given)


def _check_input(what: str, given: PromptsConfig | ImportConfig) -> None:
    files = input_files(given.path, what)
    for uri in files:
        check_columns(uri, given.needed, what)
    check_some_rows(files, what)
