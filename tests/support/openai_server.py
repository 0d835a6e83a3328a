"""A server of chat completions on this machine that misbehaves as it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from aiohttp import web

HANG = 0.1
"""Seconds after which a call that hangs no longer counts as in flight: less than any timeout."""

NO_JSON = ("", "upstream error", "<html>502</html>", '{"choices": [', '{"a": 1e', "[" * 100_000)
NO_COMPLETION: tuple[Any, ...] = (
    None,
    [],
    {},
    "text",
    7,
    {"choices": {"0": 1}},
    {"choices": None},
    {"choices": "text"},
    {"message": {"role": "assistant", "content": "a"}},
    {"detail": "upstream is not there", "usage": {}},
)
"""JSON that is no chat completion."""


@dataclass(frozen=True)
class Call:
    """A call as the server saw it."""

    body: dict[str, Any]
    headers: dict[str, str]
    attempt: int
    """1 for the first call with this body."""
    time: float

    @property
    def prompt(self) -> str:
        """The last message's text."""
        return self.body["messages"][-1]["content"]


Plan = Callable[[Call], str]


@dataclass
class Server:
    """`plan` says what is done with a call: `ok`, or the name of a fault, such as `500`."""

    plan: Plan = lambda call: "ok"
    delay: float = 0.0
    """Seconds that an answer takes."""
    usage: dict[str, int] | None = field(
        default_factory=lambda: {"prompt_tokens": 5, "completion_tokens": 5}
    )
    retry_after: Callable[[], str] = lambda: "0.02"
    bodies: dict[str, Any] = field(default_factory=dict)
    """Bodies with the status 200 by names that `plan` may say: JSON, or a text that is none."""
    calls: list[Call] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""
    _seen: Counter[str] = field(default_factory=Counter)

    def of(self, prompt: str) -> list[Call]:
        """The calls with a prompt."""
        return [call for call in self.calls if call.prompt == prompt]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one call."""
        body = await request.json()
        key = json.dumps(body, sort_keys=True)
        self._seen[key] += 1
        call = Call(body, dict(request.headers), self._seen[key], time.monotonic())
        self.calls.append(call)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        what = self.plan(call)
        try:
            await asyncio.sleep(HANG if what == "hang" else self.delay)
        finally:
            self.in_flight -= 1
        return await self._answer(what, call, request)

    async def _answer(self, what: str, call: Call, request: web.Request) -> web.StreamResponse:
        if what == "hang":
            await asyncio.sleep(60)
        if what in ("cut", "cut chunk", "reset"):
            return await self._cut(what, call, request)
        if what in self.bodies:
            told = self.bodies[what]
            text = told if isinstance(told, str) else json.dumps(told)
            return web.Response(text=text, content_type="application/json")
        if what == "no json":
            return web.Response(text=NO_JSON[len(self.calls) % len(NO_JSON)])
        if what == "shape":
            return web.json_response(NO_COMPLETION[len(self.calls) % len(NO_COMPLETION)])
        if what.isdigit():
            headers = {"Retry-After": self.retry_after()} if what in ("429", "503") else {}
            headers |= {"Location": "/v1/elsewhere"} if what == "302" else {}
            told = {"error": {"message": f"no: {call.headers.get('Authorization')}"}}
            return web.json_response(told, status=int(what), headers=headers)
        return web.json_response(self.completion(call, what))

    async def _cut(self, what: str, call: Call, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        raw = json.dumps(self.completion(call, "ok")).encode()
        if what == "cut":
            response.content_length = len(raw)
        if what != "reset":
            await response.prepare(request)
            await response.write(raw[: len(raw) // 2])
        request.transport.close()
        return response

    def completion(self, call: Call, what: str) -> dict[str, Any]:
        """A good answer; `what` can be how it ends, if not by `ok`."""
        reason = "stop" if what == "ok" else what
        message = {"role": "assistant", "content": f"{call.prompt}/{call.body.get('seed')}"}
        return {
            "object": "chat.completion",
            "model": "served-1",
            "system_fingerprint": "fp_1",
            "choices": [{"index": 0, "finish_reason": reason, "message": message}],
            "usage": self.usage,
        }


def in_seconds(seconds: int) -> str:
    """An HTTP date."""
    return formatdate(time.time() + seconds, usegmt=True)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Run a server in a thread while the block lasts."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
