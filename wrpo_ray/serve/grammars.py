"""Compiles the grammars of requests where it can be killed, before the engine compiles them.

vLLM reads a schema in a replica's event loop and compiles it in a thread, without a limit: a
pattern of 20 characters can take minutes, gigabytes, or the process. So a process beside the
replica, which has the tokenizer, forks for each grammar; the kernel ends a fork at its limits. What
compiles there within them does so in the engine, in the same time. `python -m
wrpo_ray.serve.grammars FOLDER SECONDS FD` is this process; it ends when the replica does.
"""

import asyncio
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from random import Random
from typing import Any

from wrpo_ray.runtime.placement import thread_env

READ_SECONDS = 0.1
"""CPU time of reading a schema, for which the replica's event loop stands still."""
WALL_FACTOR = 10
"""Time for a grammar on a machine that is busy, as a multiple of its CPU time."""
MEMORY = 1 << 30
"""Bytes of a grammar and its compilation."""
REMEMBERED = 1024
"""Outcomes that are kept."""
AT_ONCE = 2
"""Compilations at a time."""
STEPS = 32
"""Tokens of an answer that is tried."""
NICE = 10
"""The engine goes first."""
BEGUN, FINE = b"+", b"ok"
TOO_COSTLY = "its grammar takes too long or too much memory to compile; make it simpler"


class CompilerLostError(Exception):
    """The process that compiles grammars ended."""


class Grammars:
    """Checks the grammars of requests to a model whose tokenizer is in `folder`.

    A grammar has `seconds` of CPU time.
    """

    def __init__(self, folder: Path, seconds: float):
        self._folder, self._seconds = folder, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._free = asyncio.Semaphore(AT_ONCE)
        self._outcomes: OrderedDict[str, str | None] = OrderedDict()

    async def fault(self, schemas: list[str]) -> str | None:
        """Return why grammars cannot be compiled within the limits; None if they can.

        `schemas` are JSON schemas, or structural tags (objects of `type` `structural_tag`).

        Raises:
            CompilerLostError: neither is known.
        """
        if (key := json.dumps(schemas)) in self._outcomes:
            self._outcomes.move_to_end(key)
            return self._outcomes[key]
        async with self._free:
            reply = await self._compile(key)
        if not reply.startswith(BEGUN):
            self.close()
            raise CompilerLostError
        text = reply.removeprefix(BEGUN)
        outcome = None if text == FINE else text.decode() or TOO_COSTLY
        self._outcomes[key] = outcome
        if len(self._outcomes) > REMEMBERED:
            self._outcomes.popitem(last=False)
        return outcome

    async def _compile(self, request: str) -> bytes:
        """Return what a fork says until it ends."""
        ours, its = socket.socketpair()
        with its:
            try:
                socket.send_fds(self._started(), [BEGUN], [its.fileno()])
            except OSError:
                ours.close()
                return b""
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            writer.write(request.encode())
            writer.write_eof()
            return await reader.read()
        except OSError:
            return b""
        finally:
            writer.close()

    async def why_not(self, body: dict[str, Any]) -> tuple[str, str] | None:
        """Return (field of a request, what is wrong with its grammar); None if nothing is.

        Of `tools`, only what is too costly: the engine may do without a grammar of theirs.

        Raises:
            CompilerLostError: it is not known.
        """
        for field, schemas in schemas_of(body).items():
            fault = await self.fault(schemas) if schemas else None
            if fault and (fault == TOO_COSTLY or field != "tools"):
                return field, fault
        return None

    def _started(self) -> socket.socket:
        """Return the socket of the process, which is started if there is none."""
        if self._control is None:
            self._control, its = socket.socketpair()
            with its:
                words = [sys.executable, "-m", __name__, str(self._folder), str(self._seconds)]
                words.append(str(its.fileno()))
                env = os.environ | thread_env(1) | {"PYTHONPATH": str(Path(__file__).parents[2])}
                self._process = subprocess.Popen(
                    words,
                    pass_fds=[its.fileno()],
                    env=env,
                    stderr=subprocess.DEVNULL,  # xgrammar writes schemas there
                )
        return self._control

    def close(self) -> None:
        """End the process."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def schemas_of(body: dict[str, Any]) -> dict[str, list[str]]:
    """Return the JSON schemas and structural tags in the fields of a request."""
    asked = body.get("response_format") or {"type": "text"}
    tools = body.get("tools") or [] if body.get("tool_choice") != "none" else []
    formats = {"json_schema": asked.get("json_schema", {}).get("schema"), "structural_tag": asked}
    given = {
        "response_format": [formats.get(asked["type"])],
        "tools": [tool["function"].get("parameters") for tool in tools],
    }
    return {
        field: [json.dumps(part) for part in parts if part is not None]
        for field, parts in given.items()
    }


# --- the process -----------------------------------------------------------------------------


def serve(folder: str, seconds: float, control: socket.socket) -> None:
    """Fork for each connection that arrives at `control`, until its other end is closed."""
    import xgrammar

    from wrpo_ray.llm.rendering import load_tokenizer

    os.nice(NICE)
    tokenizer = xgrammar.TokenizerInfo.from_huggingface(load_tokenizer(Path(folder)))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets forks that end
    while True:
        _, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not fds:
            return
        with socket.socket(fileno=fds[0]) as connection:
            if os.fork() == 0:
                control.close()
                _answer(connection, tokenizer, seconds)
                os._exit(0)


def _answer(connection: socket.socket, tokenizer: Any, seconds: float) -> None:
    """Compile the grammars of one request in a fork, under limits that the kernel enforces."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * WALL_FACTOR)
    with connection.makefile("rb") as request:
        schemas = json.loads(request.read())
    connection.sendall(BEGUN)
    try:
        for schema in schemas:
            _compile(schema, tokenizer)
        connection.sendall(FINE)
    except MemoryError:
        pass
    except Exception as error:
        words = " ".join(str(error)[:1000].split())
        text = re.sub(r"^(\[.*?\] \S+: )?", "", words)  # time and file
        connection.sendall(text[:300].encode() or b"it is no grammar")


def _compile(schema: str, tokenizer: Any) -> None:
    """Read and compile a grammar as vLLM's XgrammarBackend does, and try it.

    Raises:
        ValueError: it takes too long to read, or an answer cannot be finished.
        RuntimeError: of xgrammar, with what is wrong.
    """
    import xgrammar

    compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)
    read: Any = xgrammar.Grammar.from_json_schema
    compiling: Any = compiler.compile_json_schema
    given: tuple[Any, ...] = (schema,)
    tag = json.loads(schema)
    if tag.get("type") == "structural_tag":
        read, compiling = xgrammar.Grammar.from_structural_tag, compiler.compile_structural_tag
        if "structures" in tag:  # the old form
            items = [
                xgrammar.StructuralTagItem(
                    begin=item["begin"], schema=json.dumps(item["schema"]), end=item["end"]
                )
                for item in tag["structures"]
            ]
            given = (items, tag["triggers"])
    begun = time.process_time()
    read(*given)
    if time.process_time() > begun + READ_SECONDS:
        raise ValueError(TOO_COSTLY)
    _try(xgrammar.GrammarMatcher(compiling(*given)), tokenizer)


def _try(matcher: Any, tokenizer: Any) -> None:
    """Take some random steps: where no token is allowed, the engine would fail.

    Raises:
        ValueError: there is such a place, as in a `$ref` to itself.
    """
    import numpy
    import xgrammar

    random, mask = Random(0), xgrammar.allocate_token_bitmask(1, tokenizer.vocab_size)
    for _ in range(STEPS):
        matcher.fill_next_token_bitmask(mask)
        bits = numpy.unpackbits(mask.numpy().view("uint8")[0], bitorder="little")
        allowed = numpy.flatnonzero(bits[: tokenizer.vocab_size])
        if not len(allowed):
            raise ValueError("its grammar leads to where no token is allowed")
        matcher.accept_token(int(random.choice(allowed)))
        if matcher.is_terminated():
            return


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[3])) as end:
        serve(sys.argv[1], float(sys.argv[2]), end)
