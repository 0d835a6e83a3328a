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
from torch.utils._python_dispatch import TorchDispatchMode
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
        read = list(_tensors((arguments, kwargs)))
        written = list(_tensors(out))
        for tensor in written:
            storage = tensor.untyped_storage()
            self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        name = function.overloadpacket.__name__
        if not _is_view(function, read, written) and name not in ALLOCATIONS:
            self.operations[name] += 1
            self.bytes += _traffic(name, read, written)
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf))


def _traffic(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    if name in SPARSE:
        return len(read) * min(map(_size, read)) + _size(written[0]) * (name == "gather")
    return sum(map(_size, read)) + sum(map(_size, written))


def _size(tensor: Tensor) -> int:
    """Bytes that are touched: none twice, however often they are expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_view(function: Any, read: list[Tensor], written: list[Tensor]) -> bool:
    """Whether it only looks at its arguments' memory in another form."""
    if function._schema.is_mutable or not written:
        return False
    owned = {tensor.untyped_storage()._cdata for tensor in read}
    return all(tensor.untyped_storage()._cdata in owned for tensor in written)
