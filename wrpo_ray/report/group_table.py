"""Tables by group of prompts: prompts, y_ws by source, preference rows and mean rewards."""

from collections.abc import Mapping
from typing import Any

from wrpo_ray.data.group_counts import OTHERS, WINS, read_counts

Row = dict[str, Any]
Table = list[list[str]]
HEAD = ["group", "prompts", "with y_ws", "rows", "y_ws", "y_wt", "y_l"]
LONG = 32
"""Maximum characters of a group's name in a table, beside which its numbers have to fit."""
NO_CONFIG: Mapping[str, Any] = {}
TITLES = (
    "Prompts, preference rows and mean rewards by group",
    "y_ws by source, share of each group",
)


def by_group(
    select: Mapping[str, Any], pair: Mapping[str, Any], config: Mapping[str, Any] = NO_CONFIG
) -> dict[str, Row]:
    """Return what is known of each group, from the counts of selection and pairing.

    {group: {prompts, selected, wins {source: y_ws}, not_asked, rows, y_ws, y_wt, y_l}}: the last
    three are mean rewards, of the selection and of the preference rows; None without rows. A reward
    has a scale of its own, so they compare within a group. The group without a name is all others.
    `not_asked` are the sources that the config does not ask about the group.
    """
    only = {s.get("name"): s.get("groups") for s in config.get("sources") or ()}
    of_pair = read_counts(dict(pair))
    found = {}
    for group, own in read_counts(dict(select)).items():
        pairs = of_pair.get(group, {})
        if group == OTHERS and not own["prompts"]:
            continue
        rows = pairs.get("rows", 0)
        found[group] = {
            "prompts": own["prompts"],
            "selected": own["rows"],
            "wins": {n.removeprefix(WINS): v for n, v in own.items() if n.startswith(WINS)},
            "not_asked": [name for name, of in only.items() if of and group not in of],
            "rows": rows,
            "y_ws": _mean(own["reward"], own["rows"]),
            "y_wt": _mean(pairs.get("target_chosen", 0), rows),
            "y_l": _mean(pairs.get("rejected", 0), rows),
        }
    return found


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def tables(groups: Mapping[str, Row]) -> list[tuple[str, Table]]:
    """(title, header and rows) of both tables; none without groups.

    All other groups come last. Of sources and groups those that are more go down the second table.
    """
    if not groups:
        return []
    groups = dict(sorted(groups.items(), key=lambda item: item[0] == OTHERS))
    names = {group: _clipped(group) or "others" for group in groups}
    rows = [
        [
            names[group],
            *(f"{row[name]:,}" for name in ("prompts", "selected", "rows")),
            *("-" if row[name] is None else f"{row[name]:.3g}" for name in ("y_ws", "y_wt", "y_l")),
        ]
        for group, row in groups.items()
    ]
    sources = sorted(
        {name for row in groups.values() for name in (*row["wins"], *row["not_asked"])}
    )
    wins = [[source, *(_share(row, source) for row in groups.values())] for source in sources]
    shares = [["source", *names.values()], *wins]
    if len(groups) > len(sources):
        shares = [list(column) for column in zip(*shares, strict=True)]
        shares[0][0] = "group"
    return list(zip(TITLES, ([HEAD, *rows], shares), strict=True))


def _clipped(name: str) -> str:
    """A name with its middle left out if it is long: names often begin alike."""
    return name if len(name) <= LONG else f"{name[: LONG // 2]}…{name[-LONG // 2 + 1 :]}"


def _share(row: Row, source: str) -> str:
    if source in row["not_asked"]:
        return "not asked"
    return f"{row['wins'].get(source, 0) / row['selected']:.1%}" if row["selected"] else "-"
