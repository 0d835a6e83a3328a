"""The client of OpenAI-compatible servers, for sources and judges: calls, timeouts, retries.

Calls run concurrently on one event loop in a thread of its own. Any number of threads may call,
and the limits hold over all of them: calls in flight, requests a minute, tokens a minute. A
transient fault (429, 408, 409, 5xx, no connection, timeout, a response that is cut off or is no
completion) is retried after exponential backoff with jitter, or after the server's Retry-After,
which pauses all calls. Any other 4xx is final, and so is a completion that cannot be used: the
same call would give it again, and cost as much (`completion`). The key comes from an environment
variable, and is removed from everything that the server says before it is stored or shown.

Not covered: streaming, tools, images, servers that do not take the key as a bearer token.
"""

import asyncio
import itertools
import json
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import Any, TypeVar
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
from wrpo_ray.llm.rate_limits import RateLimits

T = TypeVar("T")
Body = dict[str, Any]
"""Fields of a call beside `model` and the config's `extra`: messages, max_tokens, seed, ..."""
Response = tuple[int, Mapping[str, str], bytes]
"""Status, headers and body."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Longest wait in seconds before the second attempt, doubled for each further one; and its cap."""
LONGEST_PAUSE = 600.0
"""A server that asks for a longer pause (seconds) is out of quota, not busy: the call fails."""
BYTES_PER_TOKEN = 4
"""For the estimate of a prompt's tokens, until the server reports their number."""
MIN_SECRET_LENGTH = 16
"""Shorter keys are placeholders such as EMPTY, which local servers take and answers may contain."""


class RateLimitedError(EndpointError):
    """The server answers 429: too many requests or tokens."""


class ConnectionFaultError(EndpointError):
    """No connection, or it closed before the response began."""

    affects_all_calls = True


class AnswerTimeoutError(EndpointError):
    """The whole answer did not arrive in time."""


class CutAnswerError(EndpointError):
    """The connection closed in the middle of an answer."""


class MalformedAnswerError(EndpointError):
    """The answer is not JSON."""


class RefusedError(EndpointError):
    """The server answers 3xx or a permanent 4xx."""

    is_retryable = False


class AccessError(RefusedError):
    """The server answers 401 or 404: it knows no such key, model or path."""

    affects_all_calls = True


def read_key(config: EndpointConfig) -> SecretStr | None:
    """Return the key, from the environment of this process; None if the config names none.

    Raises:
        UserError: it is not set, or cannot be a key.
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

    One object a process holds its limits; threads share it, and it cannot be pickled.
    """

    def __init__(self, config: EndpointConfig, model: str, *, thinks: bool = False):
        self.config, self.model, self.thinks = config, model, thinks
        self.host = urlsplit(config.url).netloc
        self._key = read_key(config)
        self._limits = RateLimits(config)
        self._has_answered = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_work, args=(self._loop,), name="endpoint", daemon=True).start()
        self._session = self._run(_open_session(config, self._key)).result()
        self._proxy = _proxy(config.url)
        self.close = weakref.finalize(self, _close, self._loop, self._session)
        """Cancel all running calls; also called when the process exits."""

    def complete(self, body: Body) -> Completion:
        """Return the answer to one call.

        Raises:
            EndpointError: it failed; the subclass says why.
            UserError: no call has succeeded yet, and none can: the server is not reachable, or
                knows no such key or model.
        """
        return self._run(self._complete(body)).result()

    def complete_all(
        self, bodies: Iterable[Body]
    ) -> Iterator[tuple[int, Completion | EndpointError]]:
        """Yield (index, answer or error) of each call, as they finish.

        Bodies are taken from the iterable as slots become free.

        Raises:
            UserError: no call has succeeded yet, and none can: the server is not reachable, or
                knows no such key or model.
        """
        numbered = enumerate(bodies)
        running: dict[Future[Completion], int] = {}
        done: SimpleQueue[Future[Completion]] = SimpleQueue()
        try:
            while True:
                # Twice as many as may run: the others wait for a slot, or for a new attempt.
                room = 2 * self.config.concurrency - len(running)
                for index, body in itertools.islice(numbered, room):
                    future = self._run(self._complete(body))
                    running[future] = index
                    future.add_done_callback(done.put)
                if not running:
                    return
                future = done.get()
                error = future.exception()
                answer = error if isinstance(error, EndpointError) else future.result()
                yield running.pop(future), answer
        finally:
            for future in running:
                future.cancel()

    def _run(self, call: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    async def _complete(self, body: Body) -> Completion:
        sent = {"model": self.model} | body | self.config.extra
        sent = {name: value for name, value in sent.items() if value is not None}
        for attempt in itertools.count(1):
            try:
                return replace(await self._attempt(sent), attempts=attempt)
            except EndpointError as error:
                error.attempts = attempt
                is_last = attempt == self.config.attempts or error.pause > LONGEST_PAUSE
                if is_last or not error.is_retryable:
                    raise self._for_all(error) from None
                wait = random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
                wait += error.pause
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, sent: Body) -> Completion:
        estimate = _estimate(sent)
        async with self._limits.slot(estimate):
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
        if completion.prompt_tokens is not None and completion.output_tokens is not None:
            used = completion.prompt_tokens + completion.output_tokens
            self._limits.correct_tokens(used - estimate)
        return completion

    async def _post(self, sent: Body) -> Response:
        """Send one request. Errors, and those that they come from, do not contain the key."""
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
            error = CutAnswerError(f"{self.host} closed the connection in the middle of an answer")
        except (aiohttp.ClientError, OSError) as fault:
            # The text of some contains the address, and a proxy's may contain a password.
            reason = getattr(fault, "message", None) or fault
            text = f"{self.host}: {type(fault).__name__}: {reason}"
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
        """Return the error that stops the run, where every row would fail as this one did."""
        if self._has_answered or not error.affects_all_calls:
            return error
        key = self.config.key_env or "missing: set `key_env`"
        return UserError(
            f"{error}; start the server, or correct the endpoint's `url`, the name {self.model!r} "
            f"in `model`, or the key ({key})"
        )

    def _read(self, status: int, raw: bytes) -> Completion:
        """Return the answer in a response body; errors quote the server, without the key."""
        if status != 200:
            raise self._refusal(status, raw)
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            text = f"{self.host} answers with what is not JSON: {self._clean(_message(raw), 100)}"
            error: EndpointError = MalformedAnswerError(text)
        else:
            if (inner := _inner_status(answer)) is not None:
                raise self._refusal(inner, raw)
            try:
                return self._redacted(read_completion(answer, thinks=self.thinks))
            except EndpointError as found:
                # The body in place of a completion is the only hint to the cause.
                body = f": {_message(raw)}" * isinstance(found, WrongShapeError)
                error = type(found)(f"{self.host} {self._clean(f'{found}{body}')}")
        raise error

    # --- the key, removed from all that the server says

    def _redacted(self, completion: Completion) -> Completion:
        text = self._without_key(completion.text) if self._has_secret else completion.text
        return replace(completion, text=text, model=self._clean(completion.model, 200))

    @property
    def _has_secret(self) -> bool:
        return self._key is not None and len(self._key.get_secret_value()) >= MIN_SECRET_LENGTH

    def _without_key(self, text: str) -> str:
        """Return the text without the key: plain, JSON-escaped or URL-quoted."""
        if self._key is None:
            return text
        key = self._key.get_secret_value()
        for form in (key, json.dumps(key)[1:-1], quote(key, safe="")):
            text = text.replace(form, "[key]")
        return text

    def _clean(self, text: str, length: int = 500) -> str:
        """Return the server's words as one line of valid Unicode, without the key."""
        line = " ".join(self._without_key(text).split())
        return line.encode(errors="replace").decode()[:length]


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
    """Return the proxy that the environment names for the server."""
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
    """Return an estimate of a call's tokens: the prompt's, by its length, and the answer's most."""
    contents = [str(message.get("content")) for message in sent["messages"]]
    prompt = sum(len(content.encode(errors="replace")) for content in contents)
    longest: int = sent.get("max_completion_tokens") or sent.get("max_tokens") or 0
    return prompt // BYTES_PER_TOKEN + longest


def _inner_status(answer: Any) -> int | None:
    """Return the HTTP status of an error in place of an answer; None without an error.

    Gateways send errors with status 200, and the true one or OpenAI's error type inside.
    """
    error = answer.get("error") if isinstance(answer, dict) else None
    if not error:
        return None
    fields = error if isinstance(error, dict) else {}
    for status in map(str, (fields.get("code"), fields.get("status"), fields.get("status_code"))):
        if re.fullmatch(r"[45]\d\d", status, re.ASCII):
            return int(status)
    return 400 if fields.get("type") == "invalid_request_error" else 500


def _message(raw: bytes) -> str:
    """Return the error message in a body: the usual field of an error, or the whole body."""
    text = raw.decode(errors="replace")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else text


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After header, a number or a date; 0 where it is neither."""
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
