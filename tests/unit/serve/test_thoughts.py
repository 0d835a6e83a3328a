"""The reasoning of served models: apart in whole answers and in streams, and read back in chats."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from support.tiny_models import make_tokenizer

from wrpo_ray.llm.reasoning import THINK, Format, split
from wrpo_ray.serve.backends import DONE
from wrpo_ray.serve.requests import Chat
from wrpo_ray.serve.thoughts import Thoughts, is_apart, thoughts_on

PLAIN, OPENED = Format(THINK), Format(THINK, "<think>\n")
TEXT = "<think>\n7 or 8\n</think>\n\nIt is 8."


def whole(*texts: str) -> str:
    choices = [{"index": i, "message": {"content": t}} for i, t in enumerate(texts)]
    return json.dumps({"choices": choices, "usage": {"prompt_tokens": 1}}, separators=(",", ":"))


def chunk(index: int, delta: dict[str, Any], **more: Any) -> str:
    return json.dumps({"choices": [{"index": index, "delta": delta} | more]})


def streamed(format_: Format, texts: list[str]) -> tuple[str, str, list[dict[str, Any]]]:
    """The reasoning, the content, and the deltas of a stream of these texts."""
    thoughts = Thoughts(format_)
    sent = thoughts.chunks([chunk(0, {"role": "assistant", "content": ""})])
    for text in texts:
        sent += thoughts.chunks([chunk(0, {"content": text})])
    sent += thoughts.chunks([chunk(0, {"content": ""}, finish_reason="stop"), DONE])
    assert sent.pop() == DONE
    assert json.loads(sent[-1])["choices"][0]["finish_reason"] == "stop"
    deltas = [json.loads(text)["choices"][0]["delta"] for text in sent]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(deltas[1:-1]), "no empty chunk"
    parts = ("".join(d.get(name, "") for d in deltas) for name in ("reasoning_content", "content"))
    return *parts, deltas


def test_a_whole_answer_has_its_reasoning_apart() -> None:
    text = Thoughts(PLAIN).whole(whole(TEXT, "8", "<think>7, or"))
    assert '"usage":{"prompt_tokens"' in text, "as the endpoint looks for it"
    messages = [choice["message"] for choice in json.loads(text)["choices"]]
    assert messages == [
        {"content": "It is 8.", "reasoning_content": "\n7 or 8\n"},
        {"content": "8"},
        {"content": None, "reasoning_content": "7, or"},
    ]


@pytest.mark.parametrize("format_", [PLAIN, OPENED])
def test_a_stream_is_split_like_the_whole_wherever_it_is_cut(format_: Format) -> None:
    rng = random.Random(2)
    for text in [TEXT, "a</think>b", "8 <think>", "<thi", "<think>é</think>\n\n  x", "x"] * 20:
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(9)))
        found = streamed(format_, [text[a:b] for a, b in pairwise([0, *cuts, len(text)])])
        parts = split(text, format_)
        assert found[:2] == (parts.reasoning, parts.answer)


def test_every_choice_of_a_stream_has_its_own_state() -> None:
    thoughts = Thoughts(PLAIN)
    texts = [(0, "<think>a"), (1, "b"), (0, "</think>c"), (1, "<think>d")]
    sent = thoughts.chunks([chunk(i, {"content": text}) for i, text in texts])
    deltas = [json.loads(text)["choices"][0]["delta"] for text in sent]
    assert deltas == [
        {"reasoning_content": "a"},
        {"content": "b"},
        {"content": "c"},
        {"content": "<think>d"},
    ]


def test_what_is_no_text_passes() -> None:
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 1}}, separators=(",", ":"))
    call = {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}
    sent = Thoughts(OPENED).chunks([chunk(0, call), usage, DONE])
    assert json.loads(sent[0])["choices"][0]["delta"] == call
    assert sent[1:] == [usage, DONE]


@pytest.mark.parametrize(
    ("body", "apart"),
    [
        ({}, True),
        ({"response_format": {"type": "text"}}, True),
        ({"response_format": {"type": "json_object"}}, False),
        ({"tools": [{}], "tool_choice": "required"}, False),
        ({"tools": [{}], "tool_choice": {"type": "function"}}, False),
        ({"tools": [{}]}, True),
    ],
)
def test_an_answer_by_a_grammar_has_no_reasoning(body: dict[str, Any], apart: bool) -> None:
    assert is_apart(body) is apart


def test_the_end_of_each_prompt_says_whether_it_opens_reasoning():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    for end, opening in (("w1 <think>", "<think>"), ("w1 <think></think>", ""), ("w1", "")):
        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        body = {"kv_transfer_params": {"prompt_token_ids": ids}}
        thoughts = thoughts_on(body, OPENED, tokenizer)
        assert thoughts is not None
        assert thoughts.format == Format(THINK, opening)
    with_tools = thoughts_on({"tools": [{}]}, OPENED, tokenizer)
    assert with_tools is not None
    assert with_tools.format == OPENED
    assert thoughts_on({"tools": [{}], "tool_choice": "required"}, OPENED, tokenizer) is None


def test_a_history_with_reasoning_is_taken_and_the_reasoning_left_out() -> None:
    said = {"role": "assistant", "content": "8", "reasoning_content": "7 or 8"}
    asked = {"role": "user", "content": "?"}
    chat = Chat.model_validate({"model": "a", "messages": [asked, said, asked]})
    kept = chat.model_dump(exclude_none=True)["messages"]
    assert kept == [asked, {"role": "assistant", "content": "8"}, asked]
