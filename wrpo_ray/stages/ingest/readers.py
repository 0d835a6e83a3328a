"""Rows of JSONL and Parquet files to records, each prompt to its split; bad rows to failures."""

import codecs
import io
import reprlib
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from wrpo_ray.config import Columns, ImportConfig, ResponseColumns
from wrpo_ray.data.published import RowError, check_text, parse_messages
from wrpo_ray.data.records import Message, prompt_id
from wrpo_ray.data.references import pack_reference
from wrpo_ray.errors import UserError
from wrpo_ray.stages.ingest.cells import (
    JsonFloat,
    group_of,
    is_missing,
    narrow_columns,
    reference_of,
    widened,
)
from wrpo_ray.storage.fingerprints import unit_interval
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.documents import read_row
from wrpo_ray.text.files import is_utf16

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".parquet")


def input_files(path: str, what: str) -> list[str]:
    """Return the URIs of the data files at `path`: the file itself, or those in the folder.

    Raises:
        UserError: there is no such file, or none that ends in .jsonl or .parquet.
    """
    place = Folder(path)
    info = place.filesystem.get_file_info(place.path)
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{what}: no such file: {place}; give a JSONL or Parquet file, or a folder")
    place = place.absolute()  # a worker's working directory is another
    found = [place.uri] if info.is_file else [(place / n).uri for n in place.files()]
    files = [uri for uri in found if str(Folder(uri)).endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{what}: {place} is no .jsonl or .parquet file, and holds none")
    return files


def check_columns(uri: str, columns: list[str], what: str) -> None:
    """Check that a Parquet file has the columns, and a JSONL file is not UTF-16.

    Rows of JSONL are checked one by one.

    Raises:
        UserError: the file has not all columns, is UTF-16, or is not a Parquet file.
    """
    file = Folder(uri)
    if not str(file).endswith(".parquet"):
        with file.filesystem.open_input_file(file.path) as stream:
            if is_utf16(stream.read(4)):
                raise UserError(f"{what}: {file}: cannot be read: it is UTF-16; save it as UTF-8")
        return
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            there = pq.ParquetFile(stream).schema_arrow.names
    except pa.ArrowInvalid as error:
        raise UserError(f"{what}: {file} is no Parquet file: {error}") from None
    missing = [c for c in columns if c not in there]
    if missing:
        raise UserError(
            f"{what}: {file} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(there)}; set `columns`"
        )


def check_some_rows(uris: list[str], what: str) -> None:
    """Check that at least one of the files has a row; only their sizes are read.

    Raises:
        UserError: all are empty.
    """
    if not any(_has_rows(Folder(uri)) for uri in uris):
        names = ", ".join(str(Folder(uri)) for uri in uris[:3])
        raise UserError(f"{what}: {names} has no rows; give a file with at least one")


def _has_rows(file: Folder) -> bool:
    with file.filesystem.open_input_file(file.path) as stream:
        if str(file).endswith(".parquet"):
            return bool(pq.ParquetFile(stream).metadata.num_rows)
        return bool(stream.size())


def read_rows(
    uri: str, columns: list[str], texts: Sequence[str] = ()
) -> Iterator[tuple[str, Row | Exception]]:
    """Yield (place, row), such as ("prompts.jsonl:3", {...}); an Exception for a bad row.

    Rows of a Parquet file have only `columns`; floats in `texts` will be converted to text. Blank
    lines are skipped.
    """
    file = Folder(uri)
    name = str(file).rsplit("/", 1)[-1]
    with file.filesystem.open_input_file(file.path) as stream:
        is_parquet = name.endswith(".parquet")
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
    may_lack_reference: bool = False,
) -> PromptRow:
    """Return a PROMPT record; a hash of the prompt draws its split from {split: share}.

    Raises:
        RowError: the prompt is missing, empty or malformed, the reference is null, or reference
            or group cannot be converted to text.
    """
    messages = _messages(row, columns)
    key, name = prompt_id(messages), columns.reference
    if may_lack_reference and name and is_missing(row.get(name)):
        name = None
    return {
        "prompt_id": key,
        "messages": messages,
        "split": _split(key, splits, seed),
        "reference": pack_reference(reference_of(_cell(row, name), name)) if name else None,
        "group": group_of(row.get(columns.group), columns.group) if columns.group else None,
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
    key = prompt_id(_messages(row, columns))
    source = given.source or _name(_cell(row, columns.source), columns.source)
    texts, rewards = _cell(row, columns.response), _cell(row, columns.reward)
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
            "reward": _number(reward, columns.reward),
            "reward_model": f"column {columns.reward}",
            "engine": "import",
        }
    except RowError as error:
        return error


def _messages(row: Row, columns: Columns) -> list[Message]:
    return parse_messages(_cell(row, columns.prompt))


def _cell(row: Row, column: str) -> Any:
    if row.get(column) is None:
        raise RowError(f"{column!r} is {'null' if column in row else 'missing'}")
    return row[column]


def _name(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"{column!r} has to be a name (got {type(value).__name__})")
    return check_text(str(value))


def _number(value: Any, column: str) -> float:
    largest = sys.float_info.max
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not is_number or not -largest <= value <= largest:
        raise RowError(f"{column!r} has to be a finite number (got {reprlib.repr(value)})")
    return float(value)
