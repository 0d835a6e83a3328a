"""The content of a store of answers or scores, told by names alone: marks of buckets, and shards.

When nothing is missing of what a step asks of a bucket, the bucket is marked for the step's key by
an empty file. A restart lists the marks and passes over these buckets. A mark's name also holds
what the bucket's folder holds in all, so that a full store is counted without listing its shards.
A store that several steps fill (of more prompts or samples) has a folder of marks for each: what a
bucket holds is known by its marks once all of these steps have marked it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from wrpo_ray.data.buckets import Bucket, read_bucket, write_shard
from wrpo_ray.data.samples import sample_keys
from wrpo_ray.data.shards import Counts, Layout, Place, Shard, list_shards, place_name, shards_in
from wrpo_ray.storage.folder import Folder

T = TypeVar("T")
MARKS = "finished"
"""Subfolder of a store with a folder of marks for each step's key."""
BEGUN = "begun"
"""File that says that the step with the key fills the store."""
_MARK = re.compile(r"(\d{5})-of-(\d{5})-n(\d+)-f(\d+)-a(\d+)-r(\d+)(?:-p(\d+)-t(\d+))?")
TOKENS = pa.schema(
    [("sample", pa.int32()), ("prompt_tokens", pa.int32()), ("output_tokens", pa.int32())]
)


@dataclass(frozen=True)
class Mark:
    """Of a bucket of which nothing is missing that a step asks for."""

    place: Place
    rows: int
    """Wanted rows that are stored."""
    failed: int
    """Wanted rows that are given up."""
    attempts: int
    """Attempts after which a failed row is given up (`Run.max_attempts`)."""
    held: Counts
    """All that the bucket's folder holds, for this step or others."""

    @property
    def name(self) -> str:
        """Of the file."""
        told = f"n{self.rows}-f{self.failed}-a{self.attempts}-{self.held}"
        return f"{place_name(self.place)}-{told}"

    @classmethod
    def named(cls, name: str) -> "Mark | None":
        """The mark of a file; None if it is another file."""
        if not (match := _MARK.fullmatch(name)):
            return None
        index, count, rows, failed, attempts, *held = (int(n or 0) for n in match.groups())
        return cls((index, count), rows, failed, attempts, Counts(*held))


def begin(store: Folder, key: str) -> None:
    """Say that the step with this key fills the store."""
    store.write(f"{MARKS}/{key}/{BEGUN}", b"")


class Filling:
    """A bucket of a store while a worker fills it, for the step with this key.

    `is_alone` says that nothing else fills it meanwhile.
    """

    def __init__(
        self, store: Folder, key: str, bucket: Bucket, schema: pa.Schema, *, is_alone: bool
    ):
        self.store, self.key, self.bucket, self.schema = store, key, bucket, schema
        self.is_alone = is_alone
        self.shards = bucket.shards(store)
        self.held = total(s for s in self.shards if s.place == bucket.place)

    def sample_keys(self) -> set[tuple[str, int]]:
        """The (prompt_id, sample) pairs that it had at first."""
        columns = ["prompt_id", "sample"]
        return sample_keys(read_bucket(self.store, self.bucket, self.schema, columns, self.shards))

    def write(self, rows: list[dict[str, Any]], key: Any) -> None:
        """Commit rows as one shard."""
        self.held += write_shard(self.store, self.bucket, self.schema, rows, key) or Counts()

    def mark(self, *, rows: int, failed: int, attempts: int) -> None:
        """Say that nothing is missing of what the step asks for."""
        place = self.bucket.place
        held = self.held if self.is_alone else total(shards_in(self.store, [place]))
        made = Mark(place, rows, failed, attempts, held)
        self.store.write(f"{MARKS}/{self.key}/{made.name}", b"")


def marks(store: Folder, key: str, count: int, attempts: int) -> dict[int, Mark]:
    """Return the marks for a step's key of buckets of `count`, by index.

    With another number of attempts, given-up rows may be tried again, and the marks do not hold.
    """
    found = _marks(store.files(f"{MARKS}/{key}"))
    return {m.place[0]: m for m in found if m.place[1] == count and m.attempts == attempts}


def _marks(names: Iterable[str]) -> list[Mark]:
    return [mark for name in names if (mark := Mark.named(name))]


def stored(store: Folder, *, most: int | None = None) -> Counts:
    """Rows and tokens of all answers in a store.

    The shards that earlier versions wrote are read, if `most` is given only about so many of them.
    """
    known, unknown = _told(store)
    if not unknown:
        return known
    for batch in _dataset(store, _some(unknown, most)).to_batches():
        first = batch.filter(pc.equal(batch["sample"], 0))
        tokens = _sum_of(first["prompt_tokens"]), _sum_of(batch["output_tokens"])
        known += Counts(batch.num_rows, *tokens)
    return known


def sampled(store: Folder, schema: pa.Schema, most: int) -> pa.Table:
    """Columns of about `most` shards of a store, of as many buckets, evenly chosen."""
    layout = Layout.of(store)
    shards = list(_some(layout.flat, most))
    for place in _some(sorted(layout.places), most):
        shards += shards_in(store, [place])[:1]
    return _dataset(store, shards, schema).to_table()


def _some(items: Sequence[T], most: int | None) -> Sequence[T]:
    """About `most` of the items, evenly chosen; None: all."""
    return items[:: -(-len(items) // most) or 1] if most else items


def stored_rows(store: Folder) -> int:
    """Rows of all answers in a store; of shards that earlier versions wrote, by their footers."""
    known, unknown = _told(store)
    return known.rows + _rows_of(store, unknown)


def failed_rows(failures: Folder) -> int:
    """Rows in a folder of failed rows."""
    shards = list_shards(failures)
    return total(shards).rows + _rows_of(failures, [s for s in shards if s.counts is None])


def _rows_of(store: Folder, shards: list[Shard]) -> int:
    return int(_dataset(store, shards).count_rows()) if shards else 0


def _told(store: Folder) -> tuple[Counts, list[Shard]]:
    """The sums that names tell, and the shards whose names tell nothing."""
    layout = Layout.of(store)
    known = _held(store)
    shards = [*layout.flat, *shards_in(store, sorted(layout.places - known.keys()))]
    told = total(shards) + sum((known[p] for p in layout.places & known.keys()), Counts())
    return told, [shard for shard in shards if shard.counts is None]


def _held(store: Folder) -> dict[Place, Counts]:
    """The content of each bucket that all steps that fill the store have marked.

    The last of them to mark it has seen the most rows.
    """
    found: dict[str, dict[Place, Counts]] = {}
    for info in store.infos(MARKS, recursive=True):
        if info.is_file:
            key = info.path.rsplit("/", 2)[1]
            of_key = found.setdefault(key, {})
            of_key |= {mark.place: mark.held for mark in _marks([info.base_name])}
    common = set.intersection(*map(set, found.values())) if found else set()
    return {p: max((of[p] for of in found.values()), key=lambda c: c.rows) for p in common}


def total(shards: Iterable[Shard]) -> Counts:
    """The sum of what the names of shards tell."""
    return sum((shard.counts for shard in shards if shard.counts), Counts())


def _dataset(store: Folder, shards: Sequence[Shard], schema: pa.Schema = TOKENS) -> ds.Dataset:
    paths = [f"{store.path}/{shard.path}" for shard in shards]
    return ds.dataset(paths, schema=schema, format="parquet", filesystem=store.filesystem)


def _sum_of(column: pa.Array) -> int:
    return int(pc.sum(column).as_py() or 0)
