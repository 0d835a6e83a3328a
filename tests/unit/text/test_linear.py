"""Reading what a model wrote takes time in proportion to its length, whatever it wrote.

Each regular expression of the package is either tried here on hostile texts of growing size, or in
`ELSEWHERE` with what it reads.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wrpo_ray.llm import vllm_settings
from wrpo_ray.serve import bounds
from wrpo_ray.stages.evaluate import arena_hard, mt_bench, protocols
from wrpo_ray.stages.ingest import cells
from wrpo_ray.stages.score import judge, verifiers
from wrpo_ray.text import addresses, display
from wrpo_ray.text.credentials import hide_credentials

PACKAGE = Path(__file__).parents[3] / "wrpo_ray"
SIZES = 1000, 8000
"""Characters of the short and of the long text: eight times as many, so linear work is eight times
as much, and quadratic work 64 times."""
GROWTH, FLOOR = 24, 0.004
"""The most that eightfold text may cost, relative to the short one, and in seconds of CPU below
which nothing is compared (quadratic work takes a second)."""

Reader = Callable[[str], object]


def _rating(text: str) -> None:
    with contextlib.suppress(judge.NoRatingError):
        judge.read_rating(text, 1, 10)


def _body(text: str) -> None:
    with contextlib.suppress(ValueError):
        bounds.load_json(text.encode(), 32)


MARKDOWN = ("a", " ", "\n", "\n ", "```", "~~~", "`", "\n```", "\n~~~\n", "-", "1", "python")
NUMBERS = ("1", ",111", ",", ".", "-", " ", "$", "\\frac", "{", "}", "/", "e", "1,111", "a")
BRACKETED = ("[", "]", "[[", "]]", "1", ".", " ", "*", "-", "a", "/", "out ", "of", "stars", "(")
STYLED = ("\n", " ", "#", "*", "**", "__", "1", ".", "```", "a", "-", "\n1.", "\r")
READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "score.verifiers.BLOCK": (verifiers.last_program, MARKDOWN),
    "score.verifiers.NUMBER": (verifiers.last_number, NUMBERS),
    "score.verifiers.BARE_FRACTION": (verifiers.last_number, ("\\frac", " ", "1", "\\", "d")),
    "score.verifiers.normal": (verifiers.normal, ("a", " ", ".", "\u0300", "\u0316", "\ufdfa")),
    "score.verifiers._marked": (verifiers.last_number, ("####", "\\boxed{", "{", "}", "1", "\n")),
    "score.judge.BRACKETS": (_rating, BRACKETED),
    "score.judge.RATING": (lambda text: _rating(f"[[{text}]]"), BRACKETED),
    "score.judge.read_rating": (_rating, ("[[", "]]", "[[1]]", " ", "of", "a")),
    "evaluate.arena_hard.LABEL": (arena_hard.LABEL.findall, ("[", "[[", "A", ">", "]", "]]")),
    "evaluate.arena_hard.CODE": (arena_hard.CODE.findall, STYLED),
    "evaluate.arena_hard.HEADERS": (arena_hard.HEADERS.findall, STYLED),
    "evaluate.arena_hard.LISTS": (
        lambda text: [pattern.findall(text) for pattern in arena_hard.LISTS],
        STYLED,
    ),
    "evaluate.arena_hard.BOLDS": (
        lambda text: [pattern.findall(text) for pattern in arena_hard.BOLDS],
        STYLED,
    ),
    "evaluate.arena_hard.WORDS": (arena_hard.length_of, STYLED),
    "evaluate.arena_hard.style_of": (lambda text: arena_hard.style_of(text, 1), STYLED),
    "evaluate.mt_bench.RATING": (mt_bench.RATING.search, BRACKETED),
    "evaluate.mt_bench.BACKUP": (mt_bench.BACKUP.search, BRACKETED),
    "evaluate.mt_bench.OTHER": (mt_bench.OTHER.search, BRACKETED),
    "evaluate.protocols.BRACKETS": (protocols.BRACKETS.findall, BRACKETED),
    "evaluate.protocols.filled": (lambda text: protocols.filled(text, {}), ("{", "}", "a", "{a}")),
    "ingest.cells.ESCAPED": (cells.ESCAPED.findall, ("\\u", "0", "\\u0000", "\\")),
    "llm.vllm_settings._LAST_LINE": (
        vllm_settings._LAST_LINE.findall,
        ("\n(a pid=1)", " ", "a", " ERROR ", "[", "]", "Error: ", ".", "\n"),
    ),
    "serve.bounds.BRACKET": (_body, ("[", "]", "{", "}", '"', "\\", '\\"', "a", ":", ",")),
    "serve.bounds.PART": (bounds.expansion, ("(", ")", "[", "]", "\\", "\\u{", "{9}", "{", "a")),
    "text.addresses._IN_TEXT": (addresses.redact, ("a", "b1", "QmFzZTY0", "-", " ")),
    "text.credentials._HEADERS": (
        hide_credentials,
        ("Authorization", ":", "'", "\\", " ", "basic ", "a", ",", ", a=", '"', ", a=b", "x-a-key"),
    ),
    "text.credentials._COOKIES": (
        hide_credentials,
        ("Cookie", ":", "=", " ", "'", "\\", "a", ";", "\n", "]"),
    ),
    "text.credentials._BASIC": (
        hide_credentials,
        ("Basic", " ", "a", "A", "aA", "1", "=", "/", "'", "\n"),
    ),
    "text.credentials._FLAGS": (
        hide_credentials,
        ("--", "-", "a-", "token", "api-key", " ", "=", "'", ",", "a", "A1"),
    ),
    "text.credentials._PEM": (
        hide_credentials,
        ("-----BEGIN ", "RSA ", "PRIVATE KEY-----", "-----END ", "-----", "-", "A", "\n"),
    ),
    "text.credentials._SCHEMES": (
        hide_credentials,
        ("Bearer", " ", "\t", "a", "A1", "-", "Basic ", "=", "\n"),
    ),
    "text.credentials._NAMED": (
        hide_credentials,
        (
            "A",
            "_KEY",
            "token",
            "=",
            ": ",
            "'",
            '"',
            "api_key",
            "a",
            "1",
            "\\",
            "password",
            ",",
            "(",
        ),
    ),
    "text.credentials._TOKENS": (
        hide_credentials,
        ("hf_", "sk-", "wrpo-", "eyJ", ".", "a", "A", "1", "-", "_", "\\n"),
    ),
    "text.display._MARKDOWN": (display.markdown, ("`", "\\", "|", "]", "](", "*", "a", "<")),
    "text.display._FENCE": (display.fenced, ("`", "```", "a", "\n")),
}
"""{module and name: (what reads a text with it, the parts that hostile texts are made of)}."""

ELSEWHERE = {
    "cli.serve": "names of models on the command line",
    "config": "configs",
    "data.finished": "names of files",
    "data.shards": "names of files",
    "export.model_card": "the licence of a model",
    "kubernetes": "manifests",
    "llm.architecture": "names of weights",
    "llm.attention": "keys of a model's config",
    "llm.endpoint_client": "a status code, compared as a whole",
    "llm.special_tokens": "texts, but the expression is a choice between fixed words",
    "planning.rates": "names of models",
    "runtime.tries": "names of files",
    "report.plots": "pictures that Matplotlib drew",
    "serve.adapters": "names of weights",
    "serve.errors": "messages of the engine",
    "serve.grammars": "the beginning of a message of xgrammar",
    "serve.haproxy": "the config of HAProxy",
    "serve.headers": "headers, but the expression is one class of bytes",
    "serve.keys": "the file of keys",
    "stages.evaluate.benchmarks": "files of a benchmark",
    "stages.ingest.cells._holds_more": "the beginning of a file of prompts",
    "storage": "names of files and models",
    "text.addresses": "addresses, and errors, which quote a model in 200 characters at most",
    "text.credentials.SECRET_NAME": "names of environment variables",
    "text.documents": "numbers in YAML",
    "zoo.skills": "its own phrases",
}
"""{module, or the beginning of its name: what its expressions read}. pyarrow's are RE2's, which
are linear."""


def expressions() -> Iterator[str]:
    """The module and name (of its variable, or the function with it) of each use of `re`."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for node in tree.body:
            uses = [
                call
                for call in ast.walk(node)
                if isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and isinstance(call.func.value, ast.Name)
                and call.func.value.id == "re"
                and call.func.attr != "escape"
            ]
            if uses:
                yield f"{module}.{_name(node)}"


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return getattr(node, "name", "")


def test_each_regular_expression_is_tried_here_or_reads_nothing_of_a_model() -> None:
    found = set(expressions())
    assert len(found) > 40
    tried = {n if n.startswith(("llm.", "serve.", "text.")) else f"stages.{n}" for n in READERS}
    places = tuple(ELSEWHERE)
    untried = {name for name in found - tried if not f"{name}.".startswith(
        tuple(f"{place}." for place in places))}  # fmt: skip
    assert untried == set()
    unknown = {place for place in places if not any(f"{n}.".startswith(f"{place}.") for n in found)}
    assert unknown == set()


TEXTS = 150
KNOWN: dict[str, list[tuple[str, str, str]]] = {
    "score.verifiers.BLOCK": [
        ("```", "a", ""),
        ("```", "a", "`"),
        ("```", "`", " "),
        ("", " ", ""),
    ],
    "score.verifiers.NUMBER": [
        ("1", ",111", "1"),
        ("1/1", ",111", "1"),
        ("-", " ", ""),
        ("", "-", ""),
    ],
    "score.verifiers.normal": [("", "\u0300\u0316", ""), ("a", "\u0316", "\u0300")],
    "score.judge.RATING": [("", "1", "a"), ("", " ", "1")],
    "evaluate.arena_hard.LISTS": [("", "\n", ""), ("", "\n ", "a"), ("", "1", "")],
    "evaluate.mt_bench.RATING": [("[[", "1", "")],
    "evaluate.mt_bench.BACKUP": [("[", "1", "")],
}
"""Texts (beginning, what is repeated, end) that were, or would easily be, of quadratic cost."""


def hostile(name: str, count: int | None) -> Iterator[tuple[str, str, str]]:
    """Known texts, and `count` of (before, repeated part or two, after), or all of them."""
    parts = READERS[name][1]
    edges = ("", *parts)
    units = [*parts, *(a + b for a, b in itertools.permutations(parts, 2))]
    every = list(itertools.product(edges, units, edges))
    chosen = every if count is None else random.Random(0).sample(every, min(count, len(every)))
    yield from KNOWN.get(name, [])
    yield from chosen


def seconds(read: Reader, text: str, times: int = 1) -> float:
    """The least CPU time of this thread, which what else runs does not lengthen."""
    found = []
    for _ in range(times):
        started = time.thread_time()
        read(text)
        found.append(time.thread_time() - started)
    return min(found)


def check_growth(name: str, count: int | None) -> None:
    """Read hostile texts of both sizes and compare the costs; again where they differ by much."""
    read = READERS[name][0]
    for before, unit, after in hostile(name, count):
        short, long = (before + unit * (size // len(unit)) + after for size in SIZES)
        cost = seconds(read, long)
        if cost <= FLOOR or cost <= FLOOR + GROWTH * seconds(read, short, 2):
            continue
        least = FLOOR + GROWTH * seconds(read, short, 3)
        assert seconds(read, long, 3) <= least, (before, unit, after)


@pytest.mark.parametrize("name", READERS)
def test_eight_times_the_text_takes_eight_times_the_work(name: str) -> None:
    check_growth(name, TEXTS)


@pytest.mark.soak
@pytest.mark.parametrize("name", READERS)
def test_the_same_for_every_text(name: str) -> None:
    check_growth(name, None)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"^[ \t]*(`{3,})[ \t]*([\w+-]*)[^\n`]*\n", "```" + "a"),
        (r"\[\[(\d+\.?\d*)\]\]", "[[" + "1"),
        (r"(?m)^\s*\d+\.\s", "\n"),
    ],
)
def test_what_was_quadratic_would_be_noticed(pattern: str, text: str) -> None:
    old = re.compile(pattern)
    short, long = (text + text[-1] * size for size in SIZES)
    assert seconds(old.findall, long) > FLOOR + GROWTH * seconds(old.findall, short, 3)
