"""Texts from files and models where people read them: on a terminal, and in Markdown.

A name in a model's folder, a group of prompts or an error can hold anything: codes that a terminal
obeys, letters that reorder a line, HTML, links. HTML pages escape by Jinja (`report.page`).
"""

import re
import unicodedata

_KEPT = "\n\t"
_MARKDOWN = re.compile(r"[\\`|*~$]|\](?=[(\[:])")
"""Begins code, the next cell, emphasis or a formula, or the address of a link or picture."""
_FENCE = re.compile("`{3,}")


def printable(text: str) -> str:
    r"""Return a text whose control characters and marks of direction are spelled, as `\u001b`.

    New lines and tabs stay. So does JSON: inside its strings the spelling means the same.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in _KEPT or not _steers(c) else _spelled(c) for c in text)


def one_line(text: str) -> str:
    """Return `printable` text with single spaces for white space, new lines too."""
    return " ".join(printable(text).split())


def markdown(text: str) -> str:
    """Return the Markdown of a text that shows as it is: no HTML, link, code or further cell."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(lambda found: "\\" + found[0], escaped)


def fenced(text: str, kind: str = "") -> str:
    """Return a Markdown block of code that no line of the text can end."""
    fence = "`" * max([3, *(len(found) + 1 for found in _FENCE.findall(text))])
    return f"{fence}{kind}\n{printable(text)}\n{fence}"


def _steers(character: str) -> bool:
    """Whether it is a control, a mark of direction, or half a surrogate pair."""
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _DIRECTIONS


_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def _spelled(character: str) -> str:
    return f"\\u{ord(character):04x}"


def say(text: object) -> None:
    """Print a text, `printable`."""
    print(printable(str(text)))
