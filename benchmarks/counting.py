"""Counts of what torch does: launches, bytes that go through memory, bytes that stay.

A mode sees every ATen operation, forward and backward, on any device; on meta tensors too, which
have shapes and no data. So a GPU's counts can be had without one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided")
"""Operations that only allocate."""
SPARSE = ("gather", "scatter_", "scatter_add_")
"""Operations that touch as many elements as their index has."""


class Counts(TorchDispatchMode):  # type: ignore[misc]
    """Counts operations that would launch a kernel, views and allocations not among them.

    An operation counts once, although some (a split matrix product, the gradient of attention)
    have more than one kernel. Its traffic are the bytes of its tensors, each read or written once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def launches(self) -> int:
        """Operations so far."""
        return sum(self.operations.values())

    @property
    def kept(self) -> int:
        """Bytes of what the operations allocated and somebody still holds."""
        return sum(size for ref, size in self._storages.values() if not ref.expired())

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count it."""
        out = function(*arguments, **(kwargs or {}))
        read, written = list(_tensors((arguments, kwargs))), list(_tensors(out))
        if self._made(read, written) or function._schema.is_mutable:
            name = function.overloadpacket.__name__
            if name not in ALLOCATIONS:
                self.operations[name] += 1
                self.bytes += _traffic(name, read, written)
        return out

    def as_one(self, function: Any, kernels: int = 1) -> Any:
        """`function`, counted as one operation with so many launches, as if it were compiled."""

        def call(*arguments: Any) -> Any:
            with _disable_current_modes():
                out = function(*arguments)
            read, written = list(_tensors(arguments)), list(_tensors(out))
            self._made(read, written)
            self.operations[function.__name__] += kernels
            self.bytes += _traffic("", read, written)
            return out

        return call

    def _made(self, read: list[Tensor], written: list[Tensor]) -> bool:
        """Whether an operation allocated what it wrote, and did not only look at what it read."""
        owned = {tensor.untyped_storage()._cdata for tensor in read}
        made = [s for s in (t.untyped_storage() for t in written) if s._cdata not in owned]
        for storage in made:
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return bool(made)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf))


def _traffic(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    if name in SPARSE:
        return len(read) * min(map(_size, read)) + _size(written[0]) * (name == "gather")
    return sum(map(_size, read)) + sum(map(_size, written))


def _size(tensor: Tensor) -> int:
    """Bytes that are touched: none twice, however often they are expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
