"""Folders, local or in an object store, through pyarrow.fs.

A file appears whole or not at all: local files are renamed into place, object stores
publish an object when it is complete. Nothing else relies on rename.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from wrpo_ray.errors import BrokenFileError, UserError
from wrpo_ray.storage.cache import node_cache, plain_path
from wrpo_ray.storage.weight_files import engine_files
from wrpo_ray.text.addresses import (
    Address,
    address_problem,
    redact,
    without_secrets,
)

TEMPORARY_PREFIX = ".part-"
"""Prefix of files that are being written; readers pass over them."""
HUB_SCHEME = "hf://"
"""Where the address of a model on the Hugging Face hub begins (`hub`)."""
MAX_STREAMS = 8
"""Files that are copied from an object store at once."""


@dataclass(frozen=True, repr=False)
class Folder:
    """A folder by its address (see `wrpo_ray.text.addresses`); it travels to workers by value.

    Such as `/data/run`, `s3://bucket/run`,
    `s3://bucket/run?endpoint_override=host:port&scheme=http`, or a model of the Hugging Face hub
    at a commit, `hf://org/name@commit`.

    Raises:
        UserError: the address holds credentials, or an option that is not known.
    """

    uri: str

    def __post_init__(self) -> None:
        if reason := address_problem(self.uri):
            raise UserError(f"{without_secrets(self.uri)}: {reason}")

    @cached_property
    def _address(self) -> Address | None:
        return Address.of(self.uri)

    @cached_property
    def _opened(self) -> tuple[pafs.FileSystem, str]:
        if self._address is None:
            return pafs.LocalFileSystem(), os.path.abspath(self._local_path)
        quoted = replace(self._address, name=quote(self._address.name))  # a URI is escaped
        try:
            filesystem, path = pafs.FileSystem.from_uri(quoted.whole)
        except pa.ArrowInvalid as error:
            raise UserError(f"{self}: not a storage address: {redact(str(error))}") from None
        except OSError as error:
            reason = " ".join(redact(str(error)).split())
            raise UserError(
                f"{self}: the store does not open ({reason}); check the address, the network, and "
                f"the credentials in the environment"
            ) from None
        return filesystem, path

    @property
    def is_remote(self) -> bool:
        """Whether it lies in an object store."""
        return self._address is not None

    @property
    def is_relative(self) -> bool:
        """Whether it is local, and where depends on the working directory."""
        return not self.is_remote and not os.path.isabs(self._local_path)

    @property
    def _local_path(self) -> str:
        return os.path.expanduser(self.uri.removeprefix("file://"))

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow filesystem."""
        return self._opened[0]

    @property
    def path(self) -> str:
        """The path within `filesystem`; absolute for local folders."""
        return self._opened[1]

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)

    def __str__(self) -> str:
        """The address without the options that open its store; names are as they are."""
        return self.uri if self._address is None else str(self._address)

    def __repr__(self) -> str:
        return f"Folder({str(self)!r})"

    def absolute(self) -> Folder:
        """The same folder by a path that any working directory leads to."""
        return self if self.is_remote else Folder(self.path)

    def __truediv__(self, name: str) -> Folder:
        if self._address is None:
            return Folder(f"{self.uri.rstrip('/')}/{name}")
        inside = f"{self._address.name.rstrip('/')}/{name}"
        return Folder(replace(self._address, name=inside).whole)

    def is_within(self, other: Folder) -> bool:
        """Whether it lies below another folder of the same store."""
        return str(self).startswith(f"{other}/")

    # --- files ---------------------------------------------------------------------------

    def exists(self, name: str = "") -> bool:
        """Whether the file or folder `name` is there."""
        return self.filesystem.get_file_info(self._at(name)).type != pafs.FileType.NotFound

    def files(self, name: str = "", suffix: str = "") -> list[str]:
        """Names of the finished files right in the subfolder `name`, sorted."""
        selector = pafs.FileSelector(self._at(name), allow_not_found=True)
        found = [i.base_name for i in self.filesystem.get_file_info(selector) if i.is_file]
        return sorted(n for n in found if n.endswith(suffix) and not n.startswith(TEMPORARY_PREFIX))

    def folders(self) -> list[str]:
        """Names of the folders right in this one, sorted."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return sorted(i.base_name for i in found if i.type == pafs.FileType.Directory)

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        with self.filesystem.open_input_stream(self._at(name)) as stream:
            return stream.read()

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; it appears at once."""
        with self.open_output(name) as stream:
            stream.write(data)

    @contextmanager
    def open_output(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream into a file, which appears when the block ends."""
        with self._publish(name) as path, self.filesystem.open_output_stream(path) as stream:
            yield stream

    def read_json(self, name: str) -> Any:
        """The value of a JSON file.

        Raises:
            BrokenFileError: it holds none, as after it was cut off.
        """
        data = self.read(name)  # a store that does not open is no broken file
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._broken(name, f"holds no JSON ({str(error)[:100]})") from None

    def read_record(self, name: str, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
        """The object of a JSON file, with fields of these types.

        Raises:
            BrokenFileError: it holds no such object.
        """
        value = self.read_json(name)
        if not isinstance(value, dict):
            raise self._broken(name, f"holds a {type(value).__name__} in place of a JSON object")
        for key, kind in kinds.items():
            if not isinstance(value.get(key), kind):
                raise self._broken(name, f"has no right `{key}`")
        return value

    def holds_json(self, name: str, value: Any) -> bool:
        """Whether a JSON file is there and has this value."""
        try:
            return bool(self.read_json(name) == value)
        except (FileNotFoundError, BrokenFileError):
            return False

    def _broken(self, name: str, what: str) -> BrokenFileError:
        return BrokenFileError(
            f"{self}/{name}: {what}; it was cut off or changed after it was written: put it back "
            f"from a copy, or delete it, so that it is made again"
        )

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as indented JSON."""
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_records(self, name: str) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines; a line that is not whole, yet, is passed over.

        Lines end with a newline alone: within one there may be spaces and other separators.
        """
        return [r for line in self.read(name).split(b"\n") if (r := _record(line)) is not None]

    def latest_records(self, name: str) -> Iterator[dict[str, Any]]:
        """The same from the last line on; only those that are asked for are parsed."""
        return filter(None, map(_record, reversed(self.read(name).split(b"\n"))))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """The table of a Parquet file."""
        return pq.read_table(self._at(name), columns=columns, filesystem=self.filesystem)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file; it appears at once."""
        repeated = [path for path, kind in _leaves(table.schema) if not _is_varied(path, kind)]
        with self._publish(name) as path:
            pq.write_table(
                table, path, filesystem=self.filesystem, compression="zstd", use_dictionary=repeated
            )

    @property
    def size(self) -> int:
        """Bytes, where the path is that of a file."""
        return self.filesystem.get_file_info(self.path).size or 0

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all in it; nothing happens where there is none."""
        info = self.filesystem.get_file_info(self._at(name))
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self._at(name))
        elif info.is_file:
            self.filesystem.delete_file(self._at(name))

    # --- whole folders -------------------------------------------------------------------

    def upload(self, local: Path) -> None:
        """Copy a local folder's files to here."""
        self.filesystem.create_dir(self.path, recursive=True)
        pafs.copy_files(
            str(local),
            self.path,
            source_filesystem=pafs.LocalFileSystem(),
            destination_filesystem=self.filesystem,
        )

    def local(self, version: str = "") -> Path:
        """A local path with the folder's files: itself, or a copy in the node's cache.

        It has no character that an engine would take for a pattern or an address (`plain_path`).

        The copy is made once a node and version, under a lock, and held by this process until it
        ends (`cache`). Folders of finished steps never change; for others `version` has to tell
        their contents apart. Of a model on the hub it holds what an engine needs.

        Raises:
            UserError: no room, or the hub does not give it.
        """
        if not self.is_remote:
            return plain_path(Path(self.path))
        if self.uri.startswith(HUB_SCHEME):
            from wrpo_ray.storage.hub import HubModel  # its client takes a moment to import

            return HubModel.at(self.uri).local()
        key = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.uri}#{version}").hex
        return node_cache().copy(key, _Remote(self))

    # --- inside --------------------------------------------------------------------------

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}".rstrip("/") if name else self.path

    def _publish(self, name: str) -> _Publication:
        return _Publication(self.filesystem, self._at(name))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _leaves(fields: Iterable[pa.Field], above: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """The Parquet columns of a schema: their paths and types."""
    for field in fields:
        kind, path = field.type, above + field.name
        if pa.types.is_list(kind):
            yield from _leaves([kind.value_field], f"{path}.list.")
        elif pa.types.is_struct(kind):
            yield from _leaves(kind, f"{path}.")
        else:
            yield path, kind


def _is_varied(path: str, kind: pa.DataType) -> bool:
    """Whether a column's values hardly repeat: a dictionary of them would only cost time."""
    return pa.types.is_floating(kind) or path.rpartition(".")[2] in ("text", "content")


class _Publication:
    """Gives the path to write to, and puts the file in place when the block ends well."""

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


@dataclass(frozen=True)
class _Remote:
    """A folder of an object store as the source of a copy."""

    folder: Folder

    def __str__(self) -> str:
        return str(self.folder)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file in the folder and below; of a model's those that an engine needs."""
        selector = pafs.FileSelector(self.folder.path, recursive=True)
        found = self.folder.filesystem.get_file_info(selector)
        start = len(self.folder.path) + 1
        sizes = {i.path[start:]: i.size for i in found if i.is_file}
        return {n: sizes[n] for n in engine_files(sizes)} if "config.json" in sizes else sizes

    def fetch(self, sizes: dict[str, int], to: Path) -> None:
        """Copy files that are not there; several at a time."""
        for left in to.rglob(f"{TEMPORARY_PREFIX}*"):  # of an interrupted copy
            left.unlink()
        missing = [name for name in sizes if not (to / name).is_file()]
        with ThreadPoolExecutor(MAX_STREAMS) as threads:
            for done in [threads.submit(self._fetch, name, to) for name in missing]:
                done.result()

    def _fetch(self, name: str, to: Path) -> None:
        target = _Publication(pafs.LocalFileSystem(), str(to / name))
        with target as path:
            pafs.copy_files(
                f"{self.folder.path}/{name}",
                path,
                source_filesystem=self.folder.filesystem,
                destination_filesystem=pafs.LocalFileSystem(),
            )


def check_writable(folder: Folder, what: str = "output") -> None:
    """Write and delete a probe.

    Raises:
        UserError: naming the folder and what the system said.
    """
    probe = f"{TEMPORARY_PREFIX}probe-{uuid.uuid4().hex[:8]}"
    try:
        folder.write(probe, b"")
        folder.delete(probe)
    except OSError as error:
        reason = " ".join(redact(str(error)).split())
        raise UserError(
            f"{what}: {folder} is not writable ({reason}); set `{what}` to a folder you can write"
        ) from None
