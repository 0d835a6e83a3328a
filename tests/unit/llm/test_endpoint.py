"""OpenAI-compatible endpoints, against a server on this machine that misbehaves as told."""

from __future__ import annotations

import itertools
import json
import logging
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.openai_server import NO_COMPLETION, NO_JSON, Call, Server, in_seconds, serving
from support.tiny_models import make_tokenizer
from support.waiting import wait_until

from wrpo_ray.config import (
    AnswersConfig,
    EndpointConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    load,
)
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, read_bucket, write_shard
from wrpo_ray.data.failures import write_failures
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.errors import UserError
from wrpo_ray.llm import completion, rate_limits
from wrpo_ray.llm import endpoint_client as core
from wrpo_ray.llm.chat import end_ids
from wrpo_ray.llm.completion import EndpointError
from wrpo_ray.llm.endpoint_client import Endpoint
from wrpo_ray.pipeline import preflight, runner
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.generate.endpoint import EndpointEngine
from wrpo_ray.stages.generate.vllm_engine import Request
from wrpo_ray.stages.pair.stage import Answers, Select
from wrpo_ray.stages.train.rows import Tokenizing
from wrpo_ray.stages.train.task import SFT_ANSWERS
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

KEY = 'sk-/"secret"+0123456789abcdef'
VARIABLE = "WRPO_TEST_KEY"
SAMPLING = SamplingConfig(samples=3, max_tokens=20)
BUCKET = Bucket(0, 1)

REASONS = {
    "429": "RateLimitedError",
    "500": "ServerFaultError",
    "503": "ServerFaultError",
    "408": "ServerFaultError",
    "409": "ServerFaultError",
    "hang": "AnswerTimeoutError",
    "cut": "CutAnswerError",
    "cut chunk": "CutAnswerError",
    "reset": "ConnectionFaultError",
    "no json": "MalformedAnswerError",
    "shape": "WrongShapeError",
}
"""What may pass, and the type of error that is kept when it does not."""
FINAL = {
    "400": "RefusedError",
    "401": "AccessError",
    "404": "AccessError",
    "422": "RefusedError",
    "302": "RefusedError",
    "content_filter": "ContentFilterError",
}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, no proxy on the way to this machine, and short waits."""
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(core, "FIRST_WAIT", 0.01)


Start = Callable[..., tuple[Server, EndpointConfig]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server, and gives it with a config of it."""
    with ExitStack() as stack:

        def start(server: Server, **config: Any) -> tuple[Server, EndpointConfig]:
            stack.enter_context(serving(server))
            defaults = {"url": server.url, "key_env": VARIABLE, "timeout": 5}
            return server, EndpointConfig(**defaults | config)

        yield start


def engine(config: EndpointConfig) -> EndpointEngine:
    return EndpointEngine(ModelConfig(name="far", model="far-1", endpoint=config), seed=7)


def request(text: str, count: int = 3, first: int = 0) -> Request:
    messages = [{"role": "user", "content": text}]
    return Request(records.prompt_id(messages), messages, first, count)


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | more


def everything(answers: Iterator[tuple[list, list]]) -> tuple[list[dict], list[dict]]:
    pairs = list(answers)
    return [r for rows, _ in pairs for r in rows], [f for _, failed in pairs for f in failed]


def key_of(row: dict) -> tuple[str, int]:
    return row["prompt_id"], row["sample"]


# --- faults ----------------------------------------------------------------------------------


def storm(kinds: Iterable[str]) -> Callable[[Call], str]:
    """A plan by which 30 % of calls fail, and some prompts fail for good or for ever."""
    kinds = list(kinds)

    def plan(call: Call) -> str:
        what, _, told = call.prompt.partition(": ")
        if what in ("always", "final"):
            return told
        dice = random.Random(f"{call.prompt} {call.body['seed']} {call.attempt}")
        return dice.choice(kinds) if call.attempt < 4 and dice.random() < 0.32 else "ok"

    return plan


def test_a_storm_of_faults_leaves_every_row_answered_or_failed_with_its_reason(start):
    passing = {kind: error for kind, error in REASONS.items() if kind != "hang"}
    plan = storm(passing)
    server, config = start(Server(plan, delay=0.01), concurrency=24, attempts=5, timeout=60)
    good = [request(f"good: {i}") for i in range(80)]
    bad = [request(f"always: {kind}", 1) for kind in passing]
    bad += [request(f"final: {kind}", 1) for kind in FINAL]
    asked = good[:40] + bad + good[40:]
    far = engine(config)
    far.endpoint.complete(body("good: first", seed=0))  # a 401 is a row's fault only after this
    rows, failed = everything(far.answers(asked, SAMPLING))

    assert sorted(map(key_of, rows)) == sorted((r.prompt_id, s) for r in good for s in range(3))
    texts = {r.prompt_id: r.messages[0]["content"] for r in asked}
    assert all(r["text"] == f"{texts[r['prompt_id']]}/{r['seed']}" for r in rows)
    reasons = {texts[f["prompt_id"]]: (f["error"], f["attempts"]) for f in failed}
    assert reasons == {
        **{f"always: {kind}": (error, 5) for kind, error in passing.items()},
        **{f"final: {kind}": (error, 1) for kind, error in FINAL.items()},
    }
    assert all(len(server.of(f"final: {kind}")) == 1 for kind in FINAL)
    assert all(len(server.of(f"always: {kind}")) == 5 for kind in passing)
    faults = [call for call in server.calls if plan(call) != "ok"]
    assert len(faults) > 0.3 * len(server.calls)
    assert server.most_in_flight == 24


def test_calls_that_hang_are_given_up_and_tried_again(start):
    """On a busy machine others may be late as well: the last attempts leave room for that."""
    server, config = start(Server(storm(REASONS)), attempts=8, timeout=0.2)
    good = [request(f"good: {i}") for i in range(20)]
    rows, failed = everything(engine(config).answers([*good, request("always: hang", 1)], SAMPLING))
    assert len({*map(key_of, rows)}) == len(rows) == 60
    assert [(f["error"], f["attempts"]) for f in failed] == [("AnswerTimeoutError", 8)]
    assert len(server.of("always: hang")) == 8


def chat(**choice: Any) -> dict[str, Any]:
    """A completion with a choice that ends as usual; None leaves a field out."""
    choice = {"index": 0, "finish_reason": "stop"} | choice
    kept = {name: value for name, value in choice.items() if value is not None}
    return {"object": "chat.completion", "model": "m", "choices": [kept]}


def said(content: Any, reason: Any = "stop", **message: Any) -> dict[str, Any]:
    """A completion with a message."""
    return chat(finish_reason=reason, message={"content": content} | message)


def part(kind: str, text: Any) -> dict[str, Any]:
    return {"type": kind, kind: text}


TEXT, THOUGHT = part("text", "a"), part("thinking", [part("text", "hm")])
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
USED: dict[str, tuple[Any, str]] = {
    "a text": (said("a"), "a"),
    "an empty text": (said(""), ""),
    "one part": (said([TEXT]), "a"),
    "several parts": (said([TEXT, part("text", "b c"), TEXT]), "ab ca"),
    "an empty part": (said([part("text", "")]), ""),
    "a thought and a text": (said([THOUGHT, TEXT]), "a"),
    "thoughts of other names": (
        said([part("reasoning", "x"), {"type": "redacted_thinking", "data": "x"}, TEXT]),
        "a",
    ),
    "a part as in the responses API": (said([{"type": "output_text", "text": "a"}]), "a"),
    "a thought beside the text": (said("a", reasoning_content="hm", reasoning="hm"), "a"),
    "fields that are null": (said("a", tool_calls=None, refusal=None, function_call=None), "a"),
    "fields that are empty": (said("a", tool_calls=[], refusal=""), "a"),
    **{
        f"the call of nothing {call!r}": (said("a", **{field: call}), "a")
        for field, call in (
            ("function_call", {"name": None, "arguments": ""}),
            ("function_call", {"name": "", "arguments": ""}),
            ("function_call", {}),
            ("tool_calls", [{}]),
            ("tool_calls", [{"type": "function", "function": {"name": None, "arguments": ""}}]),
            ("tool_calls", [{"type": "function", "function": None}]),
            ("tool_calls", [None]),
        )
    },
    **{
        f"a part beside the text: {kind}": (said([TEXT, {"type": kind}, TEXT]), "aa")
        for kind in ("reference", "reasoning_text", "reasoning")
    },
    "another name of the end": (said("a", "end_turn"), "a"),
    "the end in capitals": (said("a", "STOP"), "a"),
    "cut off": (said("a", "length"), "a"),
    "an error that is null": (said("a") | {"error": None}, "a"),
    "more choices than asked for": (
        {"choices": said("a")["choices"] + said("b")["choices"]},
        "a",
    ),
    **{
        f"usage {usage!r}": (said("a") | {"usage": usage}, "a")
        for usage in (None, [1], "x", 7, {"prompt_tokens": "1", "completion_tokens": None})
    },
    **{
        f"logprobs {told!r}": (chat(message={"content": "a"}, logprobs=told), "a")
        for told in (
            7,
            [],
            {"content": 1},
            {"content": [{"top_logprobs": [1]}]},
            {"content": [{"top_logprobs": [{"token": "\ud800", "logprob": 0}]}]},
            {"content": [{"top_logprobs": [{"token": "a", "logprob": "x"}]}]},
        )
    },
    **{
        f"model {name!r}": (said("a") | {"model": name, "system_fingerprint": name}, "a")
        for name in (None, 7, ["m"])
    },
}
"""Completions of other forms that have a text, and the text."""
THINKS: dict[str, tuple[Any, tuple[str, str | None]]] = {
    "in a field": (said("a", reasoning_content="hm"), ("a", "hm")),
    "in the field of other servers": (said("a", reasoning="hm"), ("a", "hm")),
    "an empty field": (said("a", reasoning="", reasoning_content=None), ("a", None)),
    "a field that is no text": (said("a", reasoning={"a": 1}), ("a", None)),
    "a field that is no Unicode": (said("a", reasoning="\ud800"), ("a", None)),
    "no field": (said("<think>hm</think>a"), ("<think>hm</think>a", None)),
    "all tokens went into a thought": (said(None, "length", reasoning="hm"), ("", "hm")),
    "in a part": (said([THOUGHT, TEXT]), ("a", "hm")),
    "in parts of other names": (
        said([part("reasoning", "h"), {"type": "reasoning_text", "text": "m"}, TEXT]),
        ("a", "hm"),
    ),
    "a part that hides it": (said([{"type": "redacted_thinking", "data": "x"}, TEXT]), ("a", None)),
    "parts that are no text": (said([part("thinking", [7, {"text": 7}]), TEXT]), ("a", None)),
    "only a part": (said([THOUGHT], "length"), ("", "hm")),
}
"""Completions of a model that thinks, with their text and reasoning."""
UNUSABLE: dict[str, tuple[Any, str]] = {
    "no content": (chat(message={"role": "assistant"}), "NoTextError"),
    "content null": (said(None), "NoTextError"),
    "all tokens went into a thought": (said(None, "length", reasoning="hm"), "NoTextError"),
    "no parts": (said([]), "NoTextError"),
    "only a thought": (said([THOUGHT]), "NoTextError"),
    "an audio": (said(None, audio={"id": "1"}), "NoTextError"),
    "a refusal": (said(None, refusal="I must not"), "ModelRefusalError"),
    "a refusal in a part": (said([TEXT, part("refusal", "I must not")]), "ModelRefusalError"),
    "a refusal beside a text": (said("a", refusal="I must not"), "ModelRefusalError"),
    "tool calls": (said(None, "tool_calls", tool_calls=CALL), "ToolCallError"),
    "tool calls that end as a text": (said(None, tool_calls=CALL), "ToolCallError"),
    "one tool call of several has a name": (said("a", tool_calls=[{}, *CALL]), "ToolCallError"),
    "the call of a tool of another kind": (
        said("a", tool_calls=[{"type": "custom", "custom": {"name": "f", "input": ""}}]),
        "ToolCallError",
    ),
    "only a reference": (said([{"type": "reference", "reference_ids": [1]}]), "NoTextError"),
    "tool calls beside a text": (said("a", "tool_calls", tool_calls=CALL), "ToolCallError"),
    "a function call": (said(None, function_call={"name": "f"}), "ToolCallError"),
    "withheld": (said(None, "content_filter"), "ContentFilterError"),
    "withheld in part": (said("a", "content_filter"), "ContentFilterError"),
    "no choices": ({"choices": []}, "NoChoiceError"),
    "choices left out": ({"object": "chat.completion", "usage": {}}, "NoChoiceError"),
    "choices null": ({"object": "chat.completion", "choices": None}, "NoChoiceError"),
    "a choice null": ({"choices": [None]}, "WrongChoiceError"),
    "a choice that is a text": ({"choices": ["a"]}, "WrongChoiceError"),
    "an empty choice": ({"choices": [{}]}, "WrongChoiceError"),
    "no message": (chat(), "WrongChoiceError"),
    "a text in place of a message": (chat(text="a"), "WrongChoiceError"),
    **{
        f"message {message!r}": (chat(message=message), "WrongChoiceError")
        for message in ("a", 7, ["a"])
    },
    **{
        f"content {content!r}": (said(content), "WrongChoiceError")
        for content in (
            7,
            1.5,
            True,
            {"text": "a"},
            {},
            ["a"],
            [7],
            [None],
            [[TEXT]],
            [{}],
            [{"text": "a"}],
            [{"type": "text"}],
            [part("text", 7)],
            [part("text", None)],
            [{"type": ["text"], "text": "a"}],
            [TEXT, part("image_url", {"url": "data:"})],
            "\ud800",
            [part("text", "\ud800")],
        )
    },
    **{
        f"finish_reason {reason!r}": (said("a", reason), "UnknownEndError")
        for reason in (None, "", "repetition", "done", 0, ["stop"], {})
    },
    "finish_reason is null": (
        {"choices": [{"message": {"content": "a"}, "finish_reason": None}]},
        "UnknownEndError",
    ),
}
"""Completions that cannot be used, each with its error: the same call would give them again."""
PASSING: dict[str, tuple[Any, str]] = {
    **{
        f"no completion {i}": (json.dumps(told), "WrongShapeError")
        for i, told in enumerate(NO_COMPLETION)
    },
    **{f"no json {i}": (told, "MalformedAnswerError") for i, told in enumerate(NO_JSON)},
    "cut JSON": (json.dumps(said("a"))[:-9], "MalformedAnswerError"),
    "HTML": ("<html><body>Bad Gateway</body></html>", "MalformedAnswerError"),
    **{
        f"end {reason}": (said("a", reason), "ServerFaultError")
        for reason in ("error", "abort", "insufficient_system_resource")
    },
    "an error": ({"error": {"message": "provider is down"}}, "ServerFaultError"),
    "an error in words": ({"error": "provider is down"}, "ServerFaultError"),
    "an error that is no text": ({"error": {"message": "\ud800"}}, "ServerFaultError"),
    "an error beside an answer": (said("a") | {"error": {"code": 502}}, "ServerFaultError"),
    "error 502": ({"error": {"message": "down", "code": 502}}, "ServerFaultError"),
    "error 429": ({"error": {"message": "slow", "code": "429"}}, "RateLimitedError"),
    "error timeout": ({"error": {"message": "slow", "status": 408}}, "ServerFaultError"),
}
"""What may be another at the next attempt."""
REFUSED: dict[str, tuple[Any, str]] = {
    "error 400": ({"error": {"message": "too long", "code": 400}}, "RefusedError"),
    "an invalid request": ({"error": {"type": "invalid_request_error"}}, "RefusedError"),
    "error 404": ({"error": {"message": "no model", "code": 404}}, "AccessError"),
}
"""Errors with the status 200 that stay."""


def test_every_form_of_an_answer_is_used_or_bought_as_often_as_makes_sense(start):
    """Calls are counted at the server: what cannot change is asked for once."""
    forms = USED | UNUSABLE | PASSING | REFUSED
    bodies = {name: told for name, (told, _) in forms.items()}
    server, config = start(Server(lambda call: call.prompt, bodies=bodies), attempts=3)
    far = engine(config)
    bodies["first"] = said("a")
    far.endpoint.complete(body("first"))
    names = {request(name).prompt_id: name for name in forms}
    rows, failed = everything(far.answers([request(name, 1) for name in forms], SAMPLING))

    assert {names[r["prompt_id"]]: r["text"] for r in rows} == {n: t for n, (_, t) in USED.items()}
    assert all(r["logprobs"] is None for r in rows)
    reasons = {names[f["prompt_id"]]: (f["error"], f["attempts"]) for f in failed}
    final, passing = UNUSABLE | REFUSED, PASSING
    assert reasons == {
        **{name: (error, 1) for name, (_, error) in final.items()},
        **{name: (error, 3) for name, (_, error) in passing.items()},
    }
    calls = {name: len(server.of(name)) for name in forms}
    assert calls == {name: 3 if name in passing else 1 for name in forms}
    assert all(server.url[7:-3] in f["message"] for f in failed)
    "".join(f["message"] for f in failed).encode()  # can be stored


def test_an_answer_that_cannot_be_used_shows_that_the_server_knows_key_and_model(start):
    """So that a 404 after it is a row's own, and does not stop the run."""
    plan = lambda call: "404" if call.prompt == "b" else "unusable"  # noqa: E731
    _, config = start(Server(plan, bodies={"unusable": said(None)}))
    endpoint = Endpoint(config, "m")
    with pytest.raises(completion.NoTextError):
        endpoint.complete(body("a"))
    with pytest.raises(core.AccessError):
        endpoint.complete(body("b"))


@pytest.mark.parametrize("name", THINKS)
def test_reasoning_in_a_field_of_its_own_is_taken(name):
    answer, parts = THINKS[name]
    found = completion.read_completion(answer, thinks=True)
    assert (found.text, found.reasoning) == parts


def test_without_a_field_an_answer_of_a_thinking_model_needs_a_text():
    for message in ({}, {"reasoning": ""}):
        with pytest.raises(completion.NoTextError):
            completion.read_completion(said(None, "length", **message), thinks=True)


@pytest.mark.parametrize("answer", NO_JSON)
def test_no_json_is_malformed(answer):
    with pytest.raises(core.MalformedAnswerError):
        reader()._read(200, answer.encode())


@pytest.mark.parametrize("answer", NO_COMPLETION, ids=range(len(NO_COMPLETION)))
def test_another_shape_is_told(answer):
    with pytest.raises(completion.WrongShapeError) as caught:
        reader()._read(200, json.dumps(answer).encode())
    str(caught.value).encode()  # can be stored


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(raw):
    with pytest.raises((core.MalformedAnswerError, completion.WrongShapeError)):
        reader()._read(200, raw)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=5)
"""Lone surrogates as well, which JSON can hold and a record cannot."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.just("stop"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "finish_reason", "usage", "error"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_no_json_breaks_the_reader(answer):
    try:
        reader()._read(200, json.dumps(answer).encode()).text.encode()
    except EndpointError as error:
        str(error).encode()


def reader() -> Endpoint:
    """An endpoint that is only read with."""
    return READER


READER = Endpoint(EndpointConfig(url="http://127.0.0.1:9/v1"), "m")


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        (None, (None, None)),
        ({}, (None, None)),
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)),
        ({"prompt_tokens": True, "completion_tokens": -1}, (None, None)),
        ({"prompt_tokens": "3", "completion_tokens": 2**40}, (None, None)),
    ],
)
def test_counts_that_are_none_are_null(usage, counts):
    server = Server(usage=usage)
    call = type("Call", (), {"prompt": "p", "body": {}})
    completion = reader()._read(200, json.dumps(server.completion(call, "ok")).encode())
    assert (completion.prompt_tokens, completion.output_tokens) == counts
    assert completion.model == "served-1 fp_1"


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        *((told, "stop") for told in ("eos", "end_turn", "complete", "COMPLETE", "stop_sequence")),
        *((told, "stop") for told in ("eos_token", "eos_token_id", "STOP")),
        *((told, "length") for told in ("length", "max_tokens", "MAX_TOKENS", "max_output_tokens")),
    ],
)
def test_how_an_answer_ends_is_told_in_two_words(told, kept):
    answer = {"choices": [{"finish_reason": told, "message": {"content": "a"}}]}
    assert reader()._read(200, json.dumps(answer).encode()).finish_reason == kept


def test_an_answer_without_text_is_final():
    answer = {"choices": [{"finish_reason": "length", "message": {"content": None}}]}
    with pytest.raises(completion.NoTextError) as caught:
        reader()._read(200, json.dumps(answer).encode())
    assert not caught.value.is_retryable


def test_nobody_listens():
    config = EndpointConfig(url="http://127.0.0.1:9/v1", attempts=2)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9.*start the server"):
        Endpoint(config, "m").complete(body("x"))


@pytest.mark.parametrize(("status", "remedy"), [("401", VARIABLE), ("404", "far-1")])
def test_a_wrong_key_or_model_stops_at_once(start, status, remedy):
    """A key that is never taken would fail every row, each with a call of its own."""
    server, config = start(Server(lambda call: status), concurrency=2)
    with pytest.raises(UserError, match=remedy) as caught:
        list(engine(config).answers([request(str(i)) for i in range(50)], SAMPLING))
    assert KEY not in str(caught.value)
    assert len(server.calls) <= 4


# --- limits ----------------------------------------------------------------------------------


def test_calls_in_flight_reach_the_limit_and_never_exceed_it(start):
    """From several threads, in bulk and one by one."""
    server, config = start(Server(delay=0.02), concurrency=7)
    endpoint = Endpoint(config, "m")
    with ThreadPoolExecutor(12) as threads:
        bulks = [
            threads.submit(lambda: list(endpoint.complete_all(body(str(i)) for i in range(30))))
            for _ in range(2)
        ]
        texts = list(threads.map(lambda i: endpoint.complete(body(str(i))).text, range(60)))
        indexes = [sorted(index for index, _ in bulk.result()) for bulk in bulks]
    assert texts == [f"{i}/None" for i in range(60)]
    assert indexes == [list(range(30))] * 2
    assert server.most_in_flight == 7


def test_two_buckets_share_one_engine(start):
    server, config = start(Server(delay=0.01), concurrency=5)
    far = engine(config)
    buckets = [[request(f"{b} {i}") for i in range(20)] for b in "ab"]
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda b: everything(far.answers(b, SAMPLING)), buckets))
    for asked, (rows, failed) in zip(buckets, results, strict=True):
        assert sorted(map(key_of, rows)) == sorted(
            (r.prompt_id, s) for r in asked for s in (0, 1, 2)
        )
        assert not failed
    assert server.most_in_flight == 5


def _excess(server: Server, seconds_each: float) -> float:
    """By how many seconds calls came earlier than even spacing allows, over any stretch."""
    times = [call.time for call in server.calls]
    return max(
        (j - i) * seconds_each - (times[j] - times[i])
        for i, j in itertools.combinations(range(len(times)), 2)
    )


def test_requests_a_minute_hold_over_any_stretch(start):
    server, config = start(Server(), concurrency=50, requests_per_minute=6000)
    began = time.monotonic()
    assert len(list(Endpoint(config, "m").complete_all(body(str(i)) for i in range(99)))) == 99
    assert _excess(server, 0.01) < 0.5  # what reaches the server late is not early
    assert time.monotonic() - began < 9  # 1 by the limit


def test_tokens_a_minute_hold_over_any_stretch(start):
    """Each call is estimated at 4 // 4 + 9 = 10 tokens, and takes 10: 0.01 s of the limit."""
    server, config = start(Server(), concurrency=50, tokens_per_minute=60_000)
    calls = [body("four", max_tokens=9)] * 99
    began = time.monotonic()
    assert len(list(Endpoint(config, "m").complete_all(calls))) == 99
    assert _excess(server, 0.01) < 0.5  # what reaches the server late is not early
    assert time.monotonic() - began < 9


def test_an_estimate_is_corrected_by_what_the_answer_took(start):
    """30 calls estimated at 501 tokens take 10 each: 0.3 s of the limit instead of 15."""
    _, config = start(Server(), concurrency=1, tokens_per_minute=60_000)
    began = time.monotonic()
    list(Endpoint(config, "m").complete_all([body("four", max_tokens=500)] * 30))
    assert 0.2 < time.monotonic() - began < 9


def test_the_pace_of_a_limit(monkeypatch):
    """60 a minute are one a second; what is given back may be taken at once."""
    clock = [100.0]
    monkeypatch.setattr(rate_limits.time, "monotonic", lambda: clock[0])
    pace = rate_limits.Pace(60)
    assert pace.wait <= 0
    pace.charge(3)
    assert pace.wait == pytest.approx(3 - rate_limits.SLACK)
    pace.correct(-2)
    assert pace.wait == pytest.approx(1 - rate_limits.SLACK)
    pace.correct(+4)
    assert pace.wait == pytest.approx(5 - rate_limits.SLACK)
    clock[0] = 1000.0  # idle time is not saved up
    pace.charge(1)
    assert pace.wait == pytest.approx(1 - rate_limits.SLACK)
    pace.pause(9)
    assert pace.wait == pytest.approx(9)
    free = rate_limits.Pace(None)
    free.charge(10**9)
    assert free.wait <= 0


def test_calls_are_taken_as_there_is_room_and_end_with_their_reader(start):
    server, config = start(Server(delay=0.1), concurrency=3)
    taken = itertools.count()
    answers = Endpoint(config, "m").complete_all(body(str(next(taken))) for _ in itertools.count())
    for _ in range(5):
        next(answers)
    answers.close()
    assert next(taken) <= 5 + 2 * 3
    time.sleep(0.05)
    before = len(server.calls)
    time.sleep(0.2)
    assert len(server.calls) == before


# --- Retry-After -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "least"), [(lambda: "0.3", 0.3), (lambda: in_seconds(2), 1.0)], ids=["number", "date"]
)
def test_a_server_that_asks_for_a_pause_gets_one_from_all_calls(start, told, least):
    """The date has whole seconds: 2 ahead are at least 1."""
    plan = lambda call: "429" if call.prompt == "0" and call.attempt == 1 else "ok"  # noqa: E731
    server, config = start(Server(plan, retry_after=told), concurrency=1)
    answers = dict(Endpoint(config, "m").complete_all(body(str(i)) for i in range(4)))
    assert [answers[i].attempts for i in range(4)] == [2, 1, 1, 1]
    first, *others = sorted(call.time for call in server.calls)
    assert min(others) - first > least - 0.02


def test_a_server_out_of_quota_is_not_waited_for(start):
    server, config = start(Server(lambda call: "429", retry_after=lambda: "86400"))
    with pytest.raises(core.RateLimitedError):
        Endpoint(config, "m").complete(body("x"))
    assert len(server.calls) == 1


@given(st.text() | st.floats().map(str) | st.integers().map(str))
def test_any_retry_after_is_a_wait(text):
    assert core._seconds(text) >= 0


def test_no_retry_after_is_no_wait():
    past = "Sun, 06 Nov 1994 08:49:37 GMT"
    assert [core._seconds(t) for t in (None, "", "soon", "-5", "nan", past)] == [0] * 6
    assert core._seconds("7") == 7


# --- the key ---------------------------------------------------------------------------------


def test_the_key_is_in_no_log_no_error_and_no_file(start, tmp_path, monkeypatch, caplog, capfd):
    """The server repeats the Authorization header in every error, and even in an answer."""
    caplog.set_level(logging.DEBUG)
    echo = [KEY, KEY.replace('"', '\\"'), "sk-%2F%22secret%22%2B0123456789abcdef"]

    def completion(call, what):
        answer = Server.completion(server, call, what)
        told = [call.headers["Authorization"], *echo]
        answer["choices"][0]["message"]["content"] = " ".join(told)
        answer["model"] = KEY
        return answer

    def plan(call) -> str:
        return call.prompt.partition(": ")[2] or "ok"

    server, config = start(Server(plan), concurrency=4, attempts=2, timeout=0.8)
    monkeypatch.setattr(server, "completion", completion)
    monkeypatch.setattr("support.openai_server.NO_JSON", [f"x {KEY}" * 30])
    shapes = [{"error": {"message": f"{' ' * n}{KEY}" * 40}} for n in range(5)]
    monkeypatch.setattr("support.openai_server.NO_COMPLETION", shapes)
    far = engine(config)
    asked = [request(f"a: {kind}", 1) for kind in ("", *REASONS, *FINAL)]
    rows, failed = everything(far.answers(asked, SAMPLING))
    assert len(rows) == 1
    assert "[key]" in rows[0]["text"]
    assert all(call.headers["Authorization"] == f"Bearer {KEY}" for call in server.calls)

    folder = Folder(str(tmp_path))
    marked = [row | {"model": "m"} for row in rows]
    write_shard(folder, BUCKET, records.RESPONSE, marked, "all")
    write_failures(folder / "failures", BUCKET, failed, "all")
    stored = read_bucket(folder, BUCKET, records.RESPONSE).to_pylist()
    stored += read_bucket(folder / "failures", BUCKET, records.FAILURE).to_pylist()
    assert len(stored) == len(asked)

    told = []
    for kind in (*REASONS, *FINAL):
        with pytest.raises(EndpointError) as caught:
            far.endpoint.complete(body(f"a: {kind}"))
        told += [repr(caught.value), *traceback.format_exception(caught.value)]
        assert caught.value.__context__ is None
    shown = "".join(capfd.readouterr())
    things = [stored, told, caplog.text, shown, repr(far.endpoint), vars(far.endpoint), config]
    for part in (KEY, "secret", KEY[:12], *echo):
        assert not [thing for thing in things if part in str(thing)], part


def test_a_placeholder_for_a_key_may_stand_in_an_answer(start, monkeypatch):
    monkeypatch.setenv(VARIABLE, "EMPTY")
    server, config = start(Server(lambda c: "ok" if c.prompt != "no" else "400"))
    endpoint = Endpoint(config, "m")
    assert endpoint.complete(body("EMPTY")).text == "EMPTY/None"
    with pytest.raises(core.RefusedError, match=r"Bearer \[key\]"):
        endpoint.complete(body("no"))
    assert server.calls[0].headers["Authorization"] == "Bearer EMPTY"


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "schlüssel-0123456789", "a\nb"])
def test_a_missing_or_impossible_key_is_told_before_any_work(tmp_path, monkeypatch, value):
    monkeypatch.delenv(VARIABLE)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UserError, match=rf"sources\.far\.endpoint: .*{VARIABLE}") as caught:
        preflight.preflight(load(job(tmp_path)))
    assert not value or not value.strip() or value not in str(caught.value)


def test_the_way_leads_through_the_proxy_that_the_environment_names(start, monkeypatch):
    server, _ = start(Server())
    monkeypatch.setenv("NO_PROXY", "near.invalid")
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    far, near = (EndpointConfig(url=f"http://{h}.invalid/v1", attempts=1) for h in ("far", "near"))
    assert Endpoint(far, "m").complete(body("x")).text == "x/None"
    assert server.calls[0].headers["Host"] == "far.invalid"
    with pytest.raises(UserError, match=r"near\.invalid"):
        Endpoint(near, "m").complete(body("x"))


# --- as a source -----------------------------------------------------------------------------


def test_rows_have_their_origin_and_the_call_has_the_sampling(start):
    server, config = start(Server(), extra={"top_p": None, "reasoning_effort": "low"})
    rows, failed = everything(engine(config).answers([request("hello", 2, first=3)], SAMPLING))
    assert not failed
    assert sorted(r["sample"] for r in rows) == [3, 4]
    one = min(rows, key=key_of)
    assert one == {
        "prompt_id": request("hello").prompt_id,
        "source": "far",
        "sample": 3,
        "text": f"hello/{one['seed']}",
        "token_ids": None,
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "output_tokens": 5,
        "seed": one["seed"],
        "engine": f"openai {server.url[7:-3]}/served-1 fp_1",
        "logprobs": None,
    }
    assert one["seed"] + 1 == max(rows, key=key_of)["seed"] < 2**31
    sent = min((call.body for call in server.calls), key=lambda b: b["seed"])
    assert sent == {
        "model": "far-1",
        "messages": [{"role": "user", "content": "hello"}],
        "seed": one["seed"],
        "temperature": 0.8,
        "max_tokens": 20,
        "reasoning_effort": "low",
    }


def test_a_sample_has_one_seed_however_it_is_asked_for(start):
    _, config = start(Server())
    together, _ = everything(engine(config).answers([request("a", 5)], SAMPLING))
    apart, _ = everything(
        engine(config).answers([request("a", 2, first=3), request("a", 3)], SAMPLING)
    )
    assert {key_of(r): r["seed"] for r in together} == {key_of(r): r["seed"] for r in apart}
    assert len({r["seed"] for r in together}) == 5


def test_a_server_draws_by_itself_where_the_run_has_no_seeds_of_requests(start):
    server, config = start(Server())
    rows, failed = everything(
        engine(config).answers([request("a", 2)], SAMPLING.model_copy(update={"seeds": "run"}))
    )
    assert not failed
    assert [r["seed"] for r in rows] == [None, None]
    assert len(server.calls) == 2
    assert not any("seed" in call.body or "seeds" in call.body for call in server.calls)


def test_an_endpoints_answer_is_selected_and_trained_on(start, tmp_path):
    """No token ids: as y_ws its text is tokenized by the target, and closed unless cut off."""
    _, config = start(Server(lambda call: "length" if call.prompt == "w2" else "ok"))
    asked = [request("w1", 1), request("w2", 1)]
    run, prompts, answers = Run(Folder(str(tmp_path)), 1), Step("prompts"), Step("answers")
    given = [{"prompt_id": r.prompt_id, "messages": r.messages, "split": "sft"} for r in asked]
    write_shard(run.root / prompts.folder, BUCKET, records.PROMPT, given, "all")
    rows, _ = everything(engine(config).answers(asked, SAMPLING))
    write_shard(run.root / "raw", BUCKET, records.RESPONSE, rows, "all")
    scored = read_bucket(run.root / "raw", BUCKET, records.RESPONSE).to_pylist()
    scored = [row | {"text": "w3 w4", "reward": 1.0} for row in scored]
    write_shard(run.root / answers.folder, BUCKET, records.SCORED, scored, "all")
    which = Prompts(prompts, ("sft",))
    policies = AnswersConfig(cut_off="keep")
    select = Select(which, Answers((Samples(answers, which, 1),), policies))
    assert select.fill(run, BUCKET)["rows"] == 2
    selection = read_bucket(run.root / select.step.folder, BUCKET, records.SELECTION).to_pylist()
    tokenizer = make_tokenizer()
    ends = end_ids(tokenizer, tmp_path)
    made = Tokenizing(tokenizer, ends, SFT_ANSWERS, TrainConfig()).rows(selection, "sft")
    assert not made.failed
    closed = {row.prompt_id: row.answers[0][-1] in ends for row in made.kept}
    assert closed == {asked[0].prompt_id: True, asked[1].prompt_id: False}


# --- the config ------------------------------------------------------------------------------


def job(folder: Path, **source: Any) -> Path:
    """A job file with one source behind an endpoint."""
    (folder / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    far = {"name": "far", "model": "far-1", "endpoint": {"url": "http://h/v1", "key_env": VARIABLE}}
    tree = {
        "output": str(folder / "out"),
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "sources": [far | source],
        "reward": {"function": "json:dumps"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_an_endpoint_needs_no_model_folder_and_its_key_is_in_no_step(tmp_path):
    def folders(*overrides: str) -> list[str]:
        plan = runner.plan(load(job(tmp_path), overrides), "generate")
        assert KEY not in str([step for _, step, _ in plan])
        return [step.folder for stage, step, _ in plan if stage == "generate"]

    (folder,) = folders()
    place = "sources.0.endpoint"
    for same in (
        "concurrency=2",
        "timeout=9",
        "attempts=1",
        "requests_per_minute=3",
        "url=http://h/v1/",
    ):
        assert folders(f"{place}.{same}") == [folder]
    assert folders(f"{place}.key_env=null") == [folder]
    others = [f"{place}.url=http://g/v1", f"{place}.extra={{a: 1}}", "sources.0.model=far-2"]
    assert len({folder, *(folders(other)[0] for other in others)}) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("sources.0.dtype=bfloat16", "dtype belongs to a model on vLLM"),
        ("sources.0.engine={seed: 1}", "engine belongs to a model on vLLM"),
        ("sources.0.chat_template=a.jinja", "chat_template belongs to a model on vLLM"),
        ("sources.0.actors.max=2", "served by one actor"),
        ("sources.0.actors.num_gpus=1", "served by one actor"),
        ("sources.0.endpoint.url=h/v1", "write it as https://host/v1"),
        ("sources.0.endpoint.url=https://u:sk-abc@h/v1", "a key belongs to `key_env`"),
        ("sources.0.endpoint.url=https://h/v1?key=sk-abc", "a key belongs to `key_env`"),
        ("sources.0.endpoint.url=https://h/v1/chat/completions", "leave /chat/completions out"),
        ("sources.0.endpoint.key_env=sk-abc", "the variable's name"),
        ("sources.0.endpoint.api_key=sk-abc", "unknown key"),
        ("sources.0.endpoint.extra={stream: true}", "stream is not for `extra`"),
        ("sources.0.endpoint.extra={seed: 3}", "seed is not for `extra`"),
        ("target={name: t, model: m, endpoint: {url: 'http://h/v1'}}", "target: it is trained"),
    ],
)
def test_what_does_not_fit_an_endpoint_is_refused_without_repeating_a_key(tmp_path, change, reason):
    with pytest.raises(UserError) as caught:
        load(job(tmp_path), [change])
    assert reason in str(caught.value)
    assert "sk-abc" not in str(caught.value)


def test_an_endpoint_ends_with_its_last_user():
    before = threading.active_count()
    endpoint = Endpoint(EndpointConfig(url="http://127.0.0.1:9/v1"), "m")
    assert threading.active_count() == before + 1
    del endpoint
    wait_until(lambda: threading.active_count() == before)
