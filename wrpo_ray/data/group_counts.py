"""Counts of a step by group of prompts, within the `counts` of its manifest.

A key is group/WHAT/GROUP, such as `group/rows/maths`; of the wins of a source it is
group/wins/SOURCE/GROUP. Names of sources have no slash, those of groups may have. Prompts of all
groups that the config does not name, and of no group, are counted under the group without a name.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MARK = "group/"
WINS = "wins/"
OTHERS = ""
"""All groups that the config does not name, and no group."""
Number = int | float


def key_of(what: str, group: str) -> str:
    """The key of a count."""
    return f"{MARK}{what}/{group}"


def sums_by_group(
    groups: pa.ChunkedArray, named: Sequence[str], columns: dict[str, Any]
) -> dict[str, Number]:
    """Sum columns {what: (N,) numbers or truth values} by the group (N,) of their rows."""
    places = pc.index_in(groups, value_set=pa.array(named, pa.string())).fill_null(len(named))
    codes = places.to_numpy()
    found: dict[str, Number] = {}
    for what, column in columns.items():
        sums = np.bincount(codes, weights=column, minlength=len(named) + 1).tolist()
        is_float = np.asarray(column).dtype.kind == "f"
        for group, value in zip((*named, OTHERS), sums, strict=True):
            found[key_of(what, group)] = value if is_float else round(value)
    return found


def read_counts(counts: dict[str, Number]) -> dict[str, dict[str, Number]]:
    """{group: {what: count}} of a manifest's counts; `what` of wins is `wins/SOURCE`."""
    found: dict[str, dict[str, Number]] = {}
    for key, value in counts.items():
        if not key.startswith(MARK):
            continue
        what, rest = key.removeprefix(MARK).split("/", 1)
        if f"{what}/" == WINS:
            source, rest = rest.split("/", 1)
            what = WINS + source
        found.setdefault(rest, {})[what] = value
    return found
