"""Training on a GPU: Ray Train, DeepSpeed, NCCL, the varlen kernel in bf16.

Skipped without a GPU. What it has to agree with is `tests/ray/test_train.py`'s plain loop.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ray"))

from test_train import WRPO, assert_close, losses, metrics, plain, root, train, weights

from wrpo_ray.config import LoraConfig, ReferenceConfig

__all__ = ["root"]  # a fixture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = WRPO.model_copy(update={"num_gpus": 1, "workers": 1})
BF16 = {"precision": "bf16"}
CASES = {
    "fp32": {},
    "bf16": BF16,
    "bf16-stage1-checkpointing": BF16 | {"zero_stage": 1, "gradient_checkpointing": True},
    "bf16-offload": BF16 | {"offload": "optimizer"},
    "bf16-lora-live": BF16 | {
        "lora": LoraConfig(rank=4, alpha=8),
        "reference": ReferenceConfig(mode="live"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_a_plain_loop(local_ray, root, name):
    """fp32 closely; bf16 (with fp32 masters) as far as its log-probs go."""
    config = GPU.model_copy(update=CASES[name])
    step = train(root, f"gpu-{name}", config)
    found, lines = losses(root, step), metrics(root, step)
    assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-4 if name == "fp32" else 0.05)
    assert all(line["peak_memory_gb"] > 0 for line in lines)
    if config.lora:
        assert found[-1] < found[0] + 0.05
        return
    expected, expected_losses, _ = plain(root, config)
    assert found == pytest.approx(expected_losses, abs=1e-3 if name == "fp32" else 0.05)
    if name == "fp32":
        assert_close(weights(root, step), expected)
