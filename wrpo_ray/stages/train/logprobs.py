"""Log-probs of answers from hidden states, without logits of all tokens at once.

Only the N positions that predict an answer token go through the head, some of them at a time;
the backward pass recomputes their logits. Sums are in fp32 (for float64 models in float64),
whatever the model's precision: bf16 sums are wrong by up to 2 nats at -400.
A answers, H width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from wrpo_ray.stages.train.memory import CHUNK
from wrpo_ray.stages.train.packing import Batch


def answer_logps(hidden: Tensor, head: Any, batch: Batch) -> Tensor:
    """The summed log-prob of each answer given its prompt, (A,).

    Args:
        hidden: the last hidden states (S, T, H).
        head: called with hidden states (N, H) and tokens (N,), gives their log-probs (N,).
        batch: the micro-batch of the hidden states.
    """
    chosen = hidden.flatten(0, 1).index_select(0, batch.predict)  # (N, H)
    logps = head(chosen, batch.targets)  # (N,)
    return logps.new_zeros(batch.answer_mask.shape).masked_scatter(batch.answer_mask, logps).sum(1)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Log-probs (N,) of `targets` (N,) under the head: hidden (N, H), weight (V, H), bias (V,).

    `softcap` is Gemma 2's on the logits: softcap * tanh(logits / softcap).
    """
    return _TokenLogps.apply(hidden, weight, bias, targets, softcap, chunk)


class _TokenLogps(torch.autograd.Function):  # type: ignore[misc]
    """d log p(t) / d logits = onehot(t) - softmax, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        rows = max(1, chunk // weight.shape[0])
        logps, norms = [], []
        for part, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = _logits(part, weight, bias, softcap)
            norm = logits.logsumexp(1)
            logps.append(logits.gather(1, tokens[:, None])[:, 0] - norm)
            norms.append(norm)
        ctx.softcap, ctx.rows = softcap, rows
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(norms))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=_wide(weight)) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=_wide(weight)) if wants_bias else None
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = _logits(hidden[part], weight, bias, ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            of_logits = _of_logits_(logits, norms[part], targets[part], gradients[0][part])
            if slope is not None:
                of_logits *= slope
            narrow = of_logits.to(weight.dtype)
            if of_hidden is not None:
                torch.mm(narrow, weight, out=of_hidden[part])
            if of_weight is not None:
                _add_product(of_weight, narrow, hidden[part])
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        cast = [g if g is None else g.to(weight.dtype) for g in (of_weight, of_bias)]
        return of_hidden, *cast, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """(rows, V) in fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(_wide(weight))
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _of_logits_(logits: Tensor, norms: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
    """Overwrite logits by their gradient, gradient * (onehot(targets) - softmax)."""
    of_logits = logits.sub_(norms[:, None]).exp_().mul_(-gradient[:, None])
    return of_logits.scatter_add_(1, targets[:, None], gradient[:, None])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.T @ right to total, in the total's precision."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right
