"""Settings of the vLLM in our actors; what the driver's environment says goes before them."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

CPU_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""On the CPU, compiling and a second process cost more than small runs take, and bound threads
starve each other."""
CPU_ENGINE = {"enforce_eager": True, "enable_chunked_prefill": False}
"""A seeded request whose prefill is split fails on the CPU: its generator has no offset."""
ENV = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def engine_env(*, on_gpu: bool) -> dict[str, str]:
    """The environment of an engine's process."""
    own = ENV | ({} if on_gpu else CPU_ENV)
    return {name: os.environ.get(name, value) for name, value in own.items()}


class EngineProcessError(RuntimeError):
    """What the engine's own process ended of."""


OUTPUTS = (Path("/proc/self/fd/1"), Path("/proc/self/fd/2"))
"""An actor's are files, which the processes that it starts write to as well."""
_TOLD = re.compile(
    r"^\(\w+ pid=\d+\)(?: ERROR \S+ \S+ \[[^\]]*\])? ([\w.]*(?:Error|Exception): .*)$", re.MULTILINE
)
"""The last line of a traceback, logged or printed by one of vLLM's processes."""


def with_root_cause(error: Exception) -> Exception:
    """The error, or where vLLM says only that there was one, what its processes wrote of it.

    On GPUs the engine has a process of its own (VLLM_ENABLE_V1_MULTIPROCESSING), and each part of
    it one more. They tell their reasons in what they log and print alone.
    """
    if "root cause" not in str(error):
        return error
    told = [line for file in OUTPUTS for line in _TOLD.findall(_end(file))]
    causes = [line for line in told if "root cause" not in line]
    return EngineProcessError(causes[-1]) if causes else error


def _end(file: Path) -> str:
    """What was written last; nothing of a terminal, a pipe, or what cannot be read."""
    with suppress(OSError):
        if file.is_file():
            with file.open("rb") as written:
                written.seek(max(0, written.seek(0, os.SEEK_END) - 2**16))
                return written.read().decode(errors="replace")
    return ""
