"""Renders report.html from facts, figures and the template; one file without external resources.

Text from models is untrusted. Jinja escapes it; rows are JSON without `<`, which the page's
script inserts as text only.
"""

import json
from functools import cache
from importlib import resources
from typing import Any

import yaml

from wrpo_ray.data.outline import Outline
from wrpo_ray.report.facts import KEPT, gather
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

FILE = "report.html"
STATE = "page.json"
"""File in the folder `report` with fingerprints of the facts and the page's source."""
MOST = 5_000_000
"""Maximum bytes of the page."""
ROWS_BYTES = 3_000_000
"""Maximum bytes of the rows to browse."""
TEXT, OTHER, PROMPT = 4000, 1200, 4000
"""Maximum characters of y_ws, y_wt and y_l, of other candidates, and of prompts."""
Row = dict[str, Any]


def write(root: Folder, outline: Outline, *, is_running: bool = False) -> bool:
    """Write the report into the output; return False if it is up to date."""
    facts = gather(root, outline, is_running=is_running)
    state = {"facts": digest(facts), "page": digest(_source())}
    kept = root / KEPT
    if root.exists(FILE) and kept.holds_json(STATE, state):
        return False
    root.write(FILE, render(facts).encode())
    kept.write_json(STATE, state)
    return True


def render(facts: Row) -> str:
    """Render the page; with fewer rows if it would be too large."""
    from wrpo_ray.report.figures import figures, palette
    from wrpo_ray.report.view import view

    rows = fitting(facts["rows"], ROWS_BYTES)
    colors = palette(facts)
    names = dict.fromkeys(str(c[0]) for row in rows for c in row["candidates"])
    while True:
        data = {"rows": rows, "colors": {name: colors[name] for name in names}}
        page: str = template("report.html").render(
            view(facts), plots=figures(facts), rows=len(rows), data=embedded(data),
            config=yaml.safe_dump(facts["config"], sort_keys=False, allow_unicode=True),
        )  # fmt: skip
        if len(page.encode()) < MOST or not rows:
            return page
        rows = rows[: len(rows) // 2]


def embedded(value: Any) -> str:
    """JSON escaped for a <script>: it cannot end the script or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode(errors="replace").decode()


def fitting(rows: list[Row], most: int) -> list[Row]:
    """The first rows that fit into `most` bytes, with long texts truncated."""
    kept, size = [], 0
    for row in map(_cut_row, rows):
        size += len(embedded(row).encode())
        if size > most:
            break
        kept.append(row)
    return kept


def _cut_row(row: Row) -> Row:
    messages = [m | {"content": _cut(m["content"], PROMPT)} for m in row["messages"]]
    answers = {
        name: row[name] | {"text": _cut(row[name]["text"], TEXT)}
        for name in ("y_ws", "y_wt", "y_l")
        if name in row
    }
    candidates = [[*c[:3], _cut(c[3], OTHER), c[4]] for c in row["candidates"]]
    return row | answers | {"messages": messages, "candidates": candidates}


def _cut(text: str | None, most: int) -> str | None:
    if text is None or len(text) <= most:
        return text
    return f"{text[:most]}… ({len(text) - most:,} more characters)"


@cache
def _source() -> str:
    """The source of the page; a change makes `write` render it again."""
    files = sorted(resources.files(__package__).iterdir(), key=lambda file: file.name)
    kinds = (".py", ".html", ".css", ".js")
    return "".join(f.read_text(encoding="utf-8") for f in files if f.name.endswith(kinds))


@cache
def template(name: str) -> Any:
    """A template of the package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("wrpo_ray.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: f"{value:,}"
    return environment.get_template(name)
