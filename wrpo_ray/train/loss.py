"""The WRPO objective (arXiv 2412.03187, equations 4 and 5), as pure functions of log-probs.

B is the number of rows. Not covered: where the log-probs come from (`logprobs`), how alpha
moves (`schedule`), averaging over rows (`loop`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor


class Logps(NamedTuple):
    """Summed log-probs in nats of the three answers of each row, each (B,)."""

    source_chosen: Tensor  # log pi(y_ws | x)
    target_chosen: Tensor  # log pi(y_wt | x)
    rejected: Tensor  # log pi(y_l | x)


def rewards(policy: Logps, reference: Logps, *, beta: float) -> Logps:
    """The implicit rewards r = beta * (log pi - log pi_ref) of the three answers, each (B,)."""
    return Logps(*(beta * (own - ref) for own, ref in zip(policy, reference, strict=True)))


def weighted_chosen(reward: Logps, alpha: float) -> Tensor:
    """The reward alpha * r(y_ws) + (1 - alpha) * r(y_wt), (B,), at the ends exactly one of them."""
    if alpha == 0:
        return reward.target_chosen
    if alpha == 1:
        return reward.source_chosen
    return alpha * reward.source_chosen + (1 - alpha) * reward.target_chosen


def wrpo_loss(policy: Logps, reference: Logps, *, alpha: float, beta: float) -> Tensor:
    """-log sigmoid(alpha * r(y_ws) + (1 - alpha) * r(y_wt) - r(y_l)) of each row, (B,).

    alpha = 0 is DPO on (y_wt, y_l), alpha = 1 is DPO on (y_ws, y_l). With a policy equal to the
    reference it is ln 2.
    """
    reward = rewards(policy, reference, beta=beta)
    return -F.logsigmoid(weighted_chosen(reward, alpha) - reward.rejected)


def row_metrics(policy: Logps, reference: Logps, *, alpha: float, beta: float) -> dict[str, Tensor]:
    """What to watch of each row, all (B,) and without gradient.

    `accuracies` is 1 where the weighted reward lies above the rejected answer's, and
    `margins` is their difference; `*_source` and `*_target` take y_ws or y_wt alone.
    """
    policy = Logps(*(value.detach() for value in policy))
    reward = rewards(policy, reference, beta=beta)
    weighted = weighted_chosen(reward, alpha)
    own = {f"logps/{name}": value for name, value in policy._asdict().items()}
    own |= {f"rewards/{name}": value for name, value in reward._asdict().items()}
    chosen = {"": weighted, "_source": reward.source_chosen, "_target": reward.target_chosen}
    for suffix, value in chosen.items():
        margin = value - reward.rejected
        own[f"rewards/margins{suffix}"] = margin
        own[f"rewards/accuracies{suffix}"] = (margin > 0).to(margin.dtype)
    return own | {"rewards/weighted": weighted}
