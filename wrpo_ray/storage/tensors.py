"""Names, types and shapes of a model folder's tensors, from the headers of its files.

Only a few kB of each file are read, also from an object store. So a missing or truncated file, or a
git-lfs pointer, is reported before any work. Not covered: the values of the tensors.
"""

import io
import json
import math
import pickle
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from wrpo_ray.errors import UserError
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.weight_files import weight_files

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
"""Weights in one file; for several files, `<name>.index.json` maps tensors to files."""
POINTER = b"version https://git-lfs"
"""The beginning of a git-lfs pointer: a file that git-lfs has not fetched."""
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""{safetensors type: bits of an element}"""
STORAGES = {
    "Float": "F32", "Double": "F64", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
"""{storage type of torch's pickles, without `Storage`: safetensors type}"""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's entry in the header of a file."""

    file: str
    dtype: str
    """The safetensors type, such as `BF16`."""
    shape: tuple[int, ...]


Tensors = dict[str, TensorHeader]


def read_tensors(folder: Folder) -> Tensors | None:
    """Return the tensors of a model folder; None if its format has no header (old pickles).

    Error messages name the file without its folder.

    Raises:
        UserError: a file is missing, truncated or not weights, or the index does not match.
    """
    names = folder.files()
    files, index = list_weight_files(folder, names)
    if not (index or folder.is_remote):  # of remote folders only the needed files are copied
        _check_no_others(files, names)
    found: Tensors = {}
    for file in files:
        tensors = read_file(folder, file)
        if tensors is None:
            return None
        if twice := found.keys() & tensors:
            name = min(twice)
            raise UserError(f"{name} is in both {found[name].file} and {file}; {SAVE_AGAIN}")
        found |= tensors
    for name, file in index.items():
        if name not in found or found[name].file != file:
            raise UserError(f"{file}: has no {name}, which its index says is there; {SAVE_AGAIN}")
    if not found:
        raise UserError(f"{files[0]}: holds no tensors; {SAVE_AGAIN}")
    return found


def _check_no_others(files: list[str], names: list[str]) -> None:
    others = [n for n in names if n.endswith(".safetensors") and n not in files]
    if others:
        raise UserError(
            f"{others[0]} lies beside {files[0]}, and vLLM reads both, transformers only the "
            f"latter; delete the file that is not meant"
        )


BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError)
"""Errors that reading a damaged file can raise."""
SAVE_AGAIN = "download the folder again, or save the model anew"


def list_weight_files(folder: Folder, names: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Return the weight files, and {tensor: file} if there is an index.

    `names` are all files of the model; `folder` may have only the small ones.

    Raises:
        UserError: a file is missing, or engines would read different files.
    """
    for single in (SAFETENSORS, PICKLED):
        table = f"{single}.index.json"
        index = _read_index(folder, table) if table in names else {}
        files = sorted(set(index.values()))
        if single in names and files and files != [single]:
            raise UserError(
                f"it has both {single} and {table} of other files, of which transformers "
                f"reads the one and vLLM the other; delete the one that is not meant"
            )
        if lacking := [file for file in files if file not in names]:
            raise UserError(f"{table} names {lacking[0]}, which is missing; {SAVE_AGAIN}")
        if single in names or files:
            return files or [single], index
    if shards := weight_files(names):
        start = SAFETENSORS if shards[0].endswith(".safetensors") else PICKLED
        raise UserError(
            f"it has neither {start} nor {start}.index.json beside {shards[0]}; {SAVE_AGAIN}"
        )
    raise UserError("has no weights (*.safetensors or pytorch_model*.bin)")


def check_trusted(files: Collection[str], trust: str | None) -> None:
    """Check that weight files are safetensors, or that pickled ones are trusted.

    Raises:
        UserError: they are pickled, and `trust` is not "pickle".
    """
    pickled = [file for file in files if not file.endswith(".safetensors")]
    if pickled and trust != "pickle":
        raise UserError(
            f"{pickled[0]}: pickled weights, a format that can hold code; save the model as "
            f"safetensors, or set `trust: pickle` beside `model` if you trust who made them"
        )


def _read_index(folder: Folder, name: str) -> dict[str, str]:
    index = read_json(folder, name).get("weight_map")
    if not isinstance(index, dict) or not index or not all(map(_is_name, index.values())):
        raise UserError(f"{name}: its weight_map does not name files; {SAVE_AGAIN}")
    return index


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and "/" not in file


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        UserError: the file holds something else.
    """
    data = folder.read(name)
    check_no_pointer(data, name)
    try:
        value = json.loads(data.decode())  # of bytes it would take UTF-16 too, as no engine does
    except ValueError as error:
        raise UserError(
            f"{name}: no JSON in UTF-8 without a byte-order mark ({error}); {SAVE_AGAIN}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: no JSON object; {SAVE_AGAIN}")
    return value


def check_no_pointer(start: bytes, file: str) -> None:
    """Raise UserError if a file is a git-lfs pointer."""
    if start.startswith(POINTER):
        raise UserError(f"{file}: a git-lfs pointer in place of the file; run `git lfs pull`")


def read_file(folder: Folder, name: str) -> Tensors | None:
    """Return the tensors of one file; None if its format has no header.

    Raises:
        UserError: the file is truncated, or not weights.
    """
    with folder.filesystem.open_input_file(f"{folder.path}/{name}") as stream:
        check_no_pointer(stream.read(len(POINTER)), name)
        stream.seek(0)
        try:
            if name.endswith(".safetensors"):
                return dict(_safetensors(stream, name))
            return _pickled(stream, name)
        except (*BROKEN, zipfile.BadZipFile) as error:
            raise UserError(f"{name}: cut off, or no weights ({error}); {SAVE_AGAIN}") from None
        except pickle.UnpicklingError as error:
            raise UserError(f"{name}: holds more than tensors ({error}); {SAVE_AGAIN}") from None


# --- safetensors -------------------------------------------------------------------------------


def _safetensors(stream: pa.NativeFile, file: str) -> Iterator[tuple[str, TensorHeader]]:
    """Yield the tensors of a file: 8 bytes with the header's length, a JSON header, then data."""
    size = stream.size()
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
        raise ValueError(f"it has {size:,} bytes, which are too few for its header")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape = entry["dtype"], tuple(entry["shape"])
        start, end_of_this = entry["data_offsets"]
        if start != end or (end_of_this - start) * 8 != math.prod(shape) * BITS[kind]:
            raise ValueError(f"{name} does not lie where its header says")
        end = end_of_this
        yield name, TensorHeader(file, kind, shape)
    if 8 + length + end != size:
        raise ValueError(f"it has {size:,} bytes in place of {8 + length + end:,}")


# --- torch's pickles ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


def _pickled(stream: pa.NativeFile, file: str) -> Tensors | None:
    """Return the tensors of a `torch.save` file without torch; only their table is unpickled."""
    if stream.read(4) != b"PK\x03\x04":
        if stream.size() < 1000 or stream.seek(0) or stream.read(1) != b"\x80":
            raise ValueError("it is not what torch.save writes")
        return None  # of torch before 1.6: tensors follow one another without a table
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        (table,) = (name for name in sizes if name.endswith("/data.pkl"))
        found = _Unpickler(io.BytesIO(archive.read(table))).load()
        folder = table.removesuffix("data.pkl")
        return {name: _described(tensor, file, sizes, folder) for name, tensor in found.items()}


def _described(tensor: Any, file: str, sizes: dict[str, int], folder: str) -> TensorHeader:
    storage, shape = tensor
    if 8 * sizes[f"{folder}data/{storage.key}"] < math.prod(shape) * BITS[storage.dtype]:
        raise ValueError(f"the bytes of a tensor of shape {shape} are not there")
    return TensorHeader(file, storage.dtype, tuple(shape))


class _Table(dict[str, Any]):
    """A dict with attributes: a model's state has `_metadata`."""


class _Unpickler(pickle.Unpickler):
    """Builds (storage, shape) for each tensor and plain containers; rejects all else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, *_: (storage, shape)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        if module == "collections" and name == "OrderedDict":
            return _Table
        if module == "torch" and name.removesuffix("Storage") in STORAGES:
            return STORAGES[name.removesuffix("Storage")]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, key: Any) -> _Storage:
        return _Storage(key[1], key[2])
