"""Request bodies: read within bounds, and checked before a model sees them."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from wrpo_ray.config import ServeConfig
from wrpo_ray.data.published import why_unanswerable
from wrpo_ray.serve.bounds import grammar_fault, load_json
from wrpo_ray.serve.errors import ClientError
from wrpo_ray.serve.requests import Ask, Chat, Completion, NamedTool, Score

M = TypeVar("M", bound=BaseModel)
LONGEST_PATH = 200
"""Characters of a field's path in a message; keys in it are the client's own."""


async def read(
    chunks: AsyncIterator[bytes], headers: Mapping[str, str], settings: ServeConfig
) -> bytes:
    """Read the body of a client's JSON within the bounds of size and time.

    Raises:
        ClientError: 400, 408, 413 or 415.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # no other kind asks a browser's user first
        raise ClientError(415, "Content-Type has to be application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ClientError(415, "a compressed body is not accepted")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise ClientError(400, "Content-Length is no number")
    if int(length[:20]) > settings.max_body:
        raise _too_large(settings)
    try:
        async with asyncio.timeout(settings.read_timeout):
            return await _gather(chunks, settings)
    except TimeoutError:
        raise ClientError(408, f"no complete body in {settings.read_timeout:g} seconds") from None


async def _gather(chunks: AsyncIterator[bytes], settings: ServeConfig) -> bytes:
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > settings.max_body:
            raise _too_large(settings)
    return bytes(data)


def _too_large(settings: ServeConfig) -> ClientError:
    return ClientError(413, f"the body has more than {settings.max_body} bytes")


def decode(data: bytes, max_depth: int) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ClientError: 400; it is not one, too deep or too large, or has text that is not Unicode.
    """
    try:
        body = load_json(data, max_depth)
    except ValueError as error:
        raise ClientError(400, f"the body {error}") from None
    if not isinstance(body, dict):
        raise ClientError(400, "the body is not a JSON object")
    return body


def _validate(kind: type[M], body: dict[str, Any]) -> M:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        where, problem = problem_of(error, body)
        raise ClientError(400, f"{where}: {problem}", param=where) from None


def problem_of(error: ValidationError, body: dict[str, Any]) -> tuple[str, str]:
    """Return (path of a field, what is wrong with it), without the value that was given.

    A value that may be of several types has an error for each; the deepest error belongs to the
    type that the client meant.
    """
    errors = error.errors(include_input=False, include_url=False)
    found = [(_path(e["loc"], e["type"], body), _problem(e["type"], e["msg"])) for e in errors]
    deepest = max((path for path, _ in found), key=len)
    problems = dict.fromkeys(problem for path, problem in found if path == deepest)
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in deepest)
    return "".join(parts).removeprefix(".")[:LONGEST_PATH], " or ".join(problems)


def _problem(kind: str, message: str) -> str:
    """Return a validator's message without class names."""
    is_no_object = kind in ("model_type", "model_attributes_type", "dict_type")
    return "Input should be an object" if is_no_object else message.removeprefix("Value error, ")


def _path(place: tuple[int | str, ...], kind: str, body: dict[str, Any]) -> tuple[int | str, ...]:
    """Return the keys in a validator's location, which also names the types that it tried."""
    path: list[int | str] = []
    value: Any = body
    for number, part in enumerate(place):
        is_missing = kind == "missing" and number == len(place) - 1
        if isinstance(value, dict) and (part in value or is_missing):
            value = value.get(str(part))
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(part)
    return (*path, "type") if kind.startswith("union_tag") else tuple(path)


def to_score(body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return the messages of a body and the answer to be scored.

    Raises:
        ClientError: 400, with the field.
    """
    *messages, answer = _validate(Score, body).messages
    if answer.role != "assistant" or not isinstance(answer.content, str):
        message = "messages: the last one is the answer to be scored: of `assistant`, with a text"
        raise ClientError(400, message, param="messages")
    if fault := why_unanswerable([message.role for message in messages]):
        raise ClientError(400, f"messages: the conversation {fault}", param="messages")
    if any(message.tool_calls for message in (*messages, answer)):
        text = "messages: a reward reads only texts; leave out `tool_calls`"
        raise ClientError(400, text, param="messages")
    return [message.model_dump() for message in messages], answer.content


def check(kind: type[Chat | Completion], body: dict[str, Any], settings: ServeConfig) -> Ask:
    """Return the request in a body, without the fields that are ignored.

    Raises:
        ClientError: 400, with the field.
    """
    ask = _validate(kind, body)
    for name in ("max_tokens", "max_completion_tokens"):
        if (getattr(ask, name, None) or 0) > settings.max_tokens:
            raise ClientError(400, f"{name}: at most {settings.max_tokens} here", param=name)
    if isinstance(ask, Chat):
        _check_together(ask)
    _check_grammars(ask)
    if ask.answers > settings.max_answers:
        name = "n" if (ask.n or 1) > 1 else "prompt"
        text = f"{name}: at most {settings.max_answers} answers a request"
        raise ClientError(400, text, param=name)
    return ask


def _check_together(ask: Chat) -> None:
    """Check fields that depend on each other.

    Raises:
        ClientError: 400, with the field.
    """
    if ask.top_logprobs and not ask.logprobs:
        raise ClientError(400, "top_logprobs: needs `logprobs: true`", param="top_logprobs")
    choice, tools = ask.tool_choice, ask.tools
    if choice in (None, "none"):
        return
    if tools is None:
        raise ClientError(400, "tool_choice: needs `tools`", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in {
        tool.function.name for tool in tools
    }:
        raise ClientError(400, "tool_choice: is none of the `tools`", param="tool_choice")


def _check_grammars(ask: Ask) -> None:
    """Check that no schema is too large for a grammar.

    Raises:
        ClientError: 400, with the field.
    """
    given: dict[str, list[Any]] = {
        "response_format": [ask.response_format] if ask.response_format else [],
        "tools": (isinstance(ask, Chat) and ask.tools) or [],
    }
    for field, parts in given.items():
        if fault := grammar_fault([part.model_dump() for part in parts]):
            raise ClientError(400, f"{field}: {fault}", param=field)


def has_grammar(ask: Ask) -> bool:
    """Whether the engine compiles a grammar for a request."""
    return ask.response_format is not None or (isinstance(ask, Chat) and ask.tools is not None)


def to_engine(ask: Ask) -> dict[str, Any]:
    """Return the body for vLLM: the given fields, and for a stream always the token counts."""
    body = ask.model_dump(exclude_unset=True, exclude_none=True)
    if ask.stream:
        body["stream_options"] = {"include_usage": True}
    else:
        body.pop("stream_options", None)
    return body
