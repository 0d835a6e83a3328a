"""Tables of a study as text."""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
TITLES = {"accuracy": ("Verifier accuracy, %", 100, 1), "reward": ("Mean reward", 1, 2)}
"""Title, scale and digits of each measure."""


def study_text(result: Row) -> str:
    """The result of a study, as printed by `wrpo study`."""
    return "\n\n".join(
        "\n".join(_table(name, measure, table))
        for name, measures in result["cases"].items()
        for measure, table in measures.items()
    )


def _table(case: str, measure: str, table: Row) -> Iterator[str]:
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
