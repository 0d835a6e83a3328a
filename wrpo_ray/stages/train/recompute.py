"""Tensors that the backward pass computes again in place of keeping them.

Autograd keeps the input of each linear layer for its weight's gradient. Where that input is an
elementwise function of tensors that are kept anyway (a norm of its input, the product of a gated
MLP), it is noted with a way to compute it again, and what is kept for it is that way. Unlike
checkpointing this computes no matrix product again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from wrpo_ray.errors import UserError

_notes: list[dict[int, _Note]] = []
"""Of the forward passes in progress, the innermost last."""


class _Again:
    """A tensor to compute when it is first asked for; it lives until its last user is gone."""

    def __init__(self, compute: Callable[[], Tensor]):
        self._compute: Callable[[], Tensor] | None = compute
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._compute is not None:
            with torch.no_grad():
                self._value, self._compute = self._compute(), None
        assert self._value is not None
        return self._value


class _Note(NamedTuple):
    storage: StorageWeakRef
    """While it exists, no other storage has the same address."""
    version: int
    again: _Again


class _Held(NamedTuple):
    """A tensor that is kept; torch looks at versions only where nothing is packed."""

    tensor: Tensor
    version: int


class _Kept(NamedTuple):
    """Kept in place of a noted tensor, or of a part of it: which part, and how to compute it."""

    again: _Again
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def recomputing() -> Iterator[None]:
    """A context for a forward pass in which noted tensors are not kept."""
    notes: dict[int, _Note] = {}
    _notes.append(notes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _pack(t, notes), _unpack):
            yield
    finally:
        _notes.pop()


def note(tensor: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Note that `compute` gives this tensor again, with equal bits; does nothing elsewhere.

    What `compute` holds has to be kept anyway and free of the graph (`detach`).
    """
    if _notes and tensor.requires_grad and tensor.is_contiguous():
        storage = tensor.untyped_storage()
        noted = _Note(StorageWeakRef(storage), tensor._version, _Again(compute))
        _notes[-1][storage._cdata] = noted
    return tensor


def _pack(tensor: Tensor, notes: dict[int, _Note]) -> Tensor | _Held | _Kept:
    noted = notes.get(tensor.untyped_storage()._cdata)
    if noted is not None and tensor._version == noted.version:
        return _Kept(noted.again, tensor.size(), tensor.stride(), tensor.storage_offset())
    # a parameter as it is: ZeRO-3 replaces its data; others without the graph that holds them
    return tensor if tensor.is_leaf else _Held(tensor.detach(), tensor._version)


def _unpack(kept: Tensor | _Held | _Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if isinstance(kept, _Held):
        if kept.tensor._version != kept.version:
            raise UserError(
                "the model's code changes a tensor in place that its gradients depend on; it "
                "cannot be trained here"
            )
        return kept.tensor
    return kept.again().as_strided(kept.size, kept.stride, kept.offset)
