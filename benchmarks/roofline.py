"""Rates of models on H100s from their sizes: the roofline of decoding, and the FLOPs of the rest.

A decoding step of b answers makes b tokens. It takes

    max(memory, compute) + communication + overhead,  each in seconds:
    memory        = (2 w(b) + b c k) / (g B e)
    compute       = 2 a b / (g P u)
    communication = 2 l (10 us + 2 (g-1)/g 2 h b / N), for g > 1

with w(b) the weights that a step reads (of a mixture of experts those that b answers touch), a the
active weights, c the tokens of an answer's context, k the bytes of a token's keys and values, g the
GPUs, l the layers, h the width; the constants are below. The cache has room for a number of
answers, which bounds b beside `max_num_seqs`. Prefill adds 2 a FLOPs for each token of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

PEAK = 989e12
"""P: FLOP/s of an H100 SXM in bf16, dense."""
BANDWIDTH = 3.35e12
"""B: bytes/s of its memory (80 GB HBM3)."""
ACHIEVED = 0.6
"""e: share of the bandwidth that decoding kernels reach."""
DECODE_MFU, PREFILL_MFU = 0.5, 0.45
"""u: shares of the peak in large batches."""
FORWARD_MFU = TRAIN_MFU = 0.35
"""Of scoring and reference passes, and of training; with recomputed layers counted as work."""
MEMORY, USABLE, WORKSPACE = 80e9, 0.9, 3e9
"""Bytes of a GPU, the share that an engine takes, and what activations and graphs need of it."""
NVLINK, NETWORK = 300e9, 200e9
"""N: bytes/s that collective calls reach at each GPU, in a node and among nodes whose GPUs have a
network card of 400 Gb/s each: what a node gets is divided among its cards, then goes by NVLink."""
FEED = 4096
"""Tokens that a worker needs for a step: with fewer, some workers wait for longer rows."""
LATENCY = 10e-6
"""Seconds of a collective call."""
OVERHEAD = 8e-3
"""Seconds of a step for scheduling, sampling and text."""
SEQUENCES = 256
"""`max_num_seqs`."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model, from its config.json, and the GPUs of an engine."""

    weights: float
    """All of them; two bytes each."""
    active: float
    """Weights that each token uses."""
    layers: int
    width: int
    kv: float
    """Bytes of keys and values of a token, in all layers."""
    gpus: int
    experts: float = 0.0
    """Weights in routed experts."""
    routed: float = 0.0
    """Share of the experts that a token uses."""
    is_latent: bool = False
    """Whether each GPU holds all keys and values, as with multi-head latent attention."""

    @property
    def bytes(self) -> float:
        """Of the weights in bf16."""
        return 2 * self.weights

    def read(self, answers: int) -> float:
        """Weights that one step of so many answers reads."""
        return self.weights - self.experts * (1 - self.routed) ** answers

    @property
    def cache(self) -> float:
        """Tokens whose keys and values have room."""
        free = self.gpus * (USABLE * MEMORY - WORKSPACE) - self.bytes
        return free / self.kv / (self.gpus if self.is_latent else 1)

    def slots(self, context: float) -> int:
        """Answers at once."""
        return max(1, min(SEQUENCES, int(self.cache / context)))

    def step(self, answers: int, context: float) -> float:
        """Seconds of a decoding step."""
        gpus, width = self.gpus, 2 * self.width * answers
        cached = answers * context * self.kv * (gpus if self.is_latent else 1)
        memory = (2 * self.read(answers) + cached) / (gpus * BANDWIDTH * ACHIEVED)
        compute = 2 * self.active * answers / (gpus * PEAK * DECODE_MFU)
        sums = 2 * self.layers * (LATENCY + 2 * (gpus - 1) / gpus * width / NVLINK)
        return max(memory, compute) + (sums if gpus > 1 else 0.0) + OVERHEAD

    def prefill(self, tokens: float) -> float:
        """Seconds for a prompt."""
        return 2 * self.active * tokens / (self.gpus * PEAK * PREFILL_MFU)

    def steps(self, context: float, prompt: float, output: float) -> list[float]:
        """Seconds of a step by the number of answers, with the prefill of those that enter.

        `prompt` are the tokens that are read for each answer, `output` those of an answer.
        """
        each = self.prefill(prompt) / output
        found = [self.step(b, context) + b * each for b in range(1, self.slots(context) + 1)]
        return [found[0], *found]

    def rate(self, context: float, prompt: float, output: float) -> float:
        """Tokens/s of an engine with all slots busy."""
        steps = self.steps(context, prompt, output)
        return (len(steps) - 1) / steps[-1]

    @property
    def forward_rate(self) -> float:
        """Tokens/s of forward passes of an engine."""
        return self.gpus * PEAK * FORWARD_MFU / (2 * self.active)


def training_step(weights: float, tokens: float, workers: int, node: int = 8) -> float:
    """Seconds of a training step with ZeRO-3 and checkpointing, on full nodes.

    Weights are gathered twice and gradients scattered once (two bytes each), beside the FLOPs: 8
    for each weight and token.
    """
    compute = 8 * weights * tokens / (workers * PEAK * TRAIN_MFU)
    moved = 3 * 2 * weights / (NVLINK if workers <= node else NETWORK)
    return max(compute, moved) + 0.05


MODELS = {
    # 59 layers of 160 routed experts of 3 x 5120 x 1536, 6 of them for a token; 512 + 64 latents
    "deepseek-v2-chat": Model(236e9, 21e9, 60, 5120, 60 * 576 * 2, 8, 222.7e9, 6 / 160, True),
    "deepseek-coder-v2": Model(236e9, 21e9, 60, 5120, 60 * 576 * 2, 8, 222.7e9, 6 / 160, True),
    # layers, width, and layers x 2 x heads of keys x their width x two bytes
    "mistral-large-2407": Model(123e9, 123e9, 88, 12288, 88 * 2 * 8 * 128 * 2, 4),
    "qwen2-72b": Model(72.7e9, 72.7e9, 80, 8192, 80 * 2 * 8 * 128 * 2, 4),
    "llama3-70b": Model(70.6e9, 70.6e9, 80, 8192, 80 * 2 * 8 * 128 * 2, 4),
    "yi-1.5-34b": Model(34.4e9, 34.4e9, 60, 7168, 60 * 2 * 8 * 128 * 2, 2),
    "gemma2-27b": Model(27.2e9, 27.2e9, 46, 4608, 46 * 2 * 16 * 128 * 2, 1),
    "internlm2.5-20b": Model(19.9e9, 19.9e9, 48, 6144, 48 * 2 * 8 * 128 * 2, 1),
    "phi3-medium-14b": Model(14.0e9, 14.0e9, 40, 5120, 40 * 2 * 10 * 128 * 2, 1),
    "gemma2-9b": Model(9.2e9, 9.2e9, 42, 3584, 42 * 2 * 8 * 256 * 2, 1),
    "llama3-8b": Model(8.0e9, 8.0e9, 32, 4096, 32 * 2 * 8 * 128 * 2, 1),
}
MODELS["reward-8b"] = MODELS["sft"] = MODELS["llama3-8b"]
