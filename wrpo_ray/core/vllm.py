"""Settings of a vLLM that runs in this process."""

from __future__ import annotations

CPU_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""On the CPU, compiling costs more than small runs take, and bound threads starve each other."""
CPU_ENGINE = {"enforce_eager": True, "enable_chunked_prefill": False}
"""A seeded request whose prefill is split fails on the CPU: its generator has no offset."""
ENV = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
