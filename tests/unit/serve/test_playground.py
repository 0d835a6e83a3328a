"""The playground in a real browser: keyboard alone, answers side by side, light and dark."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from support.in_browser import findings
from test_serve import DONE, KEY, LINES, Noted, Rewarded, Scripted, chunk, usage

from wrpo_ray import config
from wrpo_ray.serve.api import create
from wrpo_ray.serve.backends import LostError
from wrpo_ray.serve.keys import Keys

NAMES = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An endpoint with four models: the first two stream slowly, the third breaks off."""
    slow = [[chunk("a<b>&")], 0.4, [chunk(" and b")], 0.4, [usage(5, 7), DONE]]
    models = dict(
        zip(NAMES, map(Scripted, [slow, slow, [[chunk("x")], LostError()], slow]), strict=True)
    )
    tree = {
        "models": [{"name": name, "model": "folder"} for name in NAMES],
        "reward": {"name": "helpful", "model": "folder"},
    }
    app = create(config.serving(tree), models, Keys(LINES), Noted(), Rewarded(-1.25))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.told, page.asked = [], []
    page.on("console", lambda message: page.told.append(message.text))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(url)
    yield page
    context.close()


def test_by_keyboard_three_models_answer_side_by_side(page: Any, url: str):
    page.keyboard.press("Tab")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#ask:visible")
    boxes = page.locator("#models input")
    assert [boxes.nth(i).is_checked() for i in range(4)] == [True, True, True, False]
    assert boxes.nth(3).is_disabled(), "three at the most"
    page.keyboard.type("What?")  # the focus is on the prompt
    page.keyboard.press("Control+Enter")
    articles = page.locator("article")
    articles.nth(1).get_by_text("a<b>&").wait_for()
    assert "tokens" not in articles.nth(0).inner_text(), "text comes before the end"
    page.get_by_text("2 of 3 answers complete").wait_for()
    tops = {articles.nth(i).bounding_box()["y"] for i in range(3)}
    assert len(tops) == 1, "side by side"
    for i in range(2):
        assert articles.nth(i).locator(".text").inner_text() == "a<b>& and b"
        assert "5 + 7 tokens in" in articles.nth(i).inner_text()
        assert "tokens/s" in articles.nth(i).inner_text()
        assert "helpful -1.250" in articles.nth(i).inner_text()
    assert "was interrupted" in articles.nth(2).inner_text()
    assert page.told == []
    assert all(asked.startswith(url) for asked in page.asked)
    assert page.evaluate("JSON.stringify([localStorage.length, sessionStorage.length])") == "[0,0]"
    assert page.evaluate("document.cookie") == ""


def test_a_wrong_key_is_told_and_a_stopped_answer_stops(page: Any):
    page.fill("#key", "wrpo-wrong")
    page.keyboard.press("Enter")
    page.get_by_text("no valid API key").wait_for()
    assert not page.locator("#ask").is_visible()
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.fill("#prompt", "What?")
    page.keyboard.press("Control+Enter")
    page.locator("article").nth(0).get_by_text("a<b>&").wait_for()
    page.click("#stop")
    page.get_by_text("0 of 3 answers complete").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(page: Any, scheme: str):
    page.emulate_media(color_scheme=scheme)
    colors = page.evaluate(
        "[...'text quiet wrong'.split(' ')].map((name) => ["
        "getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim(),"
        "getComputedStyle(document.documentElement).getPropertyValue('--back').trim()])"
    )
    assert all(contrast(*pair) >= 4.5 for pair in colors), colors  # WCAG AA


def test_axe_finds_nothing(page: Any):
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#ask:visible")
    page.fill("#prompt", "What?")
    page.keyboard.press("Control+Enter")
    page.get_by_text("2 of 3 answers complete").wait_for()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert findings(page) == []


def contrast(first: str, second: str) -> float:
    """WCAG 2's ratio of two colours."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    digits = color.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(d * 2 for d in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
