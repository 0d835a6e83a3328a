"""Writing files that appear complete or not at all, and the encoding of their Parquet columns."""

import os
import uuid
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.fs as pafs

TEMPORARY_PREFIX = ".part-"
"""Prefix of files that are being written; readers skip them."""


class Publication:
    """Context with the path to write to; puts the file in place if the block succeeds."""

    def __init__(self, filesystem: pafs.FileSystem, path: str):
        self.filesystem, self.path = filesystem, path
        self.is_local = isinstance(filesystem, pafs.LocalFileSystem)
        folder, _, name = path.rpartition("/")
        self.folder = folder
        unique = f"{folder}/{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}-{name}"
        self.partial = unique if self.is_local else path

    def __enter__(self) -> str:
        if self.is_local:
            os.makedirs(self.folder, exist_ok=True)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.is_local:
            return
        if kind is None:
            os.replace(self.partial, self.path)
        elif os.path.exists(self.partial):
            os.remove(self.partial)


def dictionary_columns(schema: pa.Schema) -> list[str]:
    """Return the paths of Parquet columns with repeated values, stored with a dictionary."""
    return [path for path, kind in _leaves(schema) if not _is_varied(path, kind)]


def _leaves(fields: Iterable[pa.Field], above: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Yield the path and type of each Parquet column."""
    for field in fields:
        kind, path = field.type, above + field.name
        if pa.types.is_list(kind):
            yield from _leaves([kind.value_field], f"{path}.list.")
        elif pa.types.is_struct(kind):
            yield from _leaves(kind, f"{path}.")
        else:
            yield path, kind


def _is_varied(path: str, kind: pa.DataType) -> bool:
    """Whether a column's values rarely repeat, so that a dictionary would only cost time."""
    return pa.types.is_floating(kind) or path.rpartition(".")[2] in ("text", "content")
