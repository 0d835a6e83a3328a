"""Tables of judged models as text, Markdown and HTML, next to the paper's own figures.

Rates are in percent. A cell shows how many games or answers were judged if some were not.
"""

import html as escaping
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

from wrpo_ray.text import display

Row = dict[str, Any]
Table = list[list[str]]
"""The first row has the names of the columns."""


def comparison_text(comparison: Row) -> str:
    """The tables of benchmarks and pairs as aligned text."""
    return "\n\n".join(
        f"{display.one_line(title)}\n{aligned(table)}"
        for title, table in tables(comparison, with_paper=False)
    )


def markdown(comparison: Row) -> str:
    """All tables as Markdown."""
    parts = []
    for title, table in tables(comparison):
        rows = ["| " + " | ".join(map(display.markdown, row)) + " |" for row in table]
        rule = "| --- |" + " ---: |" * (len(table[0]) - 1)
        parts.append("\n".join([f"## {display.markdown(title)}", "", rows[0], rule, *rows[1:]]))
    return "\n\n".join(parts) + "\n"


def html(comparison: Row) -> str:
    """All tables as one HTML page, without scripts or external resources."""
    parts = []
    for title, table in tables(comparison):
        head, *body = [_html_row(row, "td" if i else "th") for i, row in enumerate(table)]
        rows = "".join(f"<tr>{row}</tr>\n" for row in body)
        parts.append(
            f"<h2>{escaping.escape(title)}</h2>\n<table><thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{rows}</tbody></table>"
        )
    return _PAGE.format("\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Comparison of models</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8886; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
<h1>Comparison of models</h1>
{}
</html>
"""


def _html_row(row: list[str], tag: str) -> str:
    return "".join(f"<{tag}>{escaping.escape(cell)}</{tag}>" for cell in row)


def aligned(table: Table) -> str:
    """A table as text: the first column left-aligned, the others right-aligned."""
    table = [list(map(display.one_line, row)) for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in table]
    return "\n".join("  ".join(line).rstrip() for line in lines)


# --- tables ----------------------------------------------------------------------------------


def tables(comparison: Row, *, with_paper: bool = True) -> list[tuple[str, Table]]:
    """(title, table) of the benchmarks, the pairs and the paper's figures, if there are any."""
    found: list[tuple[str, Table]] = []
    judge = f", judged by {comparison['judge']}" if comparison["judge"] else ""
    if comparison["benchmarks"]:
        found.append((f"Benchmarks{judge}", _benchmarks(comparison["benchmarks"])))
    if comparison["pairs"]:
        found.append((f"Pairs on the run's own prompts{judge}, %", _pairs(comparison["pairs"])))
    if comparison["benchmarks"] and with_paper:
        paper = json.loads(resources.files(__package__).joinpath("paper.json").read_text())
        names = ["model", *(_COLUMNS[c][0] for c in paper["columns"])]
        rows = [[name, *map(str, values)] for name, values in paper["rows"].items()]
        found.append((paper["source"], [names, *rows]))
    return found


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _judged(figures: Row) -> str:
    """The number of judged answers if some failed; else empty."""
    failed, judged = figures["failed"], figures["judged"]
    return f" ({judged:,} of {judged + failed:,} judged)" if failed else ""


def _lc(figures: Row) -> str:
    rate, error = (figures[f"length_controlled_{n}"] for n in ("win_rate", "standard_error"))
    return f"{_number(rate)} ± {_number(error)}"


def _wr(figures: Row) -> str:
    rate, error = figures["win_rate"], figures["standard_error"]
    return f"{_number(rate)} ± {_number(error)}{_judged(figures)}"


def _arena(figures: Row) -> str:
    rate, low, high = (_number(figures[n]) for n in ("win_rate", "low", "high"))
    return f"{rate} [{low}, {high}]{_judged(figures)}"


def _arena_style(figures: Row) -> str:
    if "style_controlled" not in figures:
        return "-"
    rate, low, high = (_number(figures["style_controlled"][n]) for n in ("win_rate", "low", "high"))
    return f"{rate} [{low}, {high}]"


def _mt(figures: Row) -> str:
    overall = figures["overall"]
    return f"{_number(overall['mean'], 2)}{_judged(overall)}"


def _turns(figures: Row) -> str:
    return " / ".join(_number(mean["mean"], 2) for mean in figures["turns"].values())


_COLUMNS: dict[str, tuple[str, str, Callable[[Row], str]]] = {
    "alpaca_eval.lc": ("AlpacaEval 2 LC %", "alpaca_eval", _lc),
    "alpaca_eval.wr": ("AlpacaEval 2 WR %", "alpaca_eval", _wr),
    "arena_hard": ("Arena-Hard v0.1 WR %", "arena_hard", _arena),
    "arena_hard.style": ("Arena-Hard, style-controlled %", "arena_hard", _arena_style),
    "mt_bench": ("MT-Bench", "mt_bench", _mt),
    "mt_bench.turns": ("MT-Bench by turn", "mt_bench", _turns),
}
"""Name, benchmark and cell of each column."""


def _benchmarks(benchmarks: dict[str, dict[str, Row]]) -> Table:
    columns = [
        column
        for key, column in _COLUMNS.items()
        if column[1] in benchmarks and (key != "arena_hard.style" or _has_style(benchmarks))
    ]
    models = list(dict.fromkeys(m for figures in benchmarks.values() for m in figures))
    table = [["model", *(title for title, _, _ in columns), "tokens an answer"]]
    for model in models:
        cells = [
            cell(benchmarks[name][model]) if model in benchmarks[name] else "-"
            for _, name, cell in columns
        ]
        table.append([model, *cells, _tokens(model, benchmarks)])
    return table


def _has_style(benchmarks: dict[str, dict[str, Row]]) -> bool:
    return any("style_controlled" in figures for figures in benchmarks["arena_hard"].values())


def _tokens(model: str, benchmarks: dict[str, dict[str, Row]]) -> str:
    """Mean output tokens of an answer by benchmark, summed over the models that make it."""
    given = [f[model]["tokens"] for f in benchmarks.values() if model in f]
    return " / ".join("-" if tokens is None else f"{tokens:,.0f}" for tokens in given)


def _pairs(pairs: list[Row]) -> Table:
    table = [["pair", "by", "win", "tie", "loss", "win rate", "length-controlled", "prompts"]]
    for pair in pairs:
        shares = [_share(pair[name]) for name in ("win", "tie", "loss")]
        rates = [_estimate(pair[name]) for name in ("win_rate", "length_controlled")]
        judged, failed = pair["win_rate"]["n"], pair["failed"]
        of = f" of {judged + failed:,} judged" if failed else ""
        names = [f"{pair['a']} - {pair['b']}", pair["by"]]
        table.append([*names, *shares, *rates, f"{judged:,}{of}"])
    return table


def _share(estimate: Row) -> str:
    return _number(None if estimate["mean"] is None else 100 * estimate["mean"])


def _estimate(estimate: Row) -> str:
    mean, low, high = (
        _number(None if estimate[n] is None else 100 * estimate[n]) for n in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"
