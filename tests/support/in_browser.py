"""Checks of pages in a real browser, and screenshots for the docs.

With WRPO_PICTURES set to a folder, tests of pages write a screenshot of each there.
"""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from wrpo_ray.report import page

GAP, HIGH = 32, 1000
"""Pixels around a section, and the height of a screenshot."""


def look(browser: Any, file: Path, name: str, *sections: str) -> None:
    """Check that a report is small, requests and logs nothing, and that its filter works."""
    assert file.stat().st_size < page.MOST
    tab = browser.new_page(viewport={"width": 1000, "height": HIGH})
    logged, requested = [], []
    tab.on("console", lambda message: logged.append(message.text))
    tab.on("pageerror", lambda error: logged.append(str(error)))
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(file.as_uri())
    rows = json.loads(tab.locator("#data").text_content())["rows"]
    for search, found in ((rows[-1]["id"], 1), ("no row says this", 0), ("", len(rows))):
        tab.fill("#search", search)
        assert tab.locator("#found").inner_text().startswith(f"{found:,} of {len(rows):,} ")
    assert logged == []
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    picture(tab, name, *sections)
    tab.close()


def findings(tab: Any) -> list[str]:
    """Return the serious and critical accessibility problems that axe-core finds."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(tab, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{v['id']}: {node['target']} {node['html'][:200]}"
        for v in found
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"][:3]
    ]


def picture(tab: Any, name: str, *sections: str) -> None:
    """Save a screenshot of the page, or of its sections that begin with these elements."""
    folder = os.environ.get("WRPO_PICTURES")
    if not folder:
        return
    tab.evaluate("document.activeElement.blur()")
    file = Path(folder, f"{name}.png")
    if not sections:
        tab.screenshot(path=file, full_page=True)
        return
    shot = Image.open(BytesIO(tab.screenshot(full_page=True)))
    place = "(e) => e.getBoundingClientRect().top + scrollY"
    tops = [tab.locator(section).first.evaluate(place) for section in sections]
    column = tab.locator("main").bounding_box()
    left, right = column["x"] - GAP / 2, column["x"] + column["width"] + GAP / 2
    parts = [shot.crop((left, top - GAP, right, top - GAP + HIGH)) for top in tops]
    wide = parts[0].width + GAP // 4
    whole = Image.new("RGB", (len(parts) * wide - GAP // 4, HIGH), "#d8d8d8")
    for number, part in enumerate(parts):
        whole.paste(part, (number * wide, 0))
    whole.quantize(128).save(file, optimize=True)
