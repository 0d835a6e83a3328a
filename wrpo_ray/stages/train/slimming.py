"""Gives modules of a loaded transformers model forwards that keep less for the backward pass.

Model code is not forked: norms, gated MLPs and attention with rotary positions are found by what
they are called and what they have, and get the functions of `layers`. Each kind is first compared
with the module's own forward on random input, values and gradients; where they differ, the module
stays as it is. On GPUs, linear layers of one input have their weights moved side by side, and are
one product (`layers.side_by_side`): gate and up, and where no view of the output outlives
attention, queries, keys and values. Layers with biases or adapters stay apart.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wrpo_ray.llm import attention
from wrpo_ray.llm.architecture import without_memory
from wrpo_ray.stages.train.layers import (
    ACTIVATIONS,
    Together,
    all_plain,
    inner_layers,
    linear_forward,
    mlp_forward,
    norm_forward,
    put_side_by_side,
    turn,
)

log = logging.getLogger(__name__)
ROPE = "apply_rotary_pos_emb"
"""Transformers' name of the function in each model's module."""
SMALL = 16
"""Width of the copies on which a module is compared with ours."""
SCALES = (1e-3, 1.0, 1e4)
"""Of the random input: small enough that a norm's epsilon counts, and beyond limits of MLPs, such
as 7 or 16."""


def slim(model: nn.Module) -> dict[str, int]:
    """Give modules of the model our forwards; returns how many of each class."""
    kinds: dict[Any, Any] = {}
    found: dict[str, int] = {}
    for module in model.modules():
        name = type(module).__name__
        for matches, apply in ((_is_norm, _slim_norm), (_is_mlp, _slim_mlp), (_turns, _slim_rope)):
            if matches(module) and apply(module, kinds):
                found[name] = found.get(name, 0) + 1
        _join(module)
    return found


def keeps_less(folder: Path) -> bool:
    """Whether all norms and MLPs of the layers of a model folder would get our forwards.

    Else training needs the memory of layers as they are.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = without_memory(AutoModelForCausalLM.from_config, config)
    except Exception as error:  # who loads it tells
        log.debug("%s: %s", folder, error)
        return False
    slim(model)
    body = model.get_decoder()
    parts = [m for m in body.modules() if type(m).__name__.endswith(("Norm", "MLP"))]
    return all(hasattr(part, "slim_kind") for part in parts)


def rotary(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`original` of whole heads in one precision by our function; of others as it is."""

    def apply(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        is_whole = q.shape[-1] == k.shape[-1] == cos.shape[-1]
        if not is_whole or not q.dtype == k.dtype == cos.dtype:
            return original(q, k, cos, sin, unsqueeze_dim)
        return turn(q, k, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    return apply


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and _own_tensors(module) == {"weight"}


def _is_mlp(module: nn.Module) -> bool:
    parts = set(dict(module.named_children()))
    has_parts = parts >= {"gate_proj", "up_proj", "down_proj"} or parts >= {
        "gate_up_proj",
        "down_proj",
    }
    return type(module).__name__.endswith("MLP") and has_parts and not _own_tensors(module)


def _own_tensors(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers that are the module's own and not a part's."""
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name for name, _ in named}


def _turns(module: nn.Module) -> bool:
    forward = type(module).forward
    return ROPE in getattr(getattr(forward, "__code__", None), "co_names", ())


def _slim_norm(module: Any, kinds: dict[Any, Any]) -> bool:
    key = _kind_of(module), module.weight.dtype
    if key not in kinds:
        kinds[key] = _first_equal(module, _small_norm, norm_forward, ("narrow", "wide", "from one"))
    return _set(module, norm_forward, kinds[key])


def _slim_mlp(module: Any, kinds: dict[Any, Any]) -> bool:
    key = _kind_of(module), _kind_of(getattr(module, "act_fn", None) or module.activation_fn)
    if key not in kinds:
        kinds[key] = _first_equal(module, _small_mlp, mlp_forward, ACTIVATIONS)
    return _set(module, mlp_forward, kinds[key])


def _slim_rope(module: Any, kinds: dict[Any, Any]) -> bool:
    """The module's forward, with our function under the name of transformers' own."""
    forward = type(module).forward
    if forward not in kinds:
        original = forward.__globals__.get(ROPE)
        ours = rotary(original)
        kinds[forward] = original is not None and _same_rotary(ours, original)
        if kinds[forward]:
            kinds[forward] = types.FunctionType(
                forward.__code__, forward.__globals__ | {ROPE: ours}, forward.__name__,
                forward.__defaults__, forward.__closure__,
            )  # fmt: skip
            kinds[forward].__kwdefaults__ = forward.__kwdefaults__
    return _set(module, kinds[forward], "rotary" if kinds[forward] else None)


def _kind_of(part: Any) -> Any:
    """A key of modules, or functions, that compute the same but for their weights.

    Those of a class can differ in a number from layer to layer, such as a limit.
    """
    if not isinstance(part, nn.Module):
        return part
    plain = (bool, int, float, str, type(None))
    return type(part), *((n, v) for n, v in sorted(vars(part).items()) if isinstance(v, plain))


def _set(module: Any, forward: Callable[..., Any], kind: str | None) -> bool:
    if kind is None:
        return False
    module.slim_kind = kind
    module.forward = types.MethodType(forward, module)
    return True


# --- linear layers of one input -----------------------------------------------------------------


PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _join(module: Any) -> None:
    """Have the module's linear layers of one input computed as one, where that is right."""
    if module.__dict__.get("slim_kind") in ACTIVATIONS:
        inner = inner_layers(module)
        if _can_join((*inner, module.down_proj)):
            put_side_by_side([layer.weight for layer in inner])
            module.slim_whole = True
        return
    layers: tuple[Any, ...] = tuple(getattr(module, name, None) for name in PROJECTIONS)
    if _can_join(layers) and _calls_each(module) and _lets_go(module):
        put_side_by_side([layer.weight for layer in layers])
        together = Together(layers)
        for layer in layers:
            layer.slim_together = together
            layer.forward = types.MethodType(linear_forward, layer)


def _can_join(layers: tuple[Any, ...]) -> bool:
    return all_plain(layers) and saves_time(layers[0].weight)


def saves_time(weight: Tensor) -> bool:
    """Whether fewer launches save time: not on CPUs."""
    return str(weight.device.type) != "cpu"


def _calls_each(module: Any) -> bool:
    """Whether attention calls all three layers, and changes none of their outputs in place."""
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    in_place = any(name.endswith("_") and not name.startswith("_") for name in names)
    shares = getattr(module, "is_kv_shared_layer", False)
    return set(PROJECTIONS) <= set(names) and not in_place and not shares


def _lets_go(module: Any) -> bool:
    """Whether attention keeps copies of keys and values, so not the product they are parts of."""
    cap = getattr(module, "attn_logit_softcapping", None)
    ours = module.config._attn_implementation == attention.SHARED_PROMPT
    return ours and attention.is_one_kernel(module.q_proj.weight, cap)


# --- equal on random input ----------------------------------------------------------------------


def _first_equal(
    module: Any,
    small: Callable[[Any, torch.dtype], Any],
    forward: Callable[[Any, Tensor], Tensor],
    kinds: Any,
) -> str | None:
    """The first kind whose outputs and gradients are those of the module's own forward.

    They are compared on small copies with random weights: in the module's precision and in fp32.
    """
    try:
        with _aside():
            torch.manual_seed(0)
            dtypes = {next(module.parameters()).dtype, torch.float32}
            copies = [small(module, dtype) for dtype in dtypes]
            for kind in kinds:
                if all(_same_module(own, forward, kind) for own in copies):
                    return str(kind)
    except Exception as error:  # not the kind of module that it seemed
        log.debug("%s stays as it is: %s", type(module).__name__, error)
    return None


@contextmanager
def _aside() -> Iterator[None]:
    """A context to compare in: on the CPU, where nothing is compiled, with random numbers apart."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
        yield


def _small_norm(module: Any, dtype: torch.dtype) -> Any:
    own = copy.copy(module)
    own._parameters = {"weight": nn.Parameter(1 + torch.randn(SMALL, dtype=dtype) / 2)}
    return own


def _small_mlp(module: Any, dtype: torch.dtype) -> Any:
    own, sizes = (
        copy.copy(module),
        {"down_proj": (SMALL, SMALL), "gate_up_proj": (SMALL, 2 * SMALL)},
    )
    own._modules = dict(module._modules)
    for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj"):
        if name in own._modules:
            own._modules[name] = nn.Linear(*sizes.get(name, (SMALL, SMALL)), dtype=dtype)
    return own


def _same_module(own: Any, forward: Callable[[Any, Tensor], Tensor], kind: str) -> bool:
    own.slim_kind = kind
    dtype = next(own.parameters()).dtype
    weights = list(own.parameters())
    inputs = [scale * torch.randn(2, 5, SMALL, dtype=dtype) for scale in SCALES]
    return all(
        _same(
            lambda x: (type(own).forward(own, x),), lambda x: (forward(own, x),), [hidden], weights
        )
        for hidden in inputs
    )


def _same_rotary(ours: Callable[..., Any], original: Callable[..., Any]) -> bool:
    try:
        with _aside():
            torch.manual_seed(0)
            for dtype in (torch.bfloat16, torch.float32):
                cos, sin = torch.randn(2, 1, 5, 8, dtype=dtype)
                heads = [torch.randn(1, n, 5, 8, dtype=dtype) for n in (4, 2)]
                if not _same(
                    functools.partial(_call, original, cos, sin),
                    functools.partial(_call, ours, cos, sin),
                    heads,
                    [],
                ):
                    return False
    except Exception as error:
        log.debug("%s stays as it is: %s", original, error)
        return False
    return True


def _call(function: Callable[..., Any], cos: Tensor, sin: Tensor, *heads: Tensor) -> Any:
    return function(*heads, cos, sin)


def _same(
    own: Callable[..., tuple[Tensor, ...]],
    ours: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    weights: list[Tensor],
) -> bool:
    """Whether the outputs are equal to the bit, and the gradients but for rounding."""
    found = []
    for function in (own, ours):
        given = [t.clone().requires_grad_() for t in inputs]
        out = function(*given)
        slopes = [torch.linspace(-1, 2, t.numel()).view_as(t).to(t.dtype) for t in out]
        found.append((out, torch.autograd.grad(out, [*given, *weights], slopes)))
    (values, wanted), (got, gradients) = found
    limit = 16 * torch.finfo(inputs[0].dtype).eps
    return all(torch.equal(a, b) for a, b in zip(values, got, strict=True)) and all(
        bool((a - b).float().norm() <= limit * a.float().norm())
        for a, b in zip(wanted, gradients, strict=True)
    )


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """A context in which the modules of `slim` have their own forwards."""
    ours = {
        m: m.__dict__.pop("forward")
        for m in model.modules()
        if {"slim_kind", "slim_together"} & m.__dict__.keys()
    }
    try:
        yield
    finally:
        for module, forward in ours.items():
            module.forward = forward
