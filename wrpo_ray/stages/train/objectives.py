"""Which loss, divisor and answers an objective uses; a new objective is registered here.

The training loop knows no objective by name: it asks one for the loss of each row, for the number
that a step's sum is divided by, and for the names of a row's answers. To add a preference loss,
write its class in `loss` and name it in `preference_objective` and in `WrpoConfig.objective`.

B rows, R answers (responses) of a row.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
from torch import Tensor

from wrpo_ray.config import AlphaConfig, TrainConfig, WrpoConfig
from wrpo_ray.stages.train.loss import (
    Answers,
    Ipo,
    PreferenceObjective,
    Simpo,
    Wrpo,
    preference_loss,
    row_metrics,
)
from wrpo_ray.stages.train.order import alpha_at

Losses = tuple[Tensor, dict[str, Tensor]]
"""The loss of each row (B,), and metrics of each row, each (B,)."""


class Objective(Protocol):
    """The function that training minimizes: the sum of its rows' losses over `divisor`."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Names of the R answers of a row, in the order of their log-probs."""

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients that change from step to step, by their names in the metrics."""

    def at(self, progress: float) -> Self:
        """The objective at a share of the way from the first step (0) to the last (1)."""

    def divisor(self, lengths: np.ndarray) -> int:
        """The number to divide the summed losses of rows by, from their tokens (B, 1 + R)."""

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Losses:
        """Losses and metrics from log-probs and lengths of all answers, row by row, (B * R,)."""


@dataclass(frozen=True)
class Sft:
    """Cross-entropy of y_ws: the mean over the answer tokens of a step."""

    answers: tuple[str, ...] = TrainConfig.answers

    @property
    def coefficients(self) -> dict[str, float]:
        """None change."""
        return {}

    def at(self, progress: float) -> Self:
        """The same at every step."""
        return self

    def divisor(self, lengths: np.ndarray) -> int:
        """Answer tokens."""
        return max(1, int(lengths[:, 1].sum()))

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Losses:
        """The negative log-prob of each answer, summed over its tokens; `reference` is ignored."""
        return -policy, {"logps/source_chosen": policy, "lengths/source_chosen": lengths}


@dataclass(frozen=True)
class Preference:
    """A preference loss at an alpha: the mean over the rows of a step."""

    loss: PreferenceObjective
    schedule: AlphaConfig
    alpha: float
    answers: tuple[str, ...] = WrpoConfig.answers

    @property
    def coefficients(self) -> dict[str, float]:
        """The fusion coefficient."""
        return {"alpha": self.alpha}

    def at(self, progress: float) -> Self:
        """The objective with the alpha that is due."""
        return replace(self, alpha=alpha_at(self.schedule, progress))

    def divisor(self, lengths: np.ndarray) -> int:
        """Rows."""
        return len(lengths)

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Losses:
        """`preference_loss` and `row_metrics` of each row."""
        columns = Answers.of(policy), Answers.of(reference), Answers.of(lengths)
        return (
            preference_loss(*columns, self.loss, self.alpha),
            row_metrics(*columns, self.loss, self.alpha),
        )


def training_objective(config: TrainConfig) -> Objective:
    """The objective of a training section, at its last step (see `Objective.at`)."""
    if not isinstance(config, WrpoConfig):
        return Sft()
    return Preference(preference_objective(config), config.alpha, config.alpha.end)


def preference_objective(config: WrpoConfig) -> PreferenceObjective:
    """The loss that `wrpo.objective` names."""
    match config.objective:
        case "wrpo":
            return Wrpo(config.beta, config.label_smoothing, config.sft_weight)
        case "ipo":
            return Ipo(config.beta, config.sft_weight)
        case "simpo":
            return Simpo(config.beta, config.margin, config.label_smoothing, config.sft_weight)
