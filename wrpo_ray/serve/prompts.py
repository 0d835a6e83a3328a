"""Renders chats with `llm.chat`, so that a model reads the same tokens as in training.

Token ids are passed to vLLM in `kv_transfer_params`, the field by which one vLLM server passes a
prompt to another; vLLM then renders nothing. vLLM renders chats with tools itself: there, text that
spells a special token becomes that token. A chat is rejected if the template leaves out a part of
it, with tools or without.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, TypeVar

from wrpo_ray.data.records import Message
from wrpo_ray.errors import TemplateError, UserError
from wrpo_ray.llm.chat import prompt_ids
from wrpo_ray.llm.message_checks import UNWRITTEN
from wrpo_ray.llm.rendering import PROBE, render
from wrpo_ray.serve.fairness import FairQueue

T = TypeVar("T")


KEY: ContextVar[str] = ContextVar("key", default="-")
"""The key of the request that is being rendered."""


class Prompts:
    """Renders chats in a thread, so that a long one does not block the event loop.

    One chat is rendered at a time, of each key in turn.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int] = (), context: int | None = None):
        self._tokenizer, self._thread = tokenizer, ThreadPoolExecutor(1, "prompts")
        self._ends, self._turns = sorted(ends), FairQueue(lambda: 1)
        self._context = context
        self._token_lengths = longest_tokens(tokenizer)

    def check_length(self, body: dict[str, Any]) -> None:
        """Check that a prompt of so many characters may fit the context, before it is tokenized.

        Raises:
            UserError: it cannot.
        """
        if self._context is None:
            return
        chat, prompt = body.get("messages"), body.get("prompt", ())
        texts = [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)]
        if chat:
            texts = ["".join(plain(message)["content"] for message in chat)]
        is_text = chat and not _has_tools(body)  # where no special token can be spelled
        most = self._context * self._token_lengths[not is_text]
        given = max(map(len, texts), default=0)
        if given > most:
            field = "messages" if chat else "prompt"
            text = f"{given} characters; the model's context of {self._context} tokens has room"
            raise UserError(f"{field}: {text} for {most} at most")

    def take_turns(self, renderer: Any) -> None:
        """Let vLLM's renderer take turns too: it renders chats with tools, and completions."""

        def in_turn(render: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def rendered(*given: Any, **named: Any) -> Any:
                async with self._turns.place(KEY.get()):
                    return await render(*given, **named)

            return rendered

        for name in ("_tokenize_prompt_async", "_apply_chat_template_async"):
            setattr(renderer, name, in_turn(getattr(renderer, name)))

    async def _in_thread(self, function: Callable[..., T], *given: Any) -> T:
        async with self._turns.place(KEY.get()):
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *given)

    def stopping(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body with every token id that ends a turn; vLLM knows only some of them."""
        return body if body.get("ignore_eos") else body | {"stop_token_ids": self._ends}

    async def add(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a chat, with the token ids of its prompt if it has no tools.

        Raises:
            UserError: the template or the tokenizer cannot render the messages.
        """
        messages = body["messages"]
        tools = body.get("tools") if body.get("tool_choice") != "none" else None
        if _has_tools(body):
            shapes = tuple(_shape(message) for message in messages)
            await self._in_thread(_check_shapes, self._tokenizer, shapes, bool(tools))
            return body
        texts = [plain(message) for message in messages]
        ids = await self._in_thread(prompt_ids, self._tokenizer, texts)
        return body | {"kv_transfer_params": {"prompt_token_ids": ids}}


def longest_tokens(tokenizer: Any) -> tuple[int, int]:
    """Return the characters of the longest token: of those that are not special, and of all."""
    special = set(tokenizer.all_special_tokens)
    lengths = [
        (0 if token in special else len(token), len(token)) for token in tokenizer.get_vocab()
    ]
    text, every = zip(*lengths, strict=True)
    return max(text), max(every)


def _has_tools(body: dict[str, Any]) -> bool:
    return bool(body.get("tools")) or any(map(_uses_tools, body["messages"]))


def _uses_tools(message: dict[str, Any]) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def plain(message: dict[str, Any]) -> Message:
    """Return a message with one text; parts are joined as in vLLM."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}


# --- chats with tools: does the template render everything? --------------------------------------

Shape = tuple[str, bool, int]
"""A message's role, whether it has text, and its number of tool calls."""


def _shape(message: dict[str, Any]) -> Shape:
    has_text = bool(plain(message)["content"].strip())
    return message["role"], has_text, len(message.get("tool_calls") or ())


def _check_shapes(tokenizer: Any, shapes: tuple[Shape, ...], has_tools: bool) -> None:
    """Check that the template renders the texts and calls of such messages, and the tools.

    Raises:
        TemplateError: it leaves something out. Errors of the template itself are reported by vLLM.
    """
    if missing := _left_out(tokenizer, shapes, has_tools):
        raise TemplateError(f"chat template: leaves out {missing}; {UNWRITTEN}")


@lru_cache(maxsize=1024)
def _left_out(tokenizer: Any, shapes: tuple[Shape, ...], has_tools: bool) -> str | None:
    """Render probe texts in messages of these shapes, and return what the template leaves out."""
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
    """Return a probe of this shape; ids have nine characters, as Mistral's templates require."""
    role, has_text, calls = shape
    message: dict[str, Any] = {"role": role, "content": f"{PROBE}{index}." if has_text else ""}
    if calls:
        message["tool_calls"] = [_call(f"{PROBE}{index}-{n}.", f"{n:09}") for n in range(calls)]
    answered = {"tool_call_id": f"{0:09}", "name": f"{PROBE}_tool"}
    return message | answered if role == "tool" else message


def _call(text: str, key: str) -> dict[str, Any]:
    function = {"name": f"{PROBE}_tool", "arguments": {"a": text}}
    return {"id": key, "type": "function", "function": function}
