"""What a step on a GPU moves, keeps and launches, counted on meta tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))

import kernels
from counting import Counts


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
    assert launches <= 51
    before, many = kernels.per_layer(ours=False)
    assert before > 49
    assert many > 115
