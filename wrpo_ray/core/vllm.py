"""Settings of the vLLM in our actors; what the driver's environment says goes before them."""

from __future__ import annotations

import os

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
