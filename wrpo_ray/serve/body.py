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
    model_validator,
)
from pydantic_core import PydanticCustomError

from wrpo_ray.config import ServeConfig
from wrpo_ray.core.published import asks_nothing, unknown_key
from wrpo_ray.serve.errors import ClientError

M = TypeVar("M", bound=BaseModel)
Stops = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=16)]


class StreamOptions(BaseModel):
    """What a stream has besides text."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = False


class _Ask(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str = Field(max_length=256)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Stops | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    response_format: dict[str, Any] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None


class TextPart(BaseModel):
    """A part of a message; only text is taken, so nothing is fetched for a client."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    """A tool's; another's is not written into prompts."""
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _all_is_written(cls, given: Any) -> Any:
        fault = isinstance(given, dict) and unknown_key(given, ("tool_calls",))
        if fault:
            raise PydanticCustomError("unknown_key", "{fault}", {"fault": fault})
        return given


def _asking(messages: list[Message]) -> list[Message]:
    if fault := asks_nothing([message.role for message in messages]):
        raise PydanticCustomError("asks_nothing", "the conversation {fault}", {"fault": fault})
    return messages


class Chat(_Ask):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1), AfterValidator(_asking)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None


class Score(BaseModel):
    """POST /v1/score: a conversation, and last the answer that is scored."""

    model_config = ConfigDict(strict=True, extra="ignore")

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
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ClientError(400, f"{where}: {first['msg']}", param=where) from None


def to_score(body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The messages and the answer to be scored in a body.

    Raises:
        ClientError: 400, and which field it is.
    """
    *messages, answer = _valid(Score, body).messages
    if answer.role != "assistant" or not isinstance(answer.content, str):
        message = "messages: the last one is the answer to be scored: of `assistant`, with a text"
        raise ClientError(400, message, param="messages")
    if fault := asks_nothing([message.role for message in messages]):
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
    answers = (ask.n or 1) * (ask.prompts if isinstance(ask, Completion) else 1)
    if answers > settings.max_answers:
        raise ClientError(400, f"n: at most {settings.max_answers} answers a request", param="n")
    return ask


def to_engine(ask: _Ask) -> dict[str, Any]:
    """What vLLM is asked: as given, and with its count of tokens in any case."""
    body = ask.model_dump(exclude_unset=True, exclude_none=True)
    if ask.stream:
        body["stream_options"] = {"include_usage": True}
    else:
        body.pop("stream_options", None)
    return body
