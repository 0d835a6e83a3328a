"""Text summaries: the results of a run and of a study, and failed rows."""

import os
from collections.abc import Iterator
from typing import Any

from wrpo_ray.report.benchmark_table import comparison_text
from wrpo_ray.report.group_table import tables
from wrpo_ray.text.display import one_line

Row = dict[str, Any]
EXAMPLE = 120
"""Maximum characters of an example."""


def summary_text(summary: Row) -> str:
    """The summary that `wrpo fuse` prints: counts, winners, evaluation, an example, folders."""
    parts = ["\n".join(_stages(summary)), "\n".join(_wins(summary))]
    parts += [_plain_table(title, rows) for title, rows in tables(summary.get("groups", {}))]
    if "evaluation" in summary:
        parts += ["\n".join(lines) for lines in _tables(summary["evaluation"])]
    if "comparison" in summary:
        parts.append(comparison_text(summary["comparison"]))
        parts.append(f"Comparison:  {_short(summary['comparison_folder'])}/comparison.html, .md")
    if summary.get("example"):
        parts.append("\n".join(_example(summary["example"])))
    if "fused_model" in summary:
        parts.append(f"Fused model: {_short(summary['fused_model'])}")
    parts.append(f"Summary:     {_short(summary['output'])}/summary.json")
    return "\n" + "\n\n".join(part for part in parts if part)


def _short(path: str) -> str:
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return path if relative.startswith("..") else relative


def _stages(summary: Row) -> Iterator[str]:
    yield f"{'stage':12}{'steps':>8}{'rows':>12}{'failed':>10}"
    for stage in dict.fromkeys(step["stage"] for step in summary["steps"]):
        steps = [s for s in summary["steps"] if s["stage"] == stage and s["state"] == "done"]
        rows = sum(s["rows_out"] for s in steps)
        failed = sum(s["counts"].get("failed", 0) for s in steps)
        yield f"{one_line(stage):12}{len(steps):>8}{rows:>12,}{failed:>10,}"


def _wins(summary: Row) -> Iterator[str]:
    for step in summary["steps"]:
        counts = step.get("counts", {})
        wins = {k.removeprefix("wins."): v for k, v in counts.items() if k.startswith("wins.")}
        if step["step"] == "select" and wins:
            yield f"y_ws by source ({counts['rows']:,} prompts, {counts['ties']:,} with a tie):"
            for name, won in sorted(wins.items(), key=lambda item: -item[1]):
                yield f"  {one_line(name):32}{won:>8,}{won / counts['rows']:>8.1%}"
        if step["step"] == "pair":
            told = ", ".join(
                f"{k.removeprefix('dropped.')} {v:,}"
                for k, v in counts.items()
                if k.startswith("dropped.")
            )
            yield f"preference rows: {counts['rows']:,}" + (f"; dropped: {told}" if told else "")


def _plain_table(title: str, rows: list[list[str]]) -> str:
    """A table with its first column to the left."""
    shown = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*shown, strict=True)]
    lines = (
        f"{first:<{widths[0]}}" + "".join(map(str.rjust, cells, widths[1:]))
        for first, *cells in shown
    )
    return "\n".join([title, *lines])


def _tables(evaluation: Row) -> Iterator[list[str]]:
    if "accuracy" in evaluation:
        yield list(_table("Verifier accuracy on held-out prompts, %", evaluation, "accuracy", 100))
    if "reward" in evaluation:
        yield list(_table("Mean reward on held-out prompts", evaluation, "reward", 1))


def _table(title: str, evaluation: Row, measure: str, scale: int) -> Iterator[str]:
    """A line for each model: the mean over all prompts with its interval, then of each group."""
    models = evaluation[measure]["models"]
    groups = [group for group in evaluation["groups"] if group != "all"]
    digits = 1 if scale == 100 else 2
    names = list(map(one_line, groups))
    width = max(8, *(len(g) + 2 for g in ("all", *names)))
    intervals = {}
    for name, row in models.items():
        low, high = (_scaled(row["all"][end], scale, digits) for end in ("low", "high"))
        intervals[name] = f"  [{low}, {high}]"
    room = max(map(len, intervals.values()), default=0)
    yield f"{title} (all: with 95 % interval)"
    yield f"{'':16}{'all':>8}{'':{room}}{''.join(f'{g:>{width}}' for g in names)}".rstrip()
    for name, row in models.items():
        every, *cells = (_scaled(row[g]["mean"], scale, digits) for g in ("all", *groups))
        by_group = "".join(f"{cell:>{width}}" for cell in cells)
        yield f"{one_line(name):16}{every:>8}{intervals[name]:{room}}{by_group}".rstrip()
    for name, difference in evaluation[measure]["contrasts"].items():
        mean, low, high = (
            _scaled(difference[k], scale, digits, "+") for k in ("mean", "low", "high")
        )
        yield f"  {one_line(name):28}{mean}  [{low}, {high}] paired"


def _scaled(value: float | None, scale: int, digits: int, sign: str = "") -> str:
    return "-" if value is None else f"{value * scale:{sign}.{digits}f}"


def _example(example: Row) -> Iterator[str]:
    yield f"Question: {example['messages'][-1]['content']}"
    for name, text in example["answers"].items():
        reference = example["reference"]
        right = text.strip() in (reference if isinstance(reference, list) else [reference])
        yield f"  {name:14}{text.strip()}" + ("   (right)" if right else "")


# --- failed rows -----------------------------------------------------------------------------


def failures_text(groups: list[Row]) -> str:
    """The output of `wrpo failures`: a line for each step and type of error, with an example."""
    if not groups:
        return "no failed rows"
    width = max(len(group["step"]) for group in groups) + 2
    lines = [f"{'step':{width}}{'error':22}{'rows':>9}{'attempts':>10}  example"]
    for group in groups:
        place = group["where"] or f"prompt {group['prompt_id']}"
        example = one_line(f"{place}: {group['message']}")
        step, error = one_line(group["step"]), one_line(group["error"])
        lines.append(
            f"{step:{width}}{error:22}{group['rows']:>9,}"
            f"{group['attempts']:>10}  {example[:EXAMPLE]}{'...' * (len(example) > EXAMPLE)}"
        )
    folders = dict.fromkeys((group["step"], group["folder"]) for group in groups)
    kept = [f"{one_line(step):{width}}{_short(folder)}" for step, folder in folders]
    return "\n".join([*lines, "", "kept in", *kept])


TITLES = {"accuracy": ("Verifier accuracy, %", 100, 1), "reward": ("Mean reward", 1, 2)}
"""Title, scale and digits of each measure in the tables of a study."""


def study_text(result: Row) -> str:
    """The result of a study, as printed by `wrpo study`."""
    return "\n\n".join(
        "\n".join(_study_table(name, measure, table))
        for name, measures in result["cases"].items()
        for measure, table in measures.items()
    )


def _study_table(case: str, measure: str, table: Row) -> Iterator[str]:
    title, scale, digits = TITLES[measure]
    width = max(len(name) for kind in table.values() for name in kind) + 2
    yield f"{case}: {title}, with 95 % interval over seeds and prompts"
    for kind, sign in (("variants", ""), ("contrasts", "+")):
        for name, row in table[kind].items():
            mean, low, high = (
                "-" if row[n] is None else f"{scale * row[n]:{sign}.{digits}f}"
                for n in ("mean", "low", "high")
            )
            seeds = len(row["seeds"])
            yield f"  {name:{width}}{mean:>7}  [{low}, {high}]  {seeds} seed{'s' * (seeds > 1)}"
