"""Shards of a step's folder: their names, which hold counts, finding them, and reading them.

The shards of bucket i of B lie in a folder of their own, `<i>-of-<B>/<key>.parquet`, so that one
request lists a bucket whatever the size of the store. The names of answers' shards also hold their
numbers of rows, prompt tokens and answer tokens, `<key>-r320-p6400-t144000.parquet`, and those of
failed rows their number, so that no file is opened to count them. Earlier versions wrote
`<i>-of-<B>-<key>.parquet` beside each other: such shards are read as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs
from numpy.typing import NDArray

from wrpo_ray.data.records import ADDED
from wrpo_ray.storage.folder import Folder

Place = tuple[int, int]
"""(index, count) of a bucket."""
Rows = NDArray[np.integer[Any]]
"""Numbers of rows."""
THREADS = 8
"""Shards of a bucket that are read at once, and folders that are listed at once."""
MANY = 8
"""Folders of buckets above which all of a store is listed, if most of them are asked for."""
_PLACE = re.compile(r"(\d{5})-of-(\d{5})")
_NAME = re.compile(rf"{_PLACE.pattern}([/-])(\w+?)(?:-r(\d+)(?:-p(\d+)-t(\d+))?)?\.parquet")
_REMOTE = ds.ParquetFragmentScanOptions(
    pre_buffer=True,
    cache_options=pa.CacheOptions(hole_size_limit=2**20, range_size_limit=2**26, lazy=False),
)
"""A request costs an object store about as much as a megabyte, so smaller gaps are read, too."""
_LOCAL = ds.ParquetFragmentScanOptions(pre_buffer=False)


@dataclass(frozen=True)
class Counts:
    """Rows and tokens of answers."""

    rows: int = 0
    prompt_tokens: int = 0
    """Counted once a request, whatever its number of samples."""
    output_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows + other.rows,
            self.prompt_tokens + other.prompt_tokens,
            self.output_tokens + other.output_tokens,
        )

    def __str__(self) -> str:
        """As it is in names."""
        has_tokens = self.prompt_tokens or self.output_tokens
        tokens = f"-p{self.prompt_tokens}-t{self.output_tokens}" if has_tokens else ""
        return f"r{self.rows}{tokens}"

    @classmethod
    def of(cls, table: pa.Table) -> Counts | None:
        """Those of a table of answers or failed rows; None for other records."""
        if "attempts" in table.column_names:
            return cls(len(table))
        if not {"sample", "prompt_tokens", "output_tokens"} <= set(table.column_names):
            return None
        first = table.filter(pc.equal(table["sample"], 0))
        sums = (pc.sum(c).as_py() or 0 for c in (first["prompt_tokens"], table["output_tokens"]))
        return cls(len(table), *sums)


@dataclass(frozen=True)
class Shard:
    """A shard of a step's folder, as a listing shows it."""

    path: str
    """Within the folder."""
    place: Place
    key: str
    is_flat: bool = False
    """Whether an earlier version wrote it."""
    counts: Counts | None = None
    """None in flat names, and for records other than answers and failed rows."""
    size: int | None = None
    """Bytes."""
    written: int = 0
    """Nanoseconds of Unix time."""

    @classmethod
    def of(cls, path: str, info: pafs.FileInfo | None = None) -> Shard | None:
        """The shard at a path; None if the path is no shard's."""
        match = _NAME.fullmatch(path)
        if not match:
            return None
        index, count, mark, key, *counts = match.groups()
        told = Counts(*(int(n or 0) for n in counts)) if counts[0] else None
        size, written = (info.size, info.mtime_ns or 0) if info else (None, 0)
        return cls(path, (int(index), int(count)), key, mark == "-", told, size, written)


def shard_path(place: Place, key: str, counts: Counts | None) -> str:
    """Return the path of a shard within its step's folder."""
    return f"{place_name(place)}/{key}{f'-{counts}' if counts else ''}.parquet"


def place_name(place: Place) -> str:
    """Return the name of a bucket's folder."""
    return f"{place[0]:05d}-of-{place[1]:05d}"


def named_place(name: str) -> Place | None:
    """Return the bucket whose folder has the name; None if no bucket's has."""
    match = _PLACE.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def overlap(one: Place, other: Place) -> bool:
    """Whether two buckets, of equal or other numbers of buckets, can hold the same prompt."""
    return (one[0] - other[0]) % min(one[1], other[1]) == 0


# --- finding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The result of one listing of a step's folder, without a look into its buckets."""

    places: frozenset[Place]
    """Buckets that have a folder."""
    flat: tuple[Shard, ...]
    """Shards of earlier versions."""
    shards: tuple[Shard, ...] | None = None
    """All shards, of a folder that does not change; None: each bucket has to be listed."""

    @classmethod
    def of(cls, folder: Folder) -> Layout:
        """List the folder."""
        infos = folder.infos()
        names = (i.base_name for i in infos if i.type == pafs.FileType.Directory)
        files = (Shard.of(i.base_name, i) for i in infos if i.is_file)
        places = frozenset(place for name in names if (place := named_place(name)))
        return cls(places, tuple(shard for shard in files if shard))

    @property
    def filled(self) -> frozenset[Place]:
        """Buckets that have shards."""
        return self.places | {shard.place for shard in self.flat}

    @classmethod
    def whole(cls, folder: Folder) -> Layout:
        """List a folder that does not change, with its buckets: of prompts, a shard each."""
        shards = list_shards(folder)
        places = frozenset(shard.place for shard in shards)
        return cls(places, tuple(s for s in shards if s.is_flat), tuple(shards))


_SHARED: dict[tuple[str, Folder], Layout] = {}
"""Of this process, by session."""


def share_layouts(session: str, layouts: Mapping[Folder, Layout]) -> None:
    """Let a session of this process know what the driver saw in some folders."""
    _SHARED.update({(session, folder): layout for folder, layout in layouts.items()})


def _layout_in(session: str, folder: Folder) -> Layout:
    """List a folder once a session and process, unless the driver did."""
    if (session, folder) not in _SHARED:
        _SHARED[session, folder] = Layout.of(folder)
    return _SHARED[session, folder]


def find_shards(
    folder: Folder, place: Place, session: str = "", *, is_untouched: bool = False
) -> list[Shard]:
    """Return the shards that can hold records of a bucket, in the order of their keys.

    A `session` writes buckets of one number, that of `place`, so within one each process looks only
    once which others there are. Without a session it looks each time. Nothing was written into an
    untouched bucket since the session's first look.
    """
    layout = _layout_in(session, folder) if session else Layout.of(folder)
    if layout.shards is not None:
        return [shard for shard in layout.shards if overlap(place, shard.place)]
    places = {other for other in layout.places if overlap(place, other)}
    if session and not is_untouched:
        places.add(place)
    flat = [shard for shard in layout.flat if overlap(place, shard.place)]
    if len(places) > MANY and 2 * len(places) > len(layout.places):
        found = [s for s in list_shards(folder) if s.place in places and not s.is_flat]
        return _each_once([*flat, *found])
    return _each_once([*flat, *(shard for p in sorted(places) for shard in _in_place(folder, p))])


def list_shards(folder: Folder) -> list[Shard]:
    """Return all shards of a step's folder, by one request a thousand."""
    start = len(folder.path.rstrip("/")) + 1
    infos = (i for i in folder.infos(recursive=True) if i.is_file)
    return _each_once(shard for i in infos if (shard := Shard.of(i.path[start:], i)))


def shards_in(folder: Folder, places: Iterable[Place]) -> list[Shard]:
    """Return the shards in the folders of these buckets."""
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda place: _in_place(folder, place), places)
        return [shard for part in found for shard in part]


def _in_place(folder: Folder, place: Place) -> list[Shard]:
    name = place_name(place)
    infos = (i for i in folder.infos(name) if i.is_file)
    return [shard for i in infos if (shard := Shard.of(f"{name}/{i.base_name}", i))]


def _each_once(shards: Iterable[Shard]) -> list[Shard]:
    """Return the last written of the shards of one bucket and key, which have the same records.

    There are several if an earlier version wrote it too, or a lost actor and its replacement.
    """
    last: dict[tuple[Place, str], Shard] = {}
    for shard in shards:
        known = last.get((shard.place, shard.key))
        if known is None or _age(known) < _age(shard):
            last[shard.place, shard.key] = shard
    return sorted(last.values(), key=lambda s: (s.place, s.key))


def _age(shard: Shard) -> tuple[int, bool, str]:
    return shard.written, not shard.is_flat, shard.path


# --- reading -----------------------------------------------------------------------------------


class OpenShards:
    """Shards that are opened once: their footers stay in memory from one read to the next.

    Columns that the schema has as dictionaries (see `encoded`) are read with the codes of the file.
    """

    def __init__(self, folder: Folder, shards: Sequence[Shard], schema: pa.Schema):
        self.folder, self.shards, self.schema = folder, shards, schema

    @cached_property
    def _fragments(self) -> list[ds.ParquetFileFragment]:
        """A listing told the sizes, so that no request is needed for them."""
        names = {field.name for field in self.schema if pa.types.is_dictionary(field.type)}
        options = ds.ParquetReadOptions(dictionary_columns=names)
        scan = _REMOTE if self.folder.is_remote else _LOCAL
        parquet = ds.ParquetFileFormat(options, default_fragment_scan_options=scan)
        return [
            parquet.make_fragment(
                f"{self.folder.path}/{s.path}", self.folder.filesystem, file_size=s.size
            )
            for s in self.shards
        ]

    def read(self, columns: Sequence[str] | None = None) -> list[pa.Table]:
        """Return columns (None: all) of each shard, in order; several are read at once.

        A column that an earlier version did not write is null.
        """
        wanted = self._wanted(columns)
        return _at_once([partial(_read, fragment, wanted) for fragment in self._fragments])

    def read_all(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the same as one table."""
        parts = self.read(columns)
        return pa.concat_tables(parts) if parts else self._wanted(columns).empty_table()

    def take(self, columns: Sequence[str], rows: Rows) -> pa.Table:
        """Return columns of these rows of all shards, from 0; no more of a shard is kept."""
        wanted = self._wanted(columns)
        lengths = [fragment.metadata.num_rows for fragment in self._fragments]
        parts, places = by_part(rows, lengths)
        calls = [partial(_take, self._fragments[part], wanted, inside) for part, inside in parts]
        return joined(_at_once(calls), places, wanted)

    def _wanted(self, columns: Sequence[str] | None) -> pa.Schema:
        if columns is None:
            return self.schema
        return pa.schema([self.schema.field(name) for name in columns])


def _read(fragment: ds.ParquetFileFragment, wanted: pa.Schema) -> pa.Table:
    there = set(fragment.physical_schema.names)
    lacking = [name for name in wanted.names if name in ADDED - there]
    table = fragment.to_table(columns=[name for name in wanted.names if name not in lacking])
    for name in lacking:
        table = table.append_column(name, pa.nulls(len(table), wanted.field(name).type))
    return table.select(wanted.names).cast(wanted)


def _take(fragment: ds.ParquetFileFragment, wanted: pa.Schema, rows: Rows) -> pa.Table:
    return take_rows(_read(fragment, wanted), rows)


def _at_once(calls: Sequence[Callable[[], pa.Table]]) -> list[pa.Table]:
    if len(calls) < 2:
        return [call() for call in calls]
    with ThreadPoolExecutor(min(THREADS, len(calls))) as threads:
        return list(threads.map(lambda call: call(), calls))


# --- rows and columns --------------------------------------------------------------------------


def encoded(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    """The schema with these columns of strings as dictionaries, for values that repeat."""
    kind = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([f.with_type(kind) if f.name in columns else f for f in schema])


def in_one(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array; pyarrow's own `combine_chunks` copies even a single chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def take_rows(table: pa.Table, rows: Rows) -> pa.Table:
    """Return rows of a table; pyarrow's own `take` first makes one chunk of all."""
    if len(rows) == len(table) and np.array_equal(rows, np.arange(len(rows))):
        return table
    batches = table.to_batches()
    parts, places = by_part(rows, [len(batch) for batch in batches])
    tables = [pa.table(batches[part].take(pa.array(inside))) for part, inside in parts]
    return joined(tables, places, table.schema)


def by_part(rows: Rows, lengths: Sequence[int]) -> tuple[list[tuple[int, Rows]], Rows | None]:
    """Split rows of concatenated parts.

    Returns:
        (number of a part, rows within it) of each part that has some, and the place of each row in
        the concatenation of those; None if they are in order.
    """
    order = None if np.all(rows[1:] >= rows[:-1]) else np.argsort(rows, kind="stable")
    ordered = rows if order is None else rows[order]
    ends = np.cumsum(lengths)
    cuts = np.searchsorted(ordered, ends).tolist()
    spans = zip([0, *cuts], cuts, ends - lengths, strict=False)
    parts = [(i, ordered[a:b] - start) for i, (a, b, start) in enumerate(spans) if a < b]
    return parts, None if order is None else np.argsort(order)


def joined(tables: list[pa.Table], places: Rows | None, schema: pa.Schema) -> pa.Table:
    """Return the rows of the parts that `by_part` told, in the order that it was asked for."""
    """Join what was taken of the parts that `by_part` returned, in the order of the rows."""
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    return table if places is None else table.take(pa.array(places))
