"""The summary of a run: its steps, the evaluation's tables, and the path of the fused model."""

import math
from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.errors import RegressionError, UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.models import map_models
from wrpo_ray.pipeline.stage import Stage
from wrpo_ray.report import benchmark_table as comparison
from wrpo_ray.runtime.job import JobKind
from wrpo_ray.stages.evaluate.comparison import FILE as COMPARISON
from wrpo_ray.stages.evaluate.pairwise import shortfall
from wrpo_ray.stages.evaluate.stage import EXAMPLE, TABLE
from wrpo_ray.stages.evaluate.statistics import Estimate
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step, versions


def summarise(chain: Chain, stages: list[Stage]) -> dict[str, Any]:
    """The steps of a run, the evaluation's tables, and the path of the fused model, as JSON."""
    root = chain.root
    summary: dict[str, Any] = {
        "output": str(root),
        "versions": versions(),
        "models": model_addresses(chain.config),
        "steps": [_step_summary(root, s.name, step) for s in stages for step in s.steps],
    }
    for job in (job for stage in stages for job in stage.jobs if job.step.is_done(root)):
        summary |= _results(job.kind, root / job.step.folder)
    fused = chain.fused
    if fused and fused.step.is_done(root):
        summary["fused_model"] = str(root / fused.step.folder / "model")
    return summary


def _results(kind: JobKind, folder: Folder) -> dict[str, Any]:
    """The part of the summary that a finished step adds."""
    if kind is JobKind.EVALUATE:
        return {"evaluation": folder.read_json(TABLE), "example": folder.read_json(EXAMPLE)}
    if kind is JobKind.COMPARE:
        return {"comparison": folder.read_json(COMPARISON), "comparison_folder": str(folder)}
    return {}


def write_comparison(root: Folder, summary: dict[str, Any]) -> None:
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


def check_pairs(summary: dict[str, Any], floor: float) -> None:
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
        rate: dict[str, Any] = {
            name: math.nan if value is None else value for name, value in pair["win_rate"].items()
        }
        name = f"win rate of {pair['a']} against {pair['b']}"
        below += [line] if (line := shortfall(name, Estimate(**rate), floor)) else []
    if below:
        raise RegressionError("\n".join(below))


def model_addresses(config: Config) -> dict[str, str]:
    """{name: address} of the given models; a hub id with its commit."""
    found: dict[str, str] = {}
    map_models(
        config, lambda what, m: found.update({getattr(m, "name", what): str(Folder(m.model))}) or m
    )
    return found


def _step_summary(root: Folder, stage: str, step: Step) -> dict[str, Any]:
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


def _rows(record: dict[str, Any]) -> int:
    return int(record["counts"].get("rows", 0))
