"""Throughput of a model that was not measured: guesses by its size, within a factor of two.

On GPUs: generation at 15 % of peak (a 67B model made 8,700 tokens/s on 8 GPUs of 990 TFLOP/s in
arXiv 2405.04434, section 3.2.3), forward passes and training at 35 %. On a CPU: what one core did
with SmolLM2-135M (vLLM in bf16 50 to 75 output tokens/s, training in fp32 80 tokens/s), and the
8,000 to 12,000 output tokens/s of models of 0.4M weights, where Python takes most of the time.
Other CPUs differ from that one by more than a factor of two. These are rates of full engines; a
step of an engine takes a time of its own, so n answers at once make n / (n + half) of them.
"""

import re
from dataclasses import dataclass
from typing import Any

from wrpo_ray.storage.folder import Folder

DECODE, FORWARD = 0.15, 0.35
"""Shares of a GPU's peak."""
CORE_DECODE, CORE_FORWARD = 17e9, 65e9
"""Achieved FLOP/s of a CPU core."""
MOST = 10_000.0
"""Upper bound of tokens/s of an engine on a CPU."""
STREAM = 40.0
"""Tokens/s of one call of an endpoint."""
UNKNOWN = 8e9
"""Parameters assumed for a model whose size is unknown."""
START, START_PER_WEIGHT = 60.0, 3e-9
"""Seconds until an engine is up, and for loading each weight (two bytes at 0.7 GB/s)."""
CPU_START, CPU_LOAD, CPU_TASK = 20.0, 8.0, 4.0
"""Seconds on a CPU until an engine or training is up, until a model is loaded without an engine,
and of a task without a model: Ray starts a process, which imports."""
FULL, HALF = 256, 64
"""Answers at once of a full engine, and those that make half of the highest rate on a GPU, as in
`benchmarks/simulation.py`."""
BYTES = 2
"""Of a weight in an engine."""
CPU_STEP, CPU_WEIGHT = 0.01, 2e-10
"""Seconds of an engine's step on a CPU, and for reading each weight (two bytes at 10 GB/s)."""


def parameters(folder: Folder, name: str) -> float:
    """Parameters that each token uses: by config.json, `72B` or `135M` in a name, or `UNKNOWN`."""
    if folder.exists("config.json"):
        return weights(folder.read_json("config.json"))
    for text in (folder.uri.rsplit("/", 1)[-1], name):
        if found := re.search(r"(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z])", text):
            return float(found[1]) * (1e9 if found[2] in "bB" else 1e6)
    return UNKNOWN


def weights(config: dict[str, Any]) -> float:
    """Parameters that each token uses, by a Hugging Face config.

    Attention, gated MLPs (of a mixture of experts the active ones), and the output head.
    """
    config = config.get("text_config") or config
    width, layers = config.get("hidden_size", 4096), config.get("num_hidden_layers", 32)
    heads = config.get("num_attention_heads", 32)
    head = config.get("head_dim") or width / heads
    attention = 2 * width * head * (heads + (config.get("num_key_value_heads") or heads))
    dense = config.get("intermediate_size", 4 * width)
    inner = config.get("moe_intermediate_size", dense)
    experts = config.get("num_experts_per_tok") or 1
    shared = config.get("n_shared_experts") or 0
    mlp = 3 * width * (dense if experts == 1 else inner * (experts + shared))
    return float(layers * (attention + mlp) + width * config.get("vocab_size", 32000))


@dataclass(frozen=True)
class Power:
    """Compute resources of an actor or worker."""

    gpus: float
    cpus: float
    gpu_tflops: float

    def decode_rate(self, size: float) -> float:
        """Output tokens/s of a full engine: two operations a weight."""
        rate = self._flops(DECODE, CORE_DECODE) / (2 * size)
        return rate if self.gpus else min(rate, MOST)

    def answer_seconds(self, size: float, prompt: float, output: float, at_once: float) -> float:
        """Seconds in which an engine reads `prompt` tokens and writes `output`.

        Args:
            size: parameters that each token uses.
            prompt: tokens of all prompts; on GPUs reading them is part of the rate.
            output: tokens of all answers.
            at_once: answers that the engine works on at the same time.
        """
        full = self.decode_rate(size)
        half = HALF if self.gpus else (CPU_STEP + CPU_WEIGHT * size) * full
        share = min(1.0, max(at_once, 1) / (max(at_once, 1) + half) * (1 + half / FULL))
        reading = 0.0 if self.gpus else prompt / self.forward_rate(size)
        return reading + output / (full * share)

    def forward_rate(self, size: float) -> float:
        """Tokens/s of a forward pass."""
        return self._flops(FORWARD, CORE_FORWARD) / (2 * size)

    def training_rate(self, size: float, *, checkpointing: bool) -> float:
        """Tokens/s of forward and backward passes; checkpointing repeats the forward."""
        rate = self._flops(FORWARD, CORE_FORWARD) / ((8 if checkpointing else 6) * size)
        return rate if self.gpus else min(rate, MOST / 3)

    def _flops(self, share: float, core: float) -> float:
        """Achieved FLOP/s."""
        if self.gpus:
            return share * self.gpus * self.gpu_tflops * 1e12
        return max(self.cpus, 1) * core


def startup(size: float, gpus: float) -> float:
    """Seconds until an engine answers."""
    return START + START_PER_WEIGHT * size if gpus else CPU_START
