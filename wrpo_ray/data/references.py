"""The right answer to a prompt, or several of which any is right, as one text of a record."""

from __future__ import annotations

import json

Reference = str | list[str]
"""The right answer, or right answers."""
JSON_MARK = "\N{INFORMATION SEPARATOR TWO}"
"""In front of JSON; a reference of one answer is that answer itself."""


def pack_reference(reference: Reference) -> str:
    """As a record's `reference`."""
    if isinstance(reference, str) and not reference.startswith(JSON_MARK):
        return reference
    return JSON_MARK + json.dumps(reference, ensure_ascii=False)


def unpack_reference(text: str | None) -> Reference | None:
    """What `packed` was given; None of None."""
    if text is None or not text.startswith(JSON_MARK):
        return text
    return json.loads(text.removeprefix(JSON_MARK))


def show_reference(reference: Reference | None) -> str | None:
    """One text for those who read: several answers on lines of their own, with `or` between."""
    return "\nor\n".join(reference) if isinstance(reference, list) else reference
