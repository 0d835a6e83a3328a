"""Parts of decoder layers that keep few bytes and, on GPUs, launch few kernels.

Autograd functions for norms, gated MLPs and rotary positions, and forwards of modules that use them
(see `slimming`). They keep their inputs in the model's precision and compute the rest again in the
backward pass. On GPUs torch compiles them, into one kernel each way but for the sum that is the
gradient of a norm's weight. Linear layers of one input whose weights lie side by side in memory are
one matrix product. H width, I inner width, D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wrpo_ray.stages.train.recompute import note

log = logging.getLogger(__name__)
OPTIONS = {"combo_kernels": True}
"""Of torch's compiler: what has several sizes, as queries and keys, is one kernel too."""


# --- one kernel on a GPU ------------------------------------------------------------------------


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors without a graph; on GPUs compiled, where torch can."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        made: Callable[..., Any] = torch.compile(function, options=OPTIONS)
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
        add = torch.compile(lambda x: x.float() + 1, options=OPTIONS)
        two = add(torch.ones(64, device="cuda"))
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


# --- linear layers of one input ------------------------------------------------------------------


def side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """A view (sum of rows, H) of weights that follow one another in memory, None of others.

    DeepSpeed's flat buffers (ZeRO 1 and 2) keep them so. Under ZeRO-3, which has the weights of one
    module at a time, it is None.
    """
    first, end = weights[0], weights[0].storage_offset()
    for weight in weights:
        if hasattr(weight, "ds_id") or weight.dim() != 2 or not weight.is_contiguous():
            return None
        if weight.shape[1] != first.shape[1] or weight.dtype != first.dtype:
            return None
        same = weight.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not same or weight.storage_offset() != end:
            return None
        end += weight.numel()
    return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def all_plain(layers: Sequence[Any]) -> bool:
    """Whether all are linear layers without biases, and not such with adapters."""
    return all(type(layer) is nn.Linear and layer.bias is None for layer in layers)


def put_side_by_side(weights: Sequence[nn.Parameter]) -> None:
    """Move the weights (not ZeRO-3's) into one storage, one after another."""
    if side_by_side(weights) is None and not any(hasattr(w, "ds_id") for w in weights):
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.data = part


def _whole(weights: Sequence[Tensor]) -> Tensor:
    whole = side_by_side(weights)
    return torch.cat(list(weights)) if whole is None else whole


def _linear_backward(
    slopes: Tensor, hidden: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of the input and of all weights, if needed, from the outputs' (..., sum of rows)."""
    rows = slopes.flatten(0, -2)
    of_hidden = (rows @ _whole(weights)).view_as(hidden) if needed[0] else None
    if not any(needed[1:]):
        return of_hidden, *[None] * len(weights)
    return of_hidden, *(rows.t() @ hidden.flatten(0, -2)).split([len(w) for w in weights])


class _Joined(torch.autograd.Function):  # type: ignore[misc]
    """Outputs of linear layers of one input, by one product; parts of one tensor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, *weights)
        parts: tuple[Tensor, ...] = F.linear(hidden, _whole(weights)).split(
            [len(w) for w in weights], dim=-1
        )
        return parts

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *weights = ctx.saved_tensors
        slopes = torch.cat(gradients, dim=-1)
        return _linear_backward(slopes, hidden, weights, ctx.needs_input_grad)


class Together:
    """Linear layers without biases that their module calls one after another on the same input.

    The call of the first computes all; the outputs of the others wait for their calls. A call on
    another input, and all while the weights are apart, are computed by themselves.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        self._layers = tuple(layers)
        self._hidden: Tensor | None = None
        self._waiting: dict[nn.Linear, Tensor] = {}

    def __call__(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """The layer's output (..., rows)."""
        if layer is self._layers[0]:
            self._hidden, self._waiting = hidden, self._outputs(hidden)
        out = self._waiting.pop(layer, None) if hidden is self._hidden else None
        if not self._waiting:
            self._hidden = None
        return F.linear(hidden, layer.weight) if out is None else out

    def _outputs(self, hidden: Tensor) -> dict[nn.Linear, Tensor]:
        weights = [layer.weight for layer in self._layers]
        if side_by_side(weights) is None:
            return {}
        return dict(zip(self._layers, _Joined.apply(hidden, *weights), strict=True))


def linear_forward(layer: Any, hidden: Tensor) -> Tensor:
    """A forward of a linear layer that is computed together with others (..., rows)."""
    return layer.slim_together(layer, hidden)


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


def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return ACTIVATIONS[kind][0](gate) * up


def _gated_back(gradient: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    activation, backward = ACTIVATIONS[kind]
    return backward(gradient * up, gate), gradient * activation(gate)


@fused
def _product(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return _gated(gate, up, kind)


@fused
def _product_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    return _gated_back(gradient, gate, up, kind)


@fused
def _product_and_slopes(gradient: Tensor, both: Tensor, kind: str) -> Tensor:
    """The product, and the gradients of gate and up, side by side (..., 3 I)."""
    gate, up = both.chunk(2, dim=-1)
    slopes = _gated_back(gradient, gate, up, kind)
    return torch.cat([_gated(gate, up, kind), *slopes], dim=-1)


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


class _Mlp(torch.autograd.Function):  # type: ignore[misc]
    """A whole gated MLP (..., H) without biases; keeps its input, gate and up.

    `inner` are the weights of gate and up, or one that has both.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, down: Tensor, kind: str, *inner: Tensor) -> Tensor:
        both = F.linear(hidden, _whole(inner))
        ctx.kind = kind
        ctx.save_for_backward(hidden, both, down, *inner)
        return F.linear(_product(*both.chunk(2, dim=-1), kind), down)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, both, down, *inner = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        found = _product_and_slopes(rows @ down, both.flatten(0, -2), ctx.kind)
        product, slopes = found.split([down.shape[1], both.shape[-1]], dim=-1)
        needed = ctx.needs_input_grad
        of_down = rows.t() @ product if needed[1] else None
        of_hidden, *of_inner = _linear_backward(slopes, hidden, inner, (needed[0], *needed[3:]))
        return of_hidden, of_down, None, *of_inner


def mlp_forward(module: Any, hidden: Tensor) -> Tensor:
    """A forward of gated MLPs (..., H)."""
    kind, inner = module.slim_kind, inner_layers(module)
    if getattr(module, "slim_whole", False) and all_plain((*inner, module.down_proj)):
        weights = [layer.weight for layer in inner]
        if side_by_side(weights) is not None:
            return _Mlp.apply(hidden, module.down_proj.weight, kind, *weights)
    outputs = [layer(hidden) for layer in inner]
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    out = _Gated.apply(gate, up, kind)
    held, other = gate.detach(), up.detach()
    return module.down_proj(note(out, lambda: _product(held, other, kind)))


def inner_layers(module: Any) -> tuple[nn.Linear, ...]:
    """Gate and up, or the one layer that has both."""
    if hasattr(module, "gate_up_proj"):
        return (module.gate_up_proj,)
    return module.gate_proj, module.up_proj


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
