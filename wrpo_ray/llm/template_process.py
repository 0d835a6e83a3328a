"""Renders chat templates in a process of its own, which ends at its limits of time and memory.

A template comes with the model. transformers renders it in Jinja's sandbox, which keeps it from the
interpreter, but not from a loop without an end or a text that fills the memory. The process has no
environment and a limit of CPU seconds, which the load of the machine does not use up; it is started
at the first conversation, and again after one that ended it.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from math import ceil
from typing import Any, BinaryIO

SECONDS = 5
"""CPU time for one conversation."""
MEMORY = 2**30
"""Bytes of address space beyond what the process has after its imports."""
CHARACTERS = 2**25
"""Of a rendered conversation."""
Rendered = tuple[list[str], list[Any]]


def render_apart(**given: Any) -> Rendered:
    """`render_jinja_template` of transformers, in the process.

    Raises:
        Exception: of the template, with the original's name and text, or of a limit.
    """
    from transformers.utils.chat_template_utils import _plain_template_data

    reply = _PROCESS.ask(json.dumps([SECONDS, _plain_template_data(given)]).encode())
    if "error" in reply:
        from jinja2 import TemplateError

        name, text = reply["error"]
        raise type(name, (TemplateError,), {})(text)
    return reply["rendered"], reply["indices"]


def render_all_apart() -> None:
    """Let transformers render every template so, for whoever asks it, such as vLLM."""
    from transformers import tokenization_utils_base

    tokenization_utils_base.render_jinja_template = render_apart


class _Process:
    """The process of this one, shared by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: bytes) -> dict[str, Any]:
        """The reply, or the limit that ended the process."""
        with self._lock:
            process = self._started()
            try:
                line = _exchange(process, request)
            except BaseException:  # half a reply would be the next one's
                self._end(process)
                raise
            if line:
                reply: dict[str, Any] = json.loads(line)
                return reply
            code = self._end(process)
        limit = f"{SECONDS} s of CPU time" if code == -signal.SIGXCPU else "its memory"
        return {"error": ["TemplateLimitError", f"the template takes more than {limit}"]}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is None or self._owner != os.getpid():  # of the process before a fork
            self._running, self._owner = _start(), os.getpid()
        return self._running

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        self._running = None
        process.kill()
        process.communicate()
        return process.returncode


_PROCESS = _Process()


def _start() -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path for path in sys.path if path)
    own = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"}
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=own | kept,
        start_new_session=True,  # Ctrl-C is for the one that waits
    )


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """Send a line and return the reply; empty if the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(request + b"\n")
        process.stdin.flush()
    line = process.stdout.readline()
    return line if line.endswith(b"\n") else b""


# --- in the process ----------------------------------------------------------------------------


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for request in requests:
        seconds, given = json.loads(request)
        used = resource.getrusage(resource.RUSAGE_SELF)
        end = ceil(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (end, most))
        replies.write(_reply(render_jinja_template, given) + b"\n")
        replies.flush()


def _reply(render: Any, given: dict[str, Any]) -> bytes:
    try:
        rendered, indices = render(**given)
        if sum(map(len, rendered)) > CHARACTERS:
            raise OverflowError(f"the template writes more than {CHARACTERS:,} characters")
        return json.dumps({"rendered": rendered, "indices": indices}).encode()
    except Exception as error:  # a template can raise anything
        return json.dumps({"error": [type(error).__name__, str(error)]}).encode()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
