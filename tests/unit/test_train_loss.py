"""The WRPO loss against numbers worked by hand, against autograd, and against DPO."""

from __future__ import annotations

import math

import pytest
import torch

from wrpo_ray.train.loss import Logps, rewards, row_metrics, wrpo_loss

NAMES = Logps._fields


def logps(*values: list[float], dtype: torch.dtype = torch.float64) -> Logps:
    return Logps(*(torch.tensor(value, dtype=dtype) for value in values))


@pytest.fixture
def drawn() -> tuple[Logps, Logps]:
    torch.manual_seed(0)
    return Logps(*torch.randn(3, 64).mul(20)), Logps(*torch.randn(3, 64).mul(20))


def test_worked_by_hand():
    """One row, beta 0.5, alpha 0.25.

    policy (ws, wt, l) = (-10, -4, -6), reference = (-14, -6, -5)
    r_ws = 0.5 * 4 = 2, r_wt = 0.5 * 2 = 1, r_l = 0.5 * -1 = -0.5
    weighted = 0.25 * 2 + 0.75 * 1 = 1.25; margin = 1.25 + 0.5 = 1.75
    loss = ln(1 + e^-1.75) = ln(1.173773943) = 0.160223
    """
    policy, reference = logps([-10.0], [-4.0], [-6.0]), logps([-14.0], [-6.0], [-5.0])
    loss = wrpo_loss(policy, reference, alpha=0.25, beta=0.5)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.75)), abs=1e-12)
    assert loss.item() == pytest.approx(0.160223, abs=1e-5)
    metrics = row_metrics(policy, reference, alpha=0.25, beta=0.5)
    assert [metrics[f"rewards/{n}"].item() for n in NAMES] == [2.0, 1.0, -0.5]
    assert metrics["rewards/weighted"].item() == 1.25
    assert metrics["rewards/margins"].item() == 1.75
    assert metrics["rewards/margins_source"].item() == 2.5
    assert metrics["rewards/margins_target"].item() == 1.5
    assert metrics["logps/rejected"].item() == -6.0


def test_metrics_are_per_row():
    """Two rows whose answers differ: each is compared with its own rejected answer alone."""
    policy = logps([1.0, -3.0], [2.0, -1.0], [0.0, 0.0])
    reference = logps([0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    metrics = row_metrics(policy, reference, alpha=0.5, beta=1.0)
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0]
    assert metrics["rewards/margins"].tolist() == [1.5, -2.0]
    assert all(value.shape == (2,) for value in metrics.values())


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_gradient_by_hand(alpha):
    """d loss / d log pi = -beta * sigmoid(-margin) * (alpha, 1 - alpha, -1)."""
    torch.manual_seed(1)
    policy = Logps(*torch.randn(3, 8, dtype=torch.float64, requires_grad=True).unbind(0))
    for value in policy:
        value.retain_grad()
    reference, beta = Logps(*torch.randn(3, 8, dtype=torch.float64)), 0.7
    wrpo_loss(policy, reference, alpha=alpha, beta=beta).sum().backward()
    reward = rewards(Logps(*(v.detach() for v in policy)), reference, beta=beta)
    weighted = alpha * reward.source_chosen + (1 - alpha) * reward.target_chosen
    slope = -beta * torch.sigmoid(reward.rejected - weighted)
    for value, weight in zip(policy, (alpha, 1 - alpha, -1.0), strict=True):
        got = torch.zeros_like(slope) if value.grad is None else value.grad
        torch.testing.assert_close(got, slope * weight, rtol=1e-12, atol=1e-14)


def test_gradcheck():
    torch.manual_seed(2)
    values = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(6)]

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return wrpo_loss(Logps(*inputs[:3]), Logps(*inputs[3:]), alpha=0.3, beta=0.9)

    assert torch.autograd.gradcheck(loss, values)


def dpo(chosen, rejected, reference_chosen, reference_rejected, beta):
    """DPO (Rafailov et al. 2023, equation 7), written on its own."""
    difference = beta * (chosen - reference_chosen) - beta * (rejected - reference_rejected)
    return -torch.nn.functional.logsigmoid(difference)


@pytest.mark.parametrize(("alpha", "chosen"), [(0.0, "target_chosen"), (1.0, "source_chosen")])
def test_ends_of_alpha_are_dpo_exactly(drawn, alpha, chosen):
    policy, reference = drawn
    own, ref = getattr(policy, chosen), getattr(reference, chosen)
    expected = dpo(own, policy.rejected, ref, reference.rejected, 0.1)
    assert torch.equal(wrpo_loss(policy, reference, alpha=alpha, beta=0.1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_models_give_ln_2(dtype):
    policy = logps([-300.0, -1.0], [-50.0, -2.0], [-80.0, -3.0], dtype=dtype)
    loss = wrpo_loss(policy, policy, alpha=0.1, beta=0.01)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=4e-3, atol=0)


def test_large_margins_stay_finite():
    policy = logps([1e4, -1e4], [1e4, -1e4], [-1e4, 1e4], dtype=torch.float32)
    zero = logps([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], dtype=torch.float32)
    assert wrpo_loss(policy, zero, alpha=0.5, beta=1.0).tolist() == [0.0, 2e4]
