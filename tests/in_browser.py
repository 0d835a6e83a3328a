"""What is looked at in a real browser, and the pictures of the docs.

With WRPO_PICTURES set to a folder, tests that look at a page leave a picture of it there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from wrpo_ray.report import page


def look(browser: Any, file: Path, name: str) -> None:
    """A report is small, loads nothing, says nothing in the console, and its filter filters."""
    assert file.stat().st_size < page.MOST
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    told, asked = [], []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    rows = json.loads(tab.locator("#data").text_content())["rows"]
    for search, found in ((rows[-1]["id"], 1), ("no row says this", 0), ("", len(rows))):
        tab.fill("#search", search)
        assert tab.locator("#found").inner_text().startswith(f"{found:,} of {len(rows):,} ")
    assert told == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    picture(tab, name)
    tab.close()


def picture(tab: Any, name: str) -> None:
    """Of the whole page, where WRPO_PICTURES asks for it."""
    if folder := os.environ.get("WRPO_PICTURES"):
        tab.evaluate("document.activeElement.blur()")
        tab.screenshot(path=Path(folder, f"{name}.png"), full_page=True)
