"""The tables and plots of docs/study.md, from what `wrpo study` found.

    python benchmarks/study.py out/study/study.json

copies the result to docs/study.json, writes the tables between the marks in docs/study.md, and the
plots. Without an argument docs/study.json is read.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
Row = dict[str, Any]
CLAIMS = {
    "SFT on y_ws > target": "sft - target",
    "DPO on own answers > target": "dpo - target",
    "DPO > SFT": "dpo - sft",
    "SFT-DPO > SFT": "sft-dpo - sft",
    "SFT-DPO > DPO": "sft-dpo - dpo",
    "SFT-WRPO > SFT-DPO": "wrpo - sft-dpo",
    "SFT-WRPO > DPO": "wrpo - dpo",
    "alpha: dynamic > static at the same end": "wrpo - wrpo-static",
    "alpha: dynamic > static of the same mean": "wrpo - wrpo-static-mean",
    "sources: 2 > 1": "wrpo-2-sources - wrpo-1-source",
    "sources: 3 > 2": "wrpo - wrpo-2-sources",
}
"""The paper's orderings, and the contrast that tells of each."""
COLORS = {"near": "#1b6ca8", "distant": "#c8553d"}


def verdicts_table(result: Row) -> list[str]:
    """Which of the paper's orderings hold, by whether the interval leaves out 0."""
    cases = result["cases"]
    lines = [f"| ordering in the paper | {' | '.join(cases)} |", "| --- |" + " --- |" * len(cases)]
    for claim, contrast in CLAIMS.items():
        rows = (case["accuracy"]["contrasts"].get(contrast) for case in cases.values())
        lines.append(f"| {' | '.join([claim, *map(verdict, rows)])} |")
    return lines


def verdict(row: Row | None) -> str:
    """What a difference says about an ordering."""
    if row is None:
        return "not run"
    said = "holds" if row["low"] > 0 else "**reversed**" if row["high"] < 0 else "not resolved"
    return f"{said}: {interval(row, 100, 1, '+')}"


def variants_table(result: Row) -> list[str]:
    """Accuracy and reward of each variant, case beside case."""
    cases = result["cases"]
    head = ["variant", *(f"{c}: {m}" for c in cases for m in ("right, %", "reward", "seeds"))]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in dict.fromkeys(n for c in cases.values() for n in c["accuracy"]["variants"]):
        cells = [name]
        for case in cases.values():
            right, reward = (case[m]["variants"].get(name) for m in ("accuracy", "reward"))
            cells += (
                [interval(right, 100, 1), interval(reward, 1, 2), str(len(right["seeds"]))]
                if right
                else ["-"] * 3
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def contrasts_table(result: Row) -> list[str]:
    """Paired differences in accuracy, points, case beside case."""
    cases = result["cases"]
    head = ["difference", *(f"{c}{m}" for c in cases for m in ("", ": seeds with this sign"))]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in dict.fromkeys(n for c in cases.values() for n in c["accuracy"]["contrasts"]):
        cells = [name.replace(" - ", " − ")]
        for case in cases.values():
            row = case["accuracy"]["contrasts"].get(name)
            cells += [resolved(row), same_sign(row)] if row else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def interval(row: Row, scale: float, digits: int, sign: str = "") -> str:
    """The mean [low, high]."""
    mean, low, high = (f"{scale * row[n]:{sign}.{digits}f}" for n in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def resolved(row: Row) -> str:
    """The interval in points, bold where it leaves out 0."""
    text = interval(row, 100, 1, "+")
    return f"**{text}**" if row["low"] > 0 or row["high"] < 0 else text


def same_sign(row: Row) -> str:
    """How many of the seeds have a difference of the mean's sign."""
    agree = sum(value * row["mean"] > 0 for value in row["seeds"].values())
    return f"{agree} of {len(row['seeds'])}"


def insert(text: str, name: str, lines: list[str]) -> str:
    """The text with a table between `<!-- name -->` and `<!-- end -->`."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    found, count = re.subn(
        pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.S
    )
    if count != 1:
        raise SystemExit(f"docs/study.md has {count} places for the table {name!r}")
    return found


# --- plots -------------------------------------------------------------------------------------


def plot(result: Row, kind: str, title: str, path: Path) -> None:
    """Means with intervals, and a dot for each seed; one panel a case."""
    cases = result["cases"]
    names = list(dict.fromkeys(n for c in cases.values() for n in c["accuracy"][kind]))
    size = 10, 0.8 + 0.32 * len(names)
    figure, (axes,) = plt.subplots(
        1, len(cases), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (case, measures) in zip(axes, cases.items(), strict=True):
        for place, row in rows_of(measures["accuracy"][kind], names):
            mean, low, high = (100 * row[n] for n in ("mean", "low", "high"))
            axis.plot([low, high], [place, place], color=COLORS[case], linewidth=2)
            axis.plot(mean, place, "o", color=COLORS[case])
            seeds = [100 * value for value in row["seeds"].values()]
            axis.plot(seeds, [place + 0.28] * len(seeds), ".", color="#999999", markersize=4)
        if kind == "contrasts":
            axis.axvline(0, color="#555555", linewidth=0.8)
        axis.set_title(f"{case} sources")
        axis.set_xlabel(title)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(names)), [name.replace(" - ", " − ") for name in names])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def rows_of(rows: dict[str, Row], names: list[str]) -> Iterator[tuple[int, Row]]:
    """(place from the top, row) of those that are there."""
    return ((place, rows[name]) for place, name in enumerate(names) if name in rows)


def main(arguments: list[str]) -> None:
    """Write all."""
    kept, page = DOCS / "study.json", DOCS / "study.md"
    if arguments:
        result = json.loads(Path(arguments[0]).read_text())
        kept.write_text(json.dumps(rounded(result), indent=1) + "\n")
    result, text = json.loads(kept.read_text()), page.read_text()
    text = insert(text, "verdicts", verdicts_table(result))
    text = insert(text, "variants", variants_table(result))
    page.write_text(insert(text, "contrasts", contrasts_table(result)))
    mpl.rcParams |= {"svg.hashsalt": "study", "font.size": 9}
    images = DOCS / "img"
    plot(result, "variants", "right answers, %", images / "study-variants.svg")
    plot(result, "contrasts", "difference, points", images / "study-contrasts.svg")


def rounded(value: Any) -> Any:
    """Floats with six digits after the point, which say more than there is to know."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return round(value, 6) if isinstance(value, float) else value


if __name__ == "__main__":
    main(sys.argv[1:])
