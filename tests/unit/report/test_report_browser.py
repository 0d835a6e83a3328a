"""The report in a real browser: the rows by keyboard, no word in the console, axe finds nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.in_browser import findings
from support.made_run import MadeRun
from test_report import HOSTILE

from wrpo_ray.data.outline import read_outline
from wrpo_ray.report import compare_runs as comparing
from wrpo_ray.report import page
from wrpo_ray.report.facts import gather


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> MadeRun:
    """A run with hostile texts in prompts, answers, failures and a source's name."""
    sources = ("llama", "qwen", HOSTILE[0])
    texts = (*HOSTILE, *(f"some word{i}" for i in range(40)))
    run = MadeRun(tmp_path_factory.mktemp("made"), rows=64, sources=sources, texts=texts)
    run.write()
    page.write(run.root, read_outline(run.root))
    return run


@pytest.fixture
def opened(browser: Any, made: MadeRun) -> Iterator[Any]:
    context = browser.new_context(color_scheme="dark", viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.told, tab.asked = [], []
    tab.on("console", lambda message: tab.told.append(message.text))
    tab.on("pageerror", lambda error: tab.told.append(str(error)))
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.goto(f"file://{made.folder}/{page.FILE}")
    yield tab
    context.close()


def test_rows_are_found_and_read_by_keyboard(opened: Any):
    everything = opened.locator("#list button").count()
    opened.keyboard.press("/")
    opened.keyboard.type("WORD4 some")
    found = opened.locator("#list button").count()
    assert 0 < found < everything
    opened.keyboard.press("Control+A")
    opened.keyboard.press("Delete")
    assert opened.locator("#list button").count() == everything
    opened.locator("#list button").nth(0).focus()
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("ArrowDown")
    assert opened.locator("#list button").nth(2).get_attribute("aria-current") == "true"
    for role in ("y_ws", "y_wt", "y_l"):
        assert opened.locator(f"section[aria-label={role}] .text").inner_text()
    assert opened.locator("#detail tbody tr").count() == 8
    opened.select_option("#diff", "y_l")
    assert opened.locator("section[aria-label=y_ws] mark").count() > 0
    assert opened.locator("section[aria-label=y_l] mark").count() == 0
    opened.select_option("#kind", "selection")
    assert "SFT prompt" in opened.locator("#list .about").nth(0).inner_text()
    opened.fill("#search", "no row says this")
    assert opened.locator("#list button").count() == 0
    assert "0 of" in opened.locator("#found").inner_text()
    assert opened.evaluate("window.hit") is None
    assert opened.told == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_report(opened: Any, scheme: str):
    opened.emulate_media(color_scheme=scheme)
    opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    opened.select_option("#diff", "y_l")
    assert findings(opened) == []


def test_axe_finds_nothing_where_runs_are_compared(opened: Any, made: MadeRun, tmp_path):
    facts = gather(made.root, read_outline(made.root))
    other = facts | {"output": "other", "config": facts["config"] | {"seed": 7}}
    (tmp_path / "compare.html").write_text(comparing.html(comparing.compare([facts, other])))
    opened.goto(f"file://{tmp_path}/compare.html")
    assert opened.locator("tbody tr").count() > 5
    assert findings(opened) == []
    assert opened.told == []
