"""The plots of a report, from its facts."""

from collections.abc import Iterator
from typing import Any

from wrpo_ray.report import plots
from wrpo_ray.report.histogram import LEAST_EXPONENT, Histogram
from wrpo_ray.report.plots import Palette, Panel, Plot, Table, number
from wrpo_ray.report.sample import BETWEEN, Distributions

Row = dict[str, Any]
MOST_SERIES = 24
"""Maximum models in one plot."""
HALF = 4.9
"""Width of a plot in half a page, in inches."""
CURVES = {
    "loss": ("Loss", {"loss": ("training", "fused"), "holdout/loss": ("held out", "muted")}),
    "rewards": (
        "Implicit rewards β·log(π/π_ref)",
        {f"rewards/{role}": (name, name) for role, name in (
            ("source_chosen", "y_ws"), ("target_chosen", "y_wt"), ("rejected", "y_l"),
        )},
    ),
    "accuracy": (
        "Chosen above rejected, share of rows",
        {
            "rewards/accuracies": ("weighted", "fused"),
            "rewards/accuracies_source": ("y_ws", "y_ws"),
            "rewards/accuracies_target": ("y_wt", "y_wt"),
        },
    ),
    "margins": (
        "Margin over y_l",
        {
            "rewards/margins": ("weighted", "fused"),
            "rewards/margins_source": ("y_ws", "y_ws"),
            "rewards/margins_target": ("y_wt", "y_wt"),
        },
    ),
    "alpha": ("α, the weight of y_ws", {"alpha": ("α", "fused")}),
    "grad_norm": ("Gradient norm", {"grad_norm": ("norm", "fused")}),
    "tokens": ("Tokens a second", {"tokens_per_s": ("tokens/s", "fused")}),
    "lr": ("Learning rate", {"lr": ("rate", "fused")}),
    "logps": (
        "Log-probs of answers",
        {f"logps/{role}": (name, name) for role, name in (
            ("source_chosen", "y_ws"), ("target_chosen", "y_wt"), ("rejected", "y_l"),
        )},
    ),
}  # fmt: skip
"""Panels of a training run: title, and its curves' names and colours by metric."""


def palette(facts: Row) -> Palette:
    """The colours of the models of a run."""
    answers = facts["distributions"]["answers"]["series"]
    measures = [facts.get("evaluation", {}).get(m, {}) for m in ("accuracy", "reward")]
    compared = [name for measure in measures for name in measure.get("models", {})]
    known = {*facts["sources"], facts["target"], "target-sft", "target-dpo", "fused"}
    others = dict.fromkeys(name for name in [*_wins(facts), *answers, *compared])
    return Palette(
        facts["sources"], facts["target"] or "target", [n for n in others if n not in known]
    )


def figures(facts: Row) -> dict[str, Plot]:
    """Draw every plot that the facts have data for, by name."""
    colors = palette(facts)
    made = [
        *_wins_plot(facts, colors),
        *_distribution_plots(facts, colors),
        *_training_plots(facts),
        *_evaluation_plots(facts, colors),
    ]
    return {plot.name: plot for plot in made}


def _plot(name: str, title: str, description: str, figure: Any, table: Table) -> Plot:
    return Plot(name, title, description, plots.svg(figure, name, title, description), table)


# --- wins ------------------------------------------------------------------------------------


def _wins(facts: Row) -> dict[str, int]:
    counts = facts["counts"].get("select", {})
    wins = {k.removeprefix("wins."): v for k, v in counts.items() if k.startswith("wins.")}
    return dict(sorted(wins.items(), key=lambda item: -item[1]))


def _wins_plot(facts: Row, colors: Palette) -> Iterator[Plot]:
    wins = _wins(facts)
    total = sum(wins.values())
    if not total:
        return
    shares = {name: won / total for name, won in wins.items()}
    shown = dict(list(shares.items())[:MOST_SERIES])
    best = next(iter(wins))
    told = f"Of {total:,} prompts {best} has the best answer to {shares[best]:.1%}."
    figure = plots.bars(
        list(shown), list(shown.values()), [colors[name] for name in shown],
        lambda share: f"{share:.1%} · {round(share * total):,}",
    )  # fmt: skip
    rows = [[name, f"{won:,}", f"{shares[name]:.1%}"] for name, won in wins.items()]
    yield _plot("wins", "y_ws by source", told, figure, [["source", "prompts", "share"], *rows])


# --- distributions ---------------------------------------------------------------------------


def _distribution_plots(facts: Row, colors: Palette) -> Iterator[Plot]:
    answers = Distributions.read(facts["distributions"]["answers"])
    pairs = Distributions.read(facts["distributions"]["pairs"])
    given = facts["config"].get("reward") or {}
    by_group = Distributions.read(facts["distributions"]["rewards"]).series
    own = "of each group on a scale of its own" if by_group else given.get("name")
    reward = f"reward ({own or 'as imported'})"
    order = {name: i for i, name in enumerate([*facts["sources"], facts["target"], "target-sft"])}
    named = dict(
        sorted(answers.series.items(), key=lambda item: order.get(item[0], -1))[:MOST_SERIES]
    )
    for what, data, series, title in (
        ("answers", answers, named, "of all answers, by model"),
        ("pairs", pairs, pairs.series, "of chosen and rejected answers"),
    ):
        is_split = what == "answers" and bool(by_group)
        rewards = dict(sorted(by_group.items())[:MOST_SERIES]) if is_split else series
        shown = {name: colors[name.rpartition(BETWEEN)[2]] for name in rewards}
        yield from _ridges(f"rewards-{what}", f"Rewards {title}", reward, rewards, "reward", shown)
        label, whole = f"length in {data.unit}", 0
        yield from _ridges(
            f"lengths-{what}", f"Lengths {title}", label, series, "length", colors, whole
        )
    yield from _ridges(
        "margins-data", "Reward margins of the preference rows", "difference of rewards",
        {n: m for n, m in pairs.series.items() if "margin" in m}, "margin",
        {"y_ws − y_wt": "y_ws", "y_wt − y_l": "y_wt"},
    )  # fmt: skip


def _ridges(
    name: str,
    title: str,
    label: str,
    series: dict[str, dict[str, Histogram]],
    measure: str,
    colors: Any,
    least: int = LEAST_EXPONENT,
) -> Iterator[Plot]:
    found = {n: m[measure] for n, m in series.items() if measure in m and m[measure].n}
    if not found:
        return
    means = ", ".join(f"{n} {number(h.mean)}" for n, h in list(found.items())[:8])
    figure = plots.ridges([(n, colors[n], h) for n, h in found.items()], label, least)
    rows = [
        [n, f"{h.n:,}", *(number(v) for v in (h.mean, *_quantiles(h), h.low, h.high))]
        for n, h in found.items()
    ]
    head = [["series", "count", "mean", "5 %", "median", "95 %", "least", "greatest"]]
    yield _plot(name, title, f"Means: {means}.", figure, head + rows)


def _quantiles(histogram: Histogram) -> list[float]:
    return [histogram.quantile(share) for share in (0.05, 0.5, 0.95)]


# --- training --------------------------------------------------------------------------------


def _training_plots(facts: Row) -> Iterator[Plot]:
    for name, training in facts["training"].items():
        curves = training["curves"]
        accent = {"sft": "sft", "dpo": "dpo"}.get(name, "fused")
        panels = []
        for title, wanted in CURVES.values():
            held = [
                (label, accent if color == "fused" else color, curves[metric])
                for metric, (label, color) in wanted.items()
                if any(v is not None for v in curves.get(metric, ()))
            ]
            panels += [Panel(title, held)] if held else []
        if not panels:
            continue
        steps = [step + 1 for step in curves["step"]]
        told = f"Metrics of {name} over {training['seen']:,} of {training['steps']:,} steps. "
        told += _ends_told(curves)
        yield _plot(
            f"training-{name}", f"Training of {name}", told, plots.curves(steps, panels),
            _ends_table(curves),
        )  # fmt: skip


def _ends_told(curves: Row) -> str:
    loss = ends(curves.get("loss", []))
    return f"The loss goes from {number(loss[0])} to {number(loss[1])}." if loss else ""


def ends(values: list[float | None]) -> tuple[float, float] | None:
    """The means of the first and the last twentieth of a curve, of at least one value each."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    width = max(1, len(known) // 20)
    return sum(known[:width]) / width, sum(known[-width:]) / width


def _ends_table(curves: Row) -> Table:
    rows = [
        [name, *map(number, found)]
        for name, values in curves.items()
        if name not in ("step", "steps") and (found := ends(values))
    ]
    return [["metric", "at the start", "at the end"], *rows]


# --- evaluation ------------------------------------------------------------------------------


def _evaluation_plots(facts: Row, colors: Palette) -> Iterator[Plot]:
    table = facts.get("evaluation", {})
    for measure, label, scale in (
        ("accuracy", "verifier accuracy on held-out prompts, %", 100),
        ("reward", "mean reward on held-out prompts", 1),
    ):
        if measure not in table:
            continue
        models, contrasts = table[measure]["models"], table[measure]["contrasts"]
        rows = [(name, colors[name], *_scaled(row["all"], scale)) for name, row in models.items()]
        yield from _intervals(f"evaluation-{measure}", f"Held-out {measure}", label, rows)
        rows = [(n, colors[n.split(" - ")[0]], *_scaled(e, scale)) for n, e in contrasts.items()]
        yield from _intervals(
            f"contrasts-{measure}", f"Paired differences of {measure}", f"difference of {label}",
            rows,
        )  # fmt: skip


def _scaled(estimate: Row, scale: int) -> tuple[float, ...]:
    return tuple(
        float("nan") if estimate[n] is None else scale * estimate[n]
        for n in ("mean", "low", "high")
    )


def _intervals(name: str, title: str, label: str, rows: list[Any]) -> Iterator[Plot]:
    rows = [row for row in rows if row[2] == row[2]]
    if not rows:
        return
    told = "; ".join(f"{n} {m:.1f} [{low:.1f}, {high:.1f}]" for n, _, m, low, high in rows)
    table = [[n, f"{m:.2f}", f"{low:.2f}", f"{high:.2f}"] for n, _, m, low, high in rows]
    figure = plots.intervals(rows, label, HALF)
    yield _plot(name, title, f"{told}.", figure, [["model", "mean", "low", "high"], *table])
