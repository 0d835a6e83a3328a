"""What one client sends may cost the others little: bodies, headers, questions for the status."""

import asyncio
import gc
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.request_fuzz import Fuzzer
from support.waiting import LIMIT
from unit.serve.test_serve import (
    CHAT,
    COMPLETIONS,
    KEY,
    REWARD,
    SCORE,
    WHOLE,
    Client,
    Rewarded,
    Scripted,
)

from wrpo_ray.serve import bounds
from wrpo_ray.serve.backends import DONE, LostError, Rejection
from wrpo_ray.serve.bounds import expansion, grammar_fault, load_json
from wrpo_ray.serve.headers import DeclaredHeaders
from wrpo_ray.serve.ingress import Running

TURN = 0.05
"""Seconds of the event loop's CPU time that a body may take at a time."""


def items(item: bytes, size: int = 990_000) -> bytes:
    """As many as fit into a body."""
    return b",".join([item] * (size // (len(item) + 1)))


def chat(fields: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":"x"}],' + fields + b"}"


def formatted(schema: bytes) -> bytes:
    return chat(
        b'"response_format":{"type":"json_schema","json_schema":{"name":"s","schema":'
        + schema
        + b"}}"
    )


def keyed(form: bytes, size: int = 80_000) -> bytes:
    return b"{" + b",".join(form % number for number in range(size)) + b"}"


def prompted(prompt: bytes) -> bytes:
    return b'{"model":"m","prompt":' + prompt + b"}"


def said(call: bytes) -> bytes:
    calls = b'{"role":"assistant","tool_calls":[' + call + b"]}"
    user = b'{"role":"user","content":"x"}'
    return b'{"model":"m","messages":[' + b",".join((user, calls, user)) + b"]}"


CALL = b'{"id":"1","type":"function","function":{"name":"f","arguments":"%s"}}'
TURNS_OF_ONE = b'{"role":"user","content":"x"}'
BODIES: dict[str, tuple[str, bytes]] = {
    "objects": (COMPLETIONS, prompted(b"[" + items(b"{}") + b"]")),
    "lists": (COMPLETIONS, prompted(b"[" + items(b"[]") + b"]")),
    "some objects": (COMPLETIONS, prompted(b"[" + items(b"{}", 29_000) + b"]")),
    "tokens": (COMPLETIONS, prompted(b"[" + items(b"1") + b"]")),
    "tokens and a text": (COMPLETIONS, prompted(b"[" + items(b"1") + b',"a"]')),
    "a text and tokens": (COMPLETIONS, prompted(b'["a",' + items(b"1") + b"]")),
    "texts": (COMPLETIONS, prompted(b"[" + items(b'""') + b"]")),
    "batches": (COMPLETIONS, prompted(b"[" + items(b"[-1]", 45_000) + b"]")),
    "digits": (COMPLETIONS, prompted(b"[" + items(b"9" * 4200) + b"]")),
    "quotes": (COMPLETIONS, b'"' * 999_000),
    "backslashes": (COMPLETIONS, b'{"prompt":"' + b"\\" * 980_000),
    "depth": (CHAT, b"[" * 990_000),
    "keys": (CHAT, keyed(b'"%d":1')),
    "biases": (CHAT, chat(b'"logit_bias":' + keyed(b'"x%d":1'))),
    "stops": (CHAT, chat(b'"stop":[' + items(b"1") + b"]")),
    "messages": (CHAT, b'{"model":"m","messages":[' + items(b"{}", 29_000) + b"]}"),
    "turns": (CHAT, b'{"model":"m","messages":[' + items(TURNS_OF_ONE, 290_000) + b"]}"),
    "keys of a message": (
        CHAT,
        b'{"model":"m","messages":[' + keyed(b'"%d":1') + b"]}",
    ),
    "parts": (CHAT, b'{"messages":[{"content":[' + items(b"{}", 29_000) + b"]}]}"),
    "arguments": (CHAT, said(CALL % (b'{\\"a\\":[' + items(b"1", 900_000) + b"]}"))),
    "calls": (CHAT, said(items(CALL % b"", 300_000))),
    "tools": (CHAT, chat(b'"tools":[' + items(b"{}", 29_000) + b"]")),
    "choices": (CHAT, formatted(b'{"enum":[' + items(b'""') + b"]}")),
    "patterns": (CHAT, formatted(b'{"allOf":[' + items(b'{"pattern":"a"}', 150_000) + b"]}")),
    "a pattern": (CHAT, formatted(b'{"pattern":"' + b"{99}" * 200_000 + b'"}')),
    "scored": (SCORE, b'{"messages":[' + items(b'{"role":"user","content":[]}', 150_000) + b"]}"),
}


HEADERS = [(b"authorization", b"Bearer " + KEY.encode()), (b"content-type", b"application/json")]


async def _post(
    app: Any, path: str, body: bytes, method: str = "POST", headers: Any = HEADERS
) -> int:
    """Send a request without a network; return its status."""
    status = 0
    inbox = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        return inbox.pop() if inbox else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http"}
    await app({**scope, "headers": headers}, receive, send)
    return status


async def _longest_turn(work: Any) -> tuple[float, Any]:
    """Return the most CPU time that one turn of the event loop took, and the work's outcome.

    CPU time, which other work on the machine does not lengthen.
    """
    longest, task = 0.0, asyncio.ensure_future(work)
    while not task.done():
        begun = time.thread_time()
        await asyncio.sleep(0)
        longest = max(longest, time.thread_time() - begun)
    return longest, task.result()


@pytest.fixture
def _frozen() -> Iterator[None]:
    """Nothing that is older is collected meanwhile; Ray Serve sees to it in a replica."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_frozen")
def test_hostile_bodies_take_little_of_the_event_loop_alone_and_at_once():
    assert len(BODIES) >= 20
    client = Client(Scripted([[WHOLE, DONE]]), requests_per_minute=10_000)
    app = client.http.app

    async def measure() -> dict[str, tuple[float, Any]]:
        await _post(app, CHAT, b"{}")  # what is made once
        found = {name: await _longest_turn(_post(app, *body)) for name, body in BODIES.items()}
        crowds = [
            await _longest_turn(asyncio.gather(*(_post(app, *body) for body in BODIES.values())))
            for _ in range(3)  # the least: caches shared with other programs cost CPU time too
        ]
        return found | {"at once": min(crowds, key=lambda measured: measured[0])}

    found = asyncio.run(measure())
    print({name: f"{1000 * seconds:.0f} ms: {status}" for name, (seconds, status) in found.items()})
    *alone, (_, at_once) = found.values()
    assert {*at_once, *(status for _, status in alone)} <= {200, 400}
    assert not {name: seconds for name, (seconds, _) in found.items() if seconds > TURN}


@pytest.mark.usefixtures("_frozen")
@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.soak)])
def test_random_requests_are_answered_or_refused_without_an_engine(count: int):
    client = Client(
        Scripted([[WHOLE, DONE]]), Rewarded(0.5), reward=REWARD, requests_per_minute=10**6
    )
    statuses, turns = Counter[int](), []

    async def send() -> None:
        for sent in Fuzzer(0, KEY).requests(count):
            body = sent.body.replace(b'"target"', b'"m"')
            headers = [(name.lower(), value) for name, value in sent.headers]
            ask = _post(client.http.app, sent.path, body, sent.method, headers)
            longest, status = await _longest_turn(ask)
            turns.append(longest)
            statuses[status] += 1

    asyncio.run(send())
    print(dict(statuses), f"longest turn {1000 * max(turns):.0f} ms")
    assert max(statuses) < 500
    assert statuses[200] > count / 10
    assert max(turns) < TURN


# --- JSON ------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def _levels(tree: Any) -> int:
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return 0 if below is None else 1 + max(map(_levels, below), default=0)


@given(JSON)
def test_json_is_read_up_to_its_depth(tree: Any):
    data, levels = json.dumps(tree).encode(), _levels(tree)
    assert load_json(data, levels) == tree
    if levels:
        with pytest.raises(ValueError, match="levels"):
            load_json(data, levels - 1)


@given(st.text(alphabet='[]{}",:\\1a'))
def test_what_is_no_json_is_told(text: str):
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match="is not valid JSON|levels"):
            load_json(text.encode(), 5)
    else:
        assert load_json(text.encode(), 50) == expected


def test_brackets_of_texts_do_not_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounds, "MAX_CONTAINERS", 3)
    assert load_json(b'["[[[[{{{{\\"[[", {}, []]', 2) == ['[[[[{{{{"[[', {}, []]
    with pytest.raises(ValueError, match="more than 3 objects and lists"):
        load_json(b"[[],[],{}]", 2)


# --- grammars --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("abc", 3),
        ("a{3}", 3),
        (".{0,9000}x", 9001),
        ("((a{9}){9}){9}", 729),
        ("((a{99}){99}){99}", 970_299),
        ("a(b|c{4}){2,3}d", 20),
        ("[a-z]{3}", 3),
        (r"[\]{9}]{4}", 4),
        (r"\{9}", 3),
        ("a{,7}", 7),
        ("(?:ab){5}", 10),
        ("((((", 0),
        ("a{0}", 1),
    ],
)
def test_a_pattern_is_as_large_as_its_repetitions(pattern: str, parts: int):
    assert expansion(pattern) == parts


@given(st.text(alphabet="a(){}[]\\?:,9|*", max_size=200))
def test_any_pattern_has_a_size(pattern: str):
    assert 0 <= expansion(pattern) <= 200 * 10**9


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"pattern": ".{0,9000}x"}, "repeat more than"),
        ({"anyOf": [{"pattern": "((a{99}){99}){99}"}]}, "repeat more than"),
        ({"patternProperties": {"(.{99}){99}": {}}}, "repeat more than"),
        ({"allOf": [{"pattern": "a" * 600} for _ in range(4)]}, "repeat more than"),
        ({"allOf": [{"pattern": "a"} for _ in range(33)]}, "32 patterns"),
        ({"pattern": "a" * 1001}, "1000 characters in a pattern"),
        ({"enum": list(range(1001))}, "1000 values of `enum`"),
        ({"properties": {f"p{i}": {} for i in range(5001)}}, "5000 properties"),
        ({"maxLength": 10**6}, "for a length"),
        ({"items": {"minItems": 1e300}}, "for a length"),
        ({"description": "x" * 100_001}, "100000 keys"),
    ],
)
def test_schemas_too_large_for_a_grammar_are_told(schema: dict[str, Any], problem: str):
    client = Client(Scripted([[WHOLE, DONE]]))
    for field, value in {
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        "tools": [{"function": {"name": "f", "parameters": schema}}],
    }.items():
        error = client.post(**{field: value}).json()["error"]
        assert error["param"] == field
        assert problem in error["message"]
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    assert problem in client.post(response_format=tag).json()["error"]["message"]
    assert client.model.asked == []


def test_schemas_as_people_write_them_are_fine():
    properties = {f"p{i}": {"type": "string", "maxLength": 2000} for i in range(100)}
    named = {"pattern": {"type": "string", "pattern": "^[a-z]{1,64}@[a-z]{1,255}$"}}
    assert grammar_fault([{"type": "object", "properties": properties | named}]) is None


@pytest.mark.parametrize("lost", [[LostError()], [Rejection(503, "x")], []])
def test_what_may_have_broken_a_replica_is_not_tried_on_the_next(lost: list[Any]):
    client = Client(Scripted(lost))
    tool = {"function": {"name": "f"}}
    for fields in ({"response_format": {"type": "json_object"}}, {"tools": [tool]}):
        assert client.post(**fields).status_code == 503
    assert len(client.model.asked) == 2


# --- arguments of tools ------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['{"a":' * 33 + "1" + "}" * 33, '{"a":' * 900 + "}" * 900])
def test_deep_arguments_of_a_call_are_refused(text: str):
    client = Client(Scripted([[WHOLE, DONE]]))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    answer = client.post(messages=[*turns, turns[0]])
    assert answer.status_code == 400
    assert "more than 32 levels" in answer.json()["error"]["message"]


# --- headers -----------------------------------------------------------------------------------


def heard_of(headers: list[tuple[bytes, bytes]]) -> tuple[int, list[tuple[bytes, bytes]] | None]:
    """The status, and the headers that get to Ray Serve."""
    heard, status = None, 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal heard
        heard = scope["headers"]

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    asyncio.run(DeclaredHeaders(app)(scope, None, send))
    return status, heard


def test_only_declared_headers_get_to_ray_serve():
    steering = [
        b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"x-request-id",
        b"x-session-id", b"serve_multiplexed_model_id", b"serve-multiplexed-model-id",
        b"traceparent", b"tracestate", b"x-forwarded-for", b"cookie",
    ]  # fmt: skip
    kept = [(b"Authorization", b"Bearer x"), (b"content-type", b"application/json")]
    assert heard_of([*kept, *((name, b"?1") for name in steering)]) == (0, kept)


@pytest.mark.parametrize("odd", [b"\x80", b"\xff\xfe", "é".encode(), b"\x00", b"\x7f", b"a\nb"])
@pytest.mark.parametrize(
    "name", [b"x-request-id", b"authorization", b"content-type", b"user-agent"]
)
def test_odd_bytes_in_any_header_are_refused(name: bytes, odd: bytes):
    assert heard_of([(name, b"x" + odd * 5000)]) == (400, None)
    assert heard_of([(name + odd, b"x")]) == (400, None)


# --- the status of replicas ----------------------------------------------------------------------


class Controller:
    """Serve's controller: how often it was asked; it answers once it may, unless it fails."""

    def __init__(self) -> None:
        self.asked, self.may_answer, self.fails = 0, threading.Event(), False

    def status(self) -> Any:
        self.asked += 1
        self.may_answer.wait(LIMIT)
        if self.fails:
            raise TimeoutError
        model = SimpleNamespace(replica_states={"RUNNING": 1})
        return SimpleNamespace(
            applications={"app": SimpleNamespace(deployments={"Model:m": model})}
        )


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    controller = Controller()
    monkeypatch.setattr("wrpo_ray.serve.ingress.serve.status", controller.status)
    yield controller
    controller.may_answer.set()


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not is_true():
            await asyncio.sleep(0)


def test_many_who_ask_whether_it_is_ready_ask_the_controller_once(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("wrpo_ray.serve.ingress.STATUS_TTL", LIMIT)

    async def crowd() -> list[bool]:
        running = Running("app")
        watching = asyncio.create_task(running.watch())
        await until(lambda: controller.asked == 1)
        early = [running.is_running("Model:m") for _ in range(500)]
        controller.may_answer.set()
        await until(lambda: running.is_running("Model:m"))
        late = [running.is_running("Model:m") for _ in range(500)]
        watching.cancel()
        return early + late

    assert asyncio.run(crowd()) == [False] * 500 + [True] * 500
    assert controller.asked == 1


def test_a_controller_that_does_not_answer_is_not_ready(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("wrpo_ray.serve.ingress.STATUS_TTL", 0)
    monkeypatch.setattr("wrpo_ray.serve.ingress.STATUS_WAIT", 0.5)
    controller.may_answer.set()

    async def ask() -> None:
        running = Running("app")
        watching = asyncio.create_task(running.watch())
        await until(lambda: running.is_running("Model:m"))
        controller.fails = True
        await until(lambda: not running.is_running("Model:m"))
        watching.cancel()

    asyncio.run(ask())
