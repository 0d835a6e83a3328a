"""Plots as inline SVG: drawn by matplotlib, coloured by CSS variables of the page.

Each has a title and a description for screen readers, and its numbers as a table. CSS variables
allow light and dark mode, and a model has the same colour in all plots. Only `Figure` is used, not
the global state of pyplot, so that a thread can draw.
"""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from wrpo_ray.report.histogram import LEAST_EXPONENT, Histogram, shown
from wrpo_ray.storage.cache import node_cache

os.environ.setdefault("MPLCONFIGDIR", str(node_cache().folder / "matplotlib"))  # not in HOME

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDTH = 10.4
"""Width of a plot over the whole page, in inches of 72 points."""
COLORS = (
    "ink", "muted", "grid", "paper", "y_ws", "y_wt", "y_l", "target", "sft", "dpo", "fused",
    *(f"s{i}" for i in range(8)),
)  # fmt: skip
"""CSS variables."""
Table = list[list[str]]


@dataclass(frozen=True)
class Plot:
    """A plot with its description and numbers."""

    name: str
    title: str
    description: str
    svg: str
    table: Table = field(default_factory=list)
    """The first row has the names of the columns."""


@dataclass(frozen=True)
class Palette:
    """A colour for each model, the same in all plots."""

    sources: Sequence[str] = ()
    target: str = "target"
    others: Sequence[str] = ()

    def __getitem__(self, name: str) -> str:
        own = {
            self.target: "target", "target-sft": "sft", "target-dpo": "dpo", "fused": "fused",
            "y_ws": "y_ws", "y_wt": "y_wt", "y_l": "y_l",
        }  # fmt: skip
        if name in own:
            return own[name]
        known = [*self.sources, *self.others]
        return f"s{known.index(name) % 8}" if name in known else "muted"


# --- kinds of plots --------------------------------------------------------------------------


def bars(names: Sequence[str], values: Sequence[float], colors: Sequence[str], told: Any) -> Figure:
    """Horizontal bars, each with `told(value)` at its end."""
    figure, axes = _figure(0.34 * len(names) + 0.15, names, below=0.05)
    places = range(len(names))
    axes.barh(places, values, height=0.62, color=[_hex(c) for c in colors])
    axes.set_yticks(places, names, parse_math=False)
    axes.invert_yaxis()
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            told(value), (value, place), (5, 0), textcoords="offset points",
            va="center", fontsize=9, color=_hex("ink"),
        )  # fmt: skip
    axes.set_xlim(0, max([*values, 1e-9]) * 1.18)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return figure


def ridges(
    series: Sequence[tuple[str, str, Histogram]], label: str, least: int = LEAST_EXPONENT
) -> Figure:
    """A row of bars for each series over common bins, scaled to its maximum; a line at its mean."""
    edges, counts = shown([h for _, _, h in series], least)
    figure, axes = _figure(0.52 * len(series) + 0.5, [name for name, _, _ in series])
    for row, ((_, color, histogram), own) in enumerate(zip(series, counts, strict=True)):
        if own.sum():
            heights = 0.82 * own / own.max()
            axes.bar(
                edges[:-1], heights, np.diff(edges), bottom=-row, align="edge",
                color=_hex(color), linewidth=0.4, edgecolor=_hex("paper"),
            )  # fmt: skip
            axes.plot([histogram.mean] * 2, [-row, -row + 0.9], color=_hex("ink"), linewidth=1.4)
    axes.hlines(-np.arange(len(series)), *_ends(edges), color=_hex("grid"), linewidth=0.8)
    places = [-row + 0.35 for row in range(len(series))]
    axes.set_yticks(places, [name for name, _, _ in series], parse_math=False)
    axes.set_ylim(-len(series) + 0.92, 1)
    axes.set_xlim(*_ends(edges))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=least >= 0))
    axes.set_xlabel(label, fontsize=9, color=_hex("muted"))
    return figure


def _ends(edges: np.ndarray) -> tuple[float, float]:
    return (float(edges[0]), float(edges[-1])) if len(edges) else (0.0, 1.0)


def intervals(
    rows: Sequence[tuple[str, str, float, float, float]], label: str, width: float = WIDTH
) -> Figure:
    """A dot with an interval for each (name, colour, mean, low, high); a line at 0 if visible."""
    figure, axes = _figure(0.32 * len(rows) + 0.5, [row[0] for row in rows], width)
    for place, (_, color, mean, low, high) in enumerate(rows):
        axes.plot([low, high], [place, place], color=_hex(color), linewidth=2.2)
        axes.plot([mean], [place], "o", color=_hex(color), markersize=6)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.grid(True, color=_hex("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    if axes.get_xlim()[0] < 0 < axes.get_xlim()[1]:
        axes.axvline(0, color=_hex("muted"), linewidth=1)
    axes.set_xlabel(label, fontsize=9, color=_hex("muted"))
    return figure


@dataclass(frozen=True)
class Panel:
    """Curves over the same steps."""

    title: str
    curves: Sequence[tuple[str, str, Sequence[float | None]]]
    """(name, colour, values)"""


STYLES = ("-", (0, (5, 1.6)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
"""Line styles, so that lines differ without colour."""


def curves(steps: Sequence[float], panels: Sequence[Panel], columns: int = 3) -> Figure:
    """Small panels over the same steps: each curve faint, with its running mean on top."""
    rows = -(-len(panels) // columns)
    height = 1.95 * rows
    figure = Figure(figsize=(WIDTH, height))
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.05, 0.25 / height, 0.995, 1 - 0.25 / height, 0.22, 0.42)
    for axes, panel in zip(grid.ravel(), panels, strict=False):
        _dress(axes)
        axes.yaxis.grid(True, color=_hex("grid"), linewidth=0.8)
        axes.set_title(panel.title, fontsize=9.5, color=_hex("ink"), loc="left", pad=5)
        for number, (name, color, values) in enumerate(panel.curves):
            _curve(axes, steps, values, name, color, STYLES[number % len(STYLES)])
        if len(panel.curves) > 1:
            axes.legend(
                fontsize=8, frameon=False, labelcolor=_hex("ink"), handlelength=2.2, borderpad=0.1,
                labelspacing=0.25,
            )  # fmt: skip
        _widen(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in grid.ravel()[len(panels) :]:
        axes.remove()
    return figure


def _widen(axes: Any) -> None:
    """Widen the axis of almost constant curves, whose tick labels would all be equal."""
    low, high = axes.dataLim.intervaly
    if high - low <= 1e-3 * abs(high):
        axes.set_ylim(0, 1.6 * high or 1)


def _curve(
    axes: Any, steps: Sequence[float], values: Sequence[float | None], name: str, color: str,
    style: Any,
) -> None:  # fmt: skip
    known = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    x, y = np.array(known, float).reshape(-1, 2).T
    smooth = _running_mean(y)
    if len(y) > 30:
        axes.plot(x, y, color=_hex(color), linewidth=0.8, alpha=0.28)
    axes.plot(x, smooth, color=_hex(color), linewidth=1.7, linestyle=style, label=name)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the values, fewer at the ends."""
    reach = len(values) // 40
    sums = np.append(0, np.cumsum(values))
    places = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(places, places[::-1]))
    means: np.ndarray = (sums[places + reaches + 1] - sums[places - reaches]) / (2 * reaches + 1)
    return means


# --- SVG -------------------------------------------------------------------------------------


def svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Render a figure as an <svg> whose ids begin with `name`."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata=_NO_METADATA)
    return _standing(stream.getvalue(), name, title, description)


_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _standing(text: str, name: str, title: str, description: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"#0a00([0-9a-f]{2})", lambda m: f"var(--{COLORS[int(m[1], 16)]})", text)
    text = re.sub(r"font-family: [^;\"]*|(font: [^;\"]*?px) [^;\"]*", _font, text)
    used = set(re.findall(r"#([A-Za-z][\w-]*)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*?([\d.]+) [\d.]+"', text)
    width = f' style="max-width:{float(box[1]) * 4 / 3:.0f}px"' if box else ""
    labels = f'role="img" aria-labelledby="{name}-title {name}-text"'
    head = f"<svg {box[0] if box else ''}{width} {labels}>"
    told = f'<title id="{name}-title">{escape(title)}</title>'
    told += f'<desc id="{name}-text">{escape(description)}</desc>'
    return re.sub(r"\n\s*", "\n", head + told + text[text.index(">") + 1 :])


def _font(match: re.Match[str]) -> str:
    return f"{match[1]} inherit" if match[1] else "font-family: inherit"


def _hex(color: str) -> str:
    """The placeholder colour of a CSS variable while matplotlib draws."""
    return f"#0a00{COLORS.index(color):02x}"


def _figure(
    height: float, names: Sequence[str], width: float = WIDTH, below: float = 0.42
) -> tuple[Figure, Any]:
    """A figure with space for names at its left and `below` inches under it.

    matplotlib's automatic layout would draw everything twice.
    """
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    longest = max([len(name) for name in names], default=0)
    left = min(0.078 * longest + 0.15, 0.4 * width)
    figure.subplots_adjust(left / width, below / height, 1 - 0.05 / width, 1 - 0.04 / height)
    _dress(axes)
    axes.tick_params(axis="y", length=0, labelsize=9.5, labelcolor=_hex("ink"))
    return figure, axes


def _dress(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_hex("grid"))
    axes.set_facecolor("none")
    axes.tick_params(colors=_hex("muted"), labelsize=8.5, length=0, pad=4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


# --- numbers ---------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Format with about `digits` significant digits, as 12,345, 1.25, 0.0031 or 4.5e-07."""
    if value is None or not np.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace("-", "−")
    if abs(value) < 1e-4:
        return f"{value:.1e}".replace(".0e", "e").replace("-", "−")
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    text = f"{value:.{places}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
