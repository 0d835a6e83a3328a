"""Data sets of the Hugging Face hub as input files: addresses, commits, and files read in place.

An address is `hf://datasets/org/name`, with a folder, a file or a pattern of file names after it.
The driver resolves its revision once and lists the files; from then on the address has the commit,
`hf://datasets/org/name@commit/data/train-*.parquet`. Tasks on any node read the files by ranges,
with the token in their environment (HF_TOKEN), and keep no copy.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Self

import pyarrow as pa
import pyarrow.fs as pafs
from huggingface_hub import HfApi, HfFileSystem, constants
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from wrpo_ray.errors import UserError
from wrpo_ray.storage.folder import DATASET_SCHEME, HUB_SCHEME
from wrpo_ray.storage.hub import DATASETS, Pins, commit_of, explain_errors, one_revision

ADDRESS = re.compile(
    rf"{DATASET_SCHEME}(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<at>[\w.-]+))?(?:/(?P<path>.*))?",
    re.DOTALL,
)
COMMIT = re.compile("[0-9a-f]{40}")
SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?$")
"""The number at the end of a file's name without its suffix."""
AS_PARQUET = "refs/convert/parquet"
"""The branch in which the hub keeps most data sets as Parquet files."""
BLOCK = 2**20
"""Bytes that are read ahead where a file is read by ranges."""


@dataclass(frozen=True)
class HubData:
    """Files of a data set at a commit."""

    name: str
    """`org/name`"""
    commit: str
    path: str
    """A folder, a file, or a folder and a pattern of file names, within the repository."""

    @classmethod
    def at(cls, uri: str) -> Self:
        """Return the files at an address with a commit.

        Raises:
            UserError: it has none.
        """
        match = _parsed(uri)
        if not COMMIT.fullmatch(match["at"] or ""):
            raise UserError(f"{uri}: a data set of the hub is only an input, read at a commit")
        return cls(match["name"], match["at"], (match["path"] or "").strip("/"))

    @property
    def root(self) -> str:
        """The path of the repository in the hub's file system."""
        return f"{DATASETS}{self.name}@{self.commit}"

    def __str__(self) -> str:
        return f"{DATASET_SCHEME}{self.name}/{self.path}".rstrip("/")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors of the hub into a UserError of one line with the remedy."""
        with explain_errors(f"{DATASETS}{self.name}", self.commit):
            yield

    def files(self, suffixes: tuple[str, ...]) -> list[str]:
        """Return the sorted addresses of the files with these suffixes.

        Of a folder, those directly in it, or in its only subfolder if it has no others.

        Raises:
            UserError: there are none, they are of several splits, or the hub denies access.
        """
        folder, _, last = self.path.rpartition("/")
        if not last:
            return self._in_folder("", suffixes)
        files, folders = self._listed(folder)
        if last in folders:
            return self._in_folder(self.path, suffixes)
        pattern = last.replace("[", "[[]")
        found = [n for n in files if fnmatchcase(n, pattern) and n.endswith(suffixes)]
        if not found:
            raise UserError(f"{self}: no such {_names(suffixes)} file; {_there(files, folders)}")
        return self._addresses(folder, found)

    def _in_folder(self, folder: str, suffixes: tuple[str, ...]) -> list[str]:
        files, folders = self._listed(folder)
        found = [name for name in files if name.endswith(suffixes)]
        if not found and len(folders) == 1:
            return self._in_folder(f"{folder}/{folders[0]}".strip("/"), suffixes)
        if not found:
            raise UserError(
                f"{self}: holds no {_names(suffixes)} file; {_there(files, folders)}; give a "
                f"folder or files of it, or try `revision: {AS_PARQUET}`, which has most data sets "
                f"as Parquet"
            )
        splits = sorted({SHARD.sub("", name.rpartition(".")[0]) for name in found})
        if len(splits) > 1:
            place = f"{DATASET_SCHEME}{self.name}/{folder}".rstrip("/")
            raise UserError(
                f"{self}: holds files of several splits ({', '.join(splits[:8])}); give one, such "
                f"as {place}/{splits[0]}*, or {place}/* for all"
            )
        return self._addresses(folder, found)

    def _addresses(self, folder: str, names: list[str]) -> list[str]:
        place = f"{HUB_SCHEME}{self.root}/{folder}".rstrip("/")
        return [f"{place}/{name}" for name in names]

    def _listed(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the files and of the folders directly in a folder."""
        with self.reading():
            try:
                return _listing(constants.ENDPOINT, self.name, self.commit, folder)
            except EntryNotFoundError:
                raise UserError(f"{self}: the data set has no folder {folder!r}") from None


@cache
def _listing(endpoint: str, name: str, commit: str, folder: str) -> tuple[list[str], list[str]]:
    tree = HfApi(endpoint).list_repo_tree(
        name, folder or None, revision=commit, repo_type="dataset"
    )
    files: list[str] = []
    folders: list[str] = []
    for entry in tree:
        kind = files if isinstance(entry, RepoFile) else folders
        kind.append(entry.path.rpartition("/")[2])
    return sorted(files), sorted(folders)


def pinned_path(path: str, revision: str | None, pins: Pins | None = None) -> str:
    """Return the address of a data set at its commit (`commit_of`); another path as it is.

    Raises:
        UserError: the hub does not know the data set or denies access.
    """
    if not path.startswith(HUB_SCHEME):
        return path
    match = _parsed(path)
    revision = one_revision(path, match["at"], revision)
    commit = commit_of(f"{DATASETS}{match['name']}", revision, pins)
    inside = f"/{match['path']}" if match["path"] else ""
    return f"{DATASET_SCHEME}{match['name']}@{commit}{inside}"


def _parsed(path: str) -> re.Match[str]:
    match = ADDRESS.fullmatch(path)
    if match is None:
        raise UserError(
            f"{path}: not a data set of the hub; its address is {DATASET_SCHEME}org/name, and a "
            f"folder, a file or a pattern such as data/train-*.parquet may follow"
        )
    return match


def open_store(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the hub as a file system, and the path in it of an address with a commit.

    Raises:
        UserError: the address has no commit.
    """
    place = HubData.at(uri)
    store = HfFileSystem(endpoint=constants.ENDPOINT, block_size=BLOCK)
    return pafs.PyFileSystem(_Store(store)), f"{place.root}/{place.path}".rstrip("/")


class _Store(pafs.FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """A stream is one request, and not one for each block."""

    def open_input_stream(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb", block_size=0), mode="r")


def _names(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffixes)


def _there(files: list[str], folders: list[str]) -> str:
    names = [*(f"{name}/" for name in folders), *files]
    more = ", ..." if len(names) > 8 else ""
    return f"there {'are' if names else 'is'} {', '.join(names[:8]) or 'nothing'}{more}"
