"""Folders, local or in an object store, through pyarrow.fs.

A file appears complete or not at all: local files are renamed into place, object stores publish an
object when it is complete. Nothing else relies on rename.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from wrpo_ray.errors import BrokenFileError, UserError
from wrpo_ray.storage.cache import node_cache, plain_path
from wrpo_ray.storage.publish import TEMPORARY_PREFIX, Publication, dictionary_columns
from wrpo_ray.storage.remote import RemoteFolder
from wrpo_ray.text.addresses import Address, address_problem, redact, without_secrets

if TYPE_CHECKING:
    from wrpo_ray.storage.hub import HubModel

HUB_SCHEME = "hf://"
"""Scheme of the address of a model on the Hugging Face hub (see `hub`)."""
DATASET_SCHEME = f"{HUB_SCHEME}datasets/"
"""Begins the address of files of a data set there, which are only read (see `hub_data`)."""

DELAYED_OPEN = "allow_delayed_open"
"""Option of S3 stores by which a file below the size of a part (10 MB) is written by one request in
place of three: the upload in parts begins when the first part is full."""


@dataclass(frozen=True, repr=False)
class Folder:
    """A folder, given by its address (see `wrpo_ray.text.addresses`); pickled by value.

    Such as `/data/run`, `s3://bucket/run`,
    `s3://bucket/run?endpoint_override=host:port&scheme=http`, or a model of the Hugging Face hub
    at a commit, `hf://org/name@commit`.

    Raises:
        UserError: the address holds credentials, or an unknown option.
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
        if self.uri.startswith(DATASET_SCHEME):
            from wrpo_ray.storage import hub_data  # its client takes a moment to import

            return hub_data.open_store(self.uri)
        quoted = replace(self._address, name=quote(self._address.name))  # a URI is escaped
        if quoted.scheme == "s3" and DELAYED_OPEN not in quoted.options:
            quoted = replace(quoted, options=f"{quoted.options}&{DELAYED_OPEN}=true".lstrip("&"))
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
        """Whether it is in an object store."""
        return self._address is not None

    @property
    def is_relative(self) -> bool:
        """Whether it is a local path relative to the working directory."""
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
        """The address without options of the store."""
        return self.uri if self._address is None else str(self._address)

    def __repr__(self) -> str:
        return f"Folder({str(self)!r})"

    def absolute(self) -> Folder:
        """Return the same folder with an absolute path."""
        return self if self.is_remote else Folder(self.path)

    def __truediv__(self, name: str) -> Folder:
        if self._address is None:
            return Folder(f"{self.uri.rstrip('/')}/{name}")
        inside = f"{self._address.name.rstrip('/')}/{name}"
        return Folder(replace(self._address, name=inside).whole)

    def parted(self) -> tuple[Folder, str]:
        """Return the folder that it is in, and its name there; a local one is absolute."""
        if self._address is None:
            folder, name = os.path.split(self.path)
            return Folder(folder), name
        folder, _, name = self._address.name.rpartition("/")
        return Folder(replace(self._address, name=folder).whole), name

    def is_within(self, other: Folder) -> bool:
        """Whether it is below another folder of the same store."""
        return str(self).startswith(f"{other}/")

    # --- files ---------------------------------------------------------------------------

    def exists(self, name: str = "") -> bool:
        """Whether the file or folder `name` exists."""
        info = self.filesystem.get_file_info(self._at(name))
        return bool(info.type != pafs.FileType.NotFound)

    def files(self, name: str = "", suffix: str = "") -> list[str]:
        """Return the sorted names of the complete files directly in the subfolder `name`."""
        found = [i.base_name for i in self.infos(name) if i.is_file]
        return sorted(n for n in found if n.endswith(suffix) and not n.startswith(TEMPORARY_PREFIX))

    def infos(self, name: str = "", *, recursive: bool = False) -> list[pafs.FileInfo]:
        """Return what lies in the subfolder `name`, by one request a thousand in object stores."""
        selector = pafs.FileSelector(self._at(name), allow_not_found=True, recursive=recursive)
        found: list[pafs.FileInfo] = self.filesystem.get_file_info(selector)
        return found

    def folders(self) -> list[str]:
        """Return the sorted names of the folders directly in this one."""
        found = self.infos()
        return sorted(i.base_name for i in found if i.type == pafs.FileType.Directory)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        with self.filesystem.open_input_stream(self._at(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a file, which appears when it is complete."""
        with self.open_output(name) as stream:
            stream.write(data)

    @contextmanager
    def open_output(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a stream into a file, which appears when the block ends."""
        with self._publish(name) as path, self.filesystem.open_output_stream(path) as stream:
            yield stream

    def read_json(self, name: str) -> Any:
        """Return the value of a JSON file.

        Raises:
            BrokenFileError: it is not valid JSON, such as a truncated file.
        """
        data = self.read(name)  # a store that cannot be opened is another error
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._broken(name, f"is not valid JSON ({str(error)[:100]})") from None

    def read_record(self, name: str, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
        """Return the object of a JSON file with fields of these types.

        Raises:
            BrokenFileError: the file holds something else.
        """
        value = self.read_json(name)
        if not isinstance(value, dict):
            raise self._broken(name, f"holds a {type(value).__name__} in place of a JSON object")
        for key, kind in kinds.items():
            if not isinstance(value.get(key), kind):
                raise self._broken(name, f"has no valid `{key}`")
        return value

    def holds_json(self, name: str, value: Any) -> bool:
        """Whether a JSON file exists and has this value."""
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
        """Return the objects of a file of JSON lines, without incomplete lines.

        Only a newline ends a line: a line may contain other separators.
        """
        return [r for line in self.read(name).split(b"\n") if (r := _record(line)) is not None]

    def latest_records(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the same objects from the last line backwards, parsed one at a time."""
        return filter(None, map(_record, reversed(self.read(name).split(b"\n"))))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Return the table of a Parquet file."""
        return pq.read_table(self._at(name), columns=columns, filesystem=self.filesystem)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file, which appears when it is complete."""
        columns = dictionary_columns(table.schema)
        with self._publish(name) as path:
            pq.write_table(
                table, path, filesystem=self.filesystem, compression="zstd", use_dictionary=columns
            )

    @property
    def size(self) -> int:
        """Bytes of the file at this path; 0 for a folder."""
        return self.filesystem.get_file_info(self.path).size or 0

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with its contents, if it exists."""
        info = self.filesystem.get_file_info(self._at(name))
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self._at(name))
        elif info.is_file:
            self.filesystem.delete_file(self._at(name))

    # --- whole folders -------------------------------------------------------------------

    def upload(self, local: Path) -> None:
        """Copy the files of a local folder into this one."""
        self.filesystem.create_dir(self.path, recursive=True)
        pafs.copy_files(
            str(local),
            self.path,
            source_filesystem=pafs.LocalFileSystem(),
            destination_filesystem=self.filesystem,
        )

    def local(self, version: str = "") -> Path:
        """Return a local path with the folder's files: itself, or a copy in the node cache.

        The path has no special characters of glob patterns or addresses (`plain_path`). The copy is
        made once for each node and `version`, and locked by this process until it ends (`cache`).
        Folders of finished steps never change; for other folders `version` has to identify the
        contents. The copy of a model has only the files that an engine needs.

        Raises:
            UserError: the copy does not fit, or the hub rejects the request.
        """
        if not self.is_remote:
            return plain_path(Path(self.path))
        key, source = self._copied(version)
        found = None if isinstance(source, RemoteFolder) else source.in_users_cache()
        return found or node_cache().copy(key, source)

    def bring(self, version: str = "", spared: Collection[str] = ()) -> tuple[str, dict[str, str]]:
        """Make the copy that `local` will return, ahead of its use (`NodeCache.bring`).

        Returns its key and the hashes of its files; none for a model in the user's own cache.
        """
        key, source = self._copied(version)
        if not isinstance(source, RemoteFolder) and source.in_users_cache():
            return key, {}
        return key, node_cache().bring(key, source, spared)

    def copy_key(self, version: str = "") -> str:
        """The key of its copies in node caches; it is in a store or on the hub."""
        return self._copied(version)[0]

    def _copied(self, version: str) -> tuple[str, RemoteFolder | HubModel]:
        if self.uri.startswith(HUB_SCHEME):
            from wrpo_ray.storage.hub import HubModel  # its client takes a moment to import

            model = HubModel.at(self.uri)
            return model.key, model
        key = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.uri}#{version}").hex
        return key, RemoteFolder(self.filesystem, self.path, str(self))

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}".rstrip("/") if name else self.path

    def _publish(self, name: str) -> Publication:
        return Publication(self.filesystem, self._at(name))


class WithoutWeights(Folder):
    """A model's folder in an object store whose local copies have no weights."""

    def _copied(self, version: str) -> tuple[str, RemoteFolder | HubModel]:
        key = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.uri}#{version}#without weights").hex
        return key, RemoteFolder(self.filesystem, self.path, str(self), has_weights=False)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def check_writable(folder: Folder, what: str = "output") -> None:
    """Check that a file can be written and deleted.

    Raises:
        UserError: names the folder and the system's reason.
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
