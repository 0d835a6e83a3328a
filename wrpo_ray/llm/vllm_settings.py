"""Settings of vLLM in our actors; variables of the driver's environment override them."""

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wrpo_ray.errors import UserError
from wrpo_ray.storage.folder import HUB_SCHEME, Folder
from wrpo_ray.storage.weight_files import weight_files

CPU_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""On the CPU, compilation and a second process cost more than a small run takes, and pinned threads
of several engines starve each other."""
CPU_ENGINE = {"enforce_eager": True, "enable_chunked_prefill": False}
"""A seeded request with chunked prefill fails on the CPU: its random generator has no offset."""
ENV = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


CPU_SLOTS, GPU_SLOTS = 256, 1024
"""vLLM's own `max_num_seqs` for generation, on a CPU and on a GPU with 70 GB or more."""
LARGE_ON_CPU, LARGE_SLOTS = 100_000_000, 64
"""Bytes of weights from which more answers at once are no faster on a CPU: 64 make 0.97 of the
highest rate of 135M weights. 256 of them exceed the gibibyte for keys and values, so that answers
are computed twice, and the first one is finished with the last."""


PARALLEL_ENGINE = {"max_num_seqs": GPU_SLOTS, "max_num_batched_tokens": 16384}
"""vLLM's own values on such a GPU, for engines of several GPUs: the actor that starts one has none,
so that vLLM would take its values for small ones."""


def slots(engine: dict[str, Any], *, on_gpu: bool, weights: float) -> int:
    """Return how many answers an engine of so many bytes, with these arguments, has at once."""
    return int(engine.get("max_num_seqs") or (GPU_SLOTS if on_gpu else cpu_slots(weights)))


def cpu_slots(weights: float) -> int:
    """Return `max_num_seqs` of an engine on a CPU, by the bytes of its weights."""
    return LARGE_SLOTS if weights > LARGE_ON_CPU else CPU_SLOTS


def weight_bytes(folder: Folder) -> int:
    """Return the bytes of a model's weights; 0 where none are there, or not known of the hub's."""
    if folder.uri.startswith(HUB_SCHEME):
        from wrpo_ray.storage.hub import HubModel  # its client takes a moment to import

        with suppress(UserError):  # a plan may be made where no commit is known
            return HubModel.at(folder.uri).weight_bytes()
        return 0
    sizes = {info.base_name: info.size for info in folder.infos() if info.is_file}
    return sum(sizes[name] for name in weight_files(sizes))


def engine_env(*, on_gpu: bool) -> dict[str, str]:
    """Return the environment variables of an engine's process."""
    own = ENV | ({} if on_gpu else CPU_ENV)
    return {name: os.environ.get(name, value) for name, value in own.items()}


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without garbage collections.

    vLLM's 5,800 modules make no garbage, and looking through them takes a fifth of their import.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class EngineProcessError(RuntimeError):
    """The error that ended the engine's own process."""


OUTPUTS = (Path("/proc/self/fd/1"), Path("/proc/self/fd/2"))
"""An actor's stdout and stderr are files, to which its child processes write too."""
_LAST_LINE = re.compile(
    r"^\(\w+ pid=\d+\)(?: ERROR \S+ \S+ \[[^\]]*\])? ([\w.]*(?:Error|Exception): .*)$", re.MULTILINE
)
"""The last line of a traceback, logged or printed by one of vLLM's processes."""


def with_root_cause(error: Exception) -> Exception:
    """Return the error, or the root cause from the engine's output where vLLM only refers to it.

    On GPUs the engine has a process of its own (VLLM_ENABLE_V1_MULTIPROCESSING), and each part of
    it one more. They report errors only in their logs and output.
    """
    if "root cause" not in str(error):
        return error
    lines = [line for file in OUTPUTS for line in _LAST_LINE.findall(_tail(file))]
    causes = [line for line in lines if "root cause" not in line]
    return EngineProcessError(causes[-1]) if causes else error


def _tail(file: Path) -> str:
    """Return the end of a file; empty for a terminal, a pipe or an unreadable file."""
    with suppress(OSError):
        if file.is_file():
            with file.open("rb") as written:
                written.seek(max(0, written.seek(0, os.SEEK_END) - 2**16))
                return written.read().decode(errors="replace")
    return ""
