"""What a training step on GPUs launches, moves and keeps, counted without a GPU.

    python benchmarks/kernels.py          # all counts, and their rows of results.json
    python benchmarks/kernels.py --quick  # the counts alone

The code runs on meta tensors under a mode that sees every ATen operation (`counting`). So these are
counts, not times. Each is compared with transformers' own modules, or with the code in `before`.
"""

from __future__ import annotations

import torch
from before import TokenLogps
from counting import Counts

from wrpo_ray.stages.train.logprobs import token_logps
from wrpo_ray.stages.train.memory import chunk_on

GPU = 80 * 10**9
"""Bytes of the GPU whose chunks the head uses."""


def head_traffic(vocabulary: int, width: int = 4096, tokens: int = 8192) -> tuple[float, float]:
    """Bytes that a token's log-prob and gradients move in bf16: now, and before."""
    found = []
    for logps in (
        lambda h, w, t: token_logps(h, w, None, t, chunk=chunk_on(GPU)),
        TokenLogps.apply,
    ):
        hidden, weight = (
            torch.empty(n, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
            for n in (tokens, vocabulary)
        )
        targets = torch.empty(tokens, dtype=torch.long, device="meta")
        with Counts() as counts:
            logps(hidden, weight, targets).sum().backward()
        found.append(counts.bytes / tokens)
    return found[0], found[1]


if __name__ == "__main__":
    for size in (128_256, 256_000):
        ours, peer = head_traffic(size)
        print(size, ours, peer, ours / peer)
