"""Values of every type for every field of a request, and which of them each field accepts."""

from __future__ import annotations

from typing import Any

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    10**30,
    -(10**30),
    0.5,
    1.5,
    1e300,
    "",
    "x",
    "1",
    "auto",
    "none",
    "x" * 1001,
    "\x00",
    [],
    [None],
    [1],
    [-1],
    ["x"],
    [""],
    ["x"] * 17,
    [[]],
    [[1]],
    [{}],
    {},
    {"a": 1},
    {"1": 1},
    {"1": 101},
    {"-1": 1},
    {"1": None},
    {"type": "text"},
    {"type": "x"},
    {"type": None},
    {"type": "json_schema"},
    {"type": "function"},
    {"a": {"b": [{"c": [1]}]}},
]
COMMON: dict[str, list[Any]] = {
    "stream": [None, True, False],
    "stream_options": [None, *(value for value in VALUES if isinstance(value, dict))],
    "max_tokens": [None, 1, 7],
    "n": [None, 1, 7],
    "temperature": [None, 0, 1, 0.5, 1.5],
    "top_p": [None, 1, 0.5],
    "top_k": [None, 0, 1, -1, 7],
    "min_p": [None, 0, 1, 0.5],
    "presence_penalty": [None, 0, 1, -1, 0.5, 1.5],
    "frequency_penalty": [None, 0, 1, -1, 0.5, 1.5],
    "repetition_penalty": [None, 1, 7, 0.5, 1.5],
    "seed": [None, 0, 1, -1, 7],
    "stop": [None, "x", "1", "auto", "none", "\x00", [], ["x"]],
    "logit_bias": [None, {}, {"1": 1}],
    "response_format": [None, {"type": "text"}],
    "ignore_eos": [None, True, False],
    "skip_special_tokens": [None, True, False],
}
ACCEPTED: dict[str, dict[str, list[Any]]] = {
    "chat": COMMON
    | {
        "model": [],
        "messages": [],
        "max_completion_tokens": [None, 1, 7],
        "logprobs": [None, True, False],
        "top_logprobs": [None, 0],
        "tools": [None],
        "tool_choice": [None, "none"],
    },
    "completions": COMMON
    | {
        "model": [],
        "prompt": ["", "x", "1", "auto", "none", "x" * 1001, "\x00", [1], ["x"], [""], [[1]]],
        "echo": [None, True, False],
        "logprobs": [None, 0, 1],
    },
    "score": {"messages": []},
}
"""The `VALUES` that the endpoint accepts, by call and field; it rejects all others."""
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
}
NESTED: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["x", "y"],
    "logit_bias": {"1": 0.5},
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "s",
            "description": "d",
            "schema": {"type": "object"},
            "strict": True,
        },
    },
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
}
"""A chat that uses every field."""


def is_accepted(call: str, field: str, value: Any) -> bool:
    """Whether the endpoint accepts a value; True is not 1, and 1 is not 1.0."""
    accepted = ACCEPTED[call][field]
    return any(type(value) is type(each) and value == each for each in accepted)


def places(value: Any, path: tuple[int | str, ...] = ()) -> list[tuple[int | str, ...]]:
    """Return the paths of all nodes below the root of a tree."""
    items: list[tuple[int | str, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    if isinstance(value, list):
        items = list(enumerate(value))
    return [p for key, each in items for p in ((*path, key), *places(each, (*path, key)))]


def replaced(tree: Any, path: tuple[int | str, ...], value: Any) -> Any:
    """Return a tree with another value at a path."""
    if not path:
        return value
    key, *rest = path
    if isinstance(tree, dict):
        return tree | {key: replaced(tree[key], tuple(rest), value)}
    return [replaced(e, tuple(rest), value) if i == key else e for i, e in enumerate(tree)]


def path_text(path: tuple[int | str, ...]) -> str:
    """`messages[0].content`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")
