"""Kernels that torch's compiler makes of a function for a GPU, counted without one.

The compiler's graph of the function is lowered and scheduled for a described GPU; Triton code comes
out, which is not run. What needs the GPU itself (its properties, Triton's driver) is answered here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

H100 = {"multi_processor_count": 132, "major": 9, "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048, "warp_size": 32}  # fmt: skip
ANSWERS = {
    "torch.cuda.is_available": True,
    "torch.cuda.device_count": 1,
    "torch.cuda.current_device": 0,
    "torch.cuda.get_device_capability": (9, 0),
    "torch.cuda.get_device_properties": mock.Mock(**H100, minor=0, total_memory=80 << 30),
    "torch.utils._triton.triton_backend": None,
    "torch.utils._triton.triton_hash_with_backend": "",
}


def gpu_kernels(
    function: Callable[..., Any], *arguments: Any, options: dict[str, Any] | None = None
) -> int:
    """Launches of `function`, compiled with these options, for tensors of such shapes.

    What is left to a library counts as one.
    """
    code = triton_code(function, *arguments, options=options).partition("def call(")[2]
    return len(re.findall(r"\.run\(|extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(", code))


def triton_code(
    function: Callable[..., Any], *arguments: Any, options: dict[str, Any] | None = None
) -> str:
    """The module that torch's compiler writes."""
    shapes = ShapeEnv()
    fake = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    with _described(), config.patch(options or {}), fake:
        tensors = [_on_gpu(a) for a in arguments if torch.is_tensor(a)]
        graph = _graph(function, arguments)
        FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*tensors)
        lowering = GraphLowering(graph, example_inputs=tensors, shape_env=shapes)
        with (
            V.set_graph_handler(lowering),
            V.set_fake_mode(fake),
            V.set_extern_kernel_nodes([]),
            V.set_debug_handler(mock.MagicMock()),
        ):
            lowering.run(*tensors)
            return str(lowering.codegen()[0].value)


def _graph(function: Callable[..., Any], arguments: Sequence[Any]) -> torch.fx.GraphModule:
    """The function's operations, as far as the compiler takes them apart, of its tensors."""

    def flat(*tensors: Tensor) -> list[Tensor]:
        left = iter(tensors)
        out = function(*(next(left) if torch.is_tensor(a) else a for a in arguments))
        return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]

    given = [torch.empty_like(a, device="cpu") for a in arguments if torch.is_tensor(a)]
    return make_fx(flat, decomposition_table=select_decomp_table())(*given)


def _on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


@contextmanager
def _described() -> Iterator[None]:
    """A context in which torch believes in a GPU."""
    gpu = DeviceProperties(type="cuda", index=0, cc=90, **H100)
    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch(name, lambda *_, answer=answer: answer))
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init"))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=gpu))
        yield
