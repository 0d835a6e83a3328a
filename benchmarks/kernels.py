"""What a training step on GPUs launches, moves and keeps, counted without a GPU.

    python benchmarks/kernels.py                 # all, and their rows of results.json
    python benchmarks/kernels.py --output FOLDER

The code runs on meta tensors under a mode that sees every ATen operation (`counting`). So these are
counts, not times. Each is compared with transformers' own modules, or with the code in `before`.
Only the optimizer's step is measured, in turn with the one before it, on one CPU thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import results
import torch
from before import TokenLogps, by_varlen
from counting import Counts

from wrpo_ray.llm import attention
from wrpo_ray.stages.train import layers
from wrpo_ray.stages.train.logprobs import token_logps
from wrpo_ray.stages.train.memory import chunk_on
from wrpo_ray.stages.train.packing import Batch, pack
from wrpo_ray.stages.train.recompute import recomputing
from wrpo_ray.stages.train.rows import Row
from wrpo_ray.stages.train.slimming import slim

GPU = 80 * 10**9
"""Bytes of the GPU whose chunks the head uses."""
WIDTH, HEAD = 1024, 128
"""Width of the layer, and of its heads; the other sizes have Llama-3 8B's ratios to it."""
FUSED = dict.fromkeys(("_norm", "_norm_again", "_product", "_product_backward"), 1)
FUSED |= {"_product_and_slopes": 1, "_turn": 1, "_turn_back": 1, "_norm_backward": 3}
"""Kernels of each compiled function of `layers`, as `lowering` finds; the sum over tokens that is
the gradient of a norm's weight takes two more."""


# --- the head -----------------------------------------------------------------------------------


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


# --- a layer ------------------------------------------------------------------------------------


def per_layer(*, ours: bool) -> tuple[float, int]:
    """Of a layer in bf16: bytes kept / (tokens x width), and launches forward and backward.

    The difference of models with two layers and with one, packed rows, the varlen kernel.
    """
    batch = pack([Row("r", _ids(512), (_ids(512), _ids(512), _ids(512)))])
    _through(1, batch, ours=ours)  # the layout's indices
    (kept, launches), (less, fewer) = (_through(n, batch, ours=ours) for n in (2, 1))
    return (kept - less) / (batch.size * WIDTH), launches - fewer


def _ids(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def _through(layer_count: int, batch: Batch, *, ours: bool) -> tuple[int, int]:
    """Bytes kept after the forward pass, and launches of both passes."""
    model, counts = _model(layer_count), Counts()
    if ours:
        slim(model)
    shape = (1, batch.size, WIDTH)
    hidden = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    before = mock.patch.object(attention, "by_varlen", by_varlen)
    with _compiled(counts) if ours else before, counts:
        with recomputing() if ours else nullcontext():
            out = model(
                inputs_embeds=hidden,
                position_ids=batch.positions.to("meta"),
                use_cache=False,
                layout=batch.layout,
            ).last_hidden_state
        kept = counts.kept
        out.backward(torch.empty_like(out))
    return kept, counts.launches


def _model(layer_count: int) -> Any:
    from transformers import LlamaConfig, LlamaModel

    attention.register()
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 7 // 2,
        num_hidden_layers=layer_count,
        num_attention_heads=WIDTH // HEAD,
        num_key_value_heads=WIDTH // HEAD // 4,
        vocab_size=8,
    )
    with torch.device("meta"):
        return LlamaModel._from_config(
            config, attn_implementation=attention.SHARED_PROMPT, dtype=torch.bfloat16
        )


@contextmanager
def _compiled(counts: Counts) -> Iterator[None]:
    """A context in which compiled functions count as their kernels."""
    own = {name: counts.as_one(getattr(layers, name), n) for name, n in FUSED.items()}
    with mock.patch.multiple(layers, **own):
        yield


# --- the optimizer ------------------------------------------------------------------------------


def adam_seconds(weights: int = 20_000_000, repeats: int = 7) -> tuple[float, float]:
    """CPU seconds of AdamW's step on a CPU, as with `offload`: fused, and not; medians, in turn."""
    torch.set_num_threads(1)
    found: dict[bool, list[float]] = {True: [], False: []}
    optimizers = {}
    for fused in found:
        parameter = torch.nn.Parameter(torch.ones(weights))
        parameter.grad = torch.ones_like(parameter)
        optimizers[fused] = torch.optim.AdamW([parameter], fused=fused or None)
        optimizers[fused].step()
    for _ in range(repeats):
        for fused, times in found.items():
            started = time.process_time()
            optimizers[fused].step()
            times.append(time.process_time() - started)
    return statistics.median(found[True]), statistics.median(found[False])


# --- the command line ---------------------------------------------------------------------------


SECTION = """# Training on GPUs: what a step launches, moves and keeps

Counted by `kernels.py` on meta tensors, which have shapes and no data, so without a GPU. These
are no times.

| | now | before | |
| --- | --- | --- | --- |
{lines}

- Launches: ATen operations of a Llama layer and micro-batch in bf16, forward and backward, that
  are neither views nor allocations; the difference of models with two layers and with one. 12 of
  them are matrix products, where queries, keys and values are one, and gate and up. With
  adapters or ZeRO-3 they are apart: 21, and 51 launches. Some have more than one kernel (the
  gradient of attention). What torch compiles on GPUs counts as the kernels that its compiler
  writes for an H100 (`lowering.py`): one each, and three for the gradient of a norm, whose sum
  over tokens takes two more. If Triton or a C compiler is missing, nothing is compiled, and
  launches are about as many as before.
- Kept: bytes of all storages that operations of the forward pass made and that still exist after
  it, a layer, divided by tokens x width (sizes in Llama-3 8B's ratios, 1.75 keys for each token,
  no checkpointing).
- Head: bytes of the inputs and outputs of all operations, forward and backward, each counted
  once, a token, for a width of 4,096 in bf16, and 8,192 tokens.
- Before: transformers' own modules, advanced indexing, and chunks of 2^24 logits (`before.py`).
- Adam: torch's AdamW on a CPU, as with `offload: optimizer`, one thread, medians of steps in
  turn; this one is measured.
"""
NAMES = {
    "train.head_traffic_vs_before": "head, vocabulary 128,256: bytes/token",
    "train.head_traffic_vs_before.v256k": "head, vocabulary 256,000: bytes/token",
    "train.bytes_kept_per_token_width": "kept: bytes/(token x width)",
    "train.launches_per_layer": "launches/layer",
    "train.offload_adam": "AdamW on a CPU: s/20M weights",
}


def rows() -> list[results.Row]:
    """All rows of results.json."""
    (kept, launches), (more, many) = per_layer(ours=True), per_layer(ours=False)
    figures = [
        head_traffic(128_256),
        head_traffic(256_000),
        (kept, more),
        (launches, many),
        adam_seconds(),
    ]
    about = {
        "machine": results.machine(),
        "versions": results.versions("torch", "transformers", "wrpo-ray"),
    }
    return [
        results.row(name, *pair, title.partition(": ")[2] or "launches", about)
        for (name, title), pair in zip(NAMES.items(), figures, strict=True)
    ]


def main() -> None:
    """Write the rows and their section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    found = rows()
    lines = [
        f"| {NAMES[r['name']]} | {r['ours']:.4g} | {r['peer']:.4g} | {r['ours'] / r['peer']:.3f} |"
        for r in found
    ]
    print("\n".join(lines))
    results.save(options.output, tuple(NAMES), found, SECTION.format(lines="\n".join(lines)))


if __name__ == "__main__":
    main()
