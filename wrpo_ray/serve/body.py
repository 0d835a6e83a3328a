"""Request bodies: read within bounds, and checked before a model sees them.

Only fields that are declared here go on to vLLM. Others are ignored, as clients send many; some
that vLLM knows would let a client choose file names, templates or request ids.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from wrpo_ray.config import ServeConfig
from wrpo_ray.data.published import unknown_key, why_unanswerable
from wrpo_ray.serve.errors import ClientError

M = TypeVar("M", bound=BaseModel)
LONGEST_PATH = 200
"""Characters of a field's path that a client is told; keys in it are the client's own."""
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[list[Stop], Field(max_length=16)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class _Part(BaseModel):
    """Part of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", serialize_by_alias=True)


class StreamOptions(_Part):
    """What a stream has besides text."""

    include_usage: bool | None = False


class Function(_Part):
    """What a model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Part):
    """A function that is offered to a model."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(_Part):
    """A function of `tools`."""

    name: Name


class NamedTool(_Part):
    """The tool that a model has to call."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(_Part):
    """The form of an answer."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class FreeFormat(_Part):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(_Part):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class TagFormat(_Part):
    """Of vLLM, which knows its other fields."""

    model_config = ConfigDict(extra="allow")

    type: Literal["structural_tag"]


Format = Annotated[FreeFormat | SchemaFormat | TagFormat, Field(discriminator="type")]


class _Ask(_Part):
    model: str = Field(max_length=256)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Stops | None = None
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=1024)
    response_format: Format | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None


class TextPart(_Part):
    """A part of a message; only text is taken, so nothing is fetched for a client."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"a part of type {kind[:50]!r} is not taken, only `text` is")
        return given


class CalledFunction(_Part):
    """A function with its arguments, as a model has called it."""

    name: Name
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_json(cls, text: str) -> str:
        try:
            is_object = not text or isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise ValueError("has to be the text of a JSON object")
        return text


class ToolCall(_Part):
    """A call that a model has made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(_Part):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    """A tool's; another's is not written into prompts."""
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _all_is_written(cls, given: Any) -> Any:
        fault = isinstance(given, dict) and unknown_key(given, ("tool_calls",))
        if fault:
            raise PydanticCustomError("unknown_key", "{fault}", {"fault": fault})
        return given


def _asking(messages: list[Message]) -> list[Message]:
    if fault := why_unanswerable([message.role for message in messages]):
        raise PydanticCustomError("asks_nothing", "the conversation {fault}", {"fault": fault})
    return messages


class Chat(_Ask):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1), AfterValidator(_asking)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, min_length=1, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None


class Score(_Part):
    """POST /v1/score: a conversation, and last the answer that is scored."""

    messages: list[Message] = Field(min_length=2)


class Completion(_Ask):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]],
            Field(min_length=1),
        ]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> int:
        """How many prompts the request has."""
        is_batch = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return len(self.prompt) if is_batch else 1


async def read(chunks: AsyncIterator[bytes], headers: Any, settings: ServeConfig) -> dict[str, Any]:
    """The JSON object that a client sends, within the bounds of size, depth and time.

    Raises:
        ClientError: 400, 408, 413 or 415.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # no other kind asks a browser's user first
        raise ClientError(415, "Content-Type has to be application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ClientError(415, "a compressed body is not taken")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise ClientError(400, "Content-Length is no number")
    if int(length[:20]) > settings.max_body:
        raise _too_large(settings)
    try:
        async with asyncio.timeout(settings.read_timeout):
            data = await _gather(chunks, settings)
    except TimeoutError:
        raise ClientError(408, f"no whole body in {settings.read_timeout:g} seconds") from None
    return decode(data, settings.max_depth)


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
    """The JSON object in some bytes.

    Raises:
        ClientError: 400; it is none, too deep, or has text that is not Unicode.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_number)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except UnicodeError:
        raise ClientError(400, "the body is not valid UTF-8") from None
    except RecursionError:
        raise ClientError(400, f"the body has more than {max_depth} levels") from None
    except ValueError:
        raise ClientError(400, "the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise ClientError(400, "the body is not a JSON object")
    if _deeper(body, max_depth):
        raise ClientError(400, f"the body has more than {max_depth} levels")
    return body


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _deeper(body: Any, levels: int) -> bool:
    """Whether a tree has more levels, counted without recursion."""
    level = [body]
    for _ in range(levels):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
    return any(isinstance(node, dict | list) for node in level)


def _valid(kind: type[M], body: dict[str, Any]) -> M:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        where, problem = problem_of(error, body)
        raise ClientError(400, f"{where}: {problem}", param=where) from None


def problem_of(error: ValidationError, body: dict[str, Any]) -> tuple[str, str]:
    """(path of a field, what is wrong with it), without the value that was given.

    A value that may be of several types has an error for each; what is wrong deepest inside is of
    the type that was meant.
    """
    errors = error.errors(include_input=False, include_url=False)
    found = [(_path(e["loc"], e["type"], body), _problem(e["type"], e["msg"])) for e in errors]
    deepest = max((path for path, _ in found), key=len)
    problems = dict.fromkeys(problem for path, problem in found if path == deepest)
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in deepest)
    return "".join(parts).removeprefix(".")[:LONGEST_PATH], " or ".join(problems)


def _problem(kind: str, message: str) -> str:
    """A validator's message, without the names of classes."""
    is_no_object = kind in ("model_type", "model_attributes_type", "dict_type")
    return "Input should be an object" if is_no_object else message.removeprefix("Value error, ")


def _path(place: tuple[int | str, ...], kind: str, body: dict[str, Any]) -> tuple[int | str, ...]:
    """The keys of a validator's place; between them it names the types that it tried."""
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
    """The messages and the answer to be scored in a body.

    Raises:
        ClientError: 400, and which field it is.
    """
    *messages, answer = _valid(Score, body).messages
    if answer.role != "assistant" or not isinstance(answer.content, str):
        message = "messages: the last one is the answer to be scored: of `assistant`, with a text"
        raise ClientError(400, message, param="messages")
    if fault := why_unanswerable([message.role for message in messages]):
        raise ClientError(400, f"messages: the conversation {fault}", param="messages")
    if any(message.tool_calls for message in (*messages, answer)):
        text = "messages: a reward reads texts alone; leave out `tool_calls`"
        raise ClientError(400, text, param="messages")
    return [message.model_dump() for message in messages], answer.content


def check(kind: type[Chat | Completion], body: dict[str, Any], settings: ServeConfig) -> _Ask:
    """The request in a body, without the fields that are not taken.

    Raises:
        ClientError: 400, and which field it is.
    """
    ask = _valid(kind, body)
    for name in ("max_tokens", "max_completion_tokens"):
        if (getattr(ask, name, None) or 0) > settings.max_tokens:
            raise ClientError(400, f"{name}: at most {settings.max_tokens} here", param=name)
    if isinstance(ask, Chat):
        _check_together(ask)
    answers = (ask.n or 1) * (ask.prompts if isinstance(ask, Completion) else 1)
    if answers > settings.max_answers:
        name = "n" if (ask.n or 1) > 1 else "prompt"
        text = f"{name}: at most {settings.max_answers} answers a request"
        raise ClientError(400, text, param=name)
    return ask


def _check_together(ask: Chat) -> None:
    """Fields that need each other.

    Raises:
        ClientError: 400, and which field it is.
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


def to_engine(ask: _Ask) -> dict[str, Any]:
    """What vLLM is asked: as given, and with its count of tokens in any case."""
    body = ask.model_dump(exclude_unset=True, exclude_none=True)
    if ask.stream:
        body["stream_options"] = {"include_usage": True}
    else:
        body.pop("stream_options", None)
    return body
