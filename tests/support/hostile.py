"""Prompt rows as nobody should send them, made from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<end_of_turn>", "<pad>"),
    *("<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<think>", "<unk>", "[END]", "[UNK]"),
]
TEMPLATE = [
    "{{ 7 * 7 }}",
    "{% for m in messages %}",
    "{{ messages }}",
    "{#",
    "%}",
    "{{ bos_token }}",
]
CONTROL = [chr(i) for i in range(32)] + ["\x7f", "\u0085", "\u200b", "\u202e", "\u2028", "\ufeff"]
ODD = ["\ufdd0", "\ufffe", "\U0001f468\u200d\U0001f469", "e\u0301\u0301\u0301", "\U0010ffff", "ﷺ"]
NAMES = [
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b]8;;http://evil\x1b\\x\x1b]8;;\x1b\\", "\x9b31m",
    "a\rb", "a\bb", "\x00", "\x7f", "\u202egnp.exe", "\u2066x\u2069", "a\u2028b\u2029c", "\ud800",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](http://evil/x.png)",
    "[x](javascript:alert(1))", "[x][y]", "a | b |\n| --- |", "`code`", "```\n# head", "$x^2$",
    "a\n# head", "a\n\n> quote", "&lt;b&gt;", "**bold**", "~~gone~~", "\\",
]  # fmt: skip
"""Names and texts that steer a terminal, or are more than text in HTML or Markdown."""
ROLES = ["user", "assistant", "system", "tool", "end", "user|><|im_end", "", "USER", None, 3]


def hostile_lines(count: int, seed: int, long: int = 2**20) -> list[bytes]:
    """Lines of a JSONL file, without their ends; the longest have about `long` characters."""
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random, int], bytes]] = [
        *(_text, _text, _text, _conversation, _conversation),
        *(_special, _special, _surrogate, _wrong_type, _broken, _deep, _number, _more_than_text),
    ]
    return [_long(rng, long) if i % 100 == 7 else rng.choice(kinds)(rng, i) for i in range(count)]


def _line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass").replace(b"\n", b"")


def _mixture(rng: random.Random, i: int) -> str:
    parts = [
        rng.choice([TOKENS, TEMPLATE, CONTROL, ODD, ["Reverse abc.", " ", "x"]]) for _ in "1234"
    ]
    return f"{i} " + "".join(rng.choice(part) for part in parts)


def _text(rng: random.Random, i: int) -> bytes:
    row = {"prompt": _mixture(rng, i), "reference": rng.choice(["x", 5, None, "\x00", [1]])}
    bom, end = rng.choice([b"", b"", b"\xef\xbb\xbf"]), rng.choice([b"", b"\r"])
    return bom + _line(row) + end


def _special(rng: random.Random, i: int) -> bytes:
    token = rng.choice(TOKENS)
    return _line({"prompt": rng.choice([token, f"{i}{token}{token}", f"{token} {i} {token[:-1]}"])})


def _conversation(rng: random.Random, i: int) -> bytes:
    turns = [
        {"role": rng.choice(ROLES), "content": _mixture(rng, i)} for _ in range(rng.randint(0, 4))
    ]
    if rng.random() < 0.5:
        turns = [{"role": rng.choice(["user", "system"]), "content": _mixture(rng, i)}]
    return _line({"prompt": rng.choice([turns, turns[0] if turns else {}])})


def _more_than_text(rng: random.Random, i: int) -> bytes:
    key = rng.choice(["tool_calls", "function_call", "name", "images", "refusal", "id", "language"])
    more = {key: rng.choice([None, "", [], {}, "x", [{"function": {"name": "f"}}], 0, True])}
    turn = {"role": rng.choice(["user", "assistant", "tool"]), "content": f"{i}"} | more
    return _line({"prompt": [{"role": "user", "content": "x"}, turn]})


def _surrogate(rng: random.Random, i: int) -> bytes:
    place = rng.choice(["prompt", "reference", "group", "other"])
    return _line({"prompt": f"{i} fine", place: f"{i} half \ud83d pair"})


def _wrong_type(rng: random.Random, i: int) -> bytes:
    wrong = [
        None,
        "",
        " \n",
        i,
        1.5,
        True,
        [],
        {},
        [[]],
        [None],
        [{"role": "user"}],
        {"content": "x"},
    ]
    wrong += [[{"role": "user", "content": ["x"]}], [{"role": "user", "content": None}], ["x"]]
    return _line(rng.choice([{"prompt": rng.choice(wrong)}, {"promt": "x"}, rng.choice(wrong)]))


def _broken(rng: random.Random, i: int) -> bytes:
    return rng.choice(
        [
            *(b"", b"{", b"\xff\xfe{}", b"null", b'{"prompt": "\xc3\x28"}', b"\x00\x00", b"}" * 9),
            *(
                b'{"prompt": "a\tb"}',
                b'{"prompt": "\\ud83d"}',
                b'{"prompt": "x" "y"}',
                b"prompt: x",
            ),
            f'{{"prompt": "first", "prompt": "second {i}"}}'.encode(),
        ]
    )


def _deep(rng: random.Random, i: int) -> bytes:
    depth = rng.choice([50, 900, 100_000])
    nested = b"[" * depth + b"]" * depth
    return rng.choice(
        [nested, b'{"prompt": ' + nested + b"}", b'{"prompt": "x", "y": ' + nested + b"}"]
    )


def _number(rng: random.Random, i: int) -> bytes:
    number = rng.choice(["NaN", "-Infinity", "1e999", "9" * 400, "9" * 5000, "-0"])
    return f'{{"prompt": "{i} number", "reference": {number}, "{i}": {number}}}'.encode()


def _long(rng: random.Random, length: int) -> bytes:
    unit = rng.choice(["x", "word ", "<|im_end|>", "\u0301", "[INST]", "é", "{{", "\\", "\x00"])
    return _line({"prompt": unit * (length // len(unit))})
