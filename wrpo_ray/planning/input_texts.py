"""The first rows of the user's files, for plans: bytes of texts, answers, equal prompts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from statistics import mean
from typing import Any, NamedTuple, TypeVar

from wrpo_ray.config import PromptsConfig, RecordedAnswers
from wrpo_ray.data.records import prompt_id
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.job import AnyInput
from wrpo_ray.stages.ingest.answers import is_of
from wrpo_ray.stages.ingest.cells import exact_text
from wrpo_ray.stages.ingest.readers import (
    Row,
    cell_of,
    exist,
    input_files,
    messages_of,
    read_rows,
)
from wrpo_ray.storage.folder import HUB_SCHEME

T = TypeVar("T")
FIRST, COMPARED, ALL = 200, 1000, 10_000
"""Rows of a file that are looked at for lengths, and for equal prompts; and most prompts that
recorded answers are compared with."""


def prompt_bytes(files: Iterable[AnyInput]) -> float | None:
    """Mean bytes of the messages of a prompt; None if no file can be read, or all are on the hub.

    The mean is over files, each by its first rows.
    """
    return _mean(_sizes(f.path, [f.columns.prompt], partial(_conversation, f)) for f in files)


def recorded_bytes(files: Iterable[RecordedAnswers]) -> float | None:
    """Mean bytes of a recorded answer; None if no file can be read, or all are on the hub."""
    columns = {(f.path, f.columns.response) for f in files}
    return _mean(_sizes(path, [name], partial(_cell, name)) for path, name in columns)


def answers_per_row(given: RecordedAnswers) -> float:
    """Mean answers of a row, where rows have lists of them; 1 where none can be read."""
    name = given.columns.response
    return _mean([_sizes(given.path, [name], partial(_answers, name))]) or 1.0


def share_of_prompts(files: Iterable[AnyInput]) -> float:
    """Different prompts over rows, in the first rows of all files together; 1 without any."""
    found: list[str] = []
    for f in files:
        key = partial(_key, f)
        found += _first(f.path, [f.columns.prompt], key, COMPARED)
    return len(set(found)) / len(found) if found else 1.0


class Matches(NamedTuple):
    """How a row of recorded answers of a source meets the prompts of a run."""

    rows: float
    """The share of rows that are to one of them."""
    prompts: float
    """Different ones of them for each row."""


def prompt_keys(prompts: Iterable[PromptsConfig], *, is_by_id: bool) -> frozenset[str] | None:
    """Return the keys or ids of all prompts; None where they are too many, or cannot be read."""
    known: set[str] = set()
    with suppress(UserError, OSError, ValueError):  # a run tells what is wrong with a file
        for one in prompts:
            most = min(one.limit or ALL + 1, ALL + 1)
            keys = list(islice(_keys(one, is_by_id=is_by_id), most))
            if len(keys) > ALL:
                return None
            known |= set(filter(None, keys))
        return frozenset(known)
    return None


def matches(given: RecordedAnswers, source: str, known: frozenset[str]) -> Matches | None:
    """How recorded answers of a source match prompts, by its first rows; None without any."""
    is_by_id, found = given.columns.id is not None, list[str]()
    with suppress(UserError, OSError, ValueError):
        keys = islice(_keys(given, is_by_id=is_by_id, source=source), ALL)
        found = list(islice(filter(None, keys), COMPARED))
    met = [key for key in found if key in known]
    return Matches(len(met) / len(found), len(set(met)) / len(found)) if found else None


def _keys(
    given: PromptsConfig | RecordedAnswers, *, is_by_id: bool, source: str = ""
) -> Iterator[str | None]:
    """Yield what the prompt of each row is known by; None for a row that is not meant."""
    if given.path.startswith(HUB_SCHEME):
        raise UserError(f"{given.path}: not read for a plan")
    columns = given.columns
    name = columns.id if is_by_id else None
    wanted = [name or columns.prompt, *filter(None, [getattr(columns, "source", None)])]
    for uri in input_files(given.path, given.path):
        for _, row in read_rows(uri, wanted, [name] if name else []):
            key = None
            with suppress(KeyError, TypeError, ValueError):
                key = _key_of(row if isinstance(row, dict) else {}, given, name, source)
            yield key


def _key_of(
    row: Row, given: PromptsConfig | RecordedAnswers, name: str | None, source: str
) -> str | None:
    if isinstance(given, RecordedAnswers) and not is_of(row, given, source):
        return None
    if name:
        return exact_text(cell_of(row, name), name)
    return prompt_id(messages_of(row, given.columns))


def _sizes(path: str, columns: list[str], size: Callable[[Row], float]) -> Iterator[float]:
    return _first(path, columns, size, FIRST)


def _first(path: str, columns: list[str], read: Callable[[Row], T], most: int) -> Iterator[T]:
    """Read a file's first rows; bad rows are left out."""
    if path.startswith(HUB_SCHEME) or not exist(path):
        return
    with suppress(UserError, OSError, ValueError):  # a run tells what is wrong with a file
        for _, row in islice(read_rows(input_files(path, path)[0], columns), most):
            with suppress(KeyError, TypeError, ValueError):
                yield read(row if isinstance(row, dict) else {})


def _cell(name: str, row: Row) -> float:
    return _size(row[name])


def _answers(name: str, row: Row) -> float:
    return len(row[name]) if isinstance(row[name], list) else 1


def _key(given: AnyInput, row: Row) -> str:
    return prompt_id(messages_of(row, given.columns))


def _conversation(given: AnyInput, row: Row) -> float:
    return sum(_size(message["content"]) for message in messages_of(row, given.columns))


def _size(value: Any) -> float:
    """Bytes of a text, or the mean of several ones.

    Raises:
        ValueError: there is none, or it is no Unicode.
        TypeError: it is neither.
    """
    if isinstance(value, list):
        return mean(_size(one) for one in value if one is not None)
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return len(value.encode())


def _mean(files: Iterable[Iterator[float]]) -> float | None:
    found = [mean(sizes) for sizes in map(list, files) if sizes]
    return mean(found) if found else None
