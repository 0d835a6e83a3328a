"""Shards: their names, the folders of buckets, marks of finished ones, and outputs of old."""

import os
import threading
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from wrpo_ray.data import records, writer
from wrpo_ray.data.buckets import Bucket, buckets, read_bucket, write_shard
from wrpo_ray.data.failures import EARLIER, failed_by_error, retrying_failures, write_failures
from wrpo_ray.data.finished import BEGUN, MARKS, Filling, Mark, failed_rows, marks, stored
from wrpo_ray.data.finished import stored_rows as rows_in
from wrpo_ray.data.shards import (
    MANY,
    Counts,
    Layout,
    Shard,
    find_shards,
    list_shards,
    shard_path,
    share_layouts,
)
from wrpo_ray.data.writer import ShardWriter
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

KEYS = [records.digest(i) for i in range(60)]


def answer(key: str, sample: int = 0, tokens: int = 10) -> dict[str, Any]:
    told = {"prompt_tokens": 5, "output_tokens": tokens, "text": "x" * tokens}
    return {"prompt_id": key, "source": "a", "sample": sample, **told}


def flat(folder: Folder, bucket: Bucket, rows: list[dict], key: Any, schema=records.RESPONSE):
    """As earlier versions wrote a shard."""
    name = f"{bucket.index:05d}-of-{bucket.count:05d}-{digest(key, 16)}.parquet"
    folder.write_table(name, pa.Table.from_pylist(rows, schema=schema))


def fill(folder: Folder, count: int, write=None) -> None:
    for bucket in buckets(count):
        mine = [answer(k, s) for k in KEYS if k in bucket for s in range(2)]
        (write or (lambda *a: write_shard(a[0], a[1], records.RESPONSE, *a[2:])))(
            folder, bucket, mine, "all"
        )


def ids(folder: Folder, bucket: Bucket) -> list[str]:
    return sorted(read_bucket(folder, bucket, records.RESPONSE)["prompt_id"].to_pylist())


# --- names and places --------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [None, Counts(0), Counts(3), Counts(320, 6400, 144_000)])
def test_a_name_tells_what_a_shard_holds(counts):
    shard = Shard.of(shard_path((12, 256), "0a1b", counts))
    assert shard
    assert (shard.place, shard.key, shard.counts) == ((12, 256), "0a1b", counts)


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "00001-of-00004.parquet", "00001-of-00004/.part-1-x.parquet",
     "failures/k/00001-of-00004/x.parquet", "00001-of-00004/x-r3-q4.parquet"],
)  # fmt: skip
def test_other_files_are_no_shards(name):
    assert Shard.of(name) is None


@pytest.mark.parametrize("read", [1, 4, 16, 64])
@pytest.mark.parametrize("session", ["", "a session"])
def test_both_layouts_of_any_number_of_buckets_are_read_together(tmp_path, read, session):
    folder, halves = Folder(str(tmp_path)), (KEYS[:30], KEYS[30:])
    for bucket in buckets(4):
        flat(folder, bucket, [answer(k) for k in halves[0] if k in bucket], "old")
    for bucket in buckets(32):
        mine = [answer(k) for k in halves[1] if k in bucket]
        write_shard(folder, bucket, records.RESPONSE, mine, "new")
    session = session and f"{session} {tmp_path}"
    found = [ids(folder, Bucket(b.index, b.count, session)) for b in buckets(read)]
    assert sorted(chain.from_iterable(found)) == sorted(KEYS)
    assert MANY < 32  # so that one bucket of all is read by one listing


def test_of_shards_with_one_key_the_last_is_read(tmp_path):
    """Written by a version before and again; or by a lost actor and its replacement."""
    folder, bucket = Folder(str(tmp_path)), Bucket(0, 1)
    flat(folder, bucket, [answer(KEYS[0])], "all")
    os.utime(next(tmp_path.glob("*.parquet")), (1, 1))
    write_shard(folder, bucket, records.RESPONSE, [answer(KEYS[1])], "all")
    os.utime(next(tmp_path.glob("*/[!.]*.parquet")), (2, 2))
    assert ids(folder, bucket) == [KEYS[1]]
    write_shard(folder, bucket, records.RESPONSE, [answer(k) for k in KEYS[2:4]], "all")
    assert ids(folder, bucket) == sorted(KEYS[2:4])
    assert len(list(tmp_path.rglob("*.parquet"))) == 3


def test_a_session_looks_once_and_sees_what_it_writes_itself(tmp_path, monkeypatch):
    folder, session = Folder(str(tmp_path)), f"s {tmp_path}"
    fill(folder, 2)
    looks: list[str] = []
    real = Folder.infos

    def infos(folder: Folder, name: str = "", **more: bool) -> list:
        looks.append(name)
        return real(folder, name, **more)

    monkeypatch.setattr(Folder, "infos", infos)
    for _ in range(3):
        assert len(find_shards(folder, (1, 4), session)) == 1
    assert looks.count("") == 1
    write_shard(folder, Bucket(1, 4), records.RESPONSE, [answer(KEYS[0])], "mine")
    assert len(find_shards(folder, (1, 4), session)) == 2
    looks.clear()
    assert len(find_shards(folder, (3, 4), session, is_untouched=True)) == 1
    assert looks == ["00001-of-00002"]  # not its own folder


def test_what_the_driver_saw_is_not_looked_for_again(tmp_path, monkeypatch):
    folder, session = Folder(str(tmp_path)), f"t {tmp_path}"
    fill(folder, 4)
    share_layouts(session, {folder: Layout.whole(folder)})
    monkeypatch.setattr(Folder, "infos", None)
    found = [shard for bucket in buckets(4) for shard in find_shards(folder, bucket.place, session)]
    assert len(found) == 4


# --- counting ----------------------------------------------------------------------------------


def test_stores_are_counted_by_names_alone(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    assert stored(folder) == Counts()
    fill(folder, 4)
    monkeypatch.setattr("wrpo_ray.data.finished._dataset", None)  # opens files
    assert stored(folder) == Counts(120, 300, 1200)
    assert rows_in(folder) == 120


def test_old_stores_are_counted_by_footers_or_by_some_shards(tmp_path):
    folder = Folder(str(tmp_path))
    fill(folder, 4, flat)
    assert rows_in(folder) == 120
    assert stored(folder) == Counts(120, 300, 1200)
    some = stored(folder, most=1)
    assert 0 < some.rows < 120
    assert some.output_tokens == 10 * some.rows
    write_shard(folder, Bucket(0, 2), records.RESPONSE, [answer(KEYS[0], 9)], "new")
    assert rows_in(folder) == 121


def filling(folder: Folder, key: str, bucket: Bucket, *, is_alone: bool = True) -> Filling:
    return Filling(folder, key, bucket, records.RESPONSE, is_alone=is_alone)


def test_marks_tell_what_is_finished_for_a_request_and_what_is_held(tmp_path):
    folder, (first, second) = Folder(str(tmp_path)), buckets(2)
    for bucket in (first, second):
        one = filling(folder, "k1", bucket)
        one.write([answer(KEYS[0])], "x")
        one.write([answer(KEYS[1]), answer(KEYS[2])], "y")
        if bucket == first:
            one.mark(rows=2, failed=1, attempts=3)
    (mark,) = marks(folder, "k1", 2, 3).values()
    assert mark == Mark((0, 2), 2, 1, 3, Counts(3, 15, 30))
    assert marks(folder, "k1", 2, 4) == {}  # a failed row may be tried again
    assert marks(folder, "k1", 4, 3) == marks(folder, "k2", 2, 3) == {}
    assert stored(folder) == Counts(6, 30, 60)


def test_a_marked_bucket_is_counted_without_a_listing_until_another_step_fills_it(
    tmp_path, monkeypatch
):
    folder, bucket = Folder(str(tmp_path)), Bucket(0, 1)
    one = filling(folder, "k1", bucket)
    one.write([answer(KEYS[0])], "x")
    one.mark(rows=1, failed=0, attempts=3)
    (shard,) = tmp_path.glob("*-of-*/[!.]*.parquet")
    shard.rename(shard.with_name("aside"))  # so that a listing would not find it
    assert stored(folder).rows == 1
    folder.write(f"{MARKS}/k2/{BEGUN}", b"")
    shard.with_name("aside").rename(shard)
    two = filling(folder, "k2", bucket, is_alone=False)
    two.write([answer(KEYS[1])], "y")
    assert stored(folder).rows == 2  # by a listing
    two.mark(rows=2, failed=0, attempts=3)
    monkeypatch.setattr("wrpo_ray.data.finished.shards_in", lambda _, places: [*places])
    assert stored(folder).rows == 2


# --- failed rows -------------------------------------------------------------------------------


def test_failed_rows_of_an_old_output_are_merged_counted_and_given_up(tmp_path):
    folder, bucket = Folder(str(tmp_path)), Bucket(0, 1)
    error = ValueError("no")
    lost = [records.failure("generate", error, prompt_id=k, attempts=2) for k in KEYS[:3]]
    flat(folder, bucket, lost, EARLIER, records.FAILURE)
    assert failed_rows(folder) == 3
    with retrying_failures(folder, bucket, 3) as earlier:
        assert len(earlier.attempts) == 3
        write_failures(folder, bucket, [lost[0] | {"attempts": 1}], "now", earlier)
    assert [s.is_flat for s in list_shards(folder)] == [False]
    (found,) = failed_by_error(folder)
    assert (found["rows"], found["attempts"]) == (1, 3)
    with retrying_failures(folder, bucket, 3) as earlier:
        assert earlier.given_up == {(KEYS[0], None)}
    assert failed_rows(folder) == 1
    with retrying_failures(folder, bucket, 4):
        pass
    assert list_shards(folder) == []


# --- committing --------------------------------------------------------------------------------


class Commits:
    """Keeps what is committed."""

    def __init__(self) -> None:
        self.made: list[tuple[list, list]] = []
        self.came = threading.Event()

    def __call__(self, rows: list, failed: list) -> None:
        self.made.append((rows, failed))
        self.came.set()


def test_rows_are_committed_when_they_are_enough_and_at_the_end(monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 3 * (writer.ROW_BYTES + 10))
    commits = Commits()
    with ShardWriter(commits, 60) as target:
        for number in range(7):
            target.add([answer(KEYS[number])], [])
    assert [len(rows) for rows, _ in commits.made] == [3, 3, 1]
    with ShardWriter(commits, 60):
        pass
    assert len(commits.made) == 3  # nothing is no shard


def test_the_oldest_row_is_committed_in_time_though_no_other_comes():
    commits = Commits()
    with ShardWriter(commits, 0.2) as target:
        for _ in range(2):
            commits.came.clear()
            began = time.monotonic()
            target.add([], [{"error": "x"}])
            target.add([answer(KEYS[0])], [])
            assert commits.came.wait(20)
            assert time.monotonic() - began >= 0.19
    assert [(len(r), len(f)) for r, f in commits.made] == [(1, 1), (1, 1)]


def test_what_is_there_is_committed_when_the_work_fails():
    commits = Commits()

    def work() -> None:
        with ShardWriter(commits, 60) as target:
            target.add([answer(KEYS[0])], [])
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert len(commits.made) == 1


def test_a_commit_that_fails_in_time_is_an_error_of_the_work():
    tried = threading.Event()

    def full(*_: Any) -> None:
        tried.set()
        raise OSError("the disk is full")

    def work() -> None:
        with ShardWriter(full, 0.01) as target:
            target.add([answer(KEYS[0])], [])
            assert tried.wait(20)

    with pytest.raises(OSError, match="full"):
        work()


def test_a_store_of_files_that_are_not_ours_is_empty(tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "00000-of-00001.parquet").touch()
    (tmp_path / "x.parquet").touch()
    assert find_shards(Folder(str(tmp_path)), (0, 1)) == []
    assert list_shards(Folder(str(tmp_path / "none"))) == []
