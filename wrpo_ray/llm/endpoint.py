"""Chat completions of an OpenAI-compatible server, for sources and judges alike.

Calls run side by side on one event loop in a thread of its own; any number of threads may ask,
and the limits hold over all of them: calls in flight, requests a minute, tokens a minute. A
fault that may pass (429, 408, 409, 5xx, no connection, no answer in time, an answer that is cut
off or is no completion) is tried again after a growing, random wait, or after what the server's
Retry-After says. Any other 4xx is final, and so is a completion that cannot be used: the same
call would give it again, and cost as much (`completion`). The key comes from an environment
variable, and is cut out of whatever the server says before anyone sees it.

Not covered: streaming, tools, images, servers that want the key elsewhere than as a bearer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from pydantic import SecretStr

from wrpo_ray.config import EndpointConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm.completion import (
    Completion,
    EndpointError,
    ServerFaultError,
    UnusableAnswerError,
    WrongShapeError,
    read_completion,
)

Body = dict[str, Any]
"""What a call sends beside `model` and the config's `extra`: messages, max_tokens, seed, ..."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the second attempt at the most, doubled for each further one; and the bound."""
LONGEST_PAUSE = 600.0
"""A server that asks for more seconds is out of quota rather than busy: the call fails."""
SLACK = 0.05
"""Seconds of a limit that a late wake-up may make up for."""
GLANCE = 0.1
"""Seconds between looks at a limit that answers with fewer tokens than charged have eased."""
BYTES_A_TOKEN = 4
"""For the estimate of a prompt's tokens, until the server tells their number."""
SECRET = 16
"""Shorter keys are placeholders such as EMPTY, that local servers take and answers may spell."""


class RateLimitedError(EndpointError):
    """The server answers 429: too many requests or tokens."""


class ConnectionFaultError(EndpointError):
    """No connection, or it ended before an answer began."""

    concerns_all = True


class AnswerTimeoutError(EndpointError):
    """The whole answer was not there in time."""


class CutAnswerError(EndpointError):
    """The connection ended in the middle of an answer."""


class MalformedAnswerError(EndpointError):
    """The answer is not JSON."""


class RefusedError(EndpointError):
    """The server answers 3xx or a 4xx that will not pass."""

    may_pass = False


class AccessError(RefusedError):
    """The server answers 401 or 404: it knows no such key, model or path."""

    concerns_all = True


def read_key(config: EndpointConfig) -> SecretStr | None:
    """The key, from the environment of this process.

    Raises:
        UserError: it is not set, or can be no key.
    """
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {config.key_env} is not set; put the key of {config.url} "
            f"into it, on a cluster on every node before Ray is started"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"the environment variable {config.key_env} holds no key: it is not a word")
    return SecretStr(key)


class Endpoint:
    """A model behind an OpenAI-compatible server.

    One object a process holds its limits; it is shared by threads, and does not travel.
    """

    def __init__(self, config: EndpointConfig, model: str):
        self.config, self.model = config, model
        self.host = urlsplit(config.url).netloc
        self._key = read_key(config)
        self._limits = _Limits(config)
        self._has_answered = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_work, args=(self._loop,), name="endpoint", daemon=True).start()
        self._session = self._run(_open_session(config, self._key)).result()
        self._proxy = _proxy(config.url)
        self.close = weakref.finalize(self, _close, self._loop, self._session)
        """End all calls under way; also happens at the process's end."""

    def complete(self, body: Body) -> Completion:
        """The answer to one call.

        Raises:
            EndpointError: it failed; the subclass says why.
            UserError: nothing was ever answered, and no call can be: nobody listens there, or
                the server knows no such key or model.
        """
        return self._run(self._complete(body)).result()

    def complete_all(
        self, bodies: Iterable[Body]
    ) -> Iterator[tuple[int, Completion | EndpointError]]:
        """(index, answer or error) of each call, as they finish.

        Bodies are taken from the iterable as there is room for calls.

        Raises:
            UserError: nothing was ever answered, and no call can be: nobody listens there, or
                the server knows no such key or model.
        """
        numbered = enumerate(bodies)
        under_way: dict[Future[Completion], int] = {}
        done: SimpleQueue[Future[Completion]] = SimpleQueue()
        try:
            while True:
                # Twice as many as may run: the others wait for a turn, or for a new attempt.
                room = 2 * self.config.concurrency - len(under_way)
                for index, body in itertools.islice(numbered, room):
                    future = self._run(self._complete(body))
                    under_way[future] = index
                    future.add_done_callback(done.put)
                if not under_way:
                    return
                future = done.get()
                error = future.exception()
                answer = error if isinstance(error, EndpointError) else future.result()
                yield under_way.pop(future), answer
        finally:
            for future in under_way:
                future.cancel()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _complete(self, body: Body) -> Completion:
        sent = {"model": self.model} | body | self.config.extra
        sent = {name: value for name, value in sent.items() if value is not None}
        for attempt in itertools.count(1):
            try:
                return replace(await self._attempt(sent), attempts=attempt)
            except EndpointError as error:
                error.attempts = attempt
                is_last = attempt == self.config.attempts or error.pause > LONGEST_PAUSE
                if is_last or not error.may_pass:
                    raise self._for_all(error) from None
                wait = random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
                wait += error.pause
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, sent: Body) -> Completion:
        estimate = _estimate(sent)
        async with self._limits.turn(estimate):
            status, headers, raw = await self._post(sent)
        try:
            completion = self._read(status, raw)
        except EndpointError as error:
            self._has_answered |= isinstance(error, UnusableAnswerError)
            error.pause = _seconds(headers.get("Retry-After"))
            if error.pause <= LONGEST_PAUSE:
                self._limits.pause(error.pause)
            raise
        self._has_answered = True
        self._limits.correct(estimate, completion)
        return completion

    async def _post(self, sent: Body) -> tuple[int, Any, bytes]:
        """Status, headers and body; the key is in no error, nor in one that it comes from."""
        url = f"{self.config.url}/chat/completions"
        body = json.dumps(sent).encode()
        try:
            async with self._session.post(
                url, data=body, proxy=self._proxy, allow_redirects=False
            ) as response:
                return response.status, response.headers, await response.read()
        except TimeoutError:
            error: EndpointError = AnswerTimeoutError(
                f"{self.host} did not answer within {self.config.timeout:g} s"
            )
        except aiohttp.ClientPayloadError:
            error = CutAnswerError(f"{self.host} ended the connection in the middle of an answer")
        except (aiohttp.ClientError, OSError) as fault:
            # The text of some names the address, where a proxy's may hold a password.
            told = getattr(fault, "message", None) or fault
            text = f"{self.host}: {type(fault).__name__}: {told}"
            error = ConnectionFaultError(self._clean(text))
        raise error

    def _refusal(self, status: int, raw: bytes) -> EndpointError:
        text = f"{self.host} answers {status}: {self._clean(_message(raw))}"
        if status == 429:
            return RateLimitedError(text)
        if status in (408, 409) or status >= 500:
            return ServerFaultError(text)
        return (AccessError if status in (401, 404) else RefusedError)(text)

    def _for_all(self, error: EndpointError) -> EndpointError | UserError:
        """What stops a run before all its rows fail one after another."""
        if self._has_answered or not error.concerns_all:
            return error
        key = self.config.key_env or "missing: set `key_env`"
        return UserError(
            f"{error}; start the server, or correct the endpoint's `url`, the name {self.model!r} "
            f"in `model`, or the key ({key})"
        )

    def _read(self, status: int, raw: bytes) -> Completion:
        """The answer in a body; errors tell what the server says, without the key."""
        if status != 200:
            raise self._refusal(status, raw)
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            text = f"{self.host} answers with what is not JSON: {self._clean(_message(raw), 100)}"
            error: EndpointError = MalformedAnswerError(text)
        else:
            if (told := _told_status(answer)) is not None:
                raise self._refusal(told, raw)
            try:
                return self._kept(read_completion(answer))
            except EndpointError as found:
                # What stands in place of a completion is all there is to tell.
                body = f": {_message(raw)}" * isinstance(found, WrongShapeError)
                error = type(found)(f"{self.host} {self._clean(f'{found}{body}')}")
        raise error

    def _kept(self, completion: Completion) -> Completion:
        """The answer without the key."""
        text = self._without_key(completion.text) if self._has_secret else completion.text
        return replace(completion, text=text, model=self._clean(completion.model, 200))

    # --- what is told

    @property
    def _has_secret(self) -> bool:
        return self._key is not None and len(self._key.get_secret_value()) >= SECRET

    def _without_key(self, text: str) -> str:
        """The text without the key, plain, as JSON or as a URL has it."""
        if self._key is None:
            return text
        key = self._key.get_secret_value()
        for form in (key, json.dumps(key)[1:-1], quote(key, safe="")):
            text = text.replace(form, "[key]")
        return text

    def _clean(self, text: str, length: int = 500) -> str:
        """One line of what the server says, that can be stored."""
        line = " ".join(self._without_key(text).split())
        return line.encode(errors="replace").decode()[:length]


class _Limits:
    """Calls in flight, and the even spacing of their starts that the minute's limits ask for.

    A call takes 60 / requests_per_minute seconds, and for its tokens 60 / tokens_per_minute
    each: the next starts when these are over. Tokens are charged by an estimate, which is
    corrected by what the answer took; a call that fails stays charged.
    """

    def __init__(self, config: EndpointConfig):
        self._slots = asyncio.Semaphore(config.concurrency)
        self._turn = asyncio.Lock()
        self._requests = _Pace(config.requests_per_minute)
        self._tokens = _Pace(config.tokens_per_minute)

    @asynccontextmanager
    async def turn(self, tokens: int) -> AsyncIterator[None]:
        """Hold one of the calls in flight, from when the limits let it start."""
        async with self._slots:
            async with self._turn:
                while (wait := max(self._requests.wait, self._tokens.wait)) > 0:
                    await asyncio.sleep(min(wait, GLANCE))
                self._requests.charge(1)
                self._tokens.charge(tokens)
            yield

    def correct(self, charged: int, completion: Completion) -> None:
        """Charge what a call took, where that is known, in place of the estimate."""
        if completion.prompt_tokens is not None and completion.output_tokens is not None:
            self._tokens.correct(completion.prompt_tokens + completion.output_tokens - charged)

    def pause(self, seconds: float) -> None:
        """Start nothing for so long."""
        self._requests.pause(seconds)


class _Pace:
    """When the next call may start, by one limit."""

    def __init__(self, per_minute: int | None):
        self._seconds_each = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    @property
    def wait(self) -> float:
        """Seconds until the next start; none are left when it is not above 0."""
        return self._free_at - time.monotonic()

    def charge(self, count: int) -> None:
        """Take the time of so many."""
        self._free_at = max(self._free_at, time.monotonic() - SLACK) + count * self._seconds_each

    def correct(self, count: int) -> None:
        """Take the time of so many more, or give it back where there are fewer."""
        self._free_at += count * self._seconds_each

    def pause(self, seconds: float) -> None:
        """Start nothing for so long."""
        self._free_at = max(self._free_at, time.monotonic() + seconds)


# --- the connection --------------------------------------------------------------------------


async def _open_session(config: EndpointConfig, key: SecretStr | None) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key.get_secret_value()}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # the slots are the limit
        timeout=aiohttp.ClientTimeout(total=config.timeout),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
    )


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for the server."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


def _work(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _close(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession) -> None:
    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await session.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)


# --- reading and estimating ------------------------------------------------------------------


def _estimate(sent: Body) -> int:
    """Tokens that a call may take: the prompt's, by its length, and the longest answer's."""
    contents = [str(message.get("content")) for message in sent["messages"]]
    prompt = sum(len(content.encode(errors="replace")) for content in contents)
    longest = sent.get("max_completion_tokens") or sent.get("max_tokens") or 0
    return prompt // BYTES_A_TOKEN + longest


def _told_status(answer: Any) -> int | None:
    """The HTTP status that an error in the place of an answer stands for; null without an error.

    Gateways send errors with the status 200, and the true one or OpenAI's type inside.
    """
    error = answer.get("error") if isinstance(answer, dict) else None
    if not error:
        return None
    told = error if isinstance(error, dict) else {}
    for status in map(str, (told.get("code"), told.get("status"), told.get("status_code"))):
        if re.fullmatch(r"[45]\d\d", status, re.ASCII):
            return int(status)
    return 400 if told.get("type") == "invalid_request_error" else 500


def _message(raw: bytes) -> str:
    """What a body says went wrong: the usual fields of an error, or all of it."""
    text = raw.decode(errors="replace")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = told.get("error", told) if isinstance(told, dict) else told
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else text


def _seconds(retry_after: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date; 0 where it is neither."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds)
