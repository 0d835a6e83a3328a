"""What a step on a GPU moves, keeps and launches, counted on meta tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))

import kernels
from counting import Counts
from lowering import gpu_kernels

from wrpo_ray.stages.train import layers


def test_traffic_and_launches_by_hand():
    """y = a @ b (2 x 3, 3 x 4) and y + 1 in place, in fp32; views are free."""
    a, b = torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")
    with Counts() as counts:
        y = a @ b
        y.add_(1)
        seen = y.view(8).view(4, 2)
    assert counts.launches == 2
    assert counts.bytes == 4 * ((6 + 12 + 8) + (8 + 8))
    assert counts.kept == 4 * 8
    del y, seen
    assert counts.kept == 0


@pytest.mark.parametrize("vocabulary", [128_256, 256_000])
def test_the_head_moves_a_fifth_of_what_it_did(vocabulary):
    ours, before = kernels.head_traffic(vocabulary, width=4096, tokens=4096)
    assert ours <= 0.2 * before


def test_a_layer_keeps_and_launches_half():
    """Bytes by hand: two norms' inputs 4, q, k, v 2 + 2 x 1.75 x 0.5, output 2, MLP 14.

    In bf16 with inner 3.5 x width, a quarter of keys, 1.75 keys a token; the rest are a few numbers
    for each token.
    """
    kept, launches = kernels.per_layer(ours=True)
    assert 4 + 2 + 1.75 + 2 + 14 <= kept <= 24
    assert launches <= 40
    before, many = kernels.per_layer(ours=False)
    assert before > 49
    assert many > 115


def compiled_arguments() -> dict[str, tuple]:
    """Of each compiled function, in the shapes of Llama-3 8B: 2,048 tokens."""

    def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    hidden, gain, scale = of(1, 2048, 4096), of(4096), of(1, 2048, 1, dtype=torch.float32)
    inner, both = of(2048, 14336), of(2048, 2 * 14336)
    query, key = (of(1, 2048, heads, 128).transpose(1, 2) for heads in (32, 8))
    angle = of(1, 1, 2048, 128)
    return {
        "_norm": (hidden, gain, 1e-5, "narrow"),
        "_norm_again": (hidden, scale, gain, "narrow"),
        "_norm_backward": (hidden, hidden, scale, gain, "narrow", True),
        "_product": (inner, inner, "silu"),
        "_product_backward": (inner, inner, inner, "silu"),
        "_product_and_slopes": (inner, both, "silu"),
        "_turn": (query, key, angle, angle),
        "_turn_back": (query, key, angle, angle),
    }


def test_compiled_functions_count_as_the_kernels_that_torch_writes_for_a_gpu():
    given, found = compiled_arguments(), {}
    for name, arguments in given.items():
        function = getattr(layers, name).__wrapped__
        found[name] = gpu_kernels(function, *arguments, options=layers.OPTIONS)
    assert found == kernels.FUSED


def test_kernels_of_several_sizes_are_as_many_without_our_options():
    """Queries and keys have different numbers of heads; a long sort is a library's."""
    assert gpu_kernels(layers._turn.__wrapped__, *compiled_arguments()["_turn"]) == 2
    assert gpu_kernels(lambda x: x.sort()[0] + 1, torch.empty(2**20)) == 2
