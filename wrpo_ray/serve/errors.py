"""Errors that clients get, in OpenAI's format."""

import re
from collections.abc import Mapping
from typing import Any

OTHER_NAMES = {"input_tokens": "prompt", "input_text": "prompt"}
"""vLLM's names of fields that clients know by other names."""


class ClientError(Exception):
    """A request that ends without an answer: an HTTP status and OpenAI's error record.

    Its text is only for the client. It may quote the request, so it is never logged.
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


def model_not_found(name: str, param: str | None = None) -> ClientError:
    """The error for a model that is not served."""
    message = f"the model {name!r} does not exist"
    return ClientError(404, message, code="model_not_found", param=param)


def unavailable() -> ClientError:
    """The error when all replicas that were asked are lost."""
    message = "the model is not available at the moment; try again"
    return ClientError(503, message, code="unavailable", retry_after=5)


def overloaded(retry_after: int) -> ClientError:
    """The error when too many requests wait, with the seconds after which there may be a place."""
    message = "too many requests wait for this model; try again later"
    return ClientError(429, message, code="overloaded", retry_after=retry_after)


def too_slow(seconds: float) -> ClientError:
    """The error when an answer takes longer than `timeout`."""
    return ClientError(504, f"no complete answer in {seconds:g} seconds", code="timeout")


def name_field(message: str, param: str | None, body: Mapping[str, Any]) -> tuple[str, str]:
    """Return an engine's message as (message that names the field, the field).

    Engines do not always name it. Then it is the field of the request that the message mentions
    first, or else `response_format` if it is given, or the field of the prompt.
    """
    text = re.sub(r" \((?:parameter|value)=.*\)$", "", message, flags=re.DOTALL)
    prompt = "messages" if "messages" in body else "prompt"
    field = OTHER_NAMES.get(param or "", param) or _mentioned(text, body)
    field = field or ("response_format" if body.get("response_format") else "prompt")
    field = prompt if field == "prompt" else field
    return (text if field in text else f"{field}: {text}"), field


def _mentioned(text: str, body: Mapping[str, Any]) -> str | None:
    """Return the field of a request that a text mentions first."""
    places = {
        name: found.start()
        for name in body.keys() - {"model"}  # messages mention the model, but it is never at fault
        if (found := re.search(rf"\b{re.sub('_', '[_ ]', re.escape(name))}\b", text))
    }
    return min(places, key=places.__getitem__) if places else None
