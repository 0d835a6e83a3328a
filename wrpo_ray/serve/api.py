"""The endpoint as a web application: who may ask, what, how much, and how an answer ends.

It knows models only as `Backend`s, so it runs without Ray. An answer is whole or it is an error:
before the first byte a lost replica means another try or 503, after it an error event, and
`[DONE]` follows only what a model has finished. Logs and metrics have names, counts and times,
never a key, prompt or answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from wrpo_ray.config import ServeConfig
from wrpo_ray.data.records import Message
from wrpo_ray.serve import body as bodies
from wrpo_ray.serve.errors import (
    ClientError,
    name_field,
    too_slow,
    unavailable,
)
from wrpo_ray.serve.keys import Keys
from wrpo_ray.serve.limits import Limits
from wrpo_ray.serve.prompts import plain

Call = Literal["chat", "completions"]
DONE = "[DONE]"
"""The last of a whole answer's texts."""
TRIES = 3
"""Replicas that are asked, one after another, while none has begun to answer."""
PAUSE = 0.5
"""Seconds before another try; Serve takes a lost replica out of its list meanwhile."""
PUT_AWAY = 1.0
"""Seconds that a replica has for this at the most."""
LOG = logging.getLogger("ray.serve")
PAGE = Path(__file__).with_name("playground.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Refusal:
    """A model's own no, such as to a prompt that is too long (400).

    503 tells that its engine is dead, so that another replica may answer; 500 is not tried again.
    """

    status: int
    message: str
    param: str | None = None


class LostError(Exception):
    """A replica died before it had answered."""


class Backend(Protocol):
    """A model."""

    def ask(self, call: Call, body: dict[str, object]) -> AsyncGenerator[list[str] | Refusal, None]:
        """The JSON texts of an answer, or of a stream's chunks as they come, and DONE at the end.

        Raises:
            LostError: the replica died.
            ClientError: it takes no more requests.
        """
        ...

    async def ready(self) -> bool:
        """Whether a replica runs."""
        ...


class Scorer(Protocol):
    """A reward."""

    async def score(self, messages: list[Message], text: str) -> float | Refusal:
        """The reward of an answer.

        Raises:
            LostError: the replica died.
            ClientError: it takes no more requests.
        """
        ...


class Recorder(Protocol):
    """Metrics."""

    def finished(self, model: str, outcome: str, seconds: float) -> None:
        """A request has ended, with a status or as `broken` or `left` in mid-stream."""
        ...

    def first(self, model: str, seconds: float) -> None:
        """A stream's first tokens went out."""
        ...

    def tokens(self, model: str, prompt: int, answer: int) -> None:
        """What a request took."""
        ...


@dataclass
class _Told:
    """What is known of a request, for its one line in the log."""

    record: Recorder
    begun: float = field(default_factory=time.monotonic)
    key: str = "-"
    model: str = "-"
    tokens: tuple[int, int] = (0, 0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def usage(self, text: str) -> bool:
        """Take the counts of tokens from a JSON text; whether it has nothing else."""
        if '"usage":{' not in text:
            return False
        answer = json.loads(text)
        usage = answer["usage"]
        self.tokens = (usage["prompt_tokens"], usage.get("completion_tokens") or 0)
        return not answer["choices"]

    def finish(self, outcome: str) -> None:
        self.record.finished(self.model, outcome, self.seconds)
        if any(self.tokens):
            self.record.tokens(self.model, *self.tokens)
        counts = "{} + {} tokens".format(*self.tokens)
        LOG.info("%s asked %s: %s, %s, %.3f s", self.key, self.model, outcome, counts, self.seconds)


class _Stream(StreamingResponse):
    """A stream whose end is noticed, whichever way it ends."""

    def __init__(self, events: AsyncGenerator[str, None], close: Callable[[], Awaitable[None]]):
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


class Endpoint:
    """The requests of clients, to the models they name."""

    def __init__(
        self,
        settings: ServeConfig,
        backends: Mapping[str, Backend],
        keys: Keys,
        record: Recorder,
        scorer: Scorer | None = None,
    ):
        self.settings, self.backends, self.keys, self.record = settings, backends, keys, record
        self.scorer = scorer
        share = settings.ingress_replicas
        self.limits = Limits(
            -(-settings.requests_per_minute // share), -(-settings.concurrent // share)
        )

    def owner(self, request: Request) -> str:
        """The name of the request's key.

        Raises:
            ClientError: 401.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            message = "no valid API key; send `Authorization: Bearer KEY`"
            raise ClientError(401, message, code="invalid_api_key")
        return owner

    async def answer(
        self, request: Request, kind: type[bodies.Chat | bodies.Completion], call: Call
    ) -> Response:
        """Answer a request, whole or as a stream."""
        with self._telling() as told:
            return await self._answer(request, kind, call, told)

    async def score(self, request: Request) -> dict[str, object]:
        """The reward of an answer."""
        with self._telling() as told:
            told.key = self.owner(request)
            with self.limits.admit(told.key):
                body = await bodies.read(request.stream(), request.headers, self.settings)
                messages, text = bodies.to_score(body)
                if self.scorer is None or self.settings.reward is None:
                    raise ClientError(404, "no reward is served here", code="no_reward")
                told.model = self.settings.reward.name
                reward = await self._score(self.scorer, [plain(m) for m in messages], text)
            told.finish("200")
            return {"model": told.model, "reward": reward}

    async def _score(self, scorer: Scorer, messages: list[Message], text: str) -> float:
        try:
            async with asyncio.timeout(self.settings.timeout):
                reward = await scorer.score(messages, text)
        except TimeoutError:
            raise too_slow(self.settings.timeout) from None
        except LostError:
            raise unavailable() from None
        if isinstance(reward, Refusal):
            raise _refused(reward, {"messages": messages})
        return reward

    @contextmanager
    def _telling(self) -> Iterator[_Told]:
        """What becomes known of a request; told at once where it has no answer."""
        told = _Told(self.record)
        try:
            yield told
        except ClientError as error:
            told.finish(str(error.status))
            raise
        except BaseException as error:
            left = isinstance(error, asyncio.CancelledError | ClientDisconnect)
            told.finish("left" if left else "500")
            raise

    async def _answer(
        self,
        request: Request,
        kind: type[bodies.Chat | bodies.Completion],
        call: Call,
        told: _Told,
    ) -> Response:
        told.key = self.owner(request)
        with ExitStack() as held:
            held.enter_context(self.limits.admit(told.key))
            body = await bodies.read(request.stream(), request.headers, self.settings)
            ask = bodies.check(kind, body, self.settings)
            backend = self.backends.get(ask.model)
            if backend is None:
                message = f"the model {ask.model!r} does not exist"
                raise ClientError(404, message, code="model_not_found", param="model")
            told.model = ask.model
            deadline = asyncio.get_running_loop().time() + self.settings.timeout
            first, replies = await self._begin(backend, call, bodies.to_engine(ask), deadline)
            if not ask.stream:
                await _end(replies)
                told.usage(first[0])
                told.finish("200")
                return Response(first[0], media_type="application/json")
            wants_usage = bool(ask.stream_options and ask.stream_options.include_usage)
            events = self._events(first, replies, told, deadline, wants_usage)
            kept = held.pop_all()

        async def close() -> None:
            kept.close()
            await events.aclose()
            await replies.aclose()

        return _Stream(events, close)

    async def _begin(
        self, backend: Backend, call: Call, body: dict[str, object], deadline: float
    ) -> tuple[list[str], AsyncGenerator[list[str] | Refusal, None]]:
        """The first texts of an answer, from the first replica that lives to give them."""
        for _ in range(TRIES):
            replies = backend.ask(call, body)
            try:
                async with asyncio.timeout_at(deadline):
                    first = await anext(replies)
            except TimeoutError:
                await replies.aclose()
                raise too_slow(self.settings.timeout) from None
            except (LostError, StopAsyncIteration):
                first = Refusal(503, "lost")
            if not isinstance(first, Refusal):
                return first, replies
            await replies.aclose()
            if first.status != 503:
                raise _refused(first, body)
            await asyncio.sleep(PAUSE)
        raise unavailable()

    async def _events(
        self,
        texts: list[str],
        replies: AsyncGenerator[list[str] | Refusal, None],
        told: _Told,
        deadline: float,
        wants_usage: bool,
    ) -> AsyncGenerator[str, None]:
        """A stream's events; the last is DONE, or an error where the answer broke off."""
        self.record.first(told.model, told.seconds)
        outcome = "left"
        try:
            while True:
                if is_done := texts[-1:] == [DONE]:
                    await _end(replies)
                whole = [t for t in texts if not told.usage(t) or wants_usage]
                if whole:
                    yield "".join(f"data: {text}\n\n" for text in whole)
                if is_done:
                    outcome = "200"
                    return
                async with asyncio.timeout_at(deadline):
                    reply = await anext(replies)
                if isinstance(reply, Refusal):
                    raise ClientError(reply.status, reply.message)
                texts = reply
        except (LostError, StopAsyncIteration, TimeoutError, ClientError) as error:
            outcome = "broken"
            yield f"event: error\ndata: {json.dumps(self._broken(error).body)}\n\n"
        finally:
            told.finish(outcome)

    def _broken(self, error: Exception) -> ClientError:
        if isinstance(error, TimeoutError):
            return too_slow(self.settings.timeout)
        if isinstance(error, ClientError) and error.status < 500:
            return error
        return ClientError(503, "the answer broke off: its replica was lost", code="broken_off")


def _refused(refusal: Refusal, body: dict[str, object]) -> ClientError:
    """A model's no, as a client is told it: what is the client's fault with the field's name."""
    if refusal.status >= 500:
        return ClientError(refusal.status, refusal.message)
    message, param = name_field(refusal.message, refusal.param, body)
    return ClientError(refusal.status, message, param=param)


async def _end(replies: AsyncGenerator[list[str] | Refusal, None]) -> None:
    """Let a replica put a whole answer away, so that the client's next request finds its place."""
    with suppress(LostError, TimeoutError):
        async with asyncio.timeout(PUT_AWAY):
            async for _ in replies:
                pass
    await replies.aclose()


def create(
    settings: ServeConfig,
    backends: Mapping[str, Backend],
    keys: Keys,
    record: Recorder,
    scorer: Scorer | None = None,
) -> FastAPI:
    """The application; `backends` by the names that clients use."""
    endpoint = Endpoint(settings, backends, keys, record, scorer)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    begun = int(time.time())
    page = PAGE.read_text(encoding="utf-8")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await endpoint.answer(request, bodies.Chat, "chat")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await endpoint.answer(request, bodies.Completion, "completions")

    @app.post("/v1/score")
    async def score(request: Request) -> dict[str, object]:
        return await endpoint.score(request)

    def card(name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": begun, "owned_by": "wrpo"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, object]:
        endpoint.owner(request)
        reward = settings.reward and settings.reward.name  # for the playground
        return {"object": "list", "data": [card(name) for name in backends], "reward": reward}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, object]:
        endpoint.owner(request)
        if name not in backends:
            raise ClientError(404, f"the model {name!r} does not exist", code="model_not_found")
        return card(name)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = all([await backend.ready() for backend in backends.values()])
        status = "ready" if is_ready else "not ready"
        return JSONResponse({"status": status}, 200 if is_ready else 503)

    @app.get("/")
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.exception_handler(ClientError)
    async def refused(_: Request, error: ClientError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> JSONResponse:
        told = ClientError(error.status_code, str(error.detail))
        return JSONResponse(told.body, told.status, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    return app
