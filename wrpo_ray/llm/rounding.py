"""Counts trained changes that are lost where weights are saved with fewer bits than in training.

A change below half a bf16 step (0.4 % of a weight's size) leaves the rounded weight as it was: at
small learning rates that is most of the changes. torch is imported on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Rounding:
    """Counts of single weights."""

    compared: int = 0
    """Compared with their value before training."""
    changed: int = 0
    """Of those, weights that training changed."""
    lost: int = 0
    """Of the changed ones, those that are saved with their old value."""

    def add(self, trained: Tensor, before: Tensor | None, dtype: Any) -> None:
        """Count one tensor that is saved as `dtype`; without the tensor before it is ignored."""
        if before is None or before.shape != trained.shape:
            return
        before = before.to(trained.device)
        is_changed = trained.float() != before.float()
        is_lost = is_changed & (trained.to(dtype) == before.to(dtype))
        self.compared += trained.numel()
        self.changed += int(is_changed.sum())
        self.lost += int(is_lost.sum())

    @property
    def share(self) -> float | None:
        """The share of changed weights that is lost; None if none is known to have changed."""
        return self.lost / self.changed if self.changed else None


class Tensors:
    """The tensors of a local model folder's safetensors files by name, read one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def _files(self) -> dict[str, Any]:
        from safetensors import safe_open

        found: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            found |= dict.fromkeys(file.keys(), file)
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, dtype: Any = None) -> Tensor | None:
        """Return a tensor, rounded to `dtype` if given; None if no file has one of that name."""
        if name not in self:
            return None
        tensor = self._files[name].get_tensor(name)
        return tensor if dtype is None else tensor.to(dtype)
