"""From facts to the values that the template report.html shows: text, tables, links to figures."""

import math
from collections.abc import Iterator
from typing import Any

from wrpo_ray.report import group_table
from wrpo_ray.report.benchmark_table import tables
from wrpo_ray.report.figures import ends, palette
from wrpo_ray.report.plots import Table, number

Row = dict[str, Any]
TRAINED = {"sft": "target-sft", "dpo": "target-dpo", "wrpo": "fused"}
"""Name of the model that each training step makes."""
MARGINS = {
    "rewards/margins": "weighted margin over y_l",
    "rewards/margins_source": "r(y_ws) − r(y_l)",
    "rewards/margins_target": "r(y_wt) − r(y_l)",
    "rewards/accuracies": "chosen above rejected, share",
    "loss": "loss",
}


def view(facts: Row) -> Row:
    """The variables of the template, except plots and rows."""
    return {
        "title": facts["output"].rstrip("/").rsplit("/", 1)[-1],
        "output": facts["output"],
        "state": _state(facts),
        "summary": _summary(facts),
        "tiles": list(_tiles(facts)),
        "chain": _chain(facts),
        "spending": _spending(facts),
        "margins": {n: _margins(t["curves"]) for n, t in facts["training"].items() if n != "sft"},
        "groups": group_table.tables(facts["groups"]),
        "evaluation": list(_evaluation(facts)),
        "failures": facts["failures"],
        "left_out": list(_left_out(facts)),
        "notes": list(_notes(facts)),
        "read": _read(facts),
        "models": sorted(facts["models"].items()),
        "versions": sorted(facts["versions"].items()),
    }


def _state(facts: Row) -> tuple[str, str]:
    done = sum(step["state"] == "done" for step in facts["steps"])
    total = len(facts["steps"])
    if done == total:
        return "done", "done" if facts["until"] == "evaluate" else f"done up to {facts['until']}"
    return ("running" if facts["is_running"] else "stopped"), f"{done} of {total} steps done"


def _summary(facts: Row) -> str:
    target = facts["target"]
    answering = facts["distributions"]["answers"]["series"]
    sources = facts["sources"] or [name for name in answering if name != target]
    told = ", ".join(sources[:6]) + (f" and {len(sources) - 6} more" if len(sources) > 6 else "")
    return f"{told} → {target}" if told and target else told or target


def _tiles(facts: Row) -> Iterator[tuple[str, str, str]]:
    """(label, value, note) of the key figures."""
    counts = facts["counts"]
    if select := counts.get("select"):
        ties = f"{select.get('ties', 0):,} with a tie"
        yield "prompts with a y_ws", f"{select['rows']:,}", ties
    if pair := counts.get("pair"):
        yield "preference rows", f"{pair['rows']:,}", f"of {pair.get('prompts', 0):,} prompts"
    accuracy = facts.get("evaluation", {}).get("accuracy") or {}
    reward = facts.get("evaluation", {}).get("reward") or {}
    scale, unit = (100, " %") if accuracy else (1, "")
    measured = accuracy or reward
    if "fused" in measured.get("models", {}):
        value = measured["models"]["fused"]["all"]
        label = "fused, held-out " + ("accuracy" if accuracy else "reward")
        yield label, f"{_scaled(value['mean'], scale)}{unit}", _interval(value, scale)
        for name, gain in list(measured["contrasts"].items())[:1]:
            shown = f"{_scaled(gain['mean'], scale, '+')}{unit and ' points'}"
            yield name.replace(" - ", " − "), shown, f"paired, {_interval(gain, scale, '+')}"
    seconds = busy([(s["started"], s["ended"]) for s in facts["steps"] if "ended" in s])
    tokens = sum((step["spent"] or {}).get("output_tokens", 0) for step in facts["steps"])
    failed = sum(step.get("failed", 0) for step in facts["steps"])
    note = f"{tokens:,} answer tokens" if tokens else f"{failed:,} failed rows"
    yield "time at work", duration(seconds), note


def _interval(estimate: Row, scale: int, sign: str = "") -> str:
    low, high = (_scaled(estimate[n], scale, sign) for n in ("low", "high"))
    return f"95 % [{low}, {high}]"


def _scaled(value: float | None, scale: int, sign: str = "") -> str:
    digits = 1 if scale == 100 else 2
    return "–" if value is None else f"{value * scale:{sign}.{digits}f}".replace("-", "−")


# --- steps -----------------------------------------------------------------------------------


def _chain(facts: Row) -> list[Row]:
    """The steps, each with the position of its bar on the timeline, in percent."""
    done = [step for step in facts["steps"] if step["state"] == "done"]
    places = _places([(s["started"], s["ended"]) for s in done])
    bars = dict(zip((s["key"] for s in done), places, strict=True))
    colors = palette(facts)
    return [
        step
        | {
            "bar": bars.get(step["key"]),
            "color": colors[step["source"] or TRAINED.get(step["step"], step["step"])],
            "time": duration(step["seconds"]) if "seconds" in step else "",
            "first": i == 0 or facts["steps"][i - 1]["stage"] != step["stage"],
        }
        for i, step in enumerate(facts["steps"])
    ]


def busy(spans: list[tuple[float, float]]) -> float:
    """Total seconds covered by at least one span."""
    total, end = 0.0, -math.inf
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def _places(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(left, width) of each span in percent of the timeline, with idle times removed."""
    cuts: list[tuple[float, float]] = []  # (where a busy time begins, idle time before it)
    end, idle = (min(s for s, _ in spans) if spans else 0.0), 0.0
    start = end
    for low, high in sorted(spans):
        if low > end:
            idle += low - end
        cuts.append((low, idle))
        end = max(end, high)
    total = max(end - start - idle, 1e-9)

    def place(time: float) -> float:
        before = [idle for low, idle in cuts if low <= time]
        return 100 * (time - start - (before[-1] if before else 0)) / total

    return [
        (round(place(low), 2), round(max(100 * (high - low) / total, 0.3), 2))
        for low, high in spans
    ]


def _spending(facts: Row) -> Row:
    """{`columns`: names, `rows`: [(step, [(spent, planned)])]}, without empty columns."""
    told = {
        "rows": ("rows", "{:,.0f}".format),
        "answer tokens": ("output_tokens", "{:,.0f}".format),
        "time": ("seconds", duration),
        "GPU-hours": ("gpu_hours", "{:,.2f}".format),
        "money": ("money", "{:,.2f}".format),
    }
    rows = []
    for step in facts["steps"]:
        spent, plan = step | (step["spent"] or {}), step["plan"] or {}
        cells = [
            tuple(say(found[name]) if found.get(name) else "" for found in (spent, plan))
            for name, say in told.values()
        ]
        rows.append((step["step"], cells))
    kept = [i for i in range(len(told)) if any(any(cells[i]) for _, cells in rows)]
    columns = [list(told)[i] for i in kept]
    return {"columns": columns, "rows": [(n, [cells[i] for i in kept]) for n, cells in rows]}


def _margins(curves: Row) -> Table:
    rows = [
        [label, *map(number, found), number(found[1] - found[0])]
        for metric, label in MARGINS.items()
        if (found := ends(curves.get(metric, [])))
    ]
    return [["of the training rows", "before", "after", "change"], *rows]


# --- evaluation and failures -----------------------------------------------------------------


def _evaluation(facts: Row) -> Iterator[tuple[str, Table]]:
    table = facts.get("evaluation")
    for measure, title, scale in (
        ("accuracy", "Verifier accuracy on held-out prompts, %", 100),
        ("reward", "Mean reward on held-out prompts", 1),
    ):
        if table and measure in table:
            groups = [g for g in table["groups"] if g != "all"]
            rows = [
                [
                    name,
                    f"{_scaled(row['all']['mean'], scale)} {_interval(row['all'], scale)[5:]}",
                    *(_scaled(row[g]["mean"], scale) for g in groups),
                ]
                for name, row in table[measure]["models"].items()
            ]
            yield title, [["model", "all [95 %]", *groups], *rows]
    if "comparison" in facts:
        yield from tables(facts["comparison"])


def _left_out(facts: Row) -> Iterator[tuple[str, str, int]]:
    """(step, reason, rows) of rows that a rule dropped; they are no failures."""
    for step, counts in facts["counts"].items():
        for name, count in counts.items():
            kind, _, reason = name.partition(".")
            if count and kind in ("dropped", "answers"):
                told = reason.replace("_", " ").replace(".", ", ") or "dropped"
                yield step, f"answers: {told}" if kind == "answers" else told, count


def _notes(facts: Row) -> Iterator[tuple[str, str]]:
    """(step, text) of what a reader has to know of recorded answers."""
    for step in facts["steps"]:
        yield from ((step["step"], text) for text in (step["note"], step.get("told")) if text)


def _read(facts: Row) -> str:
    """The number of rows in the distributions, as text."""
    answers, pairs = (facts["distributions"][name]["rows"] for name in ("answers", "pairs"))
    parts = [f"{answers:,} answers"] * bool(answers) + [f"{pairs:,} preference rows"] * bool(pairs)
    return " and ".join(parts)


def duration(seconds: float) -> str:
    """Such as 2 h 05 min, 12 min 3 s, 31 s or 0.4 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02} min"
    return f"{minutes} min {rest} s" if minutes else f"{math.floor(seconds + 0.5)} s"
