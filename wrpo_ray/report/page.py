"""`report.html`: one file, with nothing from elsewhere, of less than `MOST` bytes.

Whatever models wrote is untrusted: Jinja escapes it, and rows are JSON in which no `<` stands,
which the page's script shows as text only.
"""

from __future__ import annotations

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
"""In the folder `report`: what the page was made of."""
MOST = 5_000_000
"""Bytes of the page, at most."""
ROWS_BYTES = 3_000_000
"""Of them, rows to browse."""
TEXT, OTHER, PROMPT = 4000, 1200, 4000
"""Characters that are shown of y_ws, y_wt and y_l, of another candidate, and of a prompt."""
Row = dict[str, Any]


def write(root: Folder, outline: Outline, *, is_running: bool = False) -> bool:
    """Write the report into the output, unless it tells the same already; whether it did."""
    facts = gather(root, outline, is_running=is_running)
    state = {"facts": digest(facts), "page": digest(_source())}
    kept = root / KEPT
    if root.exists(FILE) and kept.holds_json(STATE, state):
        return False
    root.write(FILE, render(facts).encode())
    kept.write_json(STATE, state)
    return True


def render(facts: Row) -> str:
    """The page."""
    from wrpo_ray.report.figures import figures, palette
    from wrpo_ray.report.view import view

    rows = fitting(facts["rows"], ROWS_BYTES)
    colors = palette(facts)
    names = dict.fromkeys(str(c[0]) for row in rows for c in row["candidates"])
    while True:
        data = {"rows": rows, "colors": {name: colors[name] for name in names}}
        page = template("report.html").render(
            view(facts), plots=figures(facts), config=_yaml(facts["config"]), rows=len(rows),
            data=embedded(data),
        )  # fmt: skip
        if len(page.encode()) < MOST or not rows:
            return page
        rows = rows[: len(rows) // 2]


def embedded(value: Any) -> str:
    """JSON that can stand in a <script>: it neither ends it nor opens a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode(errors="replace").decode()


def fitting(rows: list[Row], most: int) -> list[Row]:
    """As many of the first rows as take at most so many bytes, with long texts cut."""
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


def _yaml(config: Row) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


@cache
def _source() -> str:
    """All that makes a page of facts: another version writes it again."""
    files = sorted(resources.files(__package__).iterdir(), key=lambda file: file.name)
    kinds = (".py", ".html", ".css", ".js")
    return "".join(f.read_text(encoding="utf-8") for f in files if f.name.endswith(kinds))


@cache
def template(name: str) -> Any:
    """One of the package's pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("wrpo_ray.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: f"{value:,}"
    return environment.get_template(name)
