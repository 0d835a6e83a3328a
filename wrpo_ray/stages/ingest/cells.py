"""Conversion of cells of the user's files to text: right answers, and names of groups.

A text, a whole number or a truth value has one spelling. Values with several (a time) or none (a
struct) are rejected, because answers are compared with the text character by character.
"""

import json
import math
import re
import reprlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from wrpo_ray.data.published import RowError, check_text
from wrpo_ray.data.references import Reference
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.remote import MAX_STREAMS

EXACT = 2**53
"""Whole numbers up to here are exact as floats."""
DIGITS = 1000
"""Maximum number of digits of a number in JSON."""
READING = 2
"""Version of the conversion: part of the step key if a cell is not text."""
HEAD, ROWS = 2**20, 2**16
"""Bytes of a JSONL file, and rows of a Parquet file, that are inspected for its content."""
ESCAPED = re.compile(r"(?:\\u[0-9a-f]{4})+", re.IGNORECASE)
"""Characters as JSON escapes them."""
_KNOWN: dict[Hashable, bool] = {}
"""Cached results of inspections: a study builds a chain of the same files many times."""


class JsonFloat(float):
    """A number of a JSON line with a point or an exponent, and its spelling there."""

    written: str

    @classmethod
    def read(cls, written: str) -> Self:
        """For `json.loads(..., parse_float=)`."""
        number = cls(written)
        number.written = written
        return number


def exact_text(value: Any, column: str) -> str:
    """Return the only spelling of a cell; whole numbers are written without a point or -0.

    42.0 becomes 42, because many tools turn whole numbers into floats if one value is missing.
    Other numbers keep their digits: 1.50 is not 1.5.

    Raises:
        RowError: the value has no spelling or several, or may have lost digits.
    """
    if isinstance(value, str):
        return check_text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        if abs(value) >= 10**DIGITS:
            raise RowError(f"{column!r} is a number of more than {DIGITS} digits")
        return str(value)
    if isinstance(value, Decimal):
        return _whole(value) or f"{value:f}"
    if isinstance(value, float):
        return _float_text(value, column)
    if isinstance(value, date) and not isinstance(value, datetime):
        return value.isoformat()
    raise RowError(f"{column!r} is no text, number, truth value or date (got {_shown(value)})")


def _float_text(value: float, column: str) -> str:
    if not math.isfinite(value) and not isinstance(value, JsonFloat):
        raise RowError(f"{column!r} is {value}, which stands for a missing value")
    if isinstance(value, JsonFloat):
        number = Decimal(value.written)
        if number and not -DIGITS <= number.adjusted() < DIGITS:
            raise RowError(f"{column!r} is {value.written}, a number of more than {DIGITS} digits")
        return _whole(number) or value.written
    if not value.is_integer():
        return repr(value)
    if abs(value) > EXACT:
        raise RowError(
            f"{column!r} is the float {value!r}, which may have lost digits; give whole numbers of "
            f"this size as integers or texts"
        )
    return str(int(value))


def _whole(number: Decimal) -> str | None:
    """The digits of a whole number; None for other numbers."""
    if not number:
        return "0"
    return f"{number:.0f}" if number == number.to_integral_value() else None


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def reference_of(value: Any, column: str) -> Reference:
    """Return the right answer, or all right answers of a list.

    Raises:
        RowError: a value cannot be converted to text; the list is empty or holds an empty text.
    """
    if not isinstance(value, list):
        return exact_text(value, column)
    if not value:
        raise RowError(f"{column!r} is an empty list, so that no answer is right")
    answers = [exact_text(answer, column) for answer in value if answer is not None]
    if len(answers) < len(value) or not all(answer.strip() for answer in answers):
        raise RowError(f"{column!r} is a list with an empty or missing answer")
    return answers


def group_of(value: Any, column: str) -> str | None:
    """Return the name of a row's group; None if it is null or NaN.

    Raises:
        RowError: it cannot be converted to text.
    """
    return None if is_missing(value) else exact_text(value, column)


def is_missing(value: Any) -> bool:
    """Whether a cell is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


# --- floats of less than 64 bits ---------------------------------------------------------------


def narrow_columns(schema: pa.Schema, names: Iterable[str]) -> dict[str, pa.DataType]:
    """Return the types of those columns that hold floats of 16 or 32 bits, alone or in lists."""
    types = {name: schema.field(name).type for name in names if name in schema.names}
    return {name: type_ for name, type_ in types.items() if _is_narrow(_innermost(type_))}


def widened(value: Any, of: pa.DataType) -> Any:
    """Convert floats of type `of` to 64 bits, with the spelling 0.1, not 0.10000000149011612."""
    if value is None:
        return None
    if isinstance(value, list):
        return [widened(one, of.value_type) for one in value]
    return float(str(of.to_pandas_dtype()(value))) if _is_narrow(of) else value


def _is_narrow(type_: pa.DataType) -> bool:
    return type_ in (pa.float16(), pa.float32())


def _innermost(type_: pa.DataType) -> pa.DataType:
    return _innermost(type_.value_type) if _is_list(type_) else type_


def _is_list(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(kind(type_) for kind in kinds)


# --- the content of files -----------------------------------------------------------------------


def hold_more_than_text(uris: Sequence[str], columns: list[str], content: str) -> bool:
    """Whether a cell of the columns is neither text nor null, by types or a file's beginning.

    `content` is a fingerprint of the files; the result is cached by it.
    """
    key = ("more than text", content, *columns)
    return bool(columns) and _any_file(key, lambda file: _holds_more(file, columns), uris)


def beginnings_are(
    condition: Callable[[pa.Array], pa.Array], uris: Sequence[str], column: str, content: str
) -> bool:
    """Whether the condition holds for the beginning of a file (of one column of a Parquet file).

    It must be false for ASCII text. `content` is as for `hold_more_than_text`.
    """
    key = (condition, content, column)
    return _any_file(key, lambda file: _matches(condition, file, column), uris)


def _any_file(key: Hashable, check: Callable[[Folder], bool], uris: Sequence[str]) -> bool:
    """Whether the check is true of any file. Files are read in parallel; the result is cached."""
    if key not in _KNOWN:
        threads = ThreadPoolExecutor(MAX_STREAMS)
        try:
            _KNOWN[key] = any(threads.map(check, map(Folder, uris)))
        finally:
            threads.shutdown(cancel_futures=True)
    return _KNOWN[key]


def _matches(condition: Callable[[pa.Array], pa.Array], file: Folder, column: str) -> bool:
    with file.filesystem.open_input_file(file.path) as stream:
        if str(file).endswith(".parquet"):
            rows = next(pq.ParquetFile(stream).iter_batches(ROWS, columns=[column]), None)
            text = json.dumps(_values(rows), ensure_ascii=False, default=str) if rows else ""
        else:
            head = stream.read(HEAD)
            if head.isascii() and b"\\u" not in head:
                return False
            text = ESCAPED.sub(_unescaped, head.decode(errors="ignore"))
    found: bool = condition(pa.array([text], pa.large_string()))[0].as_py()
    return found


def _unescaped(match: re.Match[str]) -> str:
    text: str = json.loads(f'"{match[0]}"')
    return text.encode(errors="ignore").decode()  # without halves of pairs


def _values(rows: pa.RecordBatch) -> list[Any]:
    try:
        values: list[Any] = rows.to_pylist()
    except ValueError:  # the row with bytes that are not text fails later, when it is read
        return []
    return values


def _holds_more(file: Folder, columns: list[str]) -> bool:
    with file.filesystem.open_input_file(file.path) as stream:
        if str(file).endswith(".parquet"):
            schema = pq.ParquetFile(stream).schema_arrow
            there = [name for name in columns if name in schema.names]
            return not all(_is_text(schema.field(name).type) for name in there)
        head = stream.read(HEAD)
    spelled = {json.dumps(name, ensure_ascii=ascii) for name in columns for ascii in (True, False)}
    names = b"|".join(re.escape(name.encode()) for name in spelled)
    return re.search(rb"(?:" + names + rb')\s*:\s*[^"\sn]', head) is not None


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    return type_ in (pa.string(), pa.large_string(), pa.null())
