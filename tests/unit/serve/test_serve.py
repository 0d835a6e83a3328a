"""The endpoint without Ray: keys, limits, rejected requests, and the ends of answers."""

import asyncio
import hashlib
import itertools
import json
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.request_values import (
    ACCEPTED,
    NESTED,
    TOOL,
    VALUES,
    is_accepted,
    path_text,
    places,
    replaced,
)
from support.tiny_models import write_model

from wrpo_ray import cli, config
from wrpo_ray.errors import TemplateError, UserError
from wrpo_ray.llm.chat import prompt_ids
from wrpo_ray.serve import request_handling as endpoint
from wrpo_ray.serve import requests, validation
from wrpo_ray.serve.api import create
from wrpo_ray.serve.backends import DONE, LostError, Rejection
from wrpo_ray.serve.check import checked
from wrpo_ray.serve.errors import ClientError, overloaded
from wrpo_ray.serve.keys import CHECK_INTERVAL, Keys, Limits, new_key, parse
from wrpo_ray.serve.prompts import Prompts
from wrpo_ray.zoo.tokenizers import byte_tokenizer

KEY, LINE = new_key("alice")
OLD, OLD_LINE = new_key("bob")
FRESH, FRESH_LINE = new_key("carol")
LINES = f"{LINE}  # hers\n\n{OLD_LINE} 2020-01-01\n"
SECRET = "xyzzy-prompt"
HI = [{"role": "user", "content": SECRET}]
CHAT, COMPLETIONS, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Let the logger propagate: Ray Serve, which other tests import, turns that off."""
    monkeypatch.setattr(endpoint.LOG, "disabled", False)
    monkeypatch.setattr(endpoint.LOG, "propagate", True)
    caplog.set_level(logging.DEBUG, endpoint.LOG.name)


def user_says(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def chunk(text: str) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}}]}, separators=(",", ":"))


def usage(prompt: int, answer: int) -> str:
    counts = {"prompt_tokens": prompt, "completion_tokens": answer}
    return json.dumps({"choices": [], "usage": counts}, separators=(",", ":"))


WHOLE = json.dumps(
    {
        "choices": [{"message": {"content": "yes"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    },
    separators=(",", ":"),
)


class Scripted:
    """A model that answers each call with the next of its scripts, the last one for ever.

    A script's items are replies, seconds to wait, or errors to raise.
    """

    def __init__(self, *scripts: list[Any]):
        self.scripts, self.asked, self.open = list(scripts), [], 0

    async def ask(self, call: str, body: dict[str, Any], key: str) -> AsyncGenerator[Any, None]:
        self.asked.append(body)
        script = self.scripts[0] if len(self.scripts) == 1 else self.scripts.pop(0)
        self.open += 1
        try:
            for item in script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, float):
                    await asyncio.sleep(item)
                    continue
                yield item
        finally:
            self.open -= 1

    def places(self) -> int:
        return 100

    async def ready(self) -> bool:
        return bool(self.scripts)


class Rewarded:
    """A reward with a constant outcome."""

    def __init__(self, outcome: float | Rejection | Exception):
        self.outcome, self.asked = outcome, []

    async def score(self, messages: list[Any], text: str) -> float | Rejection:
        self.asked.append((messages, text))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def places(self) -> int:
        return 100


class Noted:
    """A recorder that keeps what it is given."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.counts: list[tuple[int, int]] = []

    def finished(self, model: str, outcome: str, seconds: float) -> None:
        self.outcomes[model, outcome] += 1

    def first_token(self, model: str, seconds: float) -> None:
        pass

    def tokens(self, model: str, prompt: int, answer: int) -> None:
        self.counts.append((prompt, answer))


class Client:
    """A client of an endpoint with the model `m`."""

    def __init__(self, model: Scripted, scorer: Rewarded | None = None, **settings: Any):
        tree = {"models": [{"name": "m", "model": "folder"}], **settings}
        self.model, self.noted = model, Noted()
        app = create(config.serving(tree), {"m": model}, Keys(LINES), self.noted, scorer)
        self.http = TestClient(app, raise_server_exceptions=False)

    def post(self, path: str = CHAT, key: str | None = KEY, **fields: Any) -> Any:
        fields = {"model": "m"} | ({"messages": HI} if path == CHAT else {"prompt": "p"}) | fields
        return self.http.post(path, json=fields, headers=self.headers(key))

    def headers(self, key: str | None = KEY) -> dict[str, str]:
        return {} if key is None else {"Authorization": f"Bearer {key}"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_DELAY", 0.0)


# --- keys ------------------------------------------------------------------------------------


def test_a_key_is_known_by_its_hash_until_it_expires():
    now = [0.0]
    digest = hashlib.sha256(b"k").hexdigest()
    keys = Keys(f"a {digest} 1970-01-02T00:00:00", now=lambda: now[0])
    assert keys.owner("k") == "a"
    assert keys.owner("K") is None
    assert keys.owner("\ud800") is None
    now[0] = 86400.0 - 0.001
    assert keys.owner("k") == "a"
    now[0] = 86400.0
    assert keys.owner("k") is None


@given(st.text(max_size=50))
def test_no_other_text_is_the_key(text: str):
    assert Keys(LINES).owner(text) is None


def test_a_changed_file_takes_effect_and_a_wrong_line_drops_itself_alone(tmp_path: Path):
    file, now = tmp_path / "keys", [0.0]
    file.write_text(LINE)
    keys = Keys(None, str(file), now=lambda: now[0])
    told: list[list[str]] = []
    keys.listen(told.append)
    (tmp_path / "new").write_text(f"nonsense\n{FRESH_LINE}\n")
    (tmp_path / "new").rename(file)
    assert keys.owner(KEY) == "alice", "looked at again only after a while"
    now[0] += CHECK_INTERVAL
    assert (keys.owner(KEY), keys.owner(FRESH)) == (None, "carol")
    assert told == [[], [f"{file}: line 1: write NAME SHA256 [EXPIRES], the hash as 64 hex digits"]]


def _emptied(file: Path) -> None:
    file.write_text("")


def _commented(file: Path) -> None:
    file.write_text(f"# {LINE}\n")


def _without_her_but_broken(file: Path) -> None:
    file.write_text("nonsense\n")


def _not_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")


def _a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "removed", [Path.unlink, _emptied, _commented, _without_her_but_broken, _not_text, _a_folder]
)
def test_a_key_whose_line_is_gone_is_not_accepted_however_it_went(removed: Any, tmp_path: Path):
    file, now = tmp_path / "keys", [0.0]
    file.write_text(LINE)
    keys = Keys(None, str(file), now=lambda: now[0])
    assert keys.owner(KEY) == "alice"
    removed(file)
    now[0] += CHECK_INTERVAL
    assert keys.owner(KEY) is None
    assert keys.problems
    with pytest.raises(UserError):
        checked(config.serving({"models": [{"name": "m", "model": "f"}], "keys": str(file)}))
    if file.is_dir():
        file.rmdir()
    file.write_text(LINE)
    now[0] += CHECK_INTERVAL
    assert (keys.owner(KEY), keys.problems) == ("alice", [])


@pytest.mark.parametrize(
    ("text", "problem", "names"),
    [
        ("", "no keys", []),
        ("# only a comment", "no keys", []),
        (f"alice {KEY}", "line 1: write NAME SHA256", []),
        (f"{LINE} {KEY}", "line 1: EXPIRES is no day", []),
        (f"{LINE}\n{LINE}", "line 2: the name 'alice' is given twice", ["alice"]),
        (f"x\n{LINE}\ny z", "line 1: write NAME.*line 3: write NAME", ["alice"]),
    ],
    ids=["empty", "comment", "key", "day", "twice", "several"],
)
def test_what_is_wrong_with_keys_is_told_without_a_key(text: str, problem: str, names: list[str]):
    keys, problems = parse(text, "keys")
    assert [key.name for key in keys] == names
    assert re.search(problem, " ".join(problems))
    assert KEY not in str(problems)


def test_new_key_prints_a_line_that_accepts_it(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["serve", "--new-key", "carol"]) == 0
    key, line = (text.split(maxsplit=1)[1] for text in capsys.readouterr().out.splitlines())
    assert Keys(line).owner(key) == "carol"


# --- limits ----------------------------------------------------------------------------------


def test_no_window_of_a_minute_has_more_requests_than_allowed():
    now = [0.0]
    limits = Limits(3, 9, now=lambda: now[0])
    for at in (0.0, 10.0, 59.0):
        now[0] = at
        with limits.admit("a"):
            pass
    with pytest.raises(ClientError) as told, limits.admit("a"):
        pass
    assert told.value.headers == {"Retry-After": "1"}
    with limits.admit("b"):
        pass
    now[0] = 60.0
    with limits.admit("a"):
        pass
    with pytest.raises(ClientError) as told, limits.admit("a"):
        pass
    assert told.value.headers == {"Retry-After": "10"}


def test_places_are_given_back_however_a_request_ends():
    limits = Limits(100, 2)
    with limits.admit("a"), limits.admit("a"):
        with pytest.raises(ClientError, match="at once"), limits.admit("a"):
            pass
        with limits.admit("b"):
            pass
    with pytest.raises(RuntimeError), limits.admit("a"):
        raise RuntimeError
    with limits.admit("a"), limits.admit("a"):
        pass


# --- answers ---------------------------------------------------------------------------------


def test_a_whole_answer_is_the_models_own():
    client = Client(Scripted([[WHOLE, DONE]]))
    answer = client.post()
    assert (answer.status_code, answer.text) == (200, WHOLE)
    assert client.noted.outcomes == {("m", "200"): 1}
    assert client.noted.counts == [(3, 1)]
    assert client.model.open == 0


@pytest.mark.parametrize("wants", [False, True])
def test_a_stream_ends_with_done_and_has_the_usage_that_was_asked_for(wants: bool):
    client = Client(Scripted([[chunk("a"), chunk("b")], [chunk("c")], [usage(2, 3), DONE]]))
    options = {"stream_options": {"include_usage": True}} if wants else {}
    answer = client.post(stream=True, **options)
    texts = [chunk("a"), chunk("b"), chunk("c"), *[usage(2, 3)] * wants, DONE]
    assert answer.text == "".join(f"data: {text}\n\n" for text in texts)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert client.model.asked[0]["stream_options"] == {"include_usage": True}
    assert client.noted.counts == [(2, 3)]


def test_only_known_fields_go_on_to_the_engine():
    client = Client(Scripted([[WHOLE, DONE]]))
    hostile = {"chat_template": "{{ x }}", "request_id": "1", "kv_transfer_params": {}, "user": "u"}
    assert client.post(top_p=0.5, seed=None, **hostile).status_code == 200
    assert client.model.asked == [{"model": "m", "messages": HI, "top_p": 0.5}]


@pytest.mark.parametrize("lost", [[LostError()], [Rejection(503, "x")], []])
@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_byte_another_replica_is_asked(lost: list[Any], stream: bool):
    whole = [[chunk("a"), DONE]] if stream else [[WHOLE, DONE]]
    client = Client(Scripted(lost, lost, whole))
    answer = client.post(stream=stream)
    assert answer.status_code == 200
    assert answer.text == (f"data: {chunk('a')}\n\ndata: [DONE]\n\n" if stream else WHOLE)
    client = Client(Scripted(lost))
    answer = client.post(stream=stream)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "unavailable"
    assert len(client.model.asked) == endpoint.MAX_ATTEMPTS


@pytest.mark.parametrize("end", [[LostError()], [Rejection(503, "x")], []])
def test_after_the_first_byte_a_lost_replica_is_an_error_event_without_done(end: list[Any]):
    client = Client(Scripted([[chunk("a")], *end]))
    answer = client.post(stream=True)
    first, last, rest = answer.text.split("\n\n")
    assert (answer.status_code, first, rest) == (200, f"data: {chunk('a')}", "")
    event, data = last.split("\n")
    assert event == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "broken_off")
    assert client.noted.outcomes == {("m", "broken"): 1}


def test_a_prompt_beyond_the_context_is_the_clients_fault():
    client = Client(Scripted([Rejection(400, "too long", "messages")]))
    answer = client.post(stream=True)
    assert answer.status_code == 400
    error = {"message": "messages: too long", "type": "invalid_request_error", "code": None}
    assert answer.json() == {"error": error | {"param": "messages"}}


def test_what_an_engine_fails_at_is_not_tried_on_others():
    client = Client(Scripted([Rejection(500, "failed")]))
    answer = client.post()
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert len(client.model.asked) == 1


def test_time_is_limited_before_and_after_the_first_byte():
    client = Client(Scripted([9.0, [WHOLE, DONE]]), timeout=0.1)
    assert client.post().status_code == 504
    client = Client(Scripted([[chunk("a")], 9.0, [DONE]]), timeout=0.8)
    text = client.post(stream=True).text
    assert "0.8 seconds" in text
    assert "[DONE]" not in text
    assert client.model.open == 0


def test_a_key_has_so_many_requests_at_once_and_a_left_stream_gives_its_place_back():
    model = Scripted([[chunk("a")], 0.5, [DONE]])
    client = Client(model, concurrent=1)
    with client.http as http:
        answers: list[Any] = []
        ask = threading.Thread(target=lambda: answers.append(client.post(stream=True)))
        ask.start()
        while not model.open:
            time.sleep(0.01)
        refused = client.post()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        ask.join()
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert client.post(stream=True).status_code == 200
        assert http


async def _leave(app: Any, fields: dict[str, Any]) -> None:
    """A client that goes away after the first bytes of a stream."""
    sent = asyncio.Event()
    data = json.dumps(fields).encode()
    inbox = [{"type": "http.request", "body": data}]

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        await sent.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            sent.set()

    headers = [
        (b"authorization", b"Bearer " + KEY.encode()),
        (b"content-type", b"application/json"),
    ]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode()}
    scope |= {"query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http"}
    await app(scope, receive, send)


def test_a_client_that_leaves_frees_the_model():
    model = Scripted([[chunk("a")], 60.0, [DONE]])
    client = Client(model, concurrent=1)
    fields = {"model": "m", "messages": HI, "stream": True}
    begun = time.monotonic()
    for _ in range(3):
        asyncio.run(_leave(client.http.app, fields))
        assert model.open == 0
    assert time.monotonic() - begun < 30
    assert client.noted.outcomes == {("m", "left"): 3}


def test_a_body_has_to_arrive_in_time():
    async def slow() -> AsyncGenerator[bytes, None]:
        yield b"{"
        await asyncio.sleep(9)

    tree = {"models": [{"name": "m", "model": "f"}], "read_timeout": 0.05}
    headers = {"content-type": "application/json"}
    with pytest.raises(ClientError) as told:
        asyncio.run(validation.read(slow(), headers, config.serving(tree)))
    assert told.value.status == 408


def test_health_and_ready_need_no_key_and_models_do():
    client = Client(Scripted([[WHOLE, DONE]]))
    assert client.http.get("/health").status_code == 200
    assert client.http.get("/ready").status_code == 200
    client.model.scripts.clear()
    assert client.http.get("/ready").status_code == 503
    assert client.http.get("/v1/models").status_code == 401
    answer = client.http.get("/v1/models", headers=client.headers()).json()
    assert [card["id"] for card in answer["data"]] == ["m"]
    assert client.http.get("/v1/models/m", headers=client.headers()).json()["id"] == "m"
    assert client.http.get("/v1/models/x", headers=client.headers()).status_code == 404


def test_the_page_needs_nothing_from_elsewhere():
    answer = Client(Scripted([])).http.get("/")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    text = answer.text.replace("http://www.w3.org", "")
    assert not any(word in text for word in ("http://", "https://", "//cdn", "localStorage"))


# --- hostile requests ------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
AUTH = {"Authorization": f"Bearer {KEY}"}
GOOD_CHAT = {"model": "m", "messages": HI}
SAID = {"role": "assistant", "content": "yes"}
GOOD = {"model": "m", "prompt": SECRET}
WRONG_TYPES: list[Any] = ["1", True, [], {}, [1], {"a": 1}]


def hostile() -> Iterator[tuple[str, str, str, dict[str, str], Any, int]]:
    """Name, method, path, headers, body and status."""
    good = json.dumps(GOOD_CHAT).encode()
    for name, headers in {
        "no key": {},
        "empty": {"Authorization": ""},
        "no scheme": {"Authorization": KEY},
        "basic": {"Authorization": f"Basic {KEY}"},
        "empty bearer": {"Authorization": "Bearer "},
        "wrong": {"Authorization": "Bearer wrpo-wrong"},
        "the hash": {"Authorization": f"Bearer {LINE.split()[1]}"},
        "prefix": {"Authorization": f"Bearer {KEY[:-1]}"},
        "longer": {"Authorization": f"Bearer {KEY}x"},
        "case": {"Authorization": f"Bearer {KEY.swapcase()}"},
        "expired": {"Authorization": f"Bearer {OLD}"},
        "two keys": {"Authorization": f"Bearer {KEY} {KEY}"},
        "huge": {"Authorization": "Bearer " + "k" * 100_000},
        "bytes": {"Authorization": "Bearer \xff\xfe"},
        "api-key": {"X-Api-Key": KEY},
        "cookie": {"Cookie": f"key={KEY}"},
    }.items():
        for path in (CHAT, COMPLETIONS, SCORE):
            yield f"{name} {path}", "POST", path, JSON | headers, good, 401
    yield "key in query", "POST", f"{CHAT}?key=x&api_key=y", JSON, good, 401
    for path in (CHAT, COMPLETIONS, SCORE):
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            yield f"{method} {path}", method, path, AUTH, b"", 405
    for path in ("/v1", "/v1/embeddings", "/..%2f..%2fetc/passwd", "/v1/chat", "/docs", "/%00"):
        yield f"path {path}", "POST", path, AUTH | JSON, good, 404
    yield "a model's path", "GET", "/v1/models/../../x", AUTH, b"", 404
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"):
        yield f"content type {kind}", "POST", CHAT, AUTH | {"Content-Type": kind}, good, 415
    gzip = AUTH | JSON | {"Content-Encoding": "gzip"}
    yield "gzip", "POST", CHAT, gzip, b"\x1f\x8b", 415
    for name, data in {
        "empty": b"",
        "text": b"hello",
        "cut off": good[:-1],
        "trailing": good + b"}",
        "array": b"[]",
        "null": b"null",
        "number": b"1",
        "string": b'"x"',
        "NaN": b'{"model":"m","prompt":"p","temperature":NaN}',
        "Infinity": b'{"model":"m","prompt":"p","temperature":-Infinity}',
        "1e999": b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        "many digits": b'{"model":"m","max_tokens":' + b"9" * 5000 + b"}",
        "bad UTF-8": b'{"model":"\xff"}',
        "overlong UTF-8": b'{"model":"\xc0\xaf"}',
        "UTF-16": good.decode().encode("utf-16"),
        "surrogate": b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
        "raw newline": b'{"model":"a\nb"}',
        "comment": b'{"model":"m"/*x*/}',
        "single quotes": b"{'model':'m'}",
        "deep array": b'{"model":' + b"[" * 100 + b"]" * 100 + b"}",
        "very deep": b"[" * 200_000,
        "deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "deep unknown": b'{"model":"m","prompt":"p","x":' + b"[" * 33 + b"]" * 33 + b"}",
    }.items():
        for path in (CHAT, SCORE):
            yield f"body {name} {path}", "POST", path, AUTH | JSON, data, 400
    yield "huge", "POST", CHAT, AUTH | JSON, b'{"x":"' + b"a" * 1_000_000 + b'"}', 413
    lying = AUTH | JSON | {"Content-Length": str(10**12)}
    yield "huge length", "POST", CHAT, lying, b"{}", 413
    for length in ("-1", "x", "1.5", "0x10"):
        yield f"length {length}", "POST", CHAT, AUTH | JSON | {"Content-Length": length}, b"{}", 400
    for name in ("x", "M", "m ", "", "../m", "m\x00", "é"):
        yield f"model {name!r}", "POST", CHAT, AUTH | JSON, GOOD_CHAT | {"model": name}, 404
    for value in [None, 1, *WRONG_TYPES[1:], "m" * 257]:
        yield (
            f"model {str(value)[:9]}",
            "POST",
            CHAT,
            AUTH | JSON,
            GOOD_CHAT | {"model": value},
            400,
        )
    numbers = ("max_tokens", "n", "temperature", "top_p", "seed", "top_k", "presence_penalty")
    for name in numbers:
        for value in WRONG_TYPES:
            yield f"{name} {value}", "POST", COMPLETIONS, AUTH | JSON, GOOD | {name: value}, 400
    for name, values in {
        "max_tokens": [-1, 0, 4097, 2**63, 1.5],
        "n": [-1, 0, 9, 10**9],
        "temperature": [-0.1, 2.1],
        "top_p": [0, -1, 1.1],
        "top_k": [-2],
        "presence_penalty": [-2.1, 2.1],
        "frequency_penalty": [-3, 3],
        "repetition_penalty": [0, -1, 11, 1e-308],
        "seed": [2**63, -(2**64), 0.5],
        "stop": [1, [1], ["x"] * 17, ["x" * 1001], {}],
        "stream": ["yes", 1, []],
        "stream_options": [1, "x", {"include_usage": "yes"}],
        "logit_bias": [[], {"1": "x"}, {str(i): 1 for i in range(1025)}],
        "response_format": ["json", []],
        "prompt": [None, 1, [], {}, [[]], [-1], [2**31], [1, "a"], [None], ["p"] * 9, [[1], "a"]],
        "logprobs": [-1, 6, True],
    }.items():
        for value in values:
            label = f"{name} {str(value)[:20]}"
            yield label, "POST", COMPLETIONS, AUTH | JSON, GOOD | {name: value}, 400
    for value in [
        None, [], {}, "hi", 1, [1], ["hi"], [[]], [{}], [{"role": "user", "content": 1}],
        [{"role": "root", "content": "x"}], [{"content": "x"}], [{"role": 1, "content": "x"}],
        [{"role": "user", "content": [1]}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://h/"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}],
        [{"role": "user", "content": {"type": "text", "text": "x"}}],
    ]:  # fmt: skip
        label = f"messages {str(value)[:40]}"
        yield label, "POST", CHAT, AUTH | JSON, GOOD_CHAT | {"messages": value}, 400
    for name, value in {"top_logprobs": 21, "max_completion_tokens": 4097, "tools": "x"}.items():
        yield f"{name} {value}", "POST", CHAT, AUTH | JSON, GOOD_CHAT | {name: value}, 400
    yield "no messages", "POST", CHAT, AUTH | JSON, {"model": "m"}, 400
    yield "no model", "POST", CHAT, AUTH | JSON, {"messages": HI}, 400
    for said in [
        [], {}, [SAID], HI, [*HI, SAID, *HI], [*HI, SAID | {"content": 1}], [*HI, {}], "hi",
        [*HI, {"role": "assistant", "content": None}], [*HI, SAID | {"role": "root"}],
    ]:  # fmt: skip
        label = f"score {str(said)[:40]}"
        yield label, "POST", SCORE, AUTH | JSON, {"messages": said}, 400


HOSTILE = list(hostile())


def test_hostile_requests_each_get_their_status_and_no_model_is_asked(
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.DEBUG)
    scorer, limit = Rewarded(0.5), {"requests_per_minute": 10_000}
    client = Client(Scripted([[WHOLE, DONE]]), scorer, reward=REWARD, **limit)
    assert len(HOSTILE) >= 200
    wrong = {}
    for name, method, path, headers, data, status in HOSTILE:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        raw_headers = [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
        answer = client.http.request(method, path, content=raw, headers=raw_headers)
        error = answer.json()["error"] if method != "HEAD" else None
        if answer.status_code != status or (error and set(error) < {"message", "type", "code"}):
            wrong[name] = (answer.status_code, answer.text[:200])
        assert "access-control-allow-origin" not in answer.headers
    assert not wrong
    assert client.model.asked == scorer.asked == []
    assert not any(secret in caplog.text for secret in (KEY, OLD, KEY[5:], SECRET))
    assert client.post().status_code == 200, "and it still answers"
    assert "alice asked m: 200, 3 + 1 tokens" in caplog.text


# --- fields ----------------------------------------------------------------------------------

CALLS = {"chat": (CHAT, requests.Chat), "completions": (COMPLETIONS, requests.Completion)}
CALLS |= {"score": (SCORE, requests.Score)}


@pytest.fixture(scope="module")
def patient() -> Client:
    """A client with no limit of requests that would end a walk over all fields."""
    limit = {"requests_per_minute": 100_000}
    return Client(Scripted([[WHOLE, DONE]]), Rewarded(0.5), reward=REWARD, **limit)


def refusal(client: Client, path: str, fields: dict[str, Any]) -> dict[str, Any] | None:
    """OpenAI's record of what is wrong with a request; None where it is answered."""
    answer = client.http.post(path, json=fields, headers=client.headers())
    if answer.status_code == 200:
        return None
    is_unknown_model = answer.json()["error"]["code"] == "model_not_found"
    assert answer.status_code == (404 if is_unknown_model else 400), (fields, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("call", CALLS)
def test_every_value_of_every_field_is_accepted_or_rejected_with_its_field(
    call: str, patient: Client
):
    path, kind = CALLS[call]
    assert ACCEPTED[call].keys() == kind.model_fields.keys(), "every field has its values"
    good = {"chat": GOOD_CHAT, "completions": GOOD, "score": {"messages": [*HI, SAID]}}[call]
    wrong = []
    for field, value in itertools.product(ACCEPTED[call], VALUES):
        error = refusal(patient, path, good | {field: value})
        is_named = error and error["param"].startswith(field) and error["param"] in error["message"]
        if not (error is None if is_accepted(call, field, value) else is_named):
            wrong.append((field, value, error))
    assert not wrong
    for field in good:
        error = refusal(patient, path, {n: v for n, v in good.items() if n != field})
        assert error == error | {"param": field, "message": f"{field}: Field required"}


OTHERS = {"stop": (str,), "content": (str, list)}
"""Types that fields take beside their own in the request that is changed."""
NEVER_NULL = ("role", "type", "text", "id", "function", "arguments", "json_schema", "schema")


def test_a_value_of_another_type_anywhere_in_a_request_is_rejected_with_its_path(patient: Client):
    """Only what a JSON schema holds is free."""
    whole = GOOD_CHAT | NESTED
    assert refusal(patient, CHAT, whole) is None
    tried, wrong = 0, []
    for place in places(NESTED):
        if "parameters" in place[:-1] or "schema" in place[:-1]:
            continue
        old: Any = whole
        for key in place:
            old = old[key]
        kinds = (float, int) if isinstance(old, float) else (type(old),)
        for value in (True, 7, "x", [7], {"a": 7}):
            if type(value) in kinds + OTHERS.get(str(place[-1]), ()):
                continue
            tried += 1
            error = refusal(patient, CHAT, replaced(whole, place, value))
            is_named = error and error["param"].startswith(path_text(place))
            if not (is_named and error["param"] in error["message"]):
                wrong.append((path_text(place), value, error))
        if place[-1] in NEVER_NULL or isinstance(place[-1], int):
            error = refusal(patient, CHAT, replaced(whole, place, None))
            if not (error and error["param"].startswith(path_text(place))):
                wrong.append((path_text(place), None, error))
    assert not wrong
    assert tried > 120


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"tools": []}, "tools", "at least 1 item"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs: true`"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs", "needs `logprobs: true`"),
        ({"tool_choice": "auto"}, "tool_choice", "needs `tools`"),
        ({"tool_choice": "auto", "tools": None}, "tool_choice", "needs `tools`"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
         "tool_choice", "none of the `tools`"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name", "required"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
         "response_format.json_schema.schema", "required"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"logit_bias": {"word": 1}}, "logit_bias.word", "pattern"),
        ({"logit_bias": {"x" * 5000: 1}}, "logit_bias.xxx", "pattern"),
        ({"messages": [user_says([{"type": "image_url", "image_url": {"url": "http://h"}}])]},
         "messages[0].content[0]", "a part of type 'image_url' is not accepted, only `text` is"),
        ({"messages": [user_says([{"type": "text"}])]}, "messages[0].content[0].text", "required"),
        ({"messages": [*HI, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]},
         "messages[1].tool_calls[0].function.arguments", "the text of a JSON object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place_and_reason(
    patient: Client, fields: dict[str, Any], param: str, reason: str
):
    error = refusal(patient, CHAT, GOOD_CHAT | fields)
    assert error
    assert error["param"].startswith(param)
    assert error["message"].startswith(param)
    assert reason in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("told", "param", "fields", "expected"),
    [
        ("The decoder prompt cannot be empty", None, {"prompt": ""}, "prompt"),
        ("Token id 9 is out of vocabulary", None, {"prompt": [9]}, "prompt"),
        ("the input is too long (parameter=input_tokens, value=9)", "input_tokens", {}, "messages"),
        ("the input is too long", "input_text", {"prompt": "a"}, "prompt"),
        ("n must be 1 when using greedy sampling, got 2.", None, {"n": 2, "temperature": 0}, "n"),
        ('"auto" tool choice requires --x', None, {"tools": [TOOL], "tool_choice": "auto"},
         "tool_choice"),
        ("The model's context is short", None, {}, "messages"),
        ("no such grammar", None, {"response_format": {"type": "json_object"}}, "response_format"),
        ("it contains 5 (parameter=logit_bias, value=[5])", "logit_bias", {}, "logit_bias"),
    ],
)  # fmt: skip
def test_an_engines_refusal_names_a_field(
    told: str, param: str | None, fields: dict[str, Any], expected: str
):
    client = Client(Scripted([Rejection(400, told, param)]))
    error = refusal(client, COMPLETIONS if "prompt" in fields else CHAT, GOOD_CHAT | fields)
    assert error
    assert error["param"] == expected
    assert expected in error["message"]
    assert "value=" not in error["message"]


# --- the reward ------------------------------------------------------------------------------


REWARD = {"name": "helpful", "model": "folder"}


def scored(
    outcome: float | Rejection | Exception | None, key: str | None = KEY, **body: Any
) -> tuple[int, dict[str, Any]]:
    scorer = None if outcome is None else Rewarded(outcome)
    client = Client(Scripted([[WHOLE, DONE]]), scorer, reward=scorer and REWARD)
    body = {"messages": [*HI, SAID]} | body
    answer = client.http.post("/v1/score", json=body, headers=client.headers(key))
    return answer.status_code, answer.json()


def test_an_answer_is_scored():
    scorer = Rewarded(0.5)
    client = Client(Scripted([[WHOLE, DONE]]), scorer, reward=REWARD)
    ask = {"json": {"messages": [*HI, SAID]}, "headers": client.headers()}
    assert client.http.post("/v1/score", **ask).json() == {"model": "helpful", "reward": 0.5}
    assert scorer.asked == [(HI, "yes")]
    assert client.noted.outcomes == {("helpful", "200"): 1}
    assert client.http.get("/v1/models", headers=client.headers()).json()["reward"] == "helpful"


@pytest.mark.parametrize(
    ("outcome", "changes", "status"),
    [
        (0.5, {"key": None}, 401),
        (0.5, {"key": OLD}, 401),
        (0.5, {"messages": [SAID]}, 400),
        (0.5, {"messages": [SAID, *HI]}, 400),
        (0.5, {"messages": [*HI, {"role": "assistant"}]}, 400),
        (None, {}, 404),
        (Rejection(400, "too long"), {}, 400),
        (Rejection(500, "failed"), {}, 500),
        (overloaded(2), {}, 429),
        (LostError(), {}, 503),
    ],
)
def test_what_is_not_scored_is_told(outcome: Any, changes: dict[str, Any], status: int):
    got, body = scored(outcome, **changes)
    assert got == status
    assert set(body["error"]) == {"message", "type", "param", "code"}


# --- prompts ---------------------------------------------------------------------------------


def prompt(**fields: Any) -> list[int] | None:
    """The token ids that are added to the body of a chat, of a tokenizer over bytes."""
    body = asyncio.run(Prompts(byte_tokenizer()).add({"model": "m", **fields}))
    return body.get("kv_transfer_params", {}).get("prompt_token_ids")


def test_a_chat_is_rendered_as_in_training():
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token
    assert prompt(messages=HI) == prompt_ids(tokenizer, HI)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompt(messages=[user_says(parts)]) == prompt_ids(tokenizer, [user_says("a\nb")])
    spelled, harmless = (prompt(messages=[user_says(text)]) for text in (end, "x" * len(end)))
    assert len(spelled) == len(harmless), "bytes, not the one token that they spell"
    ends = [ids.count(tokenizer.eos_token_id) for ids in (spelled, harmless)]
    assert ends[0] == ends[1], "the template's alone"


WITH_TOOLS = {
    "tools": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}",
    "tool_calls": "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
    "content": "{{ m.content or '' }}",
    "tool": "{% for m in messages %}",
}
"""Parts of a template, each of which writes something of a chat with tools."""
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"}
CHATS: dict[str, dict[str, Any]] = {
    "tools": {"messages": HI, "tools": [{"type": "function"}]},
    "tool_calls": {"messages": [*HI, CALL, *HI]},
    "content": {"messages": [*HI, {**CALL, "content": "I look"}, RESULT]},
    "tool": {"messages": [*HI, RESULT]},
}


def tooled(without: str = "") -> Any:
    """A tokenizer whose template writes all that a chat with tools has, but for one part."""
    tokenizer = byte_tokenizer()
    parts = {name: "" if name == without else text for name, text in WITH_TOOLS.items()}
    if without == "tool":
        parts["tool"] = WITH_TOOLS["tool"].replace(" %}", " if m.role != 'tool' %}")
    if without == "content":
        parts["content"] = "{{ '' if m.tool_calls else m.content }}"
    order = ("tools", "tool", "content", "tool_calls")
    tokenizer.chat_template = "".join(parts[name] for name in order) + "{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_with_tools_is_left_to_vllm(chat: str):
    prompts = Prompts(tooled())
    assert asyncio.run(prompts.add(dict(CHATS[chat]))) == CHATS[chat]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("without", WITH_TOOLS)
def test_what_a_template_leaves_out_of_a_chat_with_tools_is_told(without: str, chat: str):
    """Each part of a template against each chat: what needs the part is refused by its name."""
    needs = {
        "tools": ["tools"],
        "tool_calls": ["tool_calls", "content"],
        "content": ["content"],
        "tool": ["tool", "content"],
    }
    prompts = Prompts(tooled(without))
    if chat not in needs[without]:
        assert asyncio.run(prompts.add(dict(CHATS[chat]))) == CHATS[chat]
        return
    named = {"tools": "`tools`", "tool_calls": "`tool_calls` of", "tool": "role 'tool'"}
    told = "leaves out .*" + named.get(without, "role 'assistant'")
    with pytest.raises(TemplateError, match=told):
        asyncio.run(prompts.add(dict(CHATS[chat])))


def test_tools_that_are_not_to_be_used_need_not_be_written():
    unused = CHATS["tools"] | {"tool_choice": "none"}
    assert asyncio.run(Prompts(byte_tokenizer()).add(dict(unused))) == unused


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_message_that_the_template_leaves_out_is_refused(role: str):
    tokenizer = byte_tokenizer()
    loop = "{%- for message in messages"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        loop, f"{loop} if message['role'] != '{role}'"
    )
    messages = [{"role": role, "content": "be kind"}, *HI]
    with pytest.raises(TemplateError, match=f"leaves out a message of role '{role}'"):
        asyncio.run(Prompts(tokenizer).add({"messages": messages}))
    assert prompt(messages=messages), "where it is written"


def test_each_request_stops_at_every_end_of_turn():
    prompts = Prompts(byte_tokenizer(), {7, 3})
    assert prompts.stopping({"prompt": "x"}) == {"prompt": "x", "stop_token_ids": [3, 7]}
    assert prompts.stopping({"ignore_eos": True}) == {"ignore_eos": True}


ASSISTANT = {"role": "assistant", "content": "yes"}
UNASKED = {
    "system": [{"role": "system", "content": "be kind"}],
    "developer": [*HI, {"role": "developer", "content": "be kind"}],
    "assistant": [*HI, ASSISTANT],
    "user": [{"role": "tool", "content": "3"}],
}


@pytest.mark.parametrize("role", UNASKED)
def test_a_conversation_that_asks_nothing_is_refused(role: str):
    """As a chat, and before an answer that is scored."""
    with pytest.raises(ClientError, match=f"^messages: the conversation .* {role} message") as told:
        check({"messages": UNASKED[role]})
    assert (told.value.status, told.value.param) == (400, "messages")
    with pytest.raises(ClientError, match=f"messages: the conversation .* {role} message"):
        validation.to_score({"messages": [*UNASKED[role], ASSISTANT]})


CALL_OF_TOOL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize("place", [1, 3])
def test_calls_of_tools_are_not_scored(place: int):
    said = [*HI, ASSISTANT, *HI, ASSISTANT]
    validation.to_score({"messages": said})
    said[place] = {**ASSISTANT, "tool_calls": [CALL_OF_TOOL]}
    with pytest.raises(ClientError, match="leave out `tool_calls`"):
        validation.to_score({"messages": said})


LOST = {
    "function_call": {"name": "f"},
    "audio": {"id": "1"},
    "refusal": "I will not",
    "name": "zoe",
    "documents": ["x"],
    "prefix": True,
    "anything": 0,
}
EMPTY = [None, "", [], {}, False]


@pytest.mark.parametrize("key", LOST)
def test_what_would_be_lost_of_a_message_is_named(key: str):
    for message in ({"role": "user", "content": "x"}, ASSISTANT):
        with pytest.raises(ClientError, match=rf"messages\[0\]: a message has `{key}`") as told:
            check({"messages": [{**message, key: LOST[key]}, *HI]})
        assert told.value.status == 400
        if key != "name":
            for empty in EMPTY:
                check({"messages": [{**message, key: empty}, *HI]})


def test_what_clients_send_back_of_an_answer_is_accepted():
    """As OpenAI's client has it, with what vLLM adds."""
    sent = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    sent |= {"tool_calls": [], "reasoning": "hm", "reasoning_content": "hm", "id": "x"}
    ask = check({"messages": [*HI, {**ASSISTANT, **sent}, *HI]})
    assert validation.to_engine(ask)["messages"][1] == {**ASSISTANT, "tool_calls": []}


def check(fields: dict[str, Any]) -> Any:
    settings = config.serving({"models": [{"name": "m", "model": "folder"}]})
    return validation.check(requests.Chat, {"model": "m", **fields}, settings)


# --- settings --------------------------------------------------------------------------------


def test_settings_are_told_what_is_wrong_with_them():
    with pytest.raises(UserError, match="serve: models: .*at least 1 item"):
        config.serving({"models": []})
    model = {"name": "m", "model": "f"}
    with pytest.raises(UserError, match="the name 'm' is given twice"):
        config.serving({"models": [model, model]})
    with pytest.raises(UserError, match="the name 'm' is given twice"):
        config.serving({"models": [{**model, "adapters": {"m": "g"}}]})
    with pytest.raises(UserError, match="max_tokns: unknown key; did you mean 'max_tokens'"):
        config.serving({"models": [model], "max_tokns": 1})
    endpoint = {"url": "http://h/v1"}
    with pytest.raises(UserError, match="endpoint"):
        config.serving({"models": [{**model, "endpoint": endpoint}]})
    changed = config.serving({"models": [model]}, ["models.0.actors.max=2", "timeout=5"])
    assert (changed.models[0].actors.max, changed.timeout) == (2, 5.0)


def test_what_cannot_be_served_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WRPO_SERVE_KEYS", LINES)
    folder = str(write_model(tmp_path))
    capsys.readouterr()
    for words, problem in {
        (): "models: missing; it is required",
        ("no/such/folder",): "no/such/folder",
        ("a b=x",): "models.0.name",
        (f"m={folder}", f"m={folder}"): "the name 'm' is given twice; write NAME=FOLDER",
        (f"m={folder}", "--set", "keys=/no/such/file"): "keys: /no/such/file: cannot be read",
        (f"m={folder}", "--set", f"models.0.adapters={{a: {folder}}}"): "no adapter_config.json",
        (f"m={folder}", "--set", "reward={verifier: exact}"): "a verifier needs a reference",
        (f"m={folder}", "--set", "reward={function: 'no.such:f'}"): "no.such:f: cannot be imported",
        (f"m={folder}", "--set", "reward={model: no/such}"): "no/such",
        (f"m={folder}", "--config", "no.yaml"): "no.yaml: no such config file",
    }.items():
        assert cli.main(["serve", *words]) == 2
        told = capsys.readouterr().err
        assert problem in told, told
        assert told.startswith("wrpo: error: ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", folder, "--port", port]) == 2
    assert "choose another --host or --port" in capsys.readouterr().err
    monkeypatch.delenv("WRPO_SERVE_KEYS")
    with pytest.raises(UserError, match="no API keys"):
        checked(config.serving({"models": [{"name": "m", "model": folder}]}))
