"""Grammars are compiled in a process whose forks end at their limits."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from support.waiting import wait_until

from wrpo_ray.serve import grammars
from wrpo_ray.serve.grammars import TOO_COSTLY, CompilerLostError, Grammars, schemas_of
from wrpo_ray.zoo.tokenizers import byte_tokenizer

COSTLY = {"type": "string", "pattern": ".{0,9000}x"}
LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
DEAD_END = "its grammar leads to where no token is allowed"
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grammars]:
    """With a limit below what the costly grammar takes with a vocabulary of bytes: 2.5 s."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    found = Grammars(folder, 0.5)
    yield found
    found.close()


def formatted(schema: dict[str, Any]) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return {"response_format": form}


def offered(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"tools": [{"function": {"name": "f", "parameters": schema}}], **fields}


TAG = {"type": "structural_tag"}
OLD_TAG = TAG | {"structures": [{"begin": "<a>", "schema": OBJECT, "end": "</a>"}]}
NEW_TAG = TAG | {"format": {"type": "json_schema", "json_schema": OBJECT}}
COSTLY_TAG = TAG | {"format": {"type": "json_schema", "json_schema": COSTLY}}


@pytest.mark.parametrize(
    ("body", "why_not"),
    [
        ({}, None),
        ({"response_format": {"type": "json_object"}}, None),
        (formatted(OBJECT), None),
        (offered(OBJECT), None),
        ({"response_format": OLD_TAG | {"triggers": ["<a"]}}, None),
        ({"response_format": NEW_TAG}, None),
        (formatted(COSTLY), ("response_format", TOO_COSTLY)),
        ({"response_format": COSTLY_TAG}, ("response_format", TOO_COSTLY)),
        (offered(COSTLY), ("tools", TOO_COSTLY)),
        (offered(COSTLY, tool_choice="none"), None),
        (formatted({"type": "nothing"}), ("response_format", 'Unsupported type "nothing"')),
        (offered({"type": "nothing"}), None),
        (formatted(LOOP), ("response_format", DEAD_END)),
    ],
)
def test_what_compiles_within_the_limits_is_let_through(
    body: dict[str, Any], why_not: tuple[str, str] | None, compiler: Grammars
):
    # The second time it is remembered.
    for _ in range(2):
        assert asyncio.run(compiler.why_not(body)) == why_not


def test_a_costly_grammar_ends_alone(compiler: Grammars):
    """Beside it others are compiled by the same process, and none of its forks is left."""

    async def together() -> list[str | None]:
        costly = [json.dumps(COSTLY | {"title": str(n)}) for n in range(3)]
        cheap = [json.dumps(OBJECT | {"title": str(n)}) for n in range(3)]
        return await asyncio.gather(*(compiler.fault([schema]) for schema in costly + cheap))

    assert asyncio.run(compiler.fault(["{}"])) is None
    process = psutil.Process(compiler._process.pid)
    assert asyncio.run(together()) == [TOO_COSTLY] * 3 + [None] * 3
    assert process.is_running()
    wait_until(lambda: not process.children())


def forked(schema: dict[str, Any]) -> tuple[bytes, int]:
    """What a fork with 0.2 s says of a schema, and the signal that ended it."""
    xgrammar = pytest.importorskip("xgrammar")
    tokenizer = xgrammar.TokenizerInfo(["<end>", *map(chr, range(32, 127))], stop_token_ids=[0])
    ours, its = socket.socketpair()
    with ours, its:
        ours.sendall(json.dumps([json.dumps(schema)]).encode())
        ours.shutdown(socket.SHUT_WR)
        if (fork := os.fork()) == 0:
            try:
                grammars._answer(its, tokenizer, 0.2)
            finally:
                os._exit(0)
        its.close()
        with ours.makefile("rb") as reply:
            text = reply.read()
    return text, os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])


def test_time_and_memory_are_limited(monkeypatch: pytest.MonkeyPatch):
    assert forked(OBJECT) == (grammars.BEGUN + grammars.FINE, 0)
    with monkeypatch.context() as limits:
        limits.setattr(grammars, "WALL_FACTOR", 1000)
        assert forked(COSTLY) == (grammars.BEGUN, -signal.SIGPROF)
    monkeypatch.setattr(grammars, "_compile", lambda *_: bytearray(2 * grammars.MEMORY))
    assert forked(OBJECT) == (grammars.BEGUN, 0)


def test_a_lost_compiler_is_started_again(compiler: Grammars):
    assert asyncio.run(compiler.fault(["{}"])) is None
    psutil.Process(compiler._process.pid).kill()
    wait_until(lambda: compiler._process.poll() is not None)
    with pytest.raises(CompilerLostError):
        asyncio.run(compiler.fault(['{"title": "lost"}']))
    assert asyncio.run(compiler.fault(['{"title": "lost"}'])) is None


def test_it_ends_with_the_replica(compiler: Grammars):
    assert asyncio.run(compiler.fault(['{"title": "end"}'])) is None
    process = compiler._process
    compiler._control.close()  # as the kernel does when the replica is killed
    compiler._control = None
    assert process.wait(60) == 0


def test_schemas_are_found():
    both = formatted(OBJECT) | offered(COSTLY)
    assert schemas_of(both) == {
        "response_format": [json.dumps(OBJECT)],
        "tools": [json.dumps(COSTLY)],
    }
    assert schemas_of({"tools": [{"function": {"name": "f"}}]}) == {
        "response_format": [],
        "tools": [],
    }
