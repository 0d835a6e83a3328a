"""Copying a folder of an object store into the node cache."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from wrpo_ray.storage.publish import TEMPORARY_PREFIX, Publication
from wrpo_ray.storage.weight_files import engine_files

MAX_STREAMS = 8
"""Files that are copied at once."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of an object store as a source of the node cache (`cache.Source`)."""

    filesystem: pafs.FileSystem
    path: str
    name: str
    """The address without secrets."""

    def __str__(self) -> str:
        return self.name

    def sizes(self) -> dict[str, int]:
        """Return {path: bytes} of all files, or of those that an engine needs if it is a model."""
        selector = pafs.FileSelector(self.path, recursive=True)
        found = self.filesystem.get_file_info(selector)
        start = len(self.path) + 1
        sizes = {i.path[start:]: i.size for i in found if i.is_file}
        return {n: sizes[n] for n in engine_files(sizes)} if "config.json" in sizes else sizes

    def fetch(self, sizes: dict[str, int], to: Path) -> None:
        """Copy missing files, `MAX_STREAMS` at a time."""
        for left in to.rglob(f"{TEMPORARY_PREFIX}*"):  # from an interrupted copy
            left.unlink()
        missing = [name for name in sizes if not (to / name).is_file()]
        with ThreadPoolExecutor(MAX_STREAMS) as threads:
            for done in [threads.submit(self._fetch, name, to) for name in missing]:
                done.result()

    def _fetch(self, name: str, to: Path) -> None:
        target = Publication(pafs.LocalFileSystem(), str(to / name))
        with target as path:
            pafs.copy_files(
                f"{self.path}/{name}",
                path,
                source_filesystem=self.filesystem,
                destination_filesystem=pafs.LocalFileSystem(),
            )
