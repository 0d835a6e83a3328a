"""Log-probs of answers from hidden states, without logits of all tokens at once.

Only the N positions that predict an answer token go through the head, a chunk of them at a time.
The backward pass begins with the last chunk's logits, which it would have to make room for anyway,
and recomputes those of the others. Sums are in fp32 (for float64 models in float64),
whatever the model's precision: bf16 sums are wrong by up to 2 nats at -400. On GPUs matrix products
of half precision give their fp32 sums as they are, and add to fp32 sums (cuBLAS), so that neither
the logits nor the weight's gradient go through memory in both precisions.
A answers, H width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wrpo_ray.stages.train.memory import CHUNK, chunk_on
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
    chunk: int | None = None,
) -> Tensor:
    """Log-probs (N,) of `targets` (N,) under the head: hidden (N, H), weight (V, H), bias (V,).

    `softcap` is Gemma 2's on the logits: softcap * tanh(logits / softcap). `chunk` is the most
    logits at once, of the size that suits the device if None.
    """
    if chunk is None:
        chunk = most_logits(weight.device)
    return _TokenLogps.apply(hidden, weight, bias, targets, softcap, chunk)


@functools.cache
def most_logits(device: torch.device) -> int:
    """Most logits in memory at once; the same on every start on the same kind of GPU."""
    if device.type != "cuda":
        return CHUNK
    return chunk_on(torch.cuda.get_device_properties(device).total_memory)


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
        logps, every = [], None
        for part, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
            del every  # one chunk at a time
            every = _log_softmax(_logits(part, weight, bias, softcap))
            logps.append(every.gather(1, tokens[:, None])[:, 0])
        ctx.softcap, ctx.rows = softcap, rows
        # A soft cap's slope needs the logits.
        ctx.kept = every if softcap is None and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, targets)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = None
        of_bias = torch.zeros_like(bias, dtype=_wide(weight)) if wants_bias else None
        kept, ctx.kept = ctx.kept, None  # is overwritten here: a second pass recomputes it
        for start in reversed(range(0, len(targets), ctx.rows)):
            part = slice(start, start + ctx.rows)
            slope, every, kept = None, kept, None
            if every is None:
                logits = _logits(hidden[part], weight, bias, ctx.softcap)
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
                every = _log_softmax(logits)
                del logits
            of_logits = _of_logits(every, targets[part], gradients[0][part], slope, weight.dtype)
            del every
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[part])
            if wants_weight:
                of_weight = plus_product(of_weight, of_logits, hidden[part])
            if of_bias is not None:
                of_bias += of_logits.sum(0, dtype=of_bias.dtype)
        if wants_weight and of_weight is None:  # no token
            of_weight = torch.zeros_like(weight)
        cast = [g if g is None else g.to(weight.dtype) for g in (of_weight, of_bias)]
        return of_hidden, *cast, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """(rows, V) in fp32."""
    if gives_fp32(weight.device, weight.dtype):
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        logits = logits if bias is None else logits.add_(bias)
    else:
        logits = torch.nn.functional.linear(hidden, weight, bias).to(_wide(weight))
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probs (rows, V); on CPUs in place of the logits: a row is read before it is written."""
    out = logits if logits.device.type == "cpu" else None
    return torch.log_softmax(logits, 1, out=out)


def _of_logits(
    logps: Tensor,
    targets: Tensor,
    gradient: Tensor,
    slope: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of logits, gradient * (onehot(targets) - softmax) * slope.

    Overwrites the log-probs (rows, V).
    The last product is written in `dtype`, with the same rounding as if it were converted then.
    """
    softmax = logps.exp_()
    places, gradient = targets[:, None], gradient[:, None]
    of_targets = (1 - softmax.gather(1, places)) * gradient
    if slope is not None:
        of_targets *= slope.gather(1, places)
        softmax *= slope
    narrow = softmax if dtype == softmax.dtype else torch.empty_like(softmax, dtype=dtype)
    torch.mul(softmax, -gradient, out=narrow)
    return narrow.scatter_(1, places, of_targets.to(dtype))


def plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Add left.T @ right to `total` in its place; without one, return it, in fp32 at least."""
    if total is None and gives_fp32(left.device, left.dtype):
        return torch.mm(left.T, right, out_dtype=torch.float32)
    if total is None:
        return (left.T @ right).to(_wide(left))
    if total.dtype == left.dtype:
        return total.addmm_(left.T, right)
    if adds_to_fp32(left.device, left.dtype):
        return torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    return total.add_(left.T @ right)


# --- what torch offers on a device: found out by a small product ---------------------------------


@functools.cache
def gives_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products of this half precision can give their sums in fp32."""
    return _works(device, dtype, lambda a, _: torch.mm(a, a, out_dtype=torch.float32))


@functools.cache
def adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products of this half precision can be added to fp32 in place."""
    return _works(
        device, dtype, lambda a, sums: torch.addmm(sums, a, a, out_dtype=torch.float32, out=sums)
    )


def _works(
    device: torch.device, dtype: torch.dtype, product: Callable[[Tensor, Tensor], Tensor]
) -> bool:
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    ones, sums = torch.ones(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        found = product(ones, sums)
    except (RuntimeError, TypeError):  # not for this device, or not in this version
        return False
    return found.dtype == torch.float32 and (found.is_meta or bool((found == 16).all()))
