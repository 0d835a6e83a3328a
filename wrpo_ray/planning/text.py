"""A plan as text."""

import math
from collections.abc import Iterator

from wrpo_ray.planning.work import Plan, Work, phases, pools

HEAD = (
    "stage",
    "pool",
    "rows",
    "there",
    "prompt tok",
    "answer tok",
    "engines",
    "GPU-h",
    "money",
    "time",
    "lengths, rate",
)
WIDTHS = (9, 22, 11, 11, 11, 11, 8, 9, 10, 9)
NOTE = """\
there: rows that the output holds, at most what is skipped. time: on the clock, with engine starts.
input: lengths by texts in the input's first rows. guess: by the model's size, good to a factor of
two on GPUs, of three on CPUs, which differ; give `plan.rates`, or let a part run first."""


def plan_text(plan: Plan) -> str:
    """The output of `wrpo plan`."""
    lines = [_line(HEAD)]
    for stage in plan.stages:
        parts = phases([w for w in plan.works if w.stage == stage])
        works = [w for part in parts for w in (pools(part) if part[0].pool else part)]
        lines += [_line(_cells(plan, w)) for w in works]
        if len(works) > 1:
            lines.append(
                _line((stage, "", "", "", "", "", "", "", "", duration(plan.seconds(stage))))
            )
    notes = [*_memory(plan), *(f"{w.step}: {w.note}" for w in plan.works if w.note)]
    return "\n".join([*lines, "", *_totals(plan), "", *notes, NOTE, *_advice(plan)])


def _cells(plan: Plan, w: Work) -> tuple[str, ...]:
    name = w.pool or w.step
    counts = (w.stage, name, f"{w.rows:,}", f"{w.done:,}")
    if not w.pool:
        return counts
    return (
        *counts,
        count(w.prompt_tokens),
        count(w.output_tokens),
        f"{w.engines}x{w.gpus:g}" if w.gpus else str(w.engines),
        f"{w.gpu_seconds / 3600:,.1f}",
        f"{w.money(plan.prices):,.2f}",
        duration(w.seconds),
        ", ".join((w.lengths, w.rate)),
    )


def _line(cells: tuple[str, ...]) -> str:
    left = [f"{c:{w}}" for c, w in zip(cells[:2], WIDTHS[:2], strict=True)]
    right = [f"{c:>{w}}" for c, w in zip(cells[2:10], WIDTHS[2:], strict=False)]
    return " ".join([*left, *right, *(f" {c}" for c in cells[10:])]).rstrip()


def _totals(plan: Plan) -> Iterator[str]:
    totals = plan.totals()
    where = "with room for all engines at once"
    if plan.gpus or plan.cpus:
        where = f"on {plan.gpus:,} GPUs" if plan.gpus else f"on {plan.cpus:g} CPUs"
    yield (
        f"{count(totals['prompt_tokens'])} prompt tokens, {count(totals['output_tokens'])} answer "
        f"tokens, {totals['gpu_hours']:,.1f} GPU-hours, {totals['money']:,.2f} of money; "
        f"{duration(totals['seconds'])} {where}"
    )
    if plan.beside:
        path = ", ".join(f"{name} {duration(s)}" for name, s in plan.path() if s >= 1)
        yield f"SFT runs beside the sources; the critical path: {path}"
    low, high = plan.range()
    if high > 1.1 * low:
        yield f"by what is measured and guessed, between {duration(low)} and {duration(high)}"


def _memory(plan: Plan) -> list[str]:
    """Training memory, and an empty line."""
    return [*plan.memory, ""] if plan.memory else []


def _advice(plan: Plan) -> Iterator[str]:
    """Advice on too few buckets: an engine works on two, more balance the end (SIMULATION.md)."""
    sources = [w for w in plan.works if w.stage == "generate"]
    works = [w for w in sources if w.output_tokens and w.units < 4 * w.engines]
    if works:
        most = max(works, key=lambda w: w.engines)
        yield (
            f"storage.buckets: {most.units} are few for {most.engines} engines of {most.pool}; "
            f"set {2 ** math.ceil(math.log2(6 * most.engines))} before the first run"
        )


def count(number: float) -> str:
    """Such as 1.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Such as 2 h 05 min, 12 min, or 31 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02}" if minutes >= 60 else f"{minutes} min"
