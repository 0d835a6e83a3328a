"""Checks of the user's input files before any work: they are there, readable, and have columns."""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from wrpo_ray.errors import UserError
from wrpo_ray.stages.ingest.readers import input_files, opened, read_rows
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.remote import MAX_STREAMS
from wrpo_ray.text.display import one_line
from wrpo_ray.text.files import is_utf16

COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zX")
"""How files begin that gzip, zstd, bzip2 or xz made."""
FILES, FIRST = 16, 1000
"""JSONL files, and rows of each, whose columns are looked at before any work."""


def check_inputs(path: str, columns: list[str], what: str) -> list[str]:
    """Check files of a config before any work: they are there, have the columns, and rows.

    Returns their URIs.

    Raises:
        UserError: they do not, or the hub denies access to their content.
    """
    files = input_files(path, what)
    with ThreadPoolExecutor(MAX_STREAMS) as threads:
        for checked in [threads.submit(check_columns, uri, columns, what) for uri in files]:
            checked.result()
    check_some_rows(files, what)
    return files


def check_columns(uri: str, columns: list[str], what: str) -> None:
    """Check that a Parquet file has the columns, each once, and a JSONL file is no other format.

    Rows of JSONL are checked one by one.

    Raises:
        UserError: the file has not all columns, is UTF-16 or compressed, or is no Parquet file.
    """
    file = Folder(uri)
    if not str(file).endswith(".parquet"):
        with opened(file, what) as stream:
            start = stream.read(4)
        if is_utf16(start):
            raise UserError(f"{what}: {file}: cannot be read: it is UTF-16; save it as UTF-8")
        if start.startswith(COMPRESSED):
            raise UserError(f"{what}: {file}: cannot be read: it is compressed; unpack it")
        return
    try:
        with opened(file, what) as stream:
            there = pq.ParquetFile(stream).schema_arrow.names
    except pa.ArrowInvalid as error:
        raise UserError(f"{what}: {file} is no Parquet file: {error}") from None
    missing = [c for c in columns if c not in there]
    if missing:
        raise UserError(
            f"{what}: {file} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(there)}; set `columns`"
        )
    if twice := next((name for name in columns if there.count(name) > 1), None):
        raise UserError(f"{what}: {file} has several columns {twice!r}; keep one of them")


def check_some_columns(uris: list[str], columns: list[str], what: str) -> None:
    """Check that each column is in some of the first rows of the first JSONL files.

    Raises:
        UserError: one is in none, so that its name is wrong; or no row can be read.
    """
    files = [uri for uri in uris if str(Folder(uri)).endswith(".jsonl")][:FILES]
    there: dict[str, None] = {}
    faults: list[str] = []
    for uri in files:
        for place, row in islice(read_rows(uri, columns), FIRST):
            if isinstance(row, dict):
                there |= dict.fromkeys(row)
            else:
                faults = faults or [f"{place}: {row}"]
            if there.keys() >= set(columns):
                return
    if files == uris and not there:
        raise UserError(f"{what}: {Folder(files[0])} {_unread(faults)}")
    missing = [column for column in columns if column not in there]
    if there and missing:
        raise UserError(
            f"{what}: {Folder(files[0])} has no column {', '.join(map(repr, missing))} in its "
            f"first rows; they have {', '.join(map(one_line, there))}; set `columns`"
        )


def _unread(faults: list[str]) -> str:
    """The fault of a JSONL file that gave no row with columns."""
    if not faults:
        return "has no rows; give a file with at least one"
    return (
        f"is no JSONL: none of its first lines is a JSON object in UTF-8 (such as "
        f"{one_line(faults[0])}); write one row in each line"
    )


def check_some_rows(uris: list[str], what: str) -> None:
    """Check that at least one of the files has a row; only their sizes are read.

    Raises:
        UserError: all are empty.
    """
    if not any(_has_rows(Folder(uri), what) for uri in uris):
        names = ", ".join(str(Folder(uri)) for uri in uris[:3])
        raise UserError(f"{what}: {names} has no rows; give a file with at least one")


def _has_rows(file: Folder, what: str) -> bool:
    with opened(file, what) as stream:
        if str(file).endswith(".parquet"):
            return bool(pq.ParquetFile(stream).metadata.num_rows)
        return bool(stream.size())
