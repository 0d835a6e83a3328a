"""Chats to prompts by `core.chat`, so that a model reads what it was trained to read.

Token ids go to vLLM in the field by which one of its servers hands a prompt on to another
(`kv_transfer_params`); it then renders nothing. Chats with tools are left to vLLM, which knows
how templates take them: there, text that spells a special token becomes that token. What the
template leaves out of a chat is refused, with tools or without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

from wrpo_ray.data.records import Message
from wrpo_ray.errors import TemplateError
from wrpo_ray.llm.chat import prompt_ids
from wrpo_ray.llm.message_checks import UNWRITTEN
from wrpo_ray.llm.rendering import PROBE, render


class Prompts:
    """Renders chats, one at a time and beside the event loop: a long one takes a while."""

    def __init__(self, tokenizer: Any, ends: Collection[int] = ()):
        self._tokenizer, self._thread = tokenizer, ThreadPoolExecutor(1, "prompts")
        self._ends = sorted(ends)

    def stopping(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a request, with every token id that ends a turn; vLLM knows some of them."""
        return body if body.get("ignore_eos") else body | {"stop_token_ids": self._ends}

    async def add(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a chat, with its prompt's token ids where no tools are in it.

        Raises:
            UserError: the template or the tokenizer cannot write the messages.
        """
        loop, messages = asyncio.get_running_loop(), body["messages"]
        tools = body.get("tools") if body.get("tool_choice") != "none" else None
        if body.get("tools") or any(_has_tools(message) for message in messages):
            shapes = tuple(_shape(message) for message in messages)
            check = partial(_check_shapes, self._tokenizer, shapes, bool(tools))
            await loop.run_in_executor(self._thread, check)
            return body
        texts = [plain(message) for message in messages]
        ids = await loop.run_in_executor(self._thread, prompt_ids, self._tokenizer, texts)
        return body | {"kv_transfer_params": {"prompt_token_ids": ids}}


def _has_tools(message: dict[str, Any]) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def plain(message: dict[str, Any]) -> Message:
    """A message with one text; parts are put together as vLLM does it."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}


# --- what a template leaves out of a chat with tools ---------------------------------------------

Shape = tuple[str, bool, int]
"""A message's role, whether it has a text, and how many calls of tools."""


def _shape(message: dict[str, Any]) -> Shape:
    has_text = bool(plain(message)["content"].strip())
    return message["role"], has_text, len(message.get("tool_calls") or ())


def _check_shapes(tokenizer: Any, shapes: tuple[Shape, ...], has_tools: bool) -> None:
    """Check that the template writes the texts and calls of such messages, and the tools.

    Raises:
        TemplateError: it does not; what it refuses itself is left to vLLM to tell.
    """
    if lost := _lost(tokenizer, shapes, has_tools):
        raise TemplateError(f"chat template: leaves out {lost}; {UNWRITTEN}")


@lru_cache(maxsize=1024)
def _lost(tokenizer: Any, shapes: tuple[Shape, ...], has_tools: bool) -> str | None:
    """What is not written of messages of these shapes with texts that are known."""
    probes = [_probe(i, shape) for i, shape in enumerate(shapes)]
    try:
        tools = [TOOL] if has_tools else None
        text = render(probes, tokenizer, add_generation_prompt=True, tools=tools)
    except TemplateError:
        return None
    if has_tools and TOOL["function"]["name"] not in text:
        return "`tools`"
    for probe in probes:
        if probe["content"] not in text:
            return f"a message of role {probe['role']!r}"
        if any(c["function"]["arguments"]["a"] not in text for c in probe.get("tool_calls", ())):
            return f"`tool_calls` of a message of role {probe['role']!r}"
    return None


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": f"{PROBE}_tool",
        "description": PROBE,
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}


def _probe(index: int, shape: Shape) -> dict[str, Any]:
    """A message of this shape; ids have the nine characters that Mistral's templates ask for."""
    role, has_text, calls = shape
    message: dict[str, Any] = {"role": role, "content": f"{PROBE}{index}." if has_text else ""}
    if calls:
        message["tool_calls"] = [_call(f"{PROBE}{index}-{n}.", f"{n:09}") for n in range(calls)]
    answered = {"tool_call_id": f"{0:09}", "name": f"{PROBE}_tool"}
    return message | answered if role == "tool" else message


def _call(text: str, key: str) -> dict[str, Any]:
    function = {"name": f"{PROBE}_tool", "arguments": {"a": text}}
    return {"id": key, "type": "function", "function": function}
