"""Facts of a run for its report, as JSON, from the files in its output.

They come from manifests, the ledger, metrics and tables, and from a bounded sample of the rows
(`sample`). The sample of a finished step is cached in the output's folder `report`, so that each
bucket is read once, however often a report is written.
"""

import calendar
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from wrpo_ray.config import PricesConfig
from wrpo_ray.data.failures import failed_by_error
from wrpo_ray.data.outline import PLAN, Outline, StepOutline
from wrpo_ray.errors import UserError
from wrpo_ray.report import sample
from wrpo_ray.report.group_table import by_group
from wrpo_ray.report.histogram import Histogram
from wrpo_ray.report.sample import BETWEEN, Distributions
from wrpo_ray.runtime.ledger import Entry, Usage, read_ledger
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

FORMAT = 1
"""Version of the cached samples."""
KEPT = "report"
"""Folder of the cache within the output."""
RECORDED = "ingestrecorded"
"""Kind of the steps that read recorded answers."""
METRICS = "metrics.jsonl"
POINTS = 400
"""Maximum points of a curve."""
SHARDS = 256
"""Maximum shards of failed rows to read for a step."""
Row = dict[str, Any]


def gather(root: Folder, outline: Outline, *, is_running: bool = False) -> Row:
    """Gather the facts of a run; the same output gives the same facts."""
    done = {step.key: step.read_manifest(root) for step in outline.steps if step.is_done(root)}
    counts = {s.name: done[s.key]["counts"] for s in outline.steps if s.key in done}
    facts: Row = {
        "output": str(root),
        "until": outline.until,
        "is_running": is_running,
        "config": outline.config,
        "models": outline.models,
        "sources": outline.sources,
        "target": outline.target,
        "steps": list(_steps(root, outline, done)),
        "counts": counts,
        "groups": by_group(counts.get("select", {}), counts.get("pair", {}), outline.config),
        "versions": {k: v for record in done.values() for k, v in record["versions"].items()},
        "distributions": _distributions(root, outline, done),
        "training": {s.name: t for s in outline.steps if (t := _training(root, s))},
        "failures": list(_failures(root, outline, done)),
        "rows": _rows(root, outline, done),
    }
    return facts | _evaluation(root, outline, done)


# --- steps -----------------------------------------------------------------------------------


def _steps(root: Folder, outline: Outline, done: dict[str, Row]) -> Iterator[Row]:
    ledger, plan = read_ledger(root), _plan(root)
    prices = PricesConfig.model_validate(outline.config.get("prices") or {})
    told: set[str] = set()
    for step in outline.steps:
        record = done.get(step.key)
        entry = ledger.get(step.folder) if step.folder not in told else None
        told.add(step.folder)  # steps that share a store share its entry
        yield {
            "stage": step.stage,
            "step": step.name,
            "key": step.key,
            "folder": step.folder,
            "kind": step.kind,
            "source": step.source,
            "note": step.note,
            "state": "done" if record else "to do",
            "spent": _spent(entry, prices) if entry else None,
            "plan": plan.get(step.key),
        } | (_finished(record) if record else {})


def _finished(record: Row) -> Row:
    ended = calendar.timegm(time.strptime(record["finished"], "%Y-%m-%dT%H:%M:%SZ"))
    counts = record["counts"]
    return {
        "rows": counts.get("rows", 0),
        "told": record.get("told", ""),
        "failed": counts.get("failed", 0),
        "seconds": record["seconds"],
        "started": round(ended - record["seconds"], 2),
        "ended": ended,
    }


def _spent(entry: Entry, prices: PricesConfig) -> Row:
    spent: Usage = entry.usage
    return {
        "prompt_tokens": spent.prompt_tokens,
        "output_tokens": spent.output_tokens,
        "actor_hours": spent.actor_seconds / 3600,
        "gpu_hours": spent.gpu_seconds / 3600,
        "money": spent.money(entry.pool, prices),
    }


def _plan(root: Folder) -> Row:
    return root.read_record(PLAN) if root.exists(PLAN) else {}


# --- rows ------------------------------------------------------------------------------------


def _kept(root: Folder, name: str, make: Callable[[], Any]) -> Any:
    """Return the cached value, or make and cache it."""
    folder, file = root / KEPT, f"{name}-{FORMAT}.json"
    with suppress(FileNotFoundError, UserError):  # a broken file is written again
        return folder.read_json(file)
    value = make()
    with suppress(OSError):  # the output may be read-only
        folder.write(file, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    return value


def _distributions(root: Folder, outline: Outline, done: dict[str, Row]) -> Row:
    """Distributions of scored answers by model (`answers`), and of y_ws, y_wt, y_l (`pairs`).

    With rewards by group, those of answers are by reward and model instead (`rewards`): each has a
    scale of its own.
    """
    answers, pairs, rewards = Distributions(), Distributions(), Distributions()
    has_groups = bool((outline.config.get("reward") or {}).get("by_group"))
    for step in (step for step in outline.steps if step.key in done):
        name = f"distributions-{step.name}-{step.key}"
        if _scores_candidates(outline, step):
            make = partial(_answers, root, step.stores, outline.buckets)
            found = Distributions.read(_kept(root, name, make))
            if has_groups:
                rewards.series |= _by_reward(step, found)
            answers += found
        elif step.stage == "pair" and done[step.key]["counts"].get("rows"):
            make = partial(_preferences, root / step.folder, outline.buckets)
            pairs += Distributions.read(_kept(root, name, make))
    parts = {"answers": answers, "pairs": pairs, "rewards": rewards}
    return {name: part.record() for name, part in parts.items()}


def _by_reward(step: StepOutline, found: Distributions) -> dict[str, dict[str, Histogram]]:
    """Take the rewards of a step's answers out, as {`reward · model`: {`reward`: histogram}}."""
    own = step.name.removeprefix("score-").removesuffix(f"-{step.source}")
    return {
        f"{own}{BETWEEN}{name}": {"reward": measures.pop("reward")}
        for name, measures in found.series.items()
        if "reward" in measures
    }


def _scores_candidates(outline: Outline, step: StepOutline) -> bool:
    """Whether the step scores answers that y_ws, y_wt and y_l are chosen from."""
    if step.kind == RECORDED:
        return bool(step.stores)
    if step.stage not in ("score", "sample") or not step.stores:
        return False
    given = outline.config.get("reward") or {}
    rewards = [given, *(given.get("by_group") or {}).values()]
    names = tuple(f"score-{reward.get('name', '')}-" for reward in rewards)
    return step.kind != "score" or step.name.startswith(names)


def _answers(root: Folder, stores: tuple[str, ...], buckets: int) -> Row:
    found = [sample.answers(root / store, buckets) for store in stores]
    return sum(found, Distributions()).record()


def _preferences(folder: Folder, buckets: int) -> Row:
    return sample.preferences(folder, buckets).record()


def _rows(root: Folder, outline: Outline, done: dict[str, Row]) -> list[Row]:
    """Rows to browse: preference rows, and selected y_ws with their candidates."""
    there = {s.stage: s for s in outline.steps if s.key in done and s.kind in ("select", "pair")}
    pairs, selection = there.get("pair"), there.get("select")
    if pairs is None:  # imported
        pairs = next((s for s in outline.steps if s.stage == "pair" and s.key in done), None)
    if pairs and not done[pairs.key]["counts"].get("rows"):
        pairs = None
    steps = [step for step in (pairs, selection) if step]
    if not steps:
        return []
    of_pairs, of_selection = (step.folder if step else "" for step in (pairs, selection))
    stores = list(dict.fromkeys(store for step in steps for store in step.stores))
    name = f"rows-{digest([step.key for step in steps], 12)}"
    make = partial(sample.rows, root, of_pairs, of_selection, stores, outline.buckets)
    rows: list[Row] = _kept(root, name, make)
    return rows


def _failures(root: Folder, outline: Outline, done: dict[str, Row]) -> Iterator[Row]:
    for step in outline.steps:
        folder = step.failures(root)

        def groups(folder: Folder = folder) -> list[Row]:
            told = failed_by_error(folder, SHARDS)
            dropped = failed_by_error(folder / "dropped", SHARDS)
            return [g | {"dropped": False} for g in told] + [g | {"dropped": True} for g in dropped]

        if step.key in done:
            found = _kept(root, f"failures-{step.name}-{step.key}", groups)
        else:
            found = groups()
        yield from ({"stage": step.stage, "step": step.name} | group for group in found)


# --- training and evaluation -----------------------------------------------------------------


def _training(root: Folder, step: StepOutline) -> Row | None:
    """Curves {metric: values} of a training, averaged to at most `POINTS` values each."""
    folder = root / step.folder
    if step.kind != "train" or not folder.exists(METRICS):
        return None
    records = folder.read_records(METRICS)
    if not records:
        return None
    width = -(-len(records) // POINTS)
    parts = [records[i : i + width] for i in range(0, len(records), width)]
    names = dict.fromkeys(name for record in records for name in record)
    curves = {name: [_mean(part, name) for part in parts] for name in names}
    return {"steps": records[-1]["steps"], "seen": len(records), "curves": curves}


def _mean(records: list[Row], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return round(sum(values) / len(values), 6) if values else None


def _evaluation(root: Folder, outline: Outline, done: dict[str, Row]) -> Row:
    found: Row = {}
    for step in outline.steps:
        if step.key in done and step.name == "evaluate":
            found["evaluation"] = (root / step.folder).read_json("table.json")
        if step.key in done and step.name == "comparison":
            found["comparison"] = (root / step.folder).read_json("comparison.json")
    return found
