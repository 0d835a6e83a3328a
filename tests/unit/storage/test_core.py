"""Steps, buckets, storage: what resuming rests on."""

import json
import os
import time

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, buckets, read_bucket, write_shard
from wrpo_ray.data.failures import retrying_failures, write_failures
from wrpo_ray.data.published import parse_messages
from wrpo_ray.data.records import FAILURE, failure
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.data.shards import Shard, list_shards
from wrpo_ray.errors import BrokenFileError, UserError
from wrpo_ray.report.status import is_running
from wrpo_ray.runtime.cluster import output_mark
from wrpo_ray.runtime.lease import file_name
from wrpo_ray.storage.fingerprints import data_fingerprint, digest
from wrpo_ray.storage.folder import Folder, check_writable
from wrpo_ray.storage.publish import TEMPORARY_PREFIX
from wrpo_ray.storage.steps import Step

IDS = st.text("0123456789abcdef", min_size=32, max_size=32)


def test_step_key_depends_on_config_and_inputs_and_nothing_else():
    first = Step("pair", {"a": 1, "b": 2}, (Step("select"),))
    assert first.key == Step("pair", {"b": 2, "a": 1}, (Step("select"),)).key
    assert first.key != Step("pair", {"a": 1, "b": 3}, (Step("select"),)).key
    assert first.key != Step("pair", {"a": 1, "b": 2}, (Step("select", {"x": 1}),)).key


def test_requests_to_one_store_share_its_folder_but_not_the_manifest():
    one = Step("generate", {"samples": 3}, (), {"model": "m"})
    more = Step("generate", {"samples": 5}, (), {"model": "m"})
    assert one.folder == more.folder
    assert one.manifest != more.manifest
    assert one.folder != Step("generate", {"samples": 3}, (), {"model": "n"}).folder


def test_a_step_is_done_when_its_manifest_is_there(tmp_path):
    root, step = Folder(str(tmp_path)), Step("select", {"a": 1}, (Step("prompts"),))
    assert not step.is_done(root)
    step.finish(root, {"rows": 3}, time.time())
    assert step.is_done(root)
    record = step.read_manifest(root)
    assert record["counts"] == {"rows": 3}
    assert record["inputs"] == [Step("prompts").folder]
    assert record["versions"]["python"].startswith("3.11")


@given(IDS, st.integers(0, 6), st.integers(0, 6))
def test_a_prompt_lies_in_one_bucket_and_is_found_under_any_number_of_buckets(key, a, b):
    written = next(x for x in buckets(2**a) if key in x)
    shard = Shard.of(written.shard("any"))
    old = Shard.of(f"{written.index:05d}-of-{written.count:05d}-{digest('any', 16)}.parquet")
    holders = [x for x in buckets(2**b) if key in x]
    assert len(holders) == 1
    assert shard
    assert old
    assert shard.key == old.key
    assert holders[0].meets(shard)
    assert holders[0].meets(old)


@pytest.mark.parametrize(("written", "read"), [(4, 4), (4, 16), (16, 4), (1, 8), (8, 1)])
def test_shards_are_read_under_another_number_of_buckets(tmp_path, written, read):
    folder = Folder(str(tmp_path))
    keys = [records.digest(i) for i in range(200)]
    for bucket in buckets(written):
        rows = [prompt(k) for k in keys if k in bucket]
        write_shard(folder, bucket, records.PROMPT, rows, "all")
    found = [
        key
        for bucket in buckets(read)
        for key in read_bucket(folder, bucket, records.PROMPT)["prompt_id"].to_pylist()
    ]
    assert sorted(found) == sorted(keys)


def prompt(key: str, split: str = "sft") -> dict:
    return {"prompt_id": key, "messages": [{"role": "user", "content": "x"}], "split": split}


def response(key: str, sample: int, text: str = "a") -> dict:
    return {"prompt_id": key, "source": "s", "sample": sample, "text": text}


def test_samples_bound_what_a_grown_store_gives(tmp_path):
    """A store with other prompts, more samples and a doubled row gives what was asked, once."""
    root, bucket = Folder(str(tmp_path)), Bucket(0, 1)
    asked, other = records.digest("asked"), records.digest("other")
    prompts, store = Step("prompts"), Step("generate", {}, (), {"model": "m"})
    rows = [prompt(asked), prompt(other, "preference")]
    write_shard(root / prompts.folder, bucket, records.PROMPT, rows, "all")
    answers = [response(k, i) for k in (asked, other) for i in range(5)]
    write_shard(root / store.folder, bucket, records.RESPONSE, answers, "first")
    write_shard(root / store.folder, bucket, records.RESPONSE, [response(asked, 1)], "zombie")
    samples = Samples(store, Prompts(prompts, ("sft",)), 3)
    table = samples.read(root, bucket, records.RESPONSE)
    assert table.select(["prompt_id", "sample"]).to_pylist() == [
        {"prompt_id": asked, "sample": i} for i in range(3)
    ]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    """A writer that dies leaves a partial file that no reader sees."""
    folder = Folder(str(tmp_path))
    publication = folder._publish("a.parquet")
    folder.filesystem.open_output_stream(publication.__enter__()).write(b"half")
    publication.__exit__(RuntimeError)
    (tmp_path / f"{TEMPORARY_PREFIX}1234-b.parquet").write_bytes(b"half")
    assert folder.files() == []


def test_folder_addresses():
    folder = Folder("s3://bucket/run?endpoint_override=localhost:1&scheme=http")
    assert (folder / "a").uri == "s3://bucket/run/a?endpoint_override=localhost:1&scheme=http"
    assert str(folder / "a") == "s3://bucket/run/a"
    assert (Folder("out") / "a").path == os.path.abspath("out/a")
    with pytest.raises(UserError, match="not a storage address"):
        _ = Folder("nonsense://x").path


@pytest.mark.parametrize(
    "look",
    [
        lambda folder: folder.read_json("x.json"),
        lambda folder: folder.holds_json("x.json", {}),
        is_running,
    ],
)
def test_a_store_that_does_not_open_is_no_broken_file(look):
    """The advice for a broken file is to delete it; nobody's lease is there to be taken."""
    with pytest.raises(UserError, match="not a storage address") as caught:
        look(Folder("nonsense://x"))
    assert "delete" not in str(caught.value)


def test_a_broken_file_is_none_of_a_store(tmp_path):
    folder = Folder(str(tmp_path))
    for name in ("x.json", file_name("x")):
        folder.write(name, b"{")
    assert not folder.holds_json("x.json", {})
    assert not is_running(folder)
    with pytest.raises(BrokenFileError, match="delete it"):
        folder.read_json("x.json")


def test_records_of_json_lines_whatever_is_in_them(tmp_path):
    """Only a newline ends a line; one that is cut off, or holds no object, is passed over."""
    texts = ["a b", "\u2028", "\x85", "\x0b\x0c\x1c", "\r", "\r\n", "\n", " ", "{}", "ä🙂"]
    rows = [{"text": text, text: 1} for text in texts]
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        folder = Folder(str(tmp_path))
        folder.write("x.jsonl", "\n".join([*lines, "", "3", '{"cut": "o']).encode())
        assert folder.read_records("x.jsonl") == rows
    folder.write("empty.jsonl", b"")
    assert folder.read_records("empty.jsonl") == []


def test_unwritable_output_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not writable"):
        check_writable(Folder(str(tmp_path / "file" / "sub")))


def test_tables_keep_their_schema(tmp_path):
    folder = Folder(str(tmp_path))
    row = prompt("0" * 32)
    folder.write_table("a.parquet", pa.Table.from_pylist([row], schema=records.PROMPT))
    assert folder.read_table("a.parquet").schema.equals(records.PROMPT, check_metadata=True)


def test_an_output_is_known_by_one_mark_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("out", "./out/", str(tmp_path / "out"), f"{tmp_path}/x/../out/")
    assert len({output_mark(Folder(name)) for name in names}) == 1
    assert output_mark(Folder("other")) != output_mark(Folder("out"))


def test_half_a_surrogate_pair_is_a_bad_row():
    with pytest.raises(ValueError, match="no Unicode at character 3"):
        parse_messages("abc\ud83d")


def test_any_change_of_data_is_a_new_input(tmp_path):
    path = tmp_path / "p.jsonl"
    seen = set()
    for byte in (b"a", b"b"):
        with path.open("wb") as file:
            file.truncate(65 * 2**20)  # above what is read of weights
            file.seek(33_333_333)
            file.write(byte)
        seen.add(data_fingerprint([str(path)]))
    assert len(seen) == 2


def test_a_crash_while_failed_rows_are_tried_again_forgets_no_attempt(tmp_path):
    """Attempts 1, a crash, 2, 3: then the row is given up, and the other is forgotten."""
    folder, bucket = Folder(str(tmp_path)), Bucket(0, 1)
    rows = {
        key: failure("score", ValueError("x"), prompt_id=key, source="a", sample=0)
        for key in ("lasting", "passing")
    }
    write_failures(folder, bucket, list(rows.values()), "first")
    with pytest.raises(KeyboardInterrupt), retrying_failures(folder, bucket, 3):
        raise KeyboardInterrupt
    for attempts in (2, 3):
        with retrying_failures(folder, bucket, 3) as earlier:
            assert earlier.attempts["lasting", "a", 0] == attempts - 1
            assert not earlier.given_up
            write_failures(folder, bucket, [rows["lasting"]], "again", earlier)
        (kept,) = read_bucket(folder, bucket, FAILURE).to_pylist()
        assert (kept["prompt_id"], kept["attempts"]) == ("lasting", attempts)
    for _ in range(2):
        with retrying_failures(folder, bucket, 3) as earlier:
            assert earlier.given_up == {("lasting", 0)}
    with retrying_failures(folder, bucket) as earlier:
        assert earlier.attempts == {("lasting", "a", 0): 3}
    assert list_shards(folder) == []
