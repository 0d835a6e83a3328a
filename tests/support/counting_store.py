"""A local folder that is used as an object store, and counts what would be requests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyarrow.fs as pafs

from wrpo_ray.storage.folder import Folder


class _Handler(pafs.FileSystemHandler):
    """Local files; `list`, `head`, `read`, `write` and `delete` are counted."""

    def __init__(self, requests: Counter[str]):
        self.requests, self.local = requests, pafs.LocalFileSystem()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def get_type_name(self) -> str:
        return "counting"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[Any]:
        self.requests["head"] += len(paths)
        return list(self.local.get_file_info(paths))

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        self.requests["list"] += 1
        return list(self.local.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self.local.create_dir(path, recursive=recursive)

    def open_input_stream(self, path: str) -> Any:
        self.requests["read"] += 1
        return self.local.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        self.requests["read"] += 1
        return self.local.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self.requests["write"] += 1
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return self.local.open_output_stream(path)

    def delete_file(self, path: str) -> None:
        self.requests["delete"] += 1
        self.local.delete_file(path)

    def _unused(self, *_: Any) -> Any:
        raise NotImplementedError

    copy_file = move = open_append_stream = _unused
    delete_dir = delete_dir_contents = delete_root_dir_contents = _unused


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """The requests of all folders in the block, by kind."""
    requests: Counter[str] = Counter()
    filesystem = pafs.PyFileSystem(_Handler(requests))
    opened = property(lambda folder: (filesystem, os.path.abspath(folder._local_path)))
    with mock.patch.object(Folder, "_opened", opened):
        yield requests
