"""Run artifacts: `chain.json` (steps and config), `plan.json` (expected work) and the summary.

Reports and `wrpo status` read the first two, so that they need neither the config nor the models.
"""

import math
from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.data.outline import PLAN, Outline, StepOutline
from wrpo_ray.errors import RegressionError, UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.model_sections import map_models
from wrpo_ray.pipeline.stage_table import Stage
from wrpo_ray.report import benchmark_table as comparison
from wrpo_ray.report.group_table import by_group
from wrpo_ray.runtime.job import Job, JobKind
from wrpo_ray.stages.evaluate.comparison import FILE as COMPARISON
from wrpo_ray.stages.evaluate.pairwise import shortfall
from wrpo_ray.stages.evaluate.stage import EXAMPLE, TABLE
from wrpo_ray.stages.evaluate.statistics import Estimate
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step, versions
from wrpo_ray.text.addresses import without_secrets

Row = dict[str, Any]


def summarise(chain: Chain, stages: list[Stage]) -> Row:
    """The steps of a run, the evaluation's tables, and the path of the fused model, as JSON."""
    root = chain.root
    summary: Row = {
        "output": str(root),
        "versions": versions(),
        "models": model_addresses(chain.config),
        "steps": [_step_summary(root, s.name, step) for s in stages for step in s.steps],
    }
    for job in (job for stage in stages for job in stage.jobs if job.step.is_done(root)):
        summary |= _results(job.kind, root / job.step.folder)
    counts = {step["step"]: step.get("counts", {}) for step in summary["steps"]}
    sources = chain.config.model_dump(include={"sources"})
    if groups := by_group(counts.get("select", {}), counts.get("pair", {}), sources):
        summary["groups"] = groups
    fused = chain.fused
    if fused and fused.step.is_done(root):
        summary["fused_model"] = str(root / fused.step.folder / "model")
    return summary


def _results(kind: JobKind, folder: Folder) -> Row:
    """The part of the summary that a finished step adds."""
    if kind is JobKind.EVALUATE:
        return {"evaluation": folder.read_json(TABLE), "example": folder.read_json(EXAMPLE)}
    if kind is JobKind.COMPARE:
        return {"comparison": folder.read_json(COMPARISON), "comparison_folder": str(folder)}
    return {}


def write_comparison(root: Folder, summary: Row) -> None:
    """Write the table of the judged models as Markdown and HTML beside the step's JSON."""
    if "comparison" not in summary:
        return
    name, table = summary["comparison_folder"].rpartition("/")[2], summary["comparison"]
    folder = root / name  # what the summary shows has no options of the store
    for name, text in (
        ("comparison.md", comparison.markdown(table)),
        ("comparison.html", comparison.html(table)),
    ):
        if not folder.exists(name) or folder.read(name) != text.encode():
            folder.write(name, text.encode())


def check_pairs(summary: Row, floor: float) -> None:
    """Check that no pair of a run's comparison has a win rate below `floor`.

    Raises:
        UserError: there is no pair.
        RegressionError: one has, or its rate is not known.
    """
    pairs = summary.get("comparison", {}).get("pairs", [])
    if not pairs:
        raise UserError("--fail-below: the config compares no pairs; set evaluate.pairwise")
    below = []
    for pair in pairs:
        rate: Row = {
            name: math.nan if value is None else value for name, value in pair["win_rate"].items()
        }
        name = f"win rate of {pair['a']} against {pair['b']}"
        below += [line] if (line := shortfall(name, Estimate(**rate), floor)) else []
    if below:
        raise RegressionError("\n".join(below))


def model_addresses(config: Config) -> dict[str, str]:
    """{name: address} of the given models; a hub id with its commit, or files of answers."""
    found = {name: f"answers in {Folder(a.path)}" for name, a in config.recorded.items()}
    map_models(
        config, lambda what, m: found.update({getattr(m, "name", what): str(Folder(m.model))}) or m
    )
    return found


def _step_summary(root: Folder, stage: str, step: Step) -> Row:
    summary = {"stage": stage, "step": step.name, "folder": step.folder, "state": "to do"}
    if not step.is_done(root):
        return summary
    record = step.read_manifest(root)
    rows_in = sum(_rows(i.read_manifest(root)) for i in step.inputs if i.is_done(root))
    return summary | {
        "state": "done",
        "rows_in": rows_in,
        "rows_out": _rows(record),
        "seconds": record["seconds"],
        "counts": record["counts"],
    }


def _rows(record: Row) -> int:
    return int(record["counts"].get("rows", 0))


def outline(
    config: Config, until: str, jobs: list[tuple[str, Job]], models: dict[str, str]
) -> Outline:
    """The record of a chain for `chain.json`, without credentials."""
    tree = without_secrets(config.model_dump(mode="json", by_alias=True))
    steps = tuple(_step(stage, job) for stage, job in jobs)
    return Outline(until, config.storage.buckets, tree, models, steps)


def _step(stage: str, job: Job) -> StepOutline:
    step = job.step
    asked: Row = {}
    if samples := job.samples:
        prompts = samples.prompts
        asked = {"samples": samples.count, "prompts": prompts.step.key, "splits": prompts.splits}
        if groups := prompts.groups:
            asked |= {"groups": groups.names, "other_groups": groups.others}
    return StepOutline(
        stage=stage,
        name=step.name,
        key=step.key,
        folder=step.folder,
        manifest=step.manifest,
        kind=job.kind,
        source=step.source,
        stores=tuple(dict.fromkeys(job.stores)),
        outcome=job.outcome if isinstance(job, Score) else "",
        note=job.note,
        **asked,
    )


def keep_plan(root: Folder, planned: dict[str, Row]) -> None:
    """Add expected work to `plan.json` ({key of a step: work}); known steps keep their entry."""
    known = root.read_record(PLAN) if root.exists(PLAN) else {}
    new = {key: work for key, work in planned.items() if key not in known}
    if new:
        root.write_json(PLAN, known | new)
