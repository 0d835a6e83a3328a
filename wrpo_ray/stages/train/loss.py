"""The preference losses, as pure functions of log-probs and lengths.

One row is a preference: y_ws (the best answer of the source models), y_wt (the best answer of the
target) and y_l (the rejected answer). With the implicit reward r of an answer and
m = alpha * r(y_ws) + (1 - alpha) * r(y_wt) - r(y_l), an objective says what r is and what a row
costs at m:

- `Wrpo` (arXiv 2412.03187, equations 4 and 5); with alpha 0 it is DPO (arXiv 2305.18290)
- `Ipo` (arXiv 2310.12036)
- `Simpo` (arXiv 2405.14734)

B is the number of rows. Not covered: the log-probs (`logprobs`), the schedule of alpha
(`order`), SFT and the sum over a batch (`objectives`).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor


class Answers(NamedTuple):
    """One number for each of the three answers of each row, each (B,).

    Log-probs are in nats, summed over the answer's tokens; lengths are in tokens.

    Example:
        >>> from torch import tensor
        >>> Answers.of(tensor([-8.0, -3.0, -4.0])).rejected
        tensor([-4.])
    """

    source_chosen: Tensor  # of y_ws
    target_chosen: Tensor  # of y_wt
    rejected: Tensor  # of y_l

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Values (3 * B,), row by row, as the three columns (B,)."""
        return cls(*values.reshape(-1, 3).unbind(1))


class PreferenceObjective(Protocol):
    """The reward of an answer, and the loss of a row by its margin m."""

    @property
    def sft_weight(self) -> float:
        """Weight of the SFT term: the negative log-prob of y_ws per answer token."""

    def reward(self, policy: Tensor, reference: Tensor, length: Tensor) -> Tensor:
        """The implicit rewards (B,) of answers with log-probs (B,) and lengths (B,)."""

    def loss_at(self, margin: Tensor) -> Tensor:
        """The losses (B,) of rows with margins m (B,)."""


@dataclass(frozen=True, slots=True)
class Wrpo:
    """r = beta * log(pi / pi_ref); the loss is -log sigmoid(m).

    Example:
        >>> from torch import tensor
        >>> Wrpo(beta=0.5).reward(tensor([-4.0]), tensor([-6.0]), tensor([2]))
        tensor([1.])
    """

    beta: float = 0.01
    """Scale of the implicit reward; 0.01 is the paper's."""
    label_smoothing: float = 0.0
    """Probability s that a preference is the wrong way round, which makes the loss
    -(1 - s) * log sigmoid(m) - s * log sigmoid(-m)."""
    sft_weight: float = 0.0
    """Weight of the SFT term."""

    def reward(self, policy: Tensor, reference: Tensor, length: Tensor) -> Tensor:
        """The rewards (B,); `length` does not matter."""
        return self.beta * (policy - reference)

    def loss_at(self, margin: Tensor) -> Tensor:
        """The losses (B,)."""
        return _log_sigmoid_loss(margin, self.label_smoothing)


@dataclass(frozen=True, slots=True)
class Ipo:
    """r = beta * log(pi / pi_ref) / length; the loss is (m / beta - 1 / (2 * beta))^2.

    Example:
        >>> from torch import tensor
        >>> Ipo(beta=0.5).reward(tensor([-4.0]), tensor([-6.0]), tensor([2]))
        tensor([0.5000])
    """

    beta: float
    """Strength of the regularization towards the reference."""
    sft_weight: float = 0.0
    """Weight of the SFT term."""

    def reward(self, policy: Tensor, reference: Tensor, length: Tensor) -> Tensor:
        """The rewards (B,) per answer token."""
        return self.beta * ((policy - reference) / length)

    def loss_at(self, margin: Tensor) -> Tensor:
        """The losses (B,)."""
        return (margin / self.beta - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True, slots=True)
class Simpo:
    """r = beta * log(pi) / length; the loss is -log sigmoid(m - margin).

    Example:
        >>> from torch import tensor
        >>> Simpo(beta=2.0).reward(tensor([-4.0]), tensor([-6.0]), tensor([2]))
        tensor([-4.])
    """

    beta: float
    """Scale of the reward."""
    margin: float = 0.0
    """SimPO's gamma: by how much the chosen reward should exceed the rejected one."""
    label_smoothing: float = 0.0
    """Probability that a preference is the wrong way round, as for `Wrpo`."""
    sft_weight: float = 0.0
    """Weight of the SFT term."""

    def reward(self, policy: Tensor, reference: Tensor, length: Tensor) -> Tensor:
        """The rewards (B,) per answer token; `reference` does not matter."""
        return self.beta * (policy / length)

    def loss_at(self, margin: Tensor) -> Tensor:
        """The losses (B,)."""
        return _log_sigmoid_loss(margin - self.margin, self.label_smoothing)


def _log_sigmoid_loss(margin: Tensor, smoothing: float) -> Tensor:
    if smoothing == 0:
        return -F.logsigmoid(margin)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def rewards(
    policy: Answers, reference: Answers, lengths: Answers, objective: PreferenceObjective
) -> Answers:
    """The implicit rewards of the three answers, each (B,)."""
    return Answers(*map(objective.reward, policy, reference, lengths))


def weighted_chosen(reward: Answers, alpha: float) -> Tensor:
    """The reward alpha * r(y_ws) + (1 - alpha) * r(y_wt), (B,), at the ends exactly one of them."""
    if alpha == 0:
        return reward.target_chosen
    if alpha == 1:
        return reward.source_chosen
    return alpha * reward.source_chosen + (1 - alpha) * reward.target_chosen


def preference_loss(
    policy: Answers,
    reference: Answers,
    lengths: Answers,
    objective: PreferenceObjective,
    alpha: float,
) -> Tensor:
    """The loss of each row, (B,), in the precision of the log-probs.

    The paper's equation 5, with r = beta * log(pi / pi_ref):
    -log sigmoid(alpha * r(y_ws) + (1 - alpha) * r(y_wt) - r(y_l)). It is ln 2 where policy and
    reference agree. An SFT term adds sft_weight * -log pi(y_ws) / length(y_ws).

    Args:
        policy: log-probs of the three answers under the trained model, each (B,).
        reference: the same under the reference model; `Simpo` ignores it.
        lengths: answer tokens; `Wrpo` without an SFT term ignores them.
        objective: `Wrpo`, `Ipo` or `Simpo`.
        alpha: weight of y_ws against y_wt, in [0, 1].

    Example, one row with beta 0.5 and alpha 0.25:
    r(y_ws) = 0.5 * (-10 + 14) = 2, r(y_wt) = 0.5 * (-4 + 6) = 1, r(y_l) = 0.5 * (-6 + 5) = -0.5;
    m = 0.25 * 2 + 0.75 * 1 + 0.5 = 1.75; the loss is ln(1 + e^-1.75) = 0.1602.

        >>> from torch import tensor
        >>> policy = Answers(tensor([-10.0]), tensor([-4.0]), tensor([-6.0]))
        >>> reference = Answers(tensor([-14.0]), tensor([-6.0]), tensor([-5.0]))
        >>> lengths = Answers(tensor([8]), tensor([2]), tensor([1]))
        >>> preference_loss(policy, reference, lengths, Wrpo(beta=0.5), alpha=0.25)
        tensor([0.1602])
    """
    reward = rewards(policy, reference, lengths, objective)
    loss = objective.loss_at(weighted_chosen(reward, alpha) - reward.rejected)
    if objective.sft_weight:
        loss = loss - objective.sft_weight * policy.source_chosen / lengths.source_chosen
    return loss


def row_metrics(
    policy: Answers,
    reference: Answers,
    lengths: Answers,
    objective: PreferenceObjective,
    alpha: float,
) -> dict[str, Tensor]:
    """Metrics of each row, all (B,) and without gradient.

    `accuracies` is 1 where the weighted reward lies above the rejected answer's, and
    `margins` is their difference; `*_source` and `*_target` take y_ws or y_wt alone.

    Example:
        >>> from torch import tensor
        >>> policy = Answers.of(tensor([-10.0, -4.0, -6.0]))
        >>> reference = Answers.of(tensor([-14.0, -6.0, -5.0]))
        >>> lengths = Answers.of(tensor([8, 2, 1]))
        >>> row_metrics(policy, reference, lengths, Wrpo(beta=0.5), alpha=0.25)["rewards/margins"]
        tensor([1.7500])
    """
    policy = Answers(*(value.detach() for value in policy))
    reward = rewards(policy, reference, lengths, objective)
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
