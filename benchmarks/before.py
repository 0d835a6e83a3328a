"""The head as it was before `logprobs` took its sums from the matrix products, to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 2**24


class TokenLogps(torch.autograd.Function):  # type: ignore[misc]
    """Log-probs (N,) of targets (N,): hidden (N, H), weight (V, H)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Chunk by chunk of 2^24 logits."""
        rows = max(1, CHUNK // weight.shape[0])
        logps, norms = [], []
        for part, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = torch.nn.functional.linear(part, weight).float()
            norm = logits.logsumexp(1)
            logps.append(logits.gather(1, tokens[:, None])[:, 0] - norm)
            norms.append(norm)
        ctx.rows = rows
        ctx.save_for_backward(hidden, weight, targets, torch.cat(norms))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The weight's gradient is added in fp32, chunk by chunk."""
        hidden, weight, targets, norms = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = torch.nn.functional.linear(hidden[part], weight).float()
            gradient = gradients[0][part]
            logits.sub_(norms[part, None]).exp_().mul_(-gradient[:, None])
            logits.scatter_add_(1, targets[part, None], gradient[:, None])
            narrow = logits.to(weight.dtype)
            torch.mm(narrow, weight, out=of_hidden[part])
            of_weight += narrow.T @ hidden[part]
        return of_hidden, of_weight.to(weight.dtype), None
