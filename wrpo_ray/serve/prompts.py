"""Chats to prompts by `core.chat`, so that a model reads what it was trained to read.

Token ids go to vLLM in the field by which one of its servers hands a prompt on to another
(`kv_transfer_params`); it then renders nothing. Chats with tools are left to vLLM, which knows
how templates take them: there, text that spells a special token becomes that token.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from wrpo_ray.core.chat import prompt_ids
from wrpo_ray.core.records import Message


class Prompts:
    """Renders chats, one at a time and beside the event loop: a long one takes a while."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._thread = tokenizer, ThreadPoolExecutor(1, "prompts")

    async def add(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a chat, with its prompt's token ids where no tools are in it.

        Raises:
            UserError: the template or the tokenizer cannot write the messages.
        """
        messages = body["messages"]
        if body.get("tools") or any(_has_tools(message) for message in messages):
            return body
        loop, texts = asyncio.get_running_loop(), [plain(message) for message in messages]
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
