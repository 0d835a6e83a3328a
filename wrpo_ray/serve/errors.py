"""What a client is told when it gets no answer, in OpenAI's form."""

from __future__ import annotations

import re
from typing import Any

OTHER_NAMES = {"input_tokens": "prompt", "input_text": "prompt"}
"""What vLLM calls fields that clients know by other names."""


class ClientError(Exception):
    """A request that ends without an answer: an HTTP status and OpenAI's error record.

    Its text is for the client alone. It may quote the request, so it never goes to a log.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error record."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def unavailable() -> ClientError:
    """The answer when a model's replicas are lost, and another try did not help."""
    message = "the model is not available at the moment; try again"
    return ClientError(503, message, code="unavailable", retry_after=5)


def overloaded() -> ClientError:
    """The answer when the queue is full."""
    message = "too many requests wait for this model; try again later"
    return ClientError(429, message, code="overloaded", retry_after=2)


def too_slow(seconds: float) -> ClientError:
    """The answer when the time for one has passed."""
    return ClientError(504, f"no whole answer in {seconds:g} seconds", code="timeout")


def name_field(message: str, param: str | None, body: dict[str, Any]) -> tuple[str, str]:
    """An engine's refusal of a request as (message that names the field, the field).

    Engines do not always tell the field: then it is the one of the request that the message
    mentions first, or else the one that constrains the answer, or that holds the prompt.
    """
    text = re.sub(r" \((?:parameter|value)=.*\)$", "", message, flags=re.DOTALL)
    prompt = "messages" if "messages" in body else "prompt"
    field = OTHER_NAMES.get(param or "", param) or _mentioned(text, body)
    field = field or ("response_format" if body.get("response_format") else "prompt")
    field = prompt if field == "prompt" else field
    return (text if field in text else f"{field}: {text}"), field


def _mentioned(text: str, body: dict[str, Any]) -> str | None:
    """The field of a request that a text names first."""
    places = {
        name: found.start()
        for name in body.keys() - {"model"}  # it is mentioned for what it cannot take
        if (found := re.search(rf"\b{re.sub('_', '[_ ]', re.escape(name))}\b", text))
    }
    return min(places, key=places.__getitem__) if places else None
