"""Facts of a run for the cards of exports, without paths of this machine."""

from collections.abc import Iterator
from typing import Any

from wrpo_ray.config import Config, RecordedConfig, ScoreConfig
from wrpo_ray.export.card_parts import CardFacts, CardModel, license_of
from wrpo_ray.pipeline.failed_rows import failures_of
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.ingest.recorded import IngestRecorded
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.stages.train.prepare import Prepare
from wrpo_ray.storage.folder import HUB_SCHEME, Folder

Row = dict[str, Any]
StageJobs = list[tuple[str, Any]]
"""(name of the stage, job) of a chain."""


def run_facts(config: Config, root: Folder, jobs: StageJobs) -> CardFacts:
    """Return the models, settings, counts, failures and versions of a run's finished steps."""
    done = [job.step for _, job in jobs if job.step.is_done(root)]
    records = [step.read_manifest(root) for step in done]
    settings: Row = {"seed": config.seed}
    for name in ("sampling", "split", "pair", "reward"):
        section = getattr(config, name)
        settings |= {name: without_paths(section.identity())} if section else {}
    if config.reward and not config.reward.by_group:
        settings["reward"].pop("by_group")
    return CardFacts(
        models=list(_models(config, jobs)),
        settings=settings,
        steps=[{"step": r["step"], "counts": r["counts"]} for r in records],
        failures=failures_of(root, jobs),
        versions={k: v for record in records for k, v in record["versions"].items()},
    )


def _models(config: Config, jobs: StageJobs) -> Iterator[CardModel]:
    """The sources, the target and the reward model, if the config has them."""
    weights = {job.model.name: job.fingerprint for _, job in jobs if isinstance(job, Generate)}
    for _, job in jobs:
        if isinstance(job, Prepare) and config.target:  # the first: WRPO starts from target-SFT
            weights.setdefault(config.target.name, job.fingerprint)
        if isinstance(job, Score):
            weights[job.reward.name] = job.fingerprint
    recorded = {job.source: job for _, job in jobs if isinstance(job, IngestRecorded)}
    for source in config.sources:
        if isinstance(source, RecordedConfig):
            content = str((recorded[source.name].step.store or {})["path"])
            yield CardModel("source", source.name, "recorded answers", content, source.license)
    answering = [("source", m) for m in config.models]
    answering += [("target", config.target)] if config.target else []
    for role, m in answering:
        is_folder = not m.endpoint and not m.model.startswith(HUB_SCHEME)
        terms = license_of(m.name, m.license, Folder(m.model).absolute() if is_folder else None)
        yield CardModel(role, m.name, last_name(m.model), weights.get(m.name, ""), terms)
    for reward in config.reward.each if config.reward else ():
        name, what = reward.name, ", ".join(map(_scorer, reward.parts))
        yield CardModel("reward", name, what, weights.get(name, ""), None)


def _scorer(part: ScoreConfig) -> str:
    """The name of a reward model, function, verifier or judge, without a path."""
    judge = f"judge {part.judge.model}" if part.judge else ""
    return (last_name(part.model) if part.model else "") or part.function or part.verifier or judge


def without_paths(settings: Row) -> Row:
    """Settings for a card: of a local path only the last part, and no nulls."""
    given = {name: value for name, value in settings.items() if value is not None}
    return {k: _without_path(k, v) for k, v in given.items()}


def _without_path(name: str, value: Any) -> Any:
    if name == "by_group":
        return {group: without_paths(reward) for group, reward in value.items()}
    return last_name(value) if name in ("model", "path") else value


def last_name(path: str) -> str:
    """The last part of a path or address."""
    return str(Folder(path)).rstrip("/").rsplit("/", 1)[-1]
