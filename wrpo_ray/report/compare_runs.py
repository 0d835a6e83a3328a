"""Comparison of runs: tables of config, data and results with a column for each run.

Config, models and versions list only differences; data and results list all rows and mark those
that differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wrpo_ray.report.benchmark_table import aligned
from wrpo_ray.report.figures import ends
from wrpo_ray.report.histogram import Histogram
from wrpo_ray.report.plots import Table, number
from wrpo_ray.report.view import busy, duration

Row = dict[str, Any]
ABSENT = "–"
MARK = "≠"
METRICS = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "tokens_per_s")


@dataclass(frozen=True)
class Differences:
    """Tables by title; the first column has names, the last marks rows that differ."""

    runs: list[str]
    tables: dict[str, Table]


def compare(runs: list[Row]) -> Differences:
    """Compare runs by their facts (see `facts.gather`)."""
    names = _names([facts["output"] for facts in runs])
    config = [_flat(facts["config"]) for facts in runs]
    parts = {
        "Config": _table(names, config, only_different=True),
        "Models": _table(names, [facts["models"] for facts in runs], only_different=True),
        "Data": _table(names, [dict(_data(facts)) for facts in runs]),
        "Results": _table(names, [dict(_results(facts)) for facts in runs]),
        "Versions": _table(names, [facts["versions"] for facts in runs], only_different=True),
    }
    return Differences(names, {title: table for title, table in parts.items() if len(table) > 1})


def _names(outputs: list[str]) -> list[str]:
    """The last part of each path, or whole paths if those are equal."""
    short = [output.rstrip("/").rsplit("/", 1)[-1] for output in outputs]
    return short if len(set(short)) == len(short) else outputs


def _flat(value: Any, above: str = "") -> Row:
    """{a.b: value} of nested mappings; of lists of named sections by their names."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, dict) and "name" in v for v in value)
    ):
        value = {part["name"]: part for part in value}
    if not isinstance(value, dict):
        return {above: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _flat(part, f"{above}.{name}" if above else str(name)).items()
    }


def _table(names: list[str], columns: list[Row], *, only_different: bool = False) -> Table:
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = []
    for key in keys:
        cells = [_told(column.get(key, ABSENT)) for column in columns]
        differs = len(set(cells)) > 1
        if differs or not only_different:
            rows.append([key, *cells, MARK if differs else ""])
    return [["", *names, ""], *rows]


def _told(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else ABSENT if value is None else str(value)


def _data(facts: Row) -> Iterator[tuple[str, Any]]:
    for step in ("prompts", "import", "select", "pair", "rows-sft", "rows-wrpo", "eval-prompts"):
        if counts := facts["counts"].get(step):
            yield f"{step}: rows", f"{counts.get('rows', 0):,}"
            if counts.get("failed"):
                yield f"{step}: failed", f"{counts['failed']:,}"
    select = facts["counts"].get("select", {})
    for name, won in sorted(select.items()):
        if name.startswith("wins.") and select["rows"]:
            yield f"y_ws by {name.removeprefix('wins.')}", f"{won / select['rows']:.1%}"
    for part in ("answers", "rewards", "pairs"):
        for name, measures in facts["distributions"][part]["series"].items():
            for measure, record in measures.items():
                histogram = Histogram.read(record)
                if histogram.n:
                    yield f"{measure} of {name}, mean", histogram.mean


def _results(facts: Row) -> Iterator[tuple[str, Any]]:
    for name, training in facts["training"].items():
        yield f"{name}: steps", f"{training['seen']:,} of {training['steps']:,}"
        for metric in METRICS:
            if found := ends(training["curves"].get(metric, [])):
                yield f"{name}: {metric} at the end", found[1]
    for measure in ("accuracy", "reward"):
        table = facts.get("evaluation", {}).get(measure) or {"models": {}, "contrasts": {}}
        scale = 100 if measure == "accuracy" else 1
        for model, groups in table["models"].items():
            yield f"{measure} of {model}", _estimate(groups["all"], scale)
        for name, estimate in table["contrasts"].items():
            yield f"{measure}: {name}", _estimate(estimate, scale)
    for pair in facts.get("comparison", {}).get("pairs", []):
        yield f"win rate of {pair['a']} over {pair['b']}", _estimate(pair["win_rate"], 100)
    spans = [(step["started"], step["ended"]) for step in facts["steps"] if "ended" in step]
    yield "time at work", duration(busy(spans))
    spent = [step["spent"] for step in facts["steps"] if step["spent"]]
    yield "answer tokens", f"{sum(s['output_tokens'] for s in spent):,}"
    if any(s["gpu_hours"] for s in spent):
        yield "GPU-hours", sum(s["gpu_hours"] for s in spent)
    if any(s["money"] for s in spent):
        yield "money", sum(s["money"] for s in spent)


def _estimate(estimate: Row, scale: int) -> str:
    mean, low, high = (
        ABSENT if estimate[n] is None else f"{scale * estimate[n]:.2f}"
        for n in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"


# --- output --------------------------------------------------------------------------------


def text(differences: Differences) -> str:
    """The tables as aligned text."""
    parts = [f"{title}\n{aligned(table)}" for title, table in differences.tables.items()]
    return "\n\n".join(parts) or "the runs do not differ"


def html(differences: Differences) -> str:
    """The tables as one HTML page, without external resources."""
    from wrpo_ray.report.page import template

    title = " · ".join(differences.runs)
    page: str = template("compare.html").render(
        title=title, runs=differences.runs, tables=differences.tables, mark=MARK
    )
    return page
