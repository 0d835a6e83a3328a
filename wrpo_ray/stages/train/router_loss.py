"""The loss that keeps a mixture's experts evenly used, for models whose config.json asks for it.

It is E * sum over experts of f_e * p_e (Switch Transformer, arXiv 2101.03961, equations 4 to 6):
f_e is the share of the tokens that are sent to expert e, p_e the mean probability that the router
gives to it, over the tokens of all layers. `router_aux_loss_coef` weighs it. Because f_e and p_e
are means over the tokens of a micro-batch, it is the one part of a loss that depends on which rows
share a micro-batch, here as in transformers and TRL.

T tokens, E experts, R rows, A answers of all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from wrpo_ray.llm.architecture import balancing_loss_of
from wrpo_ray.stages.train.packing import Batch


@dataclass(frozen=True)
class RouterLoss:
    """The balancing loss of one model, computed by its own function in transformers."""

    function: Callable[..., Tensor]
    experts: int
    chosen: int
    """Experts that a token is sent to."""
    coefficient: float

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """That of a causal language model; None if its config.json does not ask for one.

        Raises:
            UserError: the config asks for it, and transformers has none for this architecture.
        """
        function = balancing_loss_of(type(model), model.config)
        if function is None:
            return None
        weight = model.config.get_text_config().router_aux_loss_coef
        return cls(function, model.num_experts, model.num_experts_per_tok, weight)

    def __call__(self, logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """The weighted loss, (), from the router's logits of each layer, each (T, E)."""
        weights = token_weights(batch).to(logits[0].device)
        return self.coefficient * self.function(logits, self.experts, self.chosen, weights)


def token_weights(batch: Batch) -> Tensor:
    """How often each token occurs among the batch's sequences of prompt and answer, (S, T).

    A packed prompt occurs once for each of its answers, padding never.
    """
    if batch.layout is None:
        assert batch.attention_mask is not None
        return batch.attention_mask
    blocks = batch.layout.blocks
    answers = Counter(block.prefix for block in blocks if block.prefix is not None)
    counts = torch.tensor([answers.get(number, 1) for number in range(len(blocks))])
    return counts.repeat_interleave(torch.tensor(batch.layout.lengths))[None]
