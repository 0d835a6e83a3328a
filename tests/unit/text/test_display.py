"""Names and texts of files as they are shown: none steers a terminal or a page."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import NAMES

from wrpo_ray.text.display import fenced, markdown, one_line, printable

PLAIN = ["llama-3.1_8B", "Größe 5 µm", "日本語", "👩‍🔬", "שלום", "[31.3, 35.7]", "+1.6", "a (b)"]


@pytest.mark.parametrize("text", NAMES)
def test_no_text_steers_a_terminal(text):
    shown = printable(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800]", shown)
    assert "\n" not in one_line(text)
    assert json.loads(f'"{printable(json.dumps(text, ensure_ascii=False)[1:-1])}"') == text


@pytest.mark.parametrize("text", PLAIN)
def test_a_text_without_tricks_is_shown_as_it_is(text):
    assert printable(text) == one_line(text) == markdown(text) == text
    assert printable(f"{text}\n\t{text}") == f"{text}\n\t{text}"


@pytest.mark.parametrize("text", NAMES)
def test_no_text_is_more_than_text_in_markdown(text):
    """As a renderer of Markdown reads it, in a table and in a block of code."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    page = parser.parse(f"| a | b |\n| --- | --- |\n| {markdown(text)} | {markdown('x')} |\n")
    cells = [token for token in page if token.type == "inline"]
    assert len(cells) == 4
    kinds = {child.type for cell in cells for child in cell.children or ()}
    assert kinds <= {"text", "text_special"}, kinds
    shown = "".join(child.content for child in cells[2].children or ())
    assert shown == one_line(text).strip()
    (block,) = parser.parse(fenced(text, "yaml"))
    assert (block.type, block.content) == ("fence", f"{printable(text)}\n")


@given(st.text())
def test_whatever_a_text_holds(text):
    kinds = {unicodedata.category(c) for c in printable(text) if c not in "\n\t"}
    assert not kinds & {"Cc", "Cs", "Zl", "Zp"}
    assert "\n" not in markdown(text)
