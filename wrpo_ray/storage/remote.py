"""Files on their way into the node cache, and folders of object stores as their source.

Each file is hashed once: while its bytes are written, or when the hub's client has written them.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs

from wrpo_ray.storage.weight_files import engine_files, small_engine_files

ARRIVING = ".arriving"
"""Folder within an unfinished copy with files that are not known to be right yet."""
MAX_STREAMS = 8
"""Files that a node fetches at once."""
PIECE = 16 * 2**20
"""Bytes of a file that are read at once."""
GIT = "git:"
"""Begins the hashes of small files on the hub: git's, of a blob. All others are SHA-256."""


@dataclass(frozen=True)
class Listed:
    """A file of a source, before it is fetched."""

    size: int
    hash: str = ""
    """SHA-256 in hex digits, or `git:` and git's hash; empty if the source knows none."""


class Source(Protocol):
    """The source of a copy; `str()` is its name for users, without credentials."""

    def files(self) -> dict[str, Listed]:
        """Return the files by their paths within the folder."""

    def fetch(self, name: str, file: Listed, to: Path) -> str:
        """Download one file into the folder `to`, where it appears when it is right.

        Returns its hash.

        Raises:
            OSError: it does not arrive, or has another hash than the listed one.
        """


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of an object store as a source of the node cache (`Source`)."""

    filesystem: pafs.FileSystem
    path: str
    name: str
    """The address without secrets."""
    has_weights: bool = True
    """Whether a model's weights are among its files; else an engine reads them in the store."""

    def __str__(self) -> str:
        return self.name

    def files(self) -> dict[str, Listed]:
        """Return all files, or those that an engine needs if it is a model."""
        selector = pafs.FileSelector(self.path, recursive=True)
        found = self.filesystem.get_file_info(selector)
        start = len(self.path) + 1
        files = {i.path[start:]: Listed(i.size) for i in found if i.is_file}
        if "config.json" not in files:
            return files
        wanted = engine_files(files) if self.has_weights else small_engine_files(files)
        return {n: files[n] for n in wanted}

    def fetch(self, name: str, file: Listed, to: Path) -> str:
        """Copy a file, and return the hash that was computed on the way."""
        try:
            return write_pieces(self._pieces(name), name, file, to)
        except OSError as error:
            raise OSError(f"{self}: {error}") from error

    def _pieces(self, name: str) -> Iterator[bytes]:
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            while piece := stream.read(PIECE):
                yield piece


def fetch_all(key: str, source: Source, files: Mapping[str, Listed], to: Path) -> dict[str, str]:
    """Fetch missing files from the source, `MAX_STREAMS` at a time; returns their hashes."""
    missing = [name for name in files if not (to / name).is_file()]
    with ThreadPoolExecutor(MAX_STREAMS) as threads:
        made = [(name, threads.submit(source.fetch, name, files[name], to)) for name in missing]
        return {name: done.result() for name, done in made}


class Transfer:
    """How this process fetches the files of a copy: from their source, or as it was told.

    A worker on a cluster asks other nodes first (`runtime.weights`).
    """

    def __init__(self) -> None:
        self.fetch = fetch_all


TRANSFER = Transfer()


def write_pieces(pieces: Iterable[bytes], name: str, file: Listed, to: Path) -> str:
    """Write a file and hash it on the way; it appears in `to` when it is right. Returns the hash.

    Raises:
        OSError: its size or its hash is another one than listed.
    """
    arriving, digest, size = to / ARRIVING / name, hasher(file), 0
    arriving.parent.mkdir(parents=True, exist_ok=True)
    with arriving.open("wb") as out:
        for piece in pieces:
            out.write(piece)
            digest.update(piece)
            size += len(piece)
    if size != file.size:
        arriving.unlink()
        raise OSError(f"{name} arrived with {size} bytes in place of {file.size}")
    return put_in_place(arriving, name, file, digest, to)


def put_in_place(arrived: Path, name: str, file: Listed, digest: Any, to: Path) -> str:
    """Move a file that has arrived, and that `digest` has read, to its place; returns its hash.

    Raises:
        OSError: it has another hash than the listed one.
    """
    found = f"{GIT if file.hash.startswith(GIT) else ''}{digest.hexdigest()}"
    if file.hash not in ("", found):
        arrived.unlink()
        raise OSError(f"the content of {name} does not match its hash")
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(arrived, to / name)
    return found


def hasher(file: Listed) -> Any:
    """Return an empty hash of the kind that the file is listed with."""
    if not file.hash.startswith(GIT):
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def pieces_of(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a local file."""
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            yield piece


def read_piece(copy: Path, name: str, offset: int) -> bytes:
    """Return a piece of a file of a copy, complete or on its way.

    Raises:
        OSError: neither has the file.
    """
    for folder in (copy, copy.with_name(f"{copy.name}.part"), copy):  # renamed meanwhile
        with suppress(FileNotFoundError), (folder / name).open("rb") as stream:
            stream.seek(offset)
            return stream.read(PIECE)
    raise FileNotFoundError(f"{copy.name} has no {name} (any more)")
