"""Converts a model's weights to another precision, and measures the training that it loses."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from wrpo_ray.errors import UserError
from wrpo_ray.llm.rounding import Rounding, Tensors
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.tensors import read_tensors

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"float32": 32, "bfloat16": 16, "float16": 16}
"""Precisions that weights can be written in, with their bits."""
SAFETENSORS_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
INDEX = "model.safetensors.index.json"
Row = dict[str, Any]


@dataclass
class Weights:
    """The precision to write weights in, and the rounding that it caused."""

    dtype: str = ""
    """Precision to convert to; empty copies the weights as they are."""
    before: Tensors | None = None
    """Weights before training; without them the loss is unknown."""
    written: str = ""
    """The precision for the card."""
    is_wider: bool = False
    """Whether the new precision is wider, so that nothing is rounded."""
    as_before: bool = False
    """Keep the precision of each tensor in `before`, such as a router's fp32."""
    rounding: Rounding = field(default_factory=Rounding)
    """The loss by rounding, measured while writing."""

    def loss_text(self) -> str:
        """The loss by rounding as a sentence; empty if nothing is lost."""
        share = self.rounding.share
        if not self.dtype or self.is_wider or (share is None and self.rounding.compared):
            return ""
        if share is None:
            return "the share lost by rounding is unknown: the target's weights cannot be read"
        return (
            f"{share:.1%} of the weights that changed are in {self.dtype} what they were before "
            "(export with --dtype float32 keeps all)"
        )


def dtype_of(config: Row) -> str:
    """The precision in a model's config.json; empty if it is none of `DTYPES`."""
    parts = config, config.get("text_config") or {}
    stated = (part.get(name) for part in parts for name in ("dtype", "torch_dtype"))
    own = next(filter(None, stated), "")
    return own if own in DTYPES else ""


def dtype_of_tensors(model: Folder) -> str:
    """The precision of most of a model's weights, from their headers; empty if they have none."""
    try:
        headers = (read_tensors(model) or {}).values()
    except (UserError, OSError):
        return ""
    counts: Counter[str] = Counter()
    for header in headers:
        counts[SAFETENSORS_TYPES.get(header.dtype, "")] += math.prod(header.shape)
    return max(counts, key=counts.__getitem__, default="")


def converted(config: Row, dtype: str) -> Row:
    """A copy of a config.json with another precision."""
    names = ("dtype", "torch_dtype")
    changed = {n: dtype for n in names if n in config} or {"dtype": dtype}
    parts = {n: converted(p, dtype) for n, p in config.items() if _has_dtype(p)}
    return config | parts | changed


def _has_dtype(part: Any) -> bool:
    return isinstance(part, dict) and bool({"dtype", "torch_dtype"} & part.keys())


def write(model: Folder, to: Folder, names: list[str], how: Weights) -> None:
    """Write the weight files `names` of a model in another precision, and measure the loss.

    Raises:
        UserError: the files are not safetensors, or a weight is too large for the precision.
    """
    if strange := [name for name in names if not name.endswith(".safetensors")]:
        raise UserError(f"export: --dtype: {model}/{strange[0]} is not a safetensors file")
    local, size = model.local(), 0
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            size += _write_file(local / name, path, how)
            pafs.copy_files(
                str(path), f"{to.path}/{name}", destination_filesystem=to.filesystem,
            )  # fmt: skip
    if INDEX in model.files():
        index = model.read_json(INDEX)
        index["metadata"] = index.get("metadata", {}) | {"total_size": size}
        to.write(INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _write_file(source: Path, path: Path, how: Weights) -> int:
    """Convert a file; return the bytes of its tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as file:
        tensors = {name: _converted(name, file.get_tensor(name), how) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _converted(name: str, tensor: Tensor, how: Weights) -> Tensor:
    import torch

    dtype = getattr(torch, how.dtype)
    before = how.before.get(name) if how.before else None
    if how.as_before and before is not None:
        dtype = before.dtype
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    written = tensor.to(dtype)
    if bool(torch.isinf(written).any()) and not bool(torch.isinf(tensor).any()):
        raise UserError(f"export: --dtype {how.dtype}: a weight of {name} is too large for it")
    how.rounding.add(tensor, before, dtype)
    return written
