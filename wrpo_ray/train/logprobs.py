"""Summed log-probs of answers under a causal language model.

B sequences, T tokens, V vocabulary, N answer tokens of the whole batch. The sums are in fp32
whatever the model's precision: in bf16 they are wrong by up to 2 nats at -400. Not covered yet:
one prompt shared by several answers, heads computed in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences of prompt and answer."""

    ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T): 1 on tokens, 0 on padding
    answer_mask: Tensor  # (B, T): true on answer tokens

    @property
    def position_ids(self) -> Tensor:
        """(B, T): each sequence counts from 0 at its first token, wherever padding lies."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(
            self.ids.to(device), self.attention_mask.to(device), self.answer_mask.to(device)
        )


def collate(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int = 0, *, left: bool = False
) -> Batch:
    """Pairs of (prompt ids, answer ids) as a batch, padded on the right, or on the left."""
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), longest), pad, dtype=torch.long)
    attention = torch.zeros_like(ids)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        length = len(prompt) + len(answer)
        start = longest - length if left else 0
        ids[row, start : start + length] = torch.as_tensor([*prompt, *answer])
        attention[row, start : start + length] = 1
        answers[row, start + len(prompt) : start + length] = True
    return Batch(ids, attention, answers)


def answer_logps(model: Any, batch: Batch) -> Tensor:
    """The summed log-prob of each sequence's answer given what is before it, (B,), fp32.

    `model` is a transformers causal language model, or an engine around one. Gradients flow
    where they are enabled.
    """
    logits = model(
        input_ids=batch.ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits  # (B, T, V)
    return sum_answers(logits, batch.ids, batch.answer_mask)


def sum_answers(logits: Tensor, ids: Tensor, answer_mask: Tensor) -> Tensor:
    """Sum over each row's answer tokens of their log-probs under logits (B, T, V); (B,)."""
    predicted = answer_mask[:, 1:]  # logits at t predict the token at t + 1
    chosen = logits[:, :-1][predicted]  # (N, V): no log-softmax where there is no answer
    wide = torch.promote_types(chosen.dtype, torch.float32)
    token_logps = -F.cross_entropy(chosen.to(wide), ids[:, 1:][predicted], reduction="none")
    spread = token_logps.new_zeros(predicted.shape).masked_scatter(predicted, token_logps)
    return spread.sum(1)
