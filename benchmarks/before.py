"""Code as it was, to compare with: the head, and the copies of keys in attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrpo_ray.llm import attention

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


def by_varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Any, scale: float, window: int | None
) -> Tensor:
    """Attention in one flash kernel, with advanced indexing."""
    from torch.nn.attention.varlen import varlen_attn

    at = attention._sequences(layout, query.device)
    queries, keys, values = (t[0].transpose(0, 1) for t in (query, key, value))
    longest = max(layout.prefix_length(block) + block.length for block in layout.blocks)
    return varlen_attn(
        queries,
        keys[at["sequences"]],
        values[at["sequences"]],
        at["queries_at"],
        at["keys_at"],
        max(layout.lengths),
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=queries.shape[1] != keys.shape[1],
    )[None]
