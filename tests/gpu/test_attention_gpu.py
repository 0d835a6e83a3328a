"""The packed path on a GPU: SDPA block by block in fp32, the varlen kernel in bf16.

Skipped without a GPU; `tests/unit/stages/train/test_train_packing.py` shows the same on the CPU,
and what the varlen kernel is given.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "stages" / "train"))

from test_train_packing import KINDS, make, plain_logps, relative, some_rows

from wrpo_ray.llm import attention
from wrpo_ray.stages.train.model import Policy
from wrpo_ray.stages.train.packing import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def gradients(model: torch.nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    logps.mean().backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_plain(kind, dtype, tolerance):
    """Against the model's own forward pass in the same precision, an answer at a time."""
    rows, device = some_rows(seed=3), torch.device("cuda")
    torch.set_default_device(device)
    try:
        reference = make(kind, "eager", dtype)
        want = plain_logps(reference, rows)
        model = make(kind, attention.SHARED_PROMPT, dtype)
        got = Policy(model)(pack(rows).to(device))
    finally:
        torch.set_default_device("cpu")
    assert relative(got.double(), want.double()) < tolerance
    wanted, found = gradients(reference, want), gradients(model, got)
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < 10 * tolerance, name
