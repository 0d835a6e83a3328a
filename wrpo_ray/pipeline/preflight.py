"""Checks before any work: everything that can be checked without starting Ray or an engine."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from wrpo_ray.config import Config, EndpointConfig, ModelConfig, ScoreConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import telling_of
from wrpo_ray.llm.model_folder import reasoning_format
from wrpo_ray.llm.reasoning import Markers, Thinker, unseen_markers
from wrpo_ray.llm.rendering import Template
from wrpo_ray.llm.weight_stream import check_loader, check_streamed
from wrpo_ray.pipeline.groups import check_first_groups, prompt_files
from wrpo_ray.pipeline.identities import verifier_reward
from wrpo_ray.pipeline.model_sections import (
    map_inputs,
    map_models,
    pinned_input,
    read_pins,
    resolved,
)
from wrpo_ray.runtime.job import AnyInput
from wrpo_ray.stages.ingest.input_checks import check_inputs, check_some_columns
from wrpo_ray.stages.pair.eligibility import check_patterns
from wrpo_ray.stages.score.rewards import load_function
from wrpo_ray.storage.folder import Folder, check_writable
from wrpo_ray.storage.hub import Pins
from wrpo_ray.text.addresses import redact


def preflight(config: Config, pins: Pins | None = None) -> Config:
    """Run all checks, and return the config with models and data sets of the hub at their commits.

    `pins` gets the commits: those that the output keeps, and the current ones of others.

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

    pins = {} if pins is None else pins
    pins |= attempt(read_pins, config.output) or {}
    config = map_models(config, lambda what, model: attempt(resolved, what, model, pins) or model)
    checked: set[tuple[str, ...]] = set()
    config = map_inputs(
        config, lambda what, one: attempt(_checked_input, what, one, pins, checked) or one
    )
    for check in _checks(config):
        attempt(check)
    if not problems:
        attempt(_check_kept_reasoning, config)
        for what, model in _on_vllm(config):
            attempt(check_streamed, what, model)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return config


def _checks(config: Config) -> Iterator[Callable[[], None]]:
    for what, model in _on_vllm(config):
        yield partial(check_loader, what, model, Folder(config.output))
    for model in config.models:
        if model.endpoint:
            yield partial(_check_key, f"sources.{model.name}", model.endpoint)
            yield partial(_check_parser, f"sources.{model.name}", model)
    asked = config.evaluate
    others = [*asked.models, *([asked.judge] if asked.judge else [])] if asked else []
    for model in others:
        if model.endpoint:
            yield partial(_check_key, f"evaluate.{model.name}", model.endpoint)
            yield partial(_check_parser, f"evaluate.{model.name}", model)
    for what, answers in config.recorded_sections.items():
        yield partial(_check_parser, what, answers)
    scorers = [part for own in config.reward.each for part in own.parts] if config.reward else []
    verifiers = (config.evaluate.verifier if config.evaluate else None, config.pair.verifier)
    for part in [*scorers, *(verifier_reward(name) for name in verifiers if name)]:
        yield partial(_check_scorer, part)
    yield partial(check_patterns, config.answers.refusal_patterns)
    for what, given in prompt_files(config).items():
        yield partial(check_first_groups, config, what, given)
    yield partial(check_writable, Folder(config.output))


def _on_vllm(config: Config) -> Iterator[tuple[str, ModelConfig]]:
    """Yield (name in messages, section) of each model that vLLM loads for its answers."""
    asked = config.evaluate
    more = [*asked.models, *([asked.judge] if asked.judge else [])] if asked else []
    for model in [*config.models, *([config.target] if config.target else []), *more]:
        if not model.endpoint:
            yield "target" if model is config.target else model.name, model


def _checked_input(
    what: str, given: AnyInput, pins: Pins, checked: set[tuple[str, ...]]
) -> AnyInput:
    """The input at its commit. Files in `checked` are in order: several sources can share them."""
    found = pinned_input(what, given, pins)
    key = (type(found).__name__, found.path, *found.needed)
    if key not in checked:
        files = check_inputs(found.path, found.needed, what)
        check_some_columns(files, found.needed, what)
        checked.add(key)
    return found


def _check_parser(what: str, given: Thinker) -> None:
    """Check the parser of an endpoint or recorded answers; others are checked with the folders."""
    with telling_of(what):
        unseen_markers(given)


def _check_kept_reasoning(config: Config) -> None:
    """Check that reasoning which is trained on stands between the target's own markers."""
    sections: dict[str, Thinker] = {f"sources.{model.name}": model for model in config.models}
    sections |= config.recorded_sections
    kept = {what: given for what, given in sections.items() if given.reasoning == "keep"}
    if not kept or not config.target:
        return
    own = _markers(config.target)
    for what, given in kept.items():
        if (others := _markers(given)) != own:
            is_model = isinstance(given, ModelConfig)
            remedy = "" if is_model else ", or reasoning_parser to the format of the answers"
            raise UserError(
                f"{what}.reasoning: its markers are {' '.join(others)}, the target's "
                f"{' '.join(own)}; set it to strip{remedy}"
            )


def _markers(given: Thinker) -> Markers:
    if not isinstance(given, ModelConfig) or given.endpoint:
        return unseen_markers(given)
    return reasoning_format(Folder(given.model), Template.of(given)).markers


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
