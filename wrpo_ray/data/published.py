"""The published form of preference rows, and ours.

`{prompt_id, prompt: {content, role}, chosen: [y_ws, y_wt], rejected: [y_l]}`, each answer
`{content, role: "assistant"}` (the method's released data sets). It holds neither rewards nor
sources, so a row read from it has none, and its margins are null.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa

from wrpo_ray.data.records import MESSAGES, Message, prompt_id

PUBLISHED = pa.schema(
    [("prompt_id", pa.string()), ("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES)]
)
"""As Parquet columns."""

Row = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Templates write a role between special tokens, so that another could spell one."""
ASKING = ("user", "tool")
"""Roles of the message that an answer follows."""
TEXT_KEYS = ("role", "content")
HARMLESS = frozenset(
    {
        *TEXT_KEYS,
        *("id", "message_id", "parent_id", "conversation_id", "turn", "turn_identifier"),
        *("timestamp", "created_at", "date", "model", "weight", "token_count", "tool_call_id"),
        *("language", "lang", "country", "state", "header", "hashed_ip", "toxic", "redacted"),
        "annotations",
    }
)
"""Keys of a message that are no part of what is said in it."""
THOUGHTS = frozenset({"reasoning", "reasoning_content"})
"""Keys of what an assistant thought, of which templates write nothing in turns that are over:
those before the last message of the user."""


class RowError(ValueError):
    """A row of the user's that cannot be used; its text is the reason."""


def parse_messages(prompt: Any) -> list[Message]:
    """A prompt as a conversation: from a string, a {role, content} record, or a list of them.

    Raises:
        RowError: it is empty, of another form, asks nothing, or a message holds more than text.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns:
        raise RowError("a prompt is a text, a {role, content} record or a list of them")
    asked = [i for i, t in enumerate(turns) if isinstance(t, dict) and t.get("role") == "user"]
    for index, turn in enumerate(turns):
        is_over = index <= max(asked, default=-1)
        fault = isinstance(turn, dict) and unknown_key(turn, thoughts=is_over)
        if fault:
            raise RowError(fault)
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in TEXT_KEYS):
            raise RowError("each message needs a text `role` and a text `content`")
        if turn["role"] not in ROLES:
            raise RowError(f"the role {turn['role'][:40]!r} is none of {', '.join(ROLES)}")
        check_text(turn["content"])
    if not turns[-1]["content"].strip():
        raise RowError("the prompt is empty")
    if fault := why_unanswerable([turn["role"] for turn in turns]):
        raise RowError(f"the prompt {fault}")
    return [{key: turn[key] for key in TEXT_KEYS} for turn in turns]


def why_unanswerable(roles: Sequence[str]) -> str | None:
    """Why nothing in a conversation of these roles is to be answered; None where something is."""
    if roles[-1] not in ASKING:
        article = "an" if roles[-1][0] in "ao" else "a"
        return f"ends with {article} {roles[-1]} message, so that nothing is asked"
    return None if "user" in roles else "has no user message, so that nothing is asked"


def unknown_key(message: Row, known: Collection[str] = (), *, thoughts: bool = True) -> str | None:
    """What of a message would be lost, as only its text is written; None where nothing is.

    Its thoughts are no loss where `thoughts` says that its turn is over.
    """
    known = {*HARMLESS, *known, *(["name"] if message.get("role") == "tool" else [])}
    known |= THOUGHTS if thoughts else set()
    for key, value in message.items():
        is_empty = value is None or value is False or value in ("", [], {})
        if key not in known and not is_empty:
            return f"a message has `{str(key)[:40]}`, which no prompt is written with; leave it out"
    return None


def check_text(text: str) -> str:
    """The text, if it can be stored.

    Raises:
        RowError: it holds half of a surrogate pair, as cut-off scraped text does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"the text is no Unicode at character {error.start}") from None
    return text


def from_published(row: Row) -> Row:
    """A PREFERENCE record.

    Raises:
        RowError: a part is missing or of another form.
    """
    messages = parse_messages(row.get("prompt"))
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, list) or len(chosen) != 2:
        raise RowError("`chosen` has to be a list of two answers, [y_ws, y_wt]")
    if not isinstance(rejected, list) or len(rejected) != 1:
        raise RowError("`rejected` has to be a list of one answer, [y_l]")
    return {
        "prompt_id": prompt_id(messages),
        "messages": messages,
        "source_chosen": _answer(chosen[0]),
        "target_chosen": _answer(chosen[1]),
        "rejected": _answer(rejected[0]),
        "source_margin": None,
        "target_margin": None,
        "candidates": [],
    }


def _answer(answer: Any) -> Row:
    if isinstance(answer, dict) and (fault := unknown_key(answer)):
        raise RowError(fault)
    if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
        raise RowError("each answer needs a text `content`")
    empty = dict.fromkeys(("token_ids", "finish_reason", "source", "sample", "reward"))
    return {"text": check_text(answer["content"])} | empty


def to_published(row: Row) -> Row:
    """A row of the published form from a PREFERENCE record."""
    messages = row["messages"]

    def said(name: str) -> Row:
        return {"content": row[name]["text"], "role": "assistant"}

    return {
        "prompt_id": row["prompt_id"],
        "prompt": messages[0] if len(messages) == 1 else messages,
        "chosen": [said("source_chosen"), said("target_chosen")],
        "rejected": [said("rejected")],
    }
