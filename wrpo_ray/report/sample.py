"""The rows in a report's table and in its distributions: a bounded, deterministic sample.

A bucket is a hash partition of the prompts, so whole buckets are a fair sample. At most `ANSWERS`
or `PAIRS` rows of `BUCKETS` evenly spaced buckets are read, whatever the size of the run; exact
sums come from manifests. Rows to browse are the first by prompt_id, which is also a hash.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wrpo_ray.data.buckets import Bucket
from wrpo_ray.data.shards import Shard
from wrpo_ray.report.histogram import Histogram
from wrpo_ray.storage.folder import Folder

BUCKETS = 32
"""Maximum buckets for distributions."""
ANSWERS, PAIRS = 100_000, 20_000
"""Maximum answers of a store, and preference rows, to count (approximate)."""
BROWSED, ROWS = 8, 240
"""Maximum buckets and rows to browse."""
SHARDS = 64
"""Maximum shards of a store and bucket to search for texts of candidates."""
BATCH = 4096
THREADS = 8
BETWEEN = " · "
"""Between a reward and a model, in the name of a series."""
ROLES = {"source_chosen": "y_ws", "target_chosen": "y_wt", "rejected": "y_l"}
Row = dict[str, Any]


def spread(count: int, most: int) -> list[Bucket]:
    """At most `most` buckets, evenly spaced."""
    step = max(1, -(-count // most))
    return [Bucket(index, count) for index in range(0, count, step)]


# --- distributions ---------------------------------------------------------------------------


@dataclass
class Distributions:
    """Rewards and lengths by series, such as a source or y_wt."""

    rows: int = 0
    """Number of counted rows."""
    of: int = 0
    """Number of shards of the buckets that are sampled."""
    unit: str = "tokens"
    """Unit of lengths: tokens, or characters if token counts are unknown."""
    series: dict[str, dict[str, Histogram]] = field(default_factory=dict)
    """{series: {`reward`, `length` or `margin`: histogram}}"""

    def add(self, name: str, measure: str, values: pa.Array | pa.ChunkedArray) -> None:
        """Count values, ignoring nulls."""
        found = Histogram.of(pc.drop_null(values).to_numpy(zero_copy_only=False))
        held = self.series.setdefault(name, {})
        held[measure] = held.get(measure, Histogram()) + found

    def __add__(self, other: Distributions) -> Distributions:
        """Both; lengths in characters are left out where others are in tokens."""
        units = {part.unit for part in (self, other) if part.rows}
        unit = "characters" if units == {"characters"} else "tokens"
        series: dict[str, dict[str, Histogram]] = {}
        for part in (self, other):
            for name, measures in part.series.items():
                held = series.setdefault(name, {})
                for measure, histogram in measures.items():
                    if measure != "length" or part.unit == unit:
                        held[measure] = held.get(measure, Histogram()) + histogram
        return Distributions(self.rows + other.rows, self.of + other.of, unit, series)

    def record(self) -> Row:
        """As JSON."""
        series = {
            name: {measure: histogram.record() for measure, histogram in measures.items()}
            for name, measures in self.series.items()
        }
        return {"rows": self.rows, "of": self.of, "unit": self.unit, "series": series}

    @classmethod
    def read(cls, record: Row) -> Distributions:
        """From its record."""
        series = {
            name: {measure: Histogram.read(h) for measure, h in measures.items()}
            for name, measures in record["series"].items()
        }
        return cls(record["rows"], record["of"], record["unit"], series)


def answers(store: Folder, buckets: int) -> Distributions:
    """Distributions of the scored answers (records SCORED) in a store, by source."""
    return _merged(store, buckets, ANSWERS, _answers_of)


def preferences(folder: Folder, buckets: int) -> Distributions:
    """Distributions of y_ws, y_wt and y_l in preference rows, and of their margins."""
    return _merged(folder, buckets, PAIRS, _preferences_of)


def _merged(folder: Folder, buckets: int, most: int, count: Any) -> Distributions:
    """Sum the distributions of shards in a fixed order, until `most` rows are counted."""
    shards = _shards(folder, spread(buckets, BUCKETS))
    shards.sort(key=lambda shard: (shard.key, shard.place))  # a hash: no bucket is preferred
    names = [shard.path for shard in shards]
    total = Distributions()
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(names), THREADS):
            part = names[start : start + THREADS]
            for found in threads.map(partial(count, folder, most // len(part)), part):
                total += found
            if total.rows >= most:
                break
    total.of = len(shards)
    return total


def _shards(folder: Folder, buckets: list[Bucket]) -> list[Shard]:
    """The shards that can hold records of these buckets, which are of one number."""
    session = uuid.uuid4().hex  # so that the folder is listed once, beside the buckets in it
    found = (s for b in buckets for s in replace(b, session=session).shards(folder))
    return list(dict.fromkeys(found))


def _batches(folder: Folder, name: str, columns: list[str], most: int) -> Iterator[pa.RecordBatch]:
    """Batches of the first rows of a shard, up to about `most` rows."""
    with pq.ParquetFile(f"{folder.path}/{name}", filesystem=folder.filesystem) as file:
        seen = 0
        for batch in file.iter_batches(batch_size=min(BATCH, most), columns=columns):
            yield batch
            seen += len(batch)
            if seen >= most:
                return


def _answers_of(folder: Folder, most: int, name: str) -> Distributions:
    found = Distributions()
    for batch in _batches(folder, name, ["source", "reward", "output_tokens"], most):
        found.rows += len(batch)
        for source in batch["source"].unique().to_pylist():
            own = batch.filter(pc.equal(batch["source"], source))
            found.add(source, "reward", own["reward"])
            found.add(source, "length", own["output_tokens"])
    if any(m["length"].n == 0 for m in found.series.values()):
        _add_characters(found, folder, name, most)
    return found


def _add_characters(found: Distributions, folder: Folder, name: str, most: int) -> None:
    """Add lengths in characters, for imported answers without token counts."""
    found.unit = "characters"
    for measures in found.series.values():
        measures["length"] = Histogram()
    for batch in _batches(folder, name, ["source", "text"], min(most, PAIRS)):
        for source in batch["source"].unique().to_pylist():
            own = batch.filter(pc.equal(batch["source"], source))
            found.add(source, "length", pc.utf8_length(own["text"]))


def _preferences_of(folder: Folder, most: int, name: str) -> Distributions:
    parts = [f"{role}.{part}" for role in ROLES for part in ("reward", "token_ids", "text")]
    found = Distributions()
    for batch in _batches(folder, name, [*parts, "source_margin", "target_margin"], most):
        found.rows += len(batch)
        for role, name_ in ROLES.items():
            answer = batch[role]
            found.add(name_, "reward", answer.field("reward"))
            tokens = answer.field("token_ids")
            if tokens.null_count == len(tokens):
                found.unit = "characters"
            lengths = pc.list_value_length(tokens)
            texts = pc.utf8_length(answer.field("text"))
            found.add(name_, "length", lengths if found.unit == "tokens" else texts)
        found.add("y_ws − y_wt", "margin", batch["source_margin"])
        found.add("y_wt − y_l", "margin", batch["target_margin"])
    return found


# --- rows ------------------------------------------------------------------------------------


def rows(root: Folder, pairs: str, selection: str, stores: list[str], buckets: int) -> list[Row]:
    """Rows to browse, bucket by bucket: of preference rows, then of prompts without a pair.

    `pairs` and `selection` are folders (or empty), `stores` those with candidates' texts. A row is
    {id, kind, split, messages, y_ws, y_wt, y_l, source_margin, target_margin, candidates}, each
    candidate [source, sample, reward, text or null, finish_reason or null].
    """
    chosen = spread(buckets, BROWSED)
    each = -(-ROWS // len(chosen))
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(
            threads.map(lambda b: _bucket_rows(root, pairs, selection, stores, b, each), chosen)
        )
    turns = max(map(len, found), default=0)
    return [part[i] for i in range(turns) for part in found if i < len(part)][:ROWS]


def _bucket_rows(
    root: Folder, pairs: str, selection: str, stores: list[str], bucket: Bucket, each: int
) -> list[Row]:
    kept = _first(root / pairs, bucket, each) if pairs else []
    ids = {row["prompt_id"] for row in kept}
    room = each // 3 if len(kept) >= each - each // 3 else each - len(kept)
    others = _first(root / selection, bucket, each + room) if selection else []
    others = [row for row in others if row["prompt_id"] not in ids][:room]
    made = [_row(r, "pair") for r in kept[: each - len(others)]]
    made += [_row(row, "selection") for row in others]
    texts = _texts(root, stores, bucket, {row["id"] for row in made})
    for row in made:
        for candidate in row["candidates"]:
            candidate += texts.get((row["id"], candidate[0], candidate[1]), [None, None])
    return made


def _first(folder: Folder, bucket: Bucket, most: int) -> list[Row]:
    """The first rows of a bucket by prompt_id; shards are sorted by it."""
    found: list[Row] = []
    for name in (shard.path for shard in _shards(folder, [bucket])[:SHARDS]):
        columns = pq.read_schema(f"{folder.path}/{name}", filesystem=folder.filesystem).names
        for batch in _batches(folder, name, columns, 4 * most):
            found += [row for row in batch.to_pylist() if row["prompt_id"] in bucket]
    return sorted(found, key=lambda row: row["prompt_id"])[:most]


def _row(row: Row, kind: str) -> Row:
    answers = {
        name: {k: row[role][k] for k in ("text", "source", "sample", "reward")}
        for role, name in ROLES.items()
        if row.get(role)
    }
    return {
        "id": row["prompt_id"],
        "kind": kind,
        "split": row.get("split") or "preference",
        "messages": row["messages"],
        **answers,
        "source_margin": row.get("source_margin"),
        "target_margin": row.get("target_margin"),
        "candidates": [[c["source"], c["sample"], c["reward"]] for c in row["candidates"]],
    }


def _texts(
    root: Folder, stores: list[str], bucket: Bucket, ids: set[str]
) -> dict[tuple[str, str, int], list[Any]]:
    """{(prompt_id, source, sample): [text, finish_reason]} of answers in the searched shards."""
    wanted, found = pa.array(sorted(ids), pa.string()), {}
    for folder in (root / store for store in stores):
        for name in (shard.path for shard in _shards(folder, [bucket])[:SHARDS]):
            keys = folder.read_table(name, ["prompt_id"])["prompt_id"]
            inside = np.flatnonzero(pc.is_in(keys, wanted).to_numpy())
            if not len(inside):
                continue
            columns = ["prompt_id", "source", "sample", "text", "finish_reason"]
            for batch in _batches(folder, name, columns, int(inside[-1]) + 1):
                own = batch.filter(pc.is_in(batch["prompt_id"], wanted))
                for row in own.to_pylist():
                    key = row["prompt_id"], row["source"], row["sample"]
                    found[key] = [row["text"], row["finish_reason"]]
    return found
