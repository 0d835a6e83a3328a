"""Parts of decoder layers that keep few bytes and, on GPUs, launch few kernels.

Autograd functions for norms, gated MLPs and rotary positions, and forwards of modules that use them
(see `slimming`). They keep their inputs in the model's precision and compute the rest again in the
backward pass. On GPUs torch compiles them, into one kernel each way but for the sum that is the
gradient of a norm's weight. H width, I inner width, D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor
from torch.autograd.function import once_differentiable

from wrpo_ray.stages.train.recompute import note

log = logging.getLogger(__name__)


# --- one kernel on a GPU ------------------------------------------------------------------------


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors without a graph; on GPUs compiled, where torch can."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        made: Callable[..., Any] = torch.compile(function)
        return made

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        on_gpu = arguments[0].is_cuda
        return compiled()(*arguments) if on_gpu and can_compile() else function(*arguments)

    return call


@functools.cache
def can_compile() -> bool:
    """Whether torch compiles for this GPU; it needs Triton and a C compiler."""
    try:
        two = torch.compile(lambda x: x.float() + 1)(torch.ones(64, device="cuda"))
        works = bool((two == 2).all())
    except Exception as error:  # a compiler may raise anything
        log.warning("not compiled, so slower: %s", " ".join(str(error).split())[:200])
        return False
    torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
    torch._dynamo.config.recompile_limit = 32  # norms of several widths, with and without a graph
    return works


# --- norms --------------------------------------------------------------------------------------


def _gain(weight: Tensor, kind: str) -> Tensor:
    return 1.0 + weight.float() if kind == "from one" else weight


@fused
def _norm_again(hidden: Tensor, scale: Tensor, weight: Tensor, kind: str) -> Tensor:
    normal = hidden.float() * scale
    if kind == "narrow":  # Llama: the gain in the model's precision
        return weight * normal.to(hidden.dtype)
    return (_gain(weight, kind) * normal).to(hidden.dtype)


@fused
def _norm(hidden: Tensor, weight: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """The output (..., H) and 1 / root mean square (..., 1), in fp32."""
    wide = hidden.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normal = wide * scale
    if kind == "narrow":
        return weight * normal.to(hidden.dtype), scale
    return (_gain(weight, kind) * normal).to(hidden.dtype), scale


@fused
def _norm_backward(
    gradient: Tensor, hidden: Tensor, scale: Tensor, weight: Tensor, kind: str, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Of the input, and of the weight if it is trained."""
    wide, normal = gradient.float(), hidden.float() * scale
    of_normal = wide * _gain(weight, kind)
    share = (of_normal * normal).mean(-1, keepdim=True)
    of_hidden = ((of_normal - normal * share) * scale).to(hidden.dtype)
    if not trained:
        return of_hidden, None
    return of_hidden, (wide * normal).flatten(0, -2).sum(0).to(weight.dtype)


class _Norm(torch.autograd.Function):  # type: ignore[misc]
    """Keeps its input in the model's precision, and a number for each token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, eps: float, kind: str
    ) -> tuple[Tensor, Tensor]:
        out, scale = _norm(hidden, weight, eps, kind)
        ctx.kind = kind
        ctx.save_for_backward(hidden, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)  # no zeros for it
        return out, scale

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        return *_norm_backward(gradient, hidden, scale, weight, ctx.kind, trained), None, None


def norm_forward(module: Any, hidden: Tensor) -> Tensor:
    """A forward of RMS norms (..., H)."""
    weight, kind = module.weight, module.slim_kind
    out, scale = _Norm.apply(hidden, weight, _eps(module), kind)
    # under ZeRO-3 `weight` is empty when its module is not at work; this is its data of now
    held, gain, scale = hidden.detach(), weight.detach(), scale.detach()
    return note(out, lambda: _norm_again(held, scale, gain, kind))


def _eps(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


# --- gated MLPs ---------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}
"""Activations with their gradients from (gradient, input)."""


@fused
def _product(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return ACTIVATIONS[kind][0](gate) * up


@fused
def _product_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    activation, backward = ACTIVATIONS[kind]
    return backward(gradient * up, gate), gradient * activation(gate)


class _Gated(torch.autograd.Function):  # type: ignore[misc]
    """activation(gate) * up, (..., I); keeps its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(gate, up)
        return _product(gate, up, kind)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_product_backward(gradient, *ctx.saved_tensors, ctx.kind), None


def mlp_forward(module: Any, hidden: Tensor) -> Tensor:
    """A forward of gated MLPs (..., H)."""
    if hasattr(module, "gate_up_proj"):
        gate, up = module.gate_up_proj(hidden).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(hidden), module.up_proj(hidden)
    kind = module.slim_kind
    out = _Gated.apply(gate, up, kind)
    held, other = gate.detach(), up.detach()
    return module.down_proj(note(out, lambda: _product(held, other, kind)))


# --- rotary positions ---------------------------------------------------------------------------


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)


def _turned_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (gradient * sin).chunk(2, dim=-1)
    return (gradient * cos + torch.cat([second, -first], dim=-1)).to(gradient.dtype)


@fused
def _turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turned(query, cos, sin), _turned(key, cos, sin)


@fused
def _turn_back(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turned_back(query, cos, sin), _turned_back(key, cos, sin)


class _Rotary(torch.autograd.Function):  # type: ignore[misc]
    """Keeps the cos and sin of the positions, which all layers share."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        turned: tuple[Tensor, Tensor] = _turn(query, key, cos, sin)
        return turned

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
        return *_turn_back(query, key, *ctx.saved_tensors), None, None


def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., D) turned by their positions."""
    turned: tuple[Tensor, Tensor] = _Rotary.apply(query, key, cos, sin)
    return turned
