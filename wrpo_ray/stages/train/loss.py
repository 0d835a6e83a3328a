"""The objectives of preference training as one pure function of log-probs and lengths.

WRPO (arXiv 2412.03187, equations 4 and 5), DPO (arXiv 2305.18290: WRPO with alpha 0), IPO
(arXiv 2310.12036), SimPO (arXiv 2405.14734), each with y_ws and y_wt weighed by alpha, and an
optional SFT term on y_ws. So baselines and WRPO differ in nothing else. B is the number of rows.
Not covered: where the log-probs come from (`logprobs`), how alpha moves (`schedule`),
averaging over rows (`loop`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor


class Answers(NamedTuple):
    """One number for each of the three answers of each row, each (B,).

    Log-probs are in nats, summed over the answer's tokens; lengths are in tokens.
    """

    source_chosen: Tensor  # of y_ws
    target_chosen: Tensor  # of y_wt
    rejected: Tensor  # of y_l


class Settings(Protocol):
    """What of a `WrpoConfig` the loss depends on."""

    @property
    def objective(self) -> str:
        """`wrpo`, `ipo` or `simpo`."""

    @property
    def beta(self) -> float:
        """Scale of the implicit reward."""

    @property
    def label_smoothing(self) -> float:
        """Probability that a preference is the wrong way round."""

    @property
    def margin(self) -> float:
        """SimPO's gamma, the least difference of rewards."""

    @property
    def sft_weight(self) -> float:
        """Weight of the SFT term."""


def rewards(policy: Answers, reference: Answers, lengths: Answers, settings: Settings) -> Answers:
    """The implicit rewards of the three answers, each (B,).

    `wrpo`: beta * (log pi - log pi_ref). `ipo`: the same an answer token. `simpo`: beta * log pi
    an answer token, without a reference.
    """
    rewards = []
    for own, ref, length in zip(policy, reference, lengths, strict=True):
        gain = own if settings.objective == "simpo" else own - ref
        rewards.append(settings.beta * (gain if settings.objective == "wrpo" else gain / length))
    return Answers(*rewards)


def weighted_chosen(reward: Answers, alpha: float) -> Tensor:
    """The reward alpha * r(y_ws) + (1 - alpha) * r(y_wt), (B,), at the ends exactly one of them."""
    if alpha == 0:
        return reward.target_chosen
    if alpha == 1:
        return reward.source_chosen
    return alpha * reward.source_chosen + (1 - alpha) * reward.target_chosen


def preference_loss(
    policy: Answers, reference: Answers, lengths: Answers, settings: Settings, alpha: float
) -> Tensor:
    """The loss of each row, (B,).

    With m = alpha * r(y_ws) + (1 - alpha) * r(y_wt) - r(y_l) and smoothing s:
    `wrpo`: -(1 - s) * log sigmoid(m) - s * log sigmoid(-m), ln 2 where policy and reference agree;
    `simpo`: the same with m - margin; `ipo`: (m / beta - 1 / (2 * beta))^2.
    The SFT term adds sft_weight times the negative log-prob of y_ws an answer token.
    """
    reward = rewards(policy, reference, lengths, settings)
    margin = weighted_chosen(reward, alpha) - reward.rejected
    if settings.objective == "ipo":
        loss = (margin / settings.beta - 1 / (2 * settings.beta)) ** 2
    else:
        loss = _smoothed(margin - _least_margin(settings), settings.label_smoothing)
    if settings.sft_weight:
        loss = loss - settings.sft_weight * policy.source_chosen / lengths.source_chosen
    return loss


def _least_margin(settings: Settings) -> float:
    return settings.margin if settings.objective == "simpo" else 0.0


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    if smoothing == 0:
        return -F.logsigmoid(margin)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def row_metrics(
    policy: Answers, reference: Answers, lengths: Answers, settings: Settings, alpha: float
) -> dict[str, Tensor]:
    """What to watch of each row, all (B,) and without gradient.

    `accuracies` is 1 where the weighted reward lies above the rejected answer's, and
    `margins` is their difference; `*_source` and `*_target` take y_ws or y_wt alone.
    """
    policy = Answers(*(value.detach() for value in policy))
    reward = rewards(policy, reference, lengths, settings)
    weighted = weighted_chosen(reward, alpha)
    own = {f"logps/{name}": value for name, value in policy._asdict().items()}
    own |= {f"lengths/{name}": value for name, value in lengths._asdict().items()}
    own |= {f"rewards/{name}": value for name, value in reward._asdict().items()}
    chosen = {"": weighted, "_source": reward.source_chosen, "_target": reward.target_chosen}
    for suffix, value in chosen.items():
        margin = value - reward.rejected
        own[f"rewards/margins{suffix}"] = margin
        own[f"rewards/accuracies{suffix}"] = (margin > 0).to(margin.dtype)
    return own | {"rewards/weighted": weighted}
