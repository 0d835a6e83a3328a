"""Reads the chat completions of OpenAI-compatible servers, with an error for each unusable one.

Servers differ: a content can be a list of parts, an answer can be a refusal or a tool call, and a
gateway can send an error with status 200. A completion without usable text is final, because the
same call would give and cost the same again; a response that is no completion is retried.

Not covered: streams, several choices (the first is taken), images, audio.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

INT32 = 2**31
FINISH: dict[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "eos_token_id": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "complete": "stop",
    "length": "length",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_length": "length",
}
"""The servers' names of the two finish reasons."""
FILTERED = frozenset({"content_filter", "safety", "recitation"})
"""Finish reasons of an answer that the server withholds."""
BROKEN_OFF = frozenset({"error", "abort", "insufficient_system_resource"})
"""Finish reasons of a fault of the server in the middle of an answer."""
TEXT_PARTS = frozenset({"text", "output_text"})
REASONING_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_text"})
"""Types of parts with reasoning, which like the field `reasoning_content` is not the answer."""
REASONING_FIELDS = ("reasoning_content", "reasoning")
"""Fields of a message with the reasoning; servers differ."""
NON_TEXT_PARTS = REASONING_PARTS | {"reference"}
"""Types of parts without text of the answer: reasoning, and numbers of citations."""


@dataclass(frozen=True)
class Completion:
    """An answer."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int | None
    output_tokens: int | None
    """As the server counts them; None if it does not."""
    model: str
    """The model by the server's name, with its fingerprint if the server gives one."""
    attempts: int = 1
    logprobs: list[dict[str, Any]] | None = None
    """[{token, logprob}] of the likeliest first tokens, if the call asks for them."""
    reasoning: str | None = None
    """The reasoning, if the server gives it in a field of its own."""


class EndpointError(RuntimeError):
    """A call failed."""

    is_retryable = True
    """Whether another attempt can succeed."""
    affects_all_calls = False
    """Whether every call fails alike, as long as none has succeeded."""
    attempts = 1
    """The number of attempts made."""
    pause = 0.0
    """Seconds for which the server asks for no further call."""


class ServerFaultError(EndpointError):
    """The server answers 5xx, 408 or 409, or reports a failure in its answer."""


class WrongShapeError(EndpointError):
    """The answer is JSON, but no chat completion."""


class UnusableAnswerError(EndpointError):
    """A completion without usable text; the same call would give it again."""

    is_retryable = False


class NoChoiceError(UnusableAnswerError):
    """The completion holds no answer."""


class WrongChoiceError(UnusableAnswerError):
    """The answer does not have the structure of OpenAI's."""


class NoTextError(UnusableAnswerError):
    """The answer has no text, for example because reasoning took all tokens."""


class ToolCallError(UnusableAnswerError):
    """The model calls a tool instead of answering."""


class ModelRefusalError(UnusableAnswerError):
    """The answer is a refusal, in the field that servers have for it."""


class UnknownEndError(UnusableAnswerError):
    """The server does not say whether the answer is whole or cut off."""


class ContentFilterError(UnusableAnswerError):
    """The server withholds the answer."""


def read_completion(answer: Any, *, thinks: bool = False) -> Completion:
    """Return the answer in the JSON of a chat completion; counts of another form become None.

    Of a model that `thinks`, an answer may consist of reasoning only; its text is then empty.

    The errors' messages continue a sentence that begins with the server's name.

    Raises:
        WrongShapeError: it is no chat completion.
        ServerFaultError: the answer broke off at the server.
        UnusableAnswerError: it has no usable text; the subclass says why.
    """
    choice = _choice(answer)
    message, reason = choice["message"], _reason(choice)
    _check_is_text(message, reason)
    reasoning = _reasoning(message)
    try:
        text = _text(message.get("content"), reason)
    except NoTextError:
        if not thinks or reasoning is None:
            raise
        text = ""
    if reason not in FINISH:
        given = choice.get("finish_reason")
        raise UnknownEndError(f"says with finish_reason {given!r} not whether the answer is whole")
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    names = [answer.get(name) for name in ("model", "system_fingerprint")]
    return Completion(
        text,
        FINISH[reason],
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        " ".join(name for name in names if isinstance(name, str)),
        logprobs=_first_token(choice.get("logprobs")),
        reasoning=reasoning,
    )


def _choice(answer: Any) -> dict[str, Any]:
    """Return the first choice, which has a message and was not broken off by the server."""
    body = answer if isinstance(answer, dict) else {}
    choices = body.get("choices")
    if not isinstance(choices, list) and body.get("object") != "chat.completion":
        raise WrongShapeError("answers with no chat completion")
    if not choices or not isinstance(choices, list):
        raise NoChoiceError("answers with no choice")
    choice = choices[0]
    if isinstance(choice, dict) and _reason(choice) in BROKEN_OFF:
        raise ServerFaultError(f"broke the answer off: finish_reason is {_reason(choice)}")
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise WrongChoiceError("answers with a choice that has no `message`")
    return choice


def _reason(choice: dict[str, Any]) -> str:
    reason = choice.get("finish_reason")
    return reason.lower() if isinstance(reason, str) else ""


def _check_is_text(message: dict[str, Any], reason: str) -> None:
    """Raise the error of a message that has something else instead of text."""
    if reason in FILTERED:
        raise ContentFilterError(f"withholds the answer: {reason}")
    if refusal := message.get("refusal"):
        raise ModelRefusalError(f"tells the model's refusal: {refusal}")
    is_call = reason in ("tool_calls", "function_call")
    if is_call or _is_call(message.get("tool_calls")) or _is_call(message.get("function_call")):
        raise ToolCallError("answers with the call of a tool")


def _is_call(value: Any) -> bool:
    """Whether a call, or one of a list, names a function: some servers send empty calls."""
    calls = value if isinstance(value, list) else [value]
    maps = [call for call in calls if isinstance(call, dict)]
    maps += [part for call in maps for part in call.values() if isinstance(part, dict)]
    return any(part.get("name") for part in maps)


def _text(content: Any, reason: str) -> str:
    """Return the text of a content, without reasoning."""
    texts = [_part(part) for part in content] if isinstance(content, list) else [content]
    if not all(isinstance(text, str | None) for text in texts):
        raise WrongChoiceError(f"answers with a content of type {type(content).__name__}")
    given = [text for text in texts if text is not None]
    if not given:
        raise NoTextError(f"answers without a text; finish_reason is {reason or 'missing'}")
    try:
        "".join(given).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        raise WrongChoiceError("answers with a text that is not Unicode") from None
    return "".join(given)


def _part(part: Any) -> str | None:
    """Return the text of a part; None for reasoning and citations."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if isinstance(kind, str) and kind in NON_TEXT_PARTS:
        return None
    if kind == "refusal" and isinstance(part, dict):
        raise ModelRefusalError(f"tells the model's refusal: {part.get('refusal')}")
    if not isinstance(kind, str) or kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise WrongChoiceError(f"answers with a part of type {kind!r} that has no `text`")
    text: str = part["text"]
    return text


def _reasoning(message: dict[str, Any]) -> str | None:
    """Return the text of the field or parts with the reasoning; None if missing or no Unicode."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    for text in (*map(message.get, REASONING_FIELDS), "".join(map(_thought, parts))):
        if isinstance(text, str) and text:
            return None if any("\ud800" <= c <= "\udfff" for c in text) else text
    return None


def _thought(part: Any) -> str:
    """Return the text of a part with reasoning, which may have parts itself; else an empty one."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in REASONING_PARTS:
        return ""
    inside = next((part[name] for name in (kind, "text") if name in part), None)
    parts = inside if isinstance(inside, list) else [{"text": inside}]
    texts = [one.get("text") for one in parts if isinstance(one, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _count(value: Any) -> int | None:
    """Return a number of tokens, or None if the value is none."""
    return value if type(value) is int and 0 <= value < INT32 else None


def _first_token(logprobs: Any) -> list[dict[str, Any]] | None:
    """Return the likeliest first tokens; None if they are missing or malformed."""
    try:
        top = logprobs["content"][0]["top_logprobs"]
        tokens = [str(p["token"]) for p in top]
        values = [float(p["logprob"]) for p in top]
        "".join(tokens).encode()  # half a surrogate pair is no text
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None
    if any(map(math.isnan, values)):
        return None
    return [{"token": t, "logprob": v} for t, v in zip(tokens, values, strict=True)]
