"""Correct answers to a prompt, one or several alternatives, stored as one text."""

import json

Reference = str | list[str]
"""The correct answer, or alternatives."""
JSON_MARK = "\N{INFORMATION SEPARATOR TWO}"
"""Begins a list in JSON; a single answer is stored as it is."""


def pack_reference(reference: Reference) -> str:
    """Return the `reference` column of a record."""
    if isinstance(reference, str) and not reference.startswith(JSON_MARK):
        return reference
    return JSON_MARK + json.dumps(reference, ensure_ascii=False)


def unpack_reference(text: str | None) -> Reference | None:
    """Return the argument of `pack_reference`; None for None."""
    if text is None or not text.startswith(JSON_MARK):
        return text
    reference: Reference = json.loads(text.removeprefix(JSON_MARK))
    return reference


def show_reference(reference: Reference | None) -> str | None:
    """Return a text to display: alternatives on separate lines, with `or` between them."""
    return "\nor\n".join(reference) if isinstance(reference, list) else reference
