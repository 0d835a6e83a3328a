"""Grammars are compiled in a process whose forks end at their limits."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.tiny_models import write_model
from support.waiting import wait_until

from wrpo_ray.serve import grammars
from wrpo_ray.serve.grammars import TOO_COSTLY, CompilerLostError, Grammars, schemas_of

COSTLY = {"type": "string", "pattern": ".{0,9000}x"}
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grammars]:
    """With a limit below what the costly grammar takes with a vocabulary of bytes: 2.5 s."""
    found = Grammars(Path(write_model(tmp_path_factory.mktemp("model"))), 0.5)
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


def test_memory_is_limited(compiler: Grammars, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammars, "MEMORY", 0)
    ours, its = grammars.socket.socketpair()
    with ours, its:
        ours.sendall(b'["{}"]')
        ours.shutdown(grammars.socket.SHUT_WR)
        if grammars.os.fork() == 0:
            try:
                grammars._answer(its, None, 5.0)
            finally:
                grammars.os._exit(0)
        its.close()
        assert ours.makefile("rb").read() != grammars.BEGUN + grammars.FINE


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
