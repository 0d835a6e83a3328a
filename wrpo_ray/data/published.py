"""Rows as users write them: prompts, and preference rows in the published form.

The WRPO authors' data sets have rows `{prompt_id, prompt: {content, role}, chosen: [y_ws, y_wt],
rejected: [y_l]}` with answers `{content, role: "assistant"}`. They hold neither rewards nor
sources, so a row read from them has none, and its margins are null.
"""

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa

from wrpo_ray.data.records import MESSAGES, AnswerRow, Message, PreferenceRow, prompt_id

PUBLISHED = pa.schema(
    [("prompt_id", pa.string()), ("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES)]
)
"""Parquet columns of the published form."""

Row = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Known roles. Templates write a role between special tokens, so it must not spell one."""
ANSWERED_ROLES = ("user", "tool")
"""Roles of messages that an answer can follow."""
TEXT_KEYS = ("role", "content")
IGNORED_KEYS = frozenset(
    {
        *TEXT_KEYS,
        *("id", "message_id", "parent_id", "conversation_id", "turn", "turn_identifier"),
        *("timestamp", "created_at", "date", "model", "weight", "token_count", "tool_call_id"),
        *("language", "lang", "country", "state", "header", "hashed_ip", "toxic", "redacted"),
        "annotations",
    }
)
"""Keys of a message that are no part of its text."""
REASONING_KEYS = frozenset({"reasoning", "reasoning_content"})
"""Keys of an assistant's reasoning. Templates leave it out in finished turns: those before the last
message of the user."""


class RowError(ValueError):
    """A user's row that cannot be used; the message is the reason."""


def parse_messages(prompt: Any) -> list[Message]:
    """Return a prompt, a string, a {role, content} record or a list of these, as a conversation.

    Raises:
        RowError: it is empty, has another form, ends with an answer, or a message holds more than
            text.
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
    """Why a conversation of these roles has nothing to answer; None if it has."""
    if roles[-1] not in ANSWERED_ROLES:
        article = "an" if roles[-1][0] in "ao" else "a"
        return f"ends with {article} {roles[-1]} message, so that nothing is asked"
    return None if "user" in roles else "has no user message, so that nothing is asked"


def unknown_key(message: Row, known: Collection[str] = (), *, thoughts: bool = True) -> str | None:
    """The key of a message that no prompt is written with, as a reason; None if there is none.

    With `thoughts`, the turn is finished, and the reasoning keys are ignored.
    """
    known = {*IGNORED_KEYS, *known, *(["name"] if message.get("role") == "tool" else [])}
    known |= REASONING_KEYS if thoughts else set()
    for key, value in message.items():
        is_empty = value is None or value is False or value in ("", [], {})
        if key not in known and not is_empty:
            return f"a message has `{str(key)[:40]}`, which no prompt is written with; leave it out"
    return None


def check_text(text: str) -> str:
    """Return the text if it is valid Unicode.

    Raises:
        RowError: it holds half of a surrogate pair, such as truncated scraped text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"the text is no Unicode at character {error.start}") from None
    return text


def from_published(row: Row) -> PreferenceRow:
    """Return a PREFERENCE record from a row of the published form.

    Raises:
        RowError: a part is missing or has another form.
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


def _answer(answer: Any) -> AnswerRow:
    if isinstance(answer, dict) and (fault := unknown_key(answer)):
        raise RowError(fault)
    if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
        raise RowError("each answer needs a text `content`")
    return {
        "text": check_text(answer["content"]),
        "token_ids": None,
        "finish_reason": None,
        "source": None,
        "sample": None,
        "reward": None,
    }
