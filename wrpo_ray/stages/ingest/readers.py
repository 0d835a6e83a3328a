"""Rows of JSONL and Parquet files to records, each prompt to its split; bad rows to failures."""

import codecs
import io
import reprlib
import string
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from wrpo_ray.config import Columns, ImportConfig, ResponseColumns
from wrpo_ray.data.published import RowError, check_text, parse_messages
from wrpo_ray.data.records import Message, prompt_id
from wrpo_ray.data.references import pack_reference
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import telling_of
from wrpo_ray.stages.ingest.cells import (
    JsonFloat,
    group_of,
    is_missing,
    narrow_columns,
    reference_of,
    widened,
)
from wrpo_ray.storage.fingerprints import unit_interval
from wrpo_ray.storage.folder import HUB_SCHEME, Folder
from wrpo_ray.text.documents import read_row

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".parquet")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Splits of data sets by the words that files and folders are named with."""


def input_files(path: str, what: str) -> list[str]:
    """Return the URIs of the data files at `path`: the file itself, or those in the folder.

    Where a folder holds none, those in its subfolders are taken, as in data sets of the hub. A
    path may end with a pattern of names, such as `train-*`.

    Raises:
        UserError: there is no such file, or none that ends in .jsonl or .parquet; a folder holds
            those of several splits; or the hub refuses to list those of a data set.
    """
    if path.startswith(HUB_SCHEME):
        from wrpo_ray.storage.hub_data import HubData  # its client takes a moment to import

        with telling_of(what):
            return HubData.at(path).files(SUFFIXES)
    place = Folder(path)
    info = place.filesystem.get_file_info(place.path)
    place = place.absolute()  # a worker's working directory is another
    if info.type == pafs.FileType.NotFound:
        if files := _matching(place):
            return files
        raise UserError(
            f"{what}: no such file: {Folder(path)}; give a JSONL or Parquet file, or a folder"
        )
    files = _data_files([place]) if info.is_file else _files_within(place)
    if not files:
        raise UserError(f"{what}: {place} is no .jsonl or .parquet file, and holds none")
    if not info.is_file:
        with telling_of(what):
            _check_one_split(place, files)
    return files


def _matching(place: Folder) -> list[str]:
    """The data files that a pattern at the end of a path names, or those in folders that it names.

    None where the path has no pattern.
    """
    folder, last = place.parted()
    if "*" not in last:
        return []
    pattern = last.replace("[", "[[]")
    files = [folder / name for name in folder.files() if fnmatchcase(name, pattern)]
    if found := _data_files(files):
        return found
    folders = [n for n in folder.folders() if fnmatchcase(n, pattern) and not n.startswith(".")]
    return [uri for name in folders for uri in _files_within(folder / name)]


def _check_one_split(place: Folder, files: list[str]) -> None:
    """Check that no two of a folder's files are named after different splits of a data set.

    Raises:
        UserError: some are; the message says how to give one split, and how all.
    """
    first: dict[str, str] = {}
    for file in map(str, map(Folder, files)):
        parts = file.removeprefix(f"{place}/").split("/")
        places = [(split, i) for i, part in enumerate(parts) if (split := _split_of(part))]
        if places:
            split, depth = places[0]
            first.setdefault(split, "/".join([str(place), *parts[: depth + 1]]))
    if len(first) > 1:
        one = first.get("train") or next(iter(first.values()))
        folder, _, name = one.rpartition("/")
        raise UserError(
            f"{place}: holds files of several splits ({', '.join(sorted(first))}); give one, such "
            f"as {folder}/{_alike(name)}, or {place}/* for all"
        )


def _split_of(name: str) -> str | None:
    """The split whose word begins or ends the name of a file or folder, if one does."""
    stem = name.rpartition(".")[0] if name.endswith(SUFFIXES) else name
    words = "".join(c if c.isalpha() else " " for c in stem.lower()).split()
    return next((SPLITS[word] for word in (*words[:1], *words[-1:]) if word in SPLITS), None)


def _alike(name: str) -> str:
    """A pattern for the files of a split, by one of them, such as `train-*`; a folder's own name.

    Example:
        >>> _alike("train-00000-of-00002.parquet"), _alike("dev.jsonl"), _alike("test")
        ('train-*', 'dev*', 'test')
    """
    if not name.endswith(SUFFIXES):
        return name
    bare = name.rpartition(".")[0].rstrip(string.digits)
    if bare.endswith("-of-"):
        bare = bare.removesuffix("-of-").rstrip(string.digits)
    return f"{bare}*"


def _files_within(folder: Folder) -> list[str]:
    """The data files in the folder; where there are none, those in its subfolders."""
    found = _data_files([folder / name for name in folder.files()])
    inside = [] if found else [folder / n for n in folder.folders() if not n.startswith(".")]
    return found + [uri for part in inside for uri in _files_within(part)]


def _data_files(files: list[Folder]) -> list[str]:
    return [file.uri for file in files if str(file).endswith(SUFFIXES)]


def exist(path: str) -> bool:
    """Whether there are input files at `path`, as far as can be told now.

    Those of a data set on the hub whose commit is not known, or where it is not reached, are not.
    """
    if not path.startswith(HUB_SCHEME):
        return Folder(path).exists() or bool(_matching(Folder(path)))
    try:
        return bool(input_files(path, path))
    except UserError:
        return False


@contextmanager
def opened(file: Folder, what: str, *, as_stream: bool = False) -> Iterator[pa.NativeFile]:
    """Open a file; an error of the hub within the block is a UserError of one line."""
    with _explained(file, what), _open(file, as_stream) as stream:
        yield stream


def _open(file: Folder, as_stream: bool) -> pa.NativeFile:
    if as_stream:
        return file.filesystem.open_input_stream(file.path, compression=None)
    return file.filesystem.open_input_file(file.path)


@contextmanager
def _explained(file: Folder, what: str) -> Iterator[None]:
    if not file.uri.startswith(HUB_SCHEME):
        yield
        return
    from wrpo_ray.storage.hub_data import HubData

    with telling_of(what), HubData.at(file.uri).reading():
        yield


def read_rows(
    uri: str, columns: list[str], texts: Sequence[str] = ()
) -> Iterator[tuple[str, Row | Exception]]:
    """Yield (place, row), such as ("prompts.jsonl:3", {...}); an Exception for a bad row.

    Rows of a Parquet file have only `columns`; floats in `texts` will be converted to text. Blank
    lines are skipped.
    """
    file = Folder(uri)
    name = str(file).rsplit("/", 1)[-1]
    is_parquet = name.endswith(".parquet")
    with opened(file, name, as_stream=not is_parquet) as stream:
        rows = _parquet(stream, columns, texts) if is_parquet else _jsonl(stream, columns)
        for number, row in enumerate(rows, start=1):
            if row is not None:
                yield f"{name}:{number}", row


def _parquet(
    stream: pa.NativeFile, columns: list[str], texts: Sequence[str]
) -> Iterator[Row | Exception]:
    file = pq.ParquetFile(stream)
    narrow = narrow_columns(file.schema_arrow, texts)
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        for row in _rows(batch):
            if isinstance(row, dict):
                row |= {name: widened(row[name], type_) for name, type_ in narrow.items()}
            yield row


def _rows(batch: pa.RecordBatch) -> list[Row | Exception]:
    try:
        rows: list[Row | Exception] = batch.to_pylist()
    except (ValueError, OverflowError):  # such as bytes that are not text: find the bad rows
        return [_one(batch.slice(i, 1)) for i in range(batch.num_rows)]
    return rows


def _one(batch: pa.RecordBatch) -> Row | Exception:
    try:
        row: Row = batch.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return error
    return row


def _jsonl(stream: pa.NativeFile, columns: list[str]) -> Iterator[Row | Exception | None]:
    """None for a blank line."""
    for line in io.BufferedReader(stream):
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            yield None
            continue
        try:
            row = read_row(line, columns, parse_float=JsonFloat.read)
            yield row if isinstance(row, dict) else RowError("the line is no JSON object")
        except (ValueError, RecursionError) as error:
            yield error


# --- rows into records -------------------------------------------------------------------


class PromptRow(TypedDict):
    """A PROMPT record."""

    prompt_id: str
    messages: list[Message]
    split: str
    reference: str | None
    group: str | None


class ScoredRow(TypedDict):
    """The columns of a SCORED record that an imported answer has."""

    prompt_id: str
    source: str
    sample: NotRequired[int]
    """Numbered when all answers of a bucket are known."""
    text: str
    reward: float
    reward_model: str
    engine: str


def prompt_record(
    row: Row,
    columns: Columns,
    splits: dict[str, float],
    seed: int,
    *,
    group: str | None = None,
    may_lack_reference: bool = False,
) -> PromptRow:
    """Return a PROMPT record; a hash of the prompt draws its split from {split: share}.

    `group` is that of all prompts of the file, if it has no column with the group of each.

    Raises:
        RowError: the prompt is missing, empty or malformed, the reference is null, or reference
            or group cannot be converted to text.
    """
    messages = messages_of(row, columns)
    key, name = prompt_id(messages), columns.reference
    if may_lack_reference and name and is_missing(row.get(name)):
        name = None
    return {
        "prompt_id": key,
        "messages": messages,
        "split": _split(key, splits, seed),
        "reference": pack_reference(reference_of(cell_of(row, name), name)) if name else None,
        "group": group_of(row.get(columns.group), columns.group) if columns.group else group,
    }


def _split(key: str, splits: dict[str, float], seed: int) -> str:
    point, edge = unit_interval("split", seed, key), 0.0
    for name, share in splits.items():
        edge += share
        if point < edge:
            return name
    return name


def scored_records(row: Row, given: ImportConfig) -> list[ScoredRow | RowError]:
    """Return SCORED records of a row's answers, without sample numbers; RowErrors for bad ones.

    Raises:
        RowError: prompt or model is null or of a wrong type, or answers and scores do not match.
    """
    columns = given.columns
    key = prompt_id(messages_of(row, columns))
    source = given.source or name_of(cell_of(row, columns.source), columns.source)
    texts, rewards = cell_of(row, columns.response), cell_of(row, columns.reward)
    if given.format == "responses":
        texts, rewards = [texts], [rewards]
    if not isinstance(texts, list) or not isinstance(rewards, list) or not texts:
        raise RowError(f"{columns.response!r} and {columns.reward!r} have to be lists, not empty")
    if len(texts) != len(rewards):
        raise RowError(
            f"{columns.response!r} has {len(texts)} answers, {columns.reward!r} {len(rewards)}"
        )
    answers = zip(texts, rewards, strict=True)
    return [_scored(key, source, text, reward, columns) for text, reward in answers]


def _scored(
    key: str, source: str, text: Any, reward: Any, columns: ResponseColumns
) -> ScoredRow | RowError:
    if not isinstance(text, str):
        return RowError(f"{columns.response!r} has to be a text (got {type(text).__name__})")
    try:
        return {
            "prompt_id": key,
            "source": source,
            "text": check_text(text),
            "reward": number_of(reward, columns.reward),
            "reward_model": f"column {columns.reward}",
            "engine": "import",
        }
    except RowError as error:
        return error


def messages_of(row: Row, columns: Columns) -> list[Message]:
    """The prompt of a row, as a conversation."""
    return parse_messages(cell_of(row, columns.prompt))


def cell_of(row: Row, column: str) -> Any:
    """The value of a column; RowError if it is missing or null."""
    if row.get(column) is None:
        raise RowError(f"{column!r} is {'null' if column in row else 'missing'}")
    return row[column]


def name_of(value: Any, column: str) -> str:
    """A text or whole number as a name; RowError for another value."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"{column!r} has to be a name (got {type(value).__name__})")
    return check_text(str(value))


def number_of(value: Any, column: str) -> float:
    """A finite number; RowError for another value."""
    largest = sys.float_info.max
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not is_number or not -largest <= value <= largest:
        raise RowError(f"{column!r} has to be a finite number (got {reprlib.repr(value)})")
    return float(value)
