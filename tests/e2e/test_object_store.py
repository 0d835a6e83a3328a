"""The data part of the demo in an S3 store, killed once: the same rows as on local disk."""

import importlib.util

import pyarrow as pa
import pytest
from support.harness import SOURCES, greedy

from wrpo_ray.cli.entry import main
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, read_bucket
from wrpo_ray.data.shards import list_shards
from wrpo_ray.storage.cache import node_cache
from wrpo_ray.storage.folder import Folder

SOURCE = SOURCES[0]


def tables(output: Folder, step: str, schema: pa.Schema) -> pa.Table:
    infos = output.filesystem.get_file_info(pa.fs.FileSelector(output.path))
    names = [i.base_name for i in infos if i.base_name.rsplit("-", 1)[0] == step]
    assert names, f"no {step} in {output}"
    parts = [read_bucket(output / name, Bucket(0, 1), schema) for name in names]
    table = pa.concat_tables(parts)
    return table.sort_by([(n, "ascending") for n in KEY if n in schema.names])


KEY = ("prompt_id", "source", "sample")


def test_same_rows_as_on_disk_after_a_kill(demo, zoo, bucket, greedy_run, on_cluster):
    """Greedy, so that answers can be compared by content.

    Where its package is installed, the source's weights are streamed from the store: the step is
    the same as from disk, and nodes have no copy.
    """
    has_streamer = importlib.util.find_spec("runai_model_streamer_s3") is not None
    model = Folder(bucket.replace("/run?", f"/models/{SOURCE}?"))
    model.upload(zoo / "sources" / SOURCE)
    streamed = {"model": model.uri, "stream_weights": True} if has_streamer else {}
    store, remote = Folder(bucket), greedy(demo, zoo, bucket, **streamed)

    def is_generating() -> bool:
        names = [
            i.base_name
            for i in store.filesystem.get_file_info(
                pa.fs.FileSelector(store.path, allow_not_found=True)
            )
        ]
        return sum(len(list_shards(store / n)) for n in names if n.startswith("generate-")) >= 6

    remote.killed_when(is_generating, "fuse", "--until", "select")
    result = remote.here("fuse", "--until", "select")
    assert result.returncode == 0, result.stderr
    assert "rows were there" in result.stderr

    disk = Folder(str(greedy_run))
    ours = tables(store, f"score-reward-{SOURCE}", records.SCORED).drop_columns("reward")
    theirs = tables(disk, f"score-reward-{SOURCE}", records.SCORED).drop_columns("reward")
    assert ours.equals(theirs)
    columns = ["prompt_id", "messages", "split"]
    ours = tables(store, "select", records.SELECTION).select(columns)
    assert ours.equals(tables(disk, "select", records.SELECTION).select(columns))
    if not has_streamer:
        pytest.skip("all but streaming was checked: runai-model-streamer[s3] is not installed")
    step = f"generate-{SOURCE}-"
    assert [n for n in store.folders() if n.startswith(step)] == [
        n for n in disk.folders() if n.startswith(step)
    ]
    copies = [copy for copy in node_cache().folder.glob("*.json") if str(model) in copy.read_text()]
    files = [{file.name for file in copy.with_suffix("").iterdir()} for copy in copies]
    assert len(files) == 1
    assert files[0] >= {"config.json", "tokenizer.json"}
    assert not [name for name in files[0] if name.endswith(".safetensors")]


def test_training_from_and_to_an_object_store(demo, zoo, bucket, on_cluster, tmp_path, capsys):
    """SFT reads its shards from the store, puts its model there, and vLLM loads it from there.

    Status and report of the run need no more than its address.
    """
    result = greedy(demo, zoo, bucket).here("fuse", "--until", "sample")
    assert result.returncode == 0, result.stderr
    store = Folder(bucket)
    (sft,) = [
        i.base_name
        for i in store.filesystem.get_file_info(pa.fs.FileSelector(store.path))
        if i.base_name.startswith("sft-")
    ]
    assert "model.safetensors" in (store / sft / "model").files()
    assert tables(store, "score-reward-target-sft", records.SCORED).num_rows > 0
    assert main(["status", bucket]) == 0
    assert "nobody: no run is under way" in capsys.readouterr().out
    assert main(["report", bucket, "--to", str(tmp_path / "report.html")]) == 0
    assert 'id="training-sft-title"' in (tmp_path / "report.html").read_text()


def test_export_into_an_object_store(bucket):
    """As on disk, from shards that lie there too."""
    from support.tiny_models import preference_rows, write_preferences

    from wrpo_ray.export.dataset_files import write_file, write_folder
    from wrpo_ray.export.forms import Form

    store = Folder(bucket)
    rows = preference_rows(20)
    write_preferences(store / "shards", rows)
    assert write_folder(store / "shards", store / "set", Form("records")).rows == 20
    (name,) = (store / "set").files("data")
    assert (store / "set").read_table(f"data/{name}").num_rows == 20
    assert write_file(store / "shards", store / "rows.jsonl", Form()) == 20
    assert store.read("rows.jsonl").count(b"\n") == 20
