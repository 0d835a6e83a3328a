"""What a client is told when it gets no answer, in OpenAI's form."""

from __future__ import annotations

from typing import Any


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
