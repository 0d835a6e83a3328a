"""Mean bytes of texts in the first rows of the user's files: a prior of lengths in tokens."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from statistics import mean
from typing import Any

from wrpo_ray.config import PromptsConfig, RecordedAnswers
from wrpo_ray.data.published import RowError
from wrpo_ray.errors import UserError
from wrpo_ray.stages.ingest.readers import Row, exist, input_files, messages_of, read_rows
from wrpo_ray.storage.folder import HUB_SCHEME

FIRST = 200
"""Rows of a file that are looked at."""


def prompt_bytes(files: Iterable[PromptsConfig]) -> float | None:
    """Mean bytes of the messages of a prompt; None if no file can be read, or all are on the hub.

    The mean is over files, each by its first rows.
    """
    return _mean(_sizes(f.path, f.needed, partial(_conversation, f)) for f in files)


def recorded_bytes(files: Iterable[RecordedAnswers]) -> float | None:
    """Mean bytes of a recorded answer; None if no file can be read, or all are on the hub."""
    columns = {(f.path, f.columns.response) for f in files}
    return _mean(_sizes(path, [name], partial(_cell, name)) for path, name in columns)


def _sizes(path: str, columns: list[str], size: Callable[[Row], float]) -> Iterator[float]:
    """Sizes of a file's first rows; bad rows are left out."""
    if path.startswith(HUB_SCHEME) or not exist(path):
        return
    with suppress(UserError, OSError, ValueError):  # a run tells what is wrong with a file
        for _, row in islice(read_rows(input_files(path, path)[0], columns), FIRST):
            with suppress(RowError, KeyError, TypeError):
                yield size(row) if isinstance(row, dict) else size({})


def _cell(name: str, row: Row) -> float:
    return _size(row[name])


def _conversation(given: PromptsConfig, row: Row) -> float:
    return sum(_size(message["content"]) for message in messages_of(row, given.columns))


def _size(value: Any) -> float:
    """Bytes of a text, or the mean of several ones."""
    return mean(map(_size, value)) if isinstance(value, list) else len(value.encode())


def _mean(files: Iterable[Iterator[float]]) -> float | None:
    found = [mean(sizes) for sizes in map(list, files) if sizes]
    return mean(found) if found else None
