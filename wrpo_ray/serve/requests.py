"""The fields of requests: types and bounds.

Only fields that are declared here are passed to vLLM. Others are ignored, as clients send many;
some that vLLM knows would let a client choose file names, templates or request ids.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from wrpo_ray.data.published import unknown_key, why_unanswerable
from wrpo_ray.serve.bounds import load_json

ARGUMENTS_DEPTH = 32
"""Levels of the arguments of a call."""


def _at_most(length: int) -> Callable[[Any], Any]:
    """Check the length before the items: each wrong item would make an error."""

    def check(given: Any) -> Any:
        if isinstance(given, dict) and len(given) > length:
            raise PydanticCustomError("too_long", f"should have at most {length} items")
        return given

    return check


Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[list[Stop], Field(max_length=16)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class _Part(BaseModel):
    """Part of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", serialize_by_alias=True)


class StreamOptions(_Part):
    """Options of a stream."""

    include_usage: bool | None = False


class Function(_Part):
    """A function that a model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Part):
    """A function that is offered to a model."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(_Part):
    """The name of one of the `tools`."""

    name: Name


class NamedTool(_Part):
    """The tool that a model has to call."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(_Part):
    """A schema that the answer has to match."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class FreeFormat(_Part):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(_Part):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class TagFormat(_Part):
    """vLLM's structural tags; vLLM checks the other fields."""

    model_config = ConfigDict(extra="allow")

    type: Literal["structural_tag"]


Format = Annotated[FreeFormat | SchemaFormat | TagFormat, Field(discriminator="type")]


class Ask(_Part):
    """The fields of a chat and of a completion."""

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
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    """A smaller one overflows logits, and then sampling takes tokens that a grammar forbids."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Stops | None = None
    logit_bias: Annotated[dict[TokenId, Bias] | None, BeforeValidator(_at_most(1024))] = None
    response_format: Format | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    @property
    def answers(self) -> int:
        """How many answers it asks for: prompts times `n`."""
        return self.n or 1


class TextPart(_Part):
    """A part of a message; only text is accepted, so nothing is fetched for a client."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"a part of type {kind[:50]!r} is not accepted, only `text` is")
        return given


class CalledFunction(_Part):
    """A function that a model has called, with its arguments."""

    name: Name
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_json(cls, text: str) -> str:
        try:
            is_object = not text or isinstance(load_json(text.encode(), ARGUMENTS_DEPTH), dict)
        except ValueError as error:
            raise ValueError(f"has to be the text of a JSON object; it {error}") from None
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
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    """The name of a tool; names of others are rejected, as they are not written into prompts."""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_key(cls, given: Any) -> Any:
        fault = isinstance(given, dict) and unknown_key(given, ("tool_calls",))
        if fault:
            raise PydanticCustomError("unknown_key", "{fault}", {"fault": fault})
        return given


def _check_conversation(messages: list[Message]) -> list[Message]:
    if fault := why_unanswerable([message.role for message in messages]):
        raise PydanticCustomError("asks_nothing", "the conversation {fault}", {"fault": fault})
    return messages


class Chat(Ask):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, fail_fast=True), AfterValidator(_check_conversation)
    ]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, min_length=1, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None


class Score(_Part):
    """POST /v1/score: a conversation that ends with the answer to be scored."""

    messages: list[Message] = Field(min_length=2, fail_fast=True)


Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
Batch = Field(min_length=1, fail_fast=True)


def _kind_of_prompt(given: Any) -> str | None:
    """Return the kind of a prompt by its first item, so that the others need not be tried."""
    kinds = {str: "texts", int: "tokens", list: "batch"}
    if isinstance(given, list):
        return kinds.get(type(given[0])) if given else None
    return "text" if isinstance(given, str) else None


class Completion(Ask):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[list[str], Batch, Tag("texts")]
        | Annotated[list[Tokens], Batch, Tag("batch")],
        Discriminator(
            _kind_of_prompt,
            custom_error_type="prompt_type",
            custom_error_message="should be a text, token ids, or a list of either",
        ),
    ]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def answers(self) -> int:
        """Prompts times `n`."""
        is_batch = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return super().answers * (len(self.prompt) if is_batch else 1)
