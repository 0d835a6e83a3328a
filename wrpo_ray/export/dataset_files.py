"""Writes preference shards as one file, or as a folder that Hugging Face `datasets` reads.

Shards are read in batches, and several files are written in parallel. Memory holds one batch for
each of them, whatever the size of the data set.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wrpo_ray.data.shards import list_shards
from wrpo_ray.errors import UserError
from wrpo_ray.export.forms import Form
from wrpo_ray.export.statistics import Statistics, bounds
from wrpo_ray.storage.folder import Folder

FILES = (".jsonl", ".parquet")
DATA = "data"
NO_ROWS = "export: there are no preference rows; see `dropped` in the summary"
FILE_BYTES = 256 * 2**20
"""Bytes of shards in one file of a folder."""
BATCH = 4096
"""Rows of a batch."""


def is_file(to: Folder) -> bool:
    """Whether the address is of one file, by its suffix, and not of a folder."""
    return str(to).endswith(FILES)


def write_file(shards: Folder, to: Folder, form: Form) -> int:
    """Write one JSONL or Parquet file; return its number of rows.

    Raises:
        UserError: its parent folder does not exist.
    """
    parent = os.path.dirname(to.path)
    if not to.is_remote and not os.path.isdir(parent):
        raise UserError(f"export: --to {to}: there is no folder {parent}; make it")
    names = _names(shards)
    if not str(to).endswith(".jsonl"):
        return _write_parquet(to, "", form, _batches(shards, names))
    alone = form.name == "published" and not _has_conversations(shards, names)
    return _write_jsonl(to, "", form, _batches(shards, names), prompts_alone=alone)


def _has_conversations(shards: Folder, names: list[str]) -> bool:
    """Whether a prompt has more than one message."""
    for batch in _batches(shards, names, ["messages"]):
        if pc.max(pc.list_value_length(batch["messages"])).as_py() not in (None, 1):
            return True
    return False


def write_folder(shards: Folder, to: Folder, form: Form) -> Statistics:
    """Write `data/train-*.parquet`; return the counts of the PREFERENCE records.

    Raises:
        UserError: there are no rows, or the folder holds files of another export.
    """
    footers = {name: _open(shards, name).metadata for name in _names(shards)}
    parts = _parts({name: footer for name, footer in footers.items() if footer.num_rows})
    if not parts:
        raise UserError(NO_ROWS)
    names = [f"train-{i:05d}-of-{len(parts):05d}.parquet" for i in range(len(parts))]
    strangers = set(to.files(DATA)) - set(names)
    if strangers:
        raise UserError(
            f"export: {to}/{DATA} holds other files, such as {min(strangers)}; give a new folder, "
            f"or delete them"
        )
    total = Statistics(bounds(footers.values()))
    write = partial(_write_part, shards, to, form, total.bounds)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for part in threads.map(write, names, parts):
            total.merge(part)
    return total


def _parts(footers: dict[str, pq.FileMetaData]) -> list[list[str]]:
    """Group the names of shards by output file."""
    parts: list[list[str]] = []
    room = 0
    for name, footer in footers.items():
        size = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
        if room < size or not parts:
            parts.append([])
            room = FILE_BYTES
        parts[-1].append(name)
        room -= size
    return parts


def _write_part(
    shards: Folder,
    to: Folder,
    form: Form,
    limits: tuple[float, float] | None,
    name: str,
    part: list[str],
) -> Statistics:
    statistics = Statistics(limits)

    def counted() -> Iterator[pa.RecordBatch]:
        for batch in _batches(shards, part):
            statistics.add(batch)
            yield batch

    _write_parquet(to, f"{DATA}/{name}", form, counted())
    return statistics


def _names(shards: Folder) -> list[str]:
    return [shard.path for shard in list_shards(shards)]


def _open(shards: Folder, name: str) -> pq.ParquetFile:
    return pq.ParquetFile(f"{shards.path}/{name}", filesystem=shards.filesystem)


def _batches(
    shards: Folder, names: list[str], columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    for name in names:
        with _open(shards, name) as file:
            yield from file.iter_batches(batch_size=BATCH, columns=columns)


def _write_parquet(to: Folder, name: str, form: Form, batches: Iterator[pa.RecordBatch]) -> int:
    """Write Parquet; a prompt is always a list of messages, because a column has one type."""
    count = 0
    with (
        to.open_output(name) as stream,
        pq.ParquetWriter(stream, form.schema, compression="zstd") as file,
    ):
        for batch in batches:
            rows = form.of(batch)
            file.write_batch(rows)
            count += len(rows)
    return count


def _write_jsonl(
    to: Folder, name: str, form: Form, batches: Iterator[pa.RecordBatch], *, prompts_alone: bool
) -> int:
    """Write JSONL in which each column has one type in all lines, as readers require.

    With `prompts_alone` a prompt is its one message, as in the published rows; else a list.
    Unknown token ids are an empty list, because pyarrow infers another type from null.
    """
    count = 0
    with to.open_output(name) as stream:
        for batch in batches:
            rows = form.of(batch).to_pylist()
            for row in rows:
                if prompts_alone:
                    (row["prompt"],) = row["prompt"]
                for answer in (row[name] for name in form.answers):
                    answer["token_ids"] = answer["token_ids"] or []
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            stream.write("".join(lines).encode())
            count += len(rows)
    return count
