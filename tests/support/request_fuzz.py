"""Random requests to the endpoint: from the description of its fields, and from known attacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from support.request_values import NESTED, VALUES
from wrpo_ray.serve.requests import Chat, Completion, Score

CALLS = {"chat/completions": Chat, "completions": Completion, "score": Score}
PATHS = [
    "",
    "models",
    "models/target",
    "models/../x",
    "embeddings",
    "chat",
    "%00",
    "é",
    "?a=b",
    "/",
]
METHODS = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "PROPFIND"]
GRAMMARS: list[Any] = [
    {},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "nothing"},
    {"type": "string", "pattern": ".{0,9000}x"},
    {"type": "string", "pattern": ".{0,1900}x"},
    {"type": "string", "pattern": "((a{99}){99}){99}"},
    {"type": "string", "pattern": "(((.?){9}){9}){9}"},
    {"type": "string", "pattern": "(" * 400 + ")" * 400},
    {"type": "string", "pattern": "(x+x+)+y"},
    {"type": "string", "pattern": "[^\\"},
    {"type": "string", "pattern": "\x00"},
    {"type": "string", "maxLength": 10_000},
    {"type": "string", "minLength": 9, "maxLength": 3},
    {"type": "array", "items": {"type": "string"}, "minItems": 9999},
    {"enum": [f"value {n}" for n in range(1000)]},
    {"enum": []},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/nowhere"},
    {"$ref": "http://127.0.0.1:1/x"},
    {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(300)}},
    {"type": "integer", "minimum": 10**30, "maximum": -(10**30)},
    {"type": "number", "multipleOf": 0.1},
    {"patternProperties": {"a.*": {"type": "string"}}},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"not": {}},
    True,
    [],
    "x",
]
ODD_HEADERS: list[tuple[bytes, bytes]] = [
    (b"X-Request-Disconnect-Disabled", b"?1"),
    (b"X-Request-Timeout-Seconds", b"0"),
    (b"X-Request-Timeout-Seconds", b"1e-9"),
    (b"X-Request-Id", b"\xff\xfe"),
    (b"X-Request-Id", b"x" * 4000),
    (b"X-Session-Id", b"\x80"),
    (b"Serve_Multiplexed_Model_Id", b"other"),
    (b"Serve-Multiplexed-Model-Id", b"\xc3\x28"),
    (b"Traceparent", b"00-x"),
    (b"Cookie", b"a=\xe9"),
    (b"Content-Encoding", b"gzip"),
    (b"Content-Type", b"text/plain"),
    (b"Authorization", b"Bearer \xff"),
    (b"Expect", b"100-continue"),
    (b"Accept", b"*/*;q=\x01"),
    (b"Range", b"bytes=0-"),
    (b"Upgrade", b"websocket"),
]


@dataclass(frozen=True)
class Sent:
    """A request."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Fuzzer:
    """Makes requests, the same for the same seed."""

    def __init__(self, seed: int, key: str):
        self._random, self._key = Random(seed), key
        self._schemas = {path: kind.model_json_schema() for path, kind in CALLS.items()}

    def requests(self, count: int) -> Iterator[Sent]:
        """Yield so many."""
        for _ in range(count):
            path = self._random.choice(list(CALLS))
            data = self._spoilt(json.dumps(self._body(path)).encode())
            headers = [
                (b"Authorization", b"Bearer " + self._key.encode()),
                (b"Content-Type", b"application/json"),
            ]
            if self._random.random() < 0.1:
                odd = self._random.choice(ODD_HEADERS)
                headers = [pair for pair in headers if pair[0] != odd[0]] + [odd]
            method = "POST"
            if self._random.random() < 0.05:
                path, method = self._random.choice(PATHS), self._random.choice([*METHODS, "POST"])
            yield Sent(method, f"/v1/{path}", headers, data)

    def _body(self, path: str) -> Any:
        """Return a body that is right, but for some fields that are made of their description."""
        random, schema = self._random, self._schemas[path]
        user = {"role": "user", "content": random.choice(["a", "Vowels in jaf:", "é\U0001f600"])}
        body: dict[str, Any] = {
            "chat/completions": {"messages": [user]},
            "completions": {"prompt": random.choice(["a", [1, 2], ["a", "b"], [[1], [2]]])},
            "score": {"messages": [user, {"role": "assistant", "content": "yes"}]},
        }[path]
        body |= {"model": "target"}
        known = list(schema["properties"])
        names = random.sample(known, min(len(known), random.choice([0, 1, 1, 2, 4])))
        body |= {name: self._value(schema["properties"][name], schema, name) for name in names}
        if random.random() < 0.1:
            name = random.choice(list(NESTED))
            body |= {name: NESTED[name]}
        if random.random() < 0.1:
            form = {"name": "s", "schema": random.choice(GRAMMARS)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        if "max_tokens" not in names:
            body["max_tokens"] = random.choice([1, 2, 3])
        return random.choice(VALUES) if random.random() < 0.01 else body

    def _value(self, part: Any, whole: dict[str, Any], name: str = "", depth: int = 0) -> Any:
        """Return a value that a JSON schema describes, at times another."""
        random = self._random
        if depth > 6 or random.random() < 0.15:
            return random.choice(VALUES)
        if name in ("schema", "parameters") and random.random() < 0.8:
            return random.choice(GRAMMARS)
        if reference := part.get("$ref"):
            return self._value(whole["$defs"][reference.rpartition("/")[2]], whole, name, depth + 1)
        if choices := part.get("anyOf") or part.get("oneOf"):
            return self._value(random.choice(choices), whole, name, depth + 1)
        if "const" in part or "enum" in part:
            return random.choice(part.get("enum") or [part.get("const")])
        return self._typed(part, whole, depth)

    def _typed(self, part: Any, whole: dict[str, Any], depth: int) -> Any:
        random, kind = self._random, part.get("type")
        if kind == "array":
            count = random.choice([0, 1, 2, 3, 20])
            return [self._value(part.get("items", {}), whole, "", depth + 1) for _ in range(count)]
        if kind == "object":
            properties = part.get("properties", {})
            kept = [n for n in properties if n in part.get("required", ()) or random.random() < 0.5]
            return {n: self._value(properties[n], whole, n, depth + 1) for n in kept}
        low, high = part.get("minimum", 0), part.get("maximum", 9)
        plain: dict[str | None, list[Any]] = {
            "string": ["", "a", "\x00", "\u2028", "x" * 300, "{}", "[[[[", "a" * 20_000],
            "integer": [low, high, low - 1, high + 1, 2**31, 2**63, -(2**63)],
            "number": [low, high, low - 0.1, high + 0.1, 1e308, 1e-308, -0.0],
            "boolean": [True, False],
            "null": [None],
        }
        return random.choice(plain.get(kind) or VALUES)

    def _spoilt(self, data: bytes) -> bytes:
        """Return a body, at times with changed, missing or repeated bytes."""
        random = self._random
        if random.random() > 0.05 or not data:
            return data
        at = random.randrange(len(data))
        middle = random.choice(
            [b"", bytes([random.randrange(256)]), b"[" * 5000, b"\\ud800", b'"', b"{}," * 50_000]
        )
        return data[:at] + middle + data[at + random.choice([0, 1, len(data)]) :]
