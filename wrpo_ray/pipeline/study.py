"""A study: variants of training over seeds, compared on the same held-out prompts.

Each variant of each seed is a chain like that of `wrpo fuse`, in one output folder, so common steps
run once. The chains advance side by side: jobs of one kind that are ready in several chains run
together and share engines. A second run resumes where the first one stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wrpo_ray.config import Config, StudyConfig, study_config
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.held_out import FUSED, SFT
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.pipeline.runner import bring_ahead, log_resumed, missing, session
from wrpo_ray.pipeline.stage_table import STAGES, Stage
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import Job, JobKind
from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.evaluate.variants import TABLE, TrainedVariant, VariantTable
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.hub import Pins
from wrpo_ray.storage.steps import Step

RESULT = "study.json"
UNTIL = {FUSED: "train", SFT: "sft"}
"""The last stage that a trained model needs; given models need none."""


def study(settings: StudyConfig, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run all cases, or only some of the variants, and return their tables.

    Those of all variants are kept in `study.json`.

    Raises:
        WrpoError: see `errors`.
    """
    cases = {name: Case.of(settings, name, chosen(settings, only)) for name in settings.cases}
    result: dict[str, Any] = {"seeds": list(settings.seeds), "cases": {}}
    for name, case in cases.items():
        result["cases"][name] = case.run()
    if not only:
        Folder(settings.output).absolute().write_json(RESULT, result)
    return result


def plan(settings: StudyConfig, only: Sequence[str] = ()) -> list[tuple[str, Step, bool]]:
    """(case, step, whether it is done) for each step, without running anything."""
    found = []
    for name in settings.cases:
        case = Case.of(settings, name, chosen(settings, only))
        steps = {job.step.key: job.step for path in case.paths for job in path.jobs}
        steps[case.table.step.key] = case.table.step
        found += [(name, step, step.is_done(case.root)) for step in steps.values()]
    return found


def chosen(settings: StudyConfig, only: Sequence[str]) -> list[str]:
    """Names of the variants to run, in the study's order.

    Raises:
        UserError: a name is not known.
    """
    for name in only:
        if name not in settings.variants:
            raise UserError(f"--only {name}: there are {', '.join(settings.variants)}")
    return [name for name in settings.variants if not only or name in only]


# --- chains that advance side by side ----------------------------------------------------------


@dataclass
class Path:
    """The remaining phases of one chain, in order."""

    phases: list[tuple[int, tuple[Job, ...]]]
    """(number of the stage in the chain, jobs of one kind)"""

    @staticmethod
    def of(stages: Iterable[Stage]) -> Path:
        """The phases of a chain's stages."""
        return Path([(STAGES.index(s.name), jobs) for s in stages for jobs in s.phases])

    @property
    def jobs(self) -> list[Job]:
        """All jobs."""
        return [job for _, jobs in self.phases for job in jobs]

    def skip_done(self, root: Folder) -> None:
        """Drop the finished phases at the front."""
        while self.phases and all(job.step.is_done(root) for job in self.phases[0][1]):
            self.phases.pop(0)


def next_wave(paths: Sequence[Path]) -> list[Job]:
    """The jobs to run now: the next phase of the path that is furthest behind, and equal jobs.

    Jobs of the same kind that are next in other paths join. A path's next phase can always run, as
    phases depend on earlier ones only.
    """
    fronts = [path.phases[0] for path in paths if path.phases]
    if not fronts:
        return []
    kind = _kind(min(fronts, key=lambda front: front[0])[1])
    alike = (jobs for _, jobs in fronts if _kind(jobs) == kind)
    return list({job.step.key: job for jobs in alike for job in jobs}.values())


def _kind(jobs: Sequence[Job]) -> tuple[JobKind, object]:
    """Phases for which this is equal can run as one."""
    return jobs[0].kind, jobs[0].batch_key


def run_waves(run: Run, paths: Sequence[Path]) -> None:
    """Run all paths to their end."""
    while True:
        for path in paths:
            path.skip_done(run.root)
        wave = next_wave(paths)
        if not wave:
            return
        jobs = missing(run, wave)
        left = len({job.step.key for path in paths for job in path.jobs})
        log(f"{jobs[0].kind}: {len(jobs)} of {left} remaining jobs")
        log_resumed(run, jobs)
        bring_ahead(jobs, [])
        jobs[0].run(run, jobs)


# --- cases -------------------------------------------------------------------------------------


@dataclass
class Case:
    """The chains of all variants and seeds in one setting."""

    config: Config
    """Of one of the chains: output, cluster and limits are common to all."""
    table: VariantTable
    root: Folder
    paths: list[Path] = field(default_factory=list)
    pins: Pins = field(default_factory=dict)
    """Commits of models and data sets of the hub."""

    @staticmethod
    def of(settings: StudyConfig, name: str, variants: Sequence[str]) -> Case:
        """Build the chains.

        Raises:
            UserError: with one line for each problem of a config.
        """
        pins: Pins = {}
        configs = {v: preflight(study_config(settings, name, v), pins) for v in variants}
        fingerprints: dict[str, str] = {}
        models, paths, prompts = [], [], set()
        for variant, config in configs.items():
            asked = settings.variants[variant]
            for seed in settings.seeds[: asked.seeds]:
                own = config.model_copy(update={"seed": seed})
                until = UNTIL.get(asked.model, STAGES[0])
                chain = Chain(own, until, shares_engines=True, fingerprints=fingerprints)
                stages = chain.build()
                stage, model, held_out = chain.compared(asked.model)
                paths.append(Path.of([*stages, stage]))
                models.append(TrainedVariant(variant, seed, model))
                prompts.add(held_out.step.config["path"])
        if len(prompts) > 1:
            raise UserError(f"{name}: variants have different `evaluate.prompts`")
        known = set(variants)
        contrasts = tuple(c for c in settings.contrasts if set(c) <= known)
        first = next(iter(configs.values()))
        root = Folder(first.output).absolute()
        return Case(first, VariantTable(tuple(models), contrasts), root, paths, pins)

    def run(self) -> dict[str, Any]:
        """Run the missing steps and return the table."""
        step = self.table.step
        if not step.is_done(self.root):
            with session(self.config, self.root, self.pins) as run:
                run_waves(run, self.paths)
                log(f"{step.name}: comparing {len(self.table.models)} models")
                self.table.run(run, [self.table])
        table: dict[str, Any] = (self.root / step.folder).read_json(TABLE)
        return table
