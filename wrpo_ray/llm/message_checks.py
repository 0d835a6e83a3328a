"""Checks that a chat template writes every message of a conversation, each as its role's."""

import contextlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from wrpo_ray.data.records import Message
from wrpo_ray.errors import TemplateError
from wrpo_ray.llm.rendering import PROBE, render, without_whitespace

SPEAKERS = ("user", "assistant")
"""The roles that every template supports."""
UNWRITTEN = "give the model a chat template that writes it, or drop the message"


def check_written(tokenizer: Any, messages: list[Message]) -> None:
    """Check that the template writes every message, each as its role's.

    Raises:
        TemplateError: it does not. A template that rejects the roles raises its own error.
    """
    template = tokenizer.chat_template
    text = json.dumps(template) if isinstance(template, dict) else template
    for index, fault in _unwritten(tokenizer, text, tuple(m["role"] for m in messages)):
        if messages[index]["content"].strip():
            role = messages[index]["role"]
            raise TemplateError(f"chat template: {fault.format(role=role)}; {UNWRITTEN}")


def check_said(messages: list[Message], written: str, write: Callable[[Any], str]) -> None:
    """Check that something of every text is in `written`, the conversation that `write` renders.

    A template may leave out part of a message, such as its reasoning, but not all of it.

    Raises:
        TemplateError: nothing is written of a text that is not empty.
    """
    if _in_order(messages, written):
        return
    for index, message in enumerate(messages):
        if not message["content"].strip():
            continue
        for empty in ("", " "):  # some templates leave out the header of an empty message
            without = [*messages[:index], message | {"content": empty}, *messages[index + 1 :]]
            if without_whitespace(write(without)) == without_whitespace(written):
                raise TemplateError(
                    f"chat template: writes nothing of what a message of role {message['role']!r} "
                    f"says; {UNWRITTEN}"
                )


def _in_order(messages: list[Message], written: str) -> bool:
    """Whether a conversation contains all texts in order; white space around them is ignored."""
    place = 0
    for message in messages:
        text = message["content"].strip()
        place = written.find(text, place)
        if place < 0:
            return False
        place += len(text)
    return True


@lru_cache(maxsize=1024)
def _unwritten(tokenizer: Any, _: str, roles: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Return (index, fault) of each message that is not written, for a sequence of roles.

    Found by rendering known texts, once for each template and sequence of roles.
    """
    whole = _written(tokenizer, roles)
    if whole is None:
        return ()
    lost = [i for i in range(len(roles)) if _numbered(i).casefold() not in whole.casefold()]
    taken = [i for i, role in enumerate(roles) if role not in SPEAKERS and i not in lost]
    if taken and _tells_roles(tokenizer):
        taken = [i for i in taken if _written(tokenizer, _replaced(roles, i)) == whole]
    else:
        taken = []
    leaves, takes = "leaves out a message of role {role!r}", "writes a message of role {role!r} as "
    faults = [(i, leaves) for i in lost] + [(i, takes + "the assistant's") for i in taken]
    return tuple(sorted(faults))


def _numbered(index: int) -> str:
    return f"{PROBE}{index}."


def _replaced(roles: tuple[str, ...], index: int) -> tuple[str, ...]:
    return (*roles[:index], "assistant", *roles[index + 1 :])


def _written(tokenizer: Any, roles: tuple[str, ...]) -> str | None:
    """Return a conversation of these roles; None if the template rejects it."""
    messages = [{"role": role, "content": _numbered(i)} for i, role in enumerate(roles)]
    with contextlib.suppress(TemplateError):
        return render(messages, tokenizer, add_generation_prompt=roles[-1:] != ("assistant",))
    return None


def _tells_roles(tokenizer: Any) -> bool:
    """Whether the template writes a user's message and an assistant's differently."""
    asked = [{"role": role, "content": PROBE} for role in SPEAKERS]
    with contextlib.suppress(TemplateError):
        return render(asked[:1], tokenizer) != render(asked[1:], tokenizer)
    return True
