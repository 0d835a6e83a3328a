"""A client's request on our server, from its key to the end of its answer.

The endpoint knows models only as `Backend`s, so it runs without Ray. An answer is complete or it is
an error: before the first byte a lost replica leads to a retry or 503, after it to an error event,
and `[DONE]` follows only what a model has finished. Logs and metrics have names, counts and times,
never a key, prompt or answer.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from wrpo_ray.config import ServeConfig
from wrpo_ray.data.records import Message
from wrpo_ray.serve import validation
from wrpo_ray.serve.backends import (
    DONE,
    Backend,
    Call,
    LostError,
    Recorder,
    Rejection,
    Replies,
    Scorer,
)
from wrpo_ray.serve.errors import (
    ClientError,
    model_not_found,
    name_field,
    overloaded,
    too_slow,
    unavailable,
)
from wrpo_ray.serve.fairness import Crowd, FairQueue, FullError, Returns
from wrpo_ray.serve.keys import Keys, Limits
from wrpo_ray.serve.prompts import plain
from wrpo_ray.serve.requests import Ask, Chat, Completion

MAX_ATTEMPTS = 3
"""Replicas that are asked, one after another, while none has begun to answer."""
RETRY_DELAY = 0.5
"""Seconds before a retry; meanwhile Serve removes a lost replica from its list."""
DRAIN_TIMEOUT = 1.0
"""Seconds that a replica has to release a request after its last text."""
LOG = logging.getLogger("ray.serve")
T = TypeVar("T")


@dataclass
class _RequestLog:
    """The facts of a request that go into its log line and metrics."""

    record: Recorder
    begun: float = field(default_factory=time.monotonic)
    key: str = "-"
    model: str = "-"
    tokens: tuple[int, int] = (0, 0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def read_usage(self, text: str) -> bool:
        """Take the token counts from a JSON text; return whether it holds nothing else."""
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
    """A streaming response that runs a callback however it ends."""

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
    """Passes the requests of clients to the models that they name."""

    def __init__(
        self,
        settings: ServeConfig,
        backends: Mapping[str, Backend],
        keys: Keys,
        record: Recorder,
        scorer: Scorer | None = None,
        ingresses: Callable[[], int] = lambda: 1,
    ):
        self.settings, self.backends, self.keys, self.record = settings, backends, keys, record
        self.scorer = scorer
        self._bodies = FairQueue(lambda: 1)
        self.limits = Limits(settings.requests_per_minute, settings.concurrent, ingresses)
        behind: set[Backend | Scorer] = {*backends.values(), *([scorer] if scorer else [])}
        self.queues = {b: FairQueue(b.places, lambda: settings.queue / ingresses()) for b in behind}
        self.crowd = self._crowd(*backends.values())
        self.score_crowd = self._crowd(scorer) if scorer else self.crowd
        self.returns = Returns()

    def _crowd(self, *behind: Backend | Scorer) -> Crowd:
        """Return the count of the requests for which some models, or the reward, have room."""
        queues = {self.queues[b] for b in behind}
        return Crowd(lambda: sum(int(queue.places() + queue.waiting()) for queue in queues))

    def owner(self, request: Request) -> str:
        """Return the name of the request's key.

        Raises:
            ClientError: 401.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            message = "no valid API key; send `Authorization: Bearer KEY`"
            raise ClientError(401, message, code="invalid_api_key")
        return owner

    async def answer(self, request: Request, kind: type[Chat | Completion], call: Call) -> Response:
        """Answer a request with one JSON record, or with a stream.

        Raises:
            ClientError: the request is rejected, or no model answers it.
        """
        with self._logged() as log:
            log.key = self.owner(request)
            with ExitStack() as held:
                held.enter_context(self._admitted(log.key, self.crowd))
                data = await validation.read(request.stream(), request.headers, self.settings)
                ask = await self._in_turn(
                    log.key, data, lambda body: validation.check(kind, body, self.settings)
                )
                return await self._answer(ask, call, log, held)

    async def score(self, request: Request) -> dict[str, object]:
        """Return the reward of an answer.

        Raises:
            ClientError: the request is rejected, or it cannot be scored.
        """
        with self._logged() as log:
            log.key = self.owner(request)
            with self._admitted(log.key, self.score_crowd):
                data = await validation.read(request.stream(), request.headers, self.settings)
                messages, text = await self._in_turn(log.key, data, validation.to_score)
                if self.scorer is None or self.settings.reward is None:
                    raise ClientError(404, "no reward is served here", code="no_reward")
                log.model = self.settings.reward.name
                reward = await self._score(self.scorer, log.key, [plain(m) for m in messages], text)
            log.finish("200")
            return {"model": log.model, "reward": reward}

    async def _in_turn(self, key: str, data: bytes, check: Callable[[dict[str, Any]], T]) -> T:
        """Parse a body and check it, in turns of the event loop that no other body has a part in.

        Keys take turns here, too.

        Raises:
            ClientError: 400.
        """
        async with self._bodies.place(key):
            await asyncio.sleep(0)
            body = validation.decode(data, self.settings.max_depth)
            await asyncio.sleep(0)
            return check(body)

    @contextmanager
    def _admitted(self, key: str, crowd: Crowd) -> Iterator[None]:
        """Reserve what a request needs before its body is read.

        Raises:
            ClientError: 429.
        """
        with ExitStack() as held:
            try:
                held.enter_context(crowd.entered(key))
            except FullError:
                raise overloaded(self.returns.after(key)) from None
            held.enter_context(self.limits.admit(key))
            yield

    async def _take_place(
        self,
        behind: Backend | Scorer,
        key: str,
        deadline: float,
        held: ExitStack,
        answers: int = 1,
    ) -> None:
        """Wait until it is the turn of a key's request; `held` gives its places back.

        Raises:
            ClientError: the queue is full, or `timeout` is over.
        """
        queue = self.queues[behind]
        try:
            async with asyncio.timeout_at(deadline):
                turn = await queue.enter(key, answers)
        except TimeoutError:
            raise too_slow(self.settings.timeout) from None
        except FullError:
            raise overloaded(self.returns.after(key)) from None
        held.callback(self.returns.ended)
        held.callback(queue.leave, turn)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.settings.timeout

    async def _score(self, scorer: Scorer, key: str, messages: list[Message], text: str) -> float:
        deadline = self._deadline()
        try:
            with ExitStack() as held:
                await self._take_place(scorer, key, deadline, held)
                async with asyncio.timeout_at(deadline):
                    reward = await scorer.score(messages, text)
        except TimeoutError:
            raise too_slow(self.settings.timeout) from None
        except LostError:
            raise unavailable() from None
        if isinstance(reward, Rejection):
            raise _client_error(reward, {"messages": messages})
        return reward

    @contextmanager
    def _logged(self) -> Iterator[_RequestLog]:
        """Log a request that raises; one that is answered logs its own end."""
        log = _RequestLog(self.record)
        try:
            yield log
        except ClientError as error:
            log.finish(str(error.status))
            raise
        except BaseException as error:
            left = isinstance(error, asyncio.CancelledError | ClientDisconnect)
            log.finish("left" if left else "500")
            raise

    async def _answer(self, ask: Ask, call: Call, log: _RequestLog, held: ExitStack) -> Response:
        """Ask the model; a stream takes over what is `held`, and releases it at its end."""
        backend = self.backends.get(ask.model)
        if backend is None:
            raise model_not_found(ask.model, param="model")
        log.model = ask.model
        deadline = self._deadline()
        await self._take_place(backend, log.key, deadline, held, ask.answers)
        # What has a grammar may be why a replica was lost, so it is not tried on others.
        attempts = 1 if validation.has_grammar(ask) else MAX_ATTEMPTS
        body = validation.to_engine(ask)
        reply = partial(backend.ask, call, body, log.key)
        first, replies = await self._begin(reply, body, deadline, attempts)
        if not ask.stream:
            await _drain(replies)
            log.read_usage(first[0])
            log.finish("200")
            return Response(first[0], media_type="application/json")
        wants_usage = bool(ask.stream_options and ask.stream_options.include_usage)
        kept = held.pop_all()
        events = self._events(first, replies, log, deadline, wants_usage, kept)

        async def close() -> None:
            try:
                await events.aclose()
                await replies.aclose()
            finally:
                kept.close()

        return _Stream(events, close)

    async def _begin(
        self,
        reply: Callable[[], Replies],
        body: dict[str, object],
        deadline: float,
        attempts: int,
    ) -> tuple[list[str], Replies]:
        """Return the first texts of an answer and its replies, from the first live replica."""
        for _ in range(attempts):
            replies = reply()
            try:
                async with asyncio.timeout_at(deadline):
                    first = await anext(replies)
            except TimeoutError:
                await replies.aclose()
                raise too_slow(self.settings.timeout) from None
            except (LostError, StopAsyncIteration):
                first = Rejection(503, "lost")
            if not isinstance(first, Rejection):
                return first, replies
            await replies.aclose()
            if first.status != 503:
                raise _client_error(first, body)
            if attempts > 1:
                await asyncio.sleep(RETRY_DELAY)
        raise unavailable()

    async def _events(
        self,
        texts: list[str],
        replies: Replies,
        log: _RequestLog,
        deadline: float,
        wants_usage: bool,
        held: ExitStack,
    ) -> AsyncGenerator[str, None]:
        """Yield a stream's events; the last is DONE, or an error if the answer was interrupted.

        What is `held` is released before DONE, so that the client's next request finds its place.
        """
        self.record.first_token(log.model, log.seconds)
        outcome = "left"
        try:
            while True:
                if is_done := texts[-1:] == [DONE]:
                    await _drain(replies)
                    held.close()
                sent = [text for text in texts if not log.read_usage(text) or wants_usage]
                if sent:
                    yield "".join(f"data: {text}\n\n" for text in sent)
                if is_done:
                    outcome = "200"
                    return
                async with asyncio.timeout_at(deadline):
                    reply = await anext(replies)
                if isinstance(reply, Rejection):
                    raise ClientError(reply.status, reply.message)
                texts = reply
        except (LostError, StopAsyncIteration, TimeoutError, ClientError) as error:
            outcome = "broken"
            yield f"event: error\ndata: {json.dumps(self._broken(error).body)}\n\n"
        finally:
            log.finish(outcome)

    def _broken(self, error: Exception) -> ClientError:
        if isinstance(error, TimeoutError):
            return too_slow(self.settings.timeout)
        if isinstance(error, ClientError) and error.status < 500:
            return error
        return ClientError(
            503, "the answer was interrupted: its replica was lost", code="broken_off"
        )


def _client_error(rejection: Rejection, body: Mapping[str, object]) -> ClientError:
    """A model's rejection as a client's error; one that the client caused names the field."""
    if rejection.status >= 500:
        return ClientError(rejection.status, rejection.message)
    message, param = name_field(rejection.message, rejection.param, body)
    return ClientError(rejection.status, message, param=param)


async def _drain(replies: Replies) -> None:
    """Let a replica release a finished request, so that the client's next one finds its slot."""
    with suppress(LostError, TimeoutError):
        async with asyncio.timeout(DRAIN_TIMEOUT):
            async for _ in replies:
                pass
    await replies.aclose()
