"""Weights on a node: hub ids and object stores, one copy for all its processes, eviction.

The hub's own client speaks with a server of the test's own; what has to hold across processes
is shown with processes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import make_model, one_source, write_model

from wrpo_ray.config import Config, ModelConfig, TargetConfig, serving
from wrpo_ray.errors import UserError
from wrpo_ray.export.forms import Form
from wrpo_ray.export.preferences import export_preferences
from wrpo_ray.llm.vllm_settings import weight_bytes
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.serve.check import checked
from wrpo_ray.storage import cache as caches
from wrpo_ray.storage import hub as hubs
from wrpo_ray.storage import remote
from wrpo_ray.storage.cache import NodeCache
from wrpo_ray.storage.fingerprints import model_fingerprint
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.remote import Listed, read_piece, write_pieces
from wrpo_ray.storage.weight_files import engine_files

ROOT = Path(__file__).parents[3]
GB = 10**9
FETCH = """
import sys
from wrpo_ray.storage.folder import Folder
print(Folder(sys.argv[1]).local(), flush=True)
sys.stdin.read()
"""
"""Fetches a folder, tells where it lies, and holds it until its stdin ends."""


class Sized:
    """A source of one file of zeros."""

    def __init__(self, size: int, name: str = "weights"):
        self.size, self.name = size, name
        self.fetched = 0

    def __str__(self) -> str:
        return self.name

    def files(self) -> dict[str, Listed]:
        return {"data": Listed(self.size)}

    def fetch(self, name: str, file: Listed, to: Path) -> str:
        self.fetched += 1
        return write_pieces([bytes(file.size)], name, file, to)


def let_go() -> None:
    """What the end of this process would do to its holds."""
    for file in caches._held.values():
        file.close()
    caches._held.clear()


@pytest.fixture(autouse=True)
def _no_holds():
    yield
    let_go()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model's folder."""
    return write_model(tmp_path_factory.mktemp("model"))


def fetching(folder: Folder, code: str = FETCH) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, folder.uri],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# --- which files ---------------------------------------------------------------------------------


def test_only_what_an_engine_reads_is_fetched():
    """One form of the weights, no copies in subfolders, all tokenizers and templates."""
    sharded = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    small = [
        "config.json", "generation_config.json", "model.safetensors.index.json",
        "tokenizer.model", "merges.txt", "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ]  # fmt: skip
    left = [
        "pytorch_model-00001-of-00002.bin", "consolidated.safetensors", "original/config.json",
        "original/consolidated.00.pth", "onnx/model.onnx", "model-Q4.gguf", "README.md",
        "tf_model.h5", "model.fp16.safetensors", "training_args.bin",
        "modeling_own.py",
    ]  # fmt: skip
    assert set(engine_files([*sharded, *small, *left])) == {*sharded, *small}
    assert engine_files(["config.json", "pytorch_model.bin", "a.pth"]) == [
        "config.json",
        "pytorch_model.bin",
    ]


# --- hub ids -------------------------------------------------------------------------------------


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model in ("org/name", "hf://org/name", "hf://org/name@v1", "Qwen/Qwen2.5-0.5B_x"):
        assert hubs.is_hub_id(model)
    for model in ("name", "/org/name", "./org/name", "~/name", "a/b/c", "s3://org/name", "../a/b"):
        assert not hubs.is_hub_id(model)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not hubs.is_hub_id("org/name")
    assert hubs.is_hub_id("hf://org/name")
    assert hubs.resolve_address("org/name", None) == "org/name"
    with pytest.raises(UserError, match="org/name is a folder; only a hub id"):
        hubs.resolve_address("org/name", "main")


def test_a_revision_is_known_by_its_commit(hub, model, tmp_path):
    """The branch moves: a new identity. The commit, or a tag at it, is the old one."""
    first = hub.add("org/name", model)
    hub.repos["org/name"].refs["v1"] = first
    branch = preflight(one_source("org/name", tmp_path))
    assert branch.sources[0].model == f"hf://org/name@{first}"
    assert branch.sources[0].revision is None
    second = hub.add("org/name", model, extra=b"{}")
    moved = preflight(one_source("org/name", tmp_path))
    pinned = preflight(one_source("org/name", tmp_path, revision=first))
    tagged = preflight(one_source("hf://org/name@v1", tmp_path))
    assert moved.sources[0].model == f"hf://org/name@{second}"
    assert pinned == tagged == branch

    def key(settings: Config) -> str:
        return Chain(settings, "generate").build()[-1].steps[-1].key

    assert key(pinned) == key(tagged) == key(branch) != key(moved)
    assert model_fingerprint(Folder(moved.sources[0].model)) == second
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    other = preflight(one_source("org/name", tmp_path, chat_template=str(template)))
    assert key(other) != key(moved)


def test_a_check_reads_all_but_the_weights(hub, model, tmp_path):
    hub.add("org/name", model)
    preflight(one_source("org/name", tmp_path))
    assert set(hub.downloads()) == {p.name for p in model.iterdir()} - {"model.safetensors"}
    assert not list((tmp_path / "cache").glob("*.json"))


def test_the_size_of_weights_is_known_after_the_check_without_a_request(hub, model, tmp_path):
    """An engine on a CPU has room by it, as by that of a folder."""
    commit = hub.add("org/name", model, **{"pytorch_model.bin": b"the same weights again"})
    address = Folder(f"hf://org/name@{commit}")
    assert weight_bytes(address) == 0
    assert weight_bytes(Folder("hf://org/name")) == 0  # of no commit
    preflight(one_source("org/name", tmp_path))
    asked = hub.asked.copy()
    size = (model / "model.safetensors").stat().st_size
    assert weight_bytes(address) == weight_bytes(Folder(str(model))) == size > 0
    assert hub.asked == asked


def test_without_a_template_or_weights_the_check_says_so(hub, model, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    hub.add("org/bare", bare)
    with pytest.raises(UserError, match=r"sources.a: org/bare: has no chat template; .*set `chat"):
        preflight(one_source("org/bare", tmp_path))
    empty = shutil.copytree(model, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    hub.add("org/empty", empty, **{"model.gguf": b"x"})
    with pytest.raises(UserError, match=r"sources.a: org/empty: has no weights \(\*.safetensors"):
        preflight(one_source("org/empty", tmp_path))


def test_what_is_broken_on_the_hub_is_told_before_its_weights_are_fetched(
    hub, model, tmp_path, monkeypatch
):
    """A shard that its index names, a tokenizer, a template; also for `wrpo serve`."""
    monkeypatch.setenv("WRPO_SERVE_KEYS", f"me {'0' * 64}")
    sharded = shutil.copytree(model, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    make_model().save_pretrained(sharded, max_shard_size="40KB")
    hub.add("org/whole", sharded)
    preflight(one_source("org/whole", tmp_path))
    (sharded / "model-00002-of-00004.safetensors").unlink()
    hub.add("org/shards", sharded)
    for name, told in (
        ("org/shards", "names model-00002-of-00004.safetensors, which is missing"),
        ("org/tokenizer", "its tokenizer cannot be loaded"),
        ("org/template", "fails on two turns"),
    ):
        files = {"org/tokenizer": {"tokenizer.json": b"{}"}}
        files["org/template"] = {"chat_template.jinja": b"{% for"}
        if name in files:
            hub.add(name, model, **files[name])
        with pytest.raises(UserError, match=f"sources.a: {name}: .*{told}"):
            preflight(one_source(name, tmp_path))
        with pytest.raises(UserError, match=f"serve: m: {name}: .*{told}"):
            checked(serving({"models": [{"name": "m", "model": name}]}))
    assert not hub.downloads(".safetensors")


def test_a_copy_is_a_model_folder_with_the_hubs_content(hub, model, tmp_path):
    extra = {"pytorch_model.bin": b"x" * 99, "README.md": b"y"}
    commit = hub.add("org/name", model, **extra)
    copy = Folder(f"hf://org/name@{commit}").local()
    names = {p.name for p in model.iterdir()}
    assert {p.name for p in copy.iterdir()} == names
    assert all((copy / n).read_bytes() == (model / n).read_bytes() for n in names)


def test_eight_processes_download_each_file_once(hub, model, tmp_path):
    hub.pause = 0.02
    commit = hub.add("org/name", model)
    processes = [fetching(Folder(f"hf://org/name@{commit}")) for _ in range(8)]
    places = {p.communicate("")[0].strip() for p in processes}
    assert [p.returncode for p in processes] == [0] * 8
    assert len(places) == 1
    assert hub.downloads() == dict.fromkeys((p.name for p in model.iterdir()), 1)


def test_a_killed_download_leaves_nothing_that_looks_whole_and_goes_on(hub, model, tmp_path):
    commit = hub.add("org/name", model)
    folder, cache = Folder(f"hf://org/name@{commit}"), tmp_path / "cache"
    small = len(list(model.iterdir())) - 1
    hub.pause = 0.2  # only the weights are large enough for it
    with fetching(folder) as process:
        while not hub.downloads(".safetensors") or _arrived(cache) < small:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [".part"]
    hub.pause = 0
    copy = folder.local()
    assert (copy / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    again = {name for name, count in hub.downloads().items() if count > 1}
    assert again == {"model.safetensors"}
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [copy.name]


def _arrived(cache: Path) -> int:
    """Files that an unfinished copy has and knows that it has; the note comes after the file."""
    return len(list(cache.glob("*.part/.arriving/.cache/huggingface/download/*.metadata")))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_with_another_content_is_refused_and_fetched_again(hub, model, name):
    """A flipped bit passes every check of sizes."""
    folder = Folder(f"hf://org/name@{hub.add('org/name', model)}")
    hub.spoil = name
    with pytest.raises(OSError, match=f"the content of {name} does not match its hash on the hub"):
        folder.local()
    hub.spoil = ""
    assert (folder.local() / name).read_bytes() == (model / name).read_bytes()
    assert {n for n, count in hub.downloads().items() if count > 1} == {name}


def test_a_model_in_the_users_own_cache_is_used_in_place(hub, model, tmp_path):
    from huggingface_hub import snapshot_download

    commit = hub.add("org/name", model)
    folder = Folder(f"hf://org/name@{commit}")
    own = snapshot_download("org/name", revision=commit)
    assert folder.local() == Path(own)
    assert not (tmp_path / "cache").exists()
    (Path(own) / "generation_config.json").unlink()
    copy = folder.local()  # it is no longer whole
    assert copy.parent == tmp_path / "cache"
    assert (copy / "generation_config.json").is_file()


def test_offline_with_a_commit_and_a_cache(hub, model, tmp_path, monkeypatch):
    commit = hub.add("org/name", model)
    settings = one_source("org/name", tmp_path, revision=commit)
    online = preflight(settings)
    assert preflight(one_source("org/name", tmp_path)) == online
    place = Folder(online.sources[0].model).local()
    asked = hub.asked.total()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert preflight(settings) == online
    assert Folder(online.sources[0].model).local() == place
    assert (
        preflight(one_source("org/name", tmp_path)) == online
    )  # the branch where it was seen last
    assert hub.asked.total() == asked


# --- what the hub refuses ------------------------------------------------------------------------


def refusal(settings: Config) -> str:
    with pytest.raises(UserError) as caught:
        preflight(settings)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("sources.a: ")
    return line


def test_a_gated_model(hub, model, tmp_path, monkeypatch):
    hub.add("org/gated", model)
    hub.repos["org/gated"].is_gated = True
    line = refusal(one_source("org/gated", tmp_path))
    assert f"org/gated: is gated; accept its licence on {hub.url}/org/gated" in line
    assert "set HF_TOKEN, on every node" in line
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    preflight(one_source("org/gated", tmp_path))
    assert "Bearer hf_granted" in hub.tokens


def test_a_token_goes_nowhere_but_to_the_hub(hub, model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    commit = hub.add("org/gated", model)
    hub.repos["org/gated"].is_gated = True
    settings = preflight(one_source("org/gated", tmp_path))
    Folder(settings.sources[0].model).local()
    assert hub.asked["GET", f"/org/gated/resolve/{commit}/model.safetensors"] == 1
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in files if b"hf_granted" in p.read_bytes()]
    assert "hf_granted" not in "".join(capfd.readouterr())
    assert "hf_granted" not in repr(settings)


def test_a_missing_model(hub, tmp_path):
    line = refusal(one_source("org/gone", tmp_path))
    assert "org/gone: no such folder, and no model that" in line
    assert "correct `model`, or set HF_TOKEN" in line


def test_a_wrong_revision(hub, model, tmp_path):
    hub.add("org/name", model)
    for revision in ("v9", "0" * 40):
        line = refusal(one_source("org/name", tmp_path, revision=revision))
        assert f"org/name: has no revision '{revision}'; give a branch, tag or commit" in line


def test_no_network(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "while HF_HUB_OFFLINE is set; put that right" in refusal(
        one_source("org/name", tmp_path)
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refusal(one_source("org/name", tmp_path, revision="v1"))
    assert "while http://127.0.0.1:9 does not answer" in line
    assert "run `hf download org/name --revision v1` where there is a network" in line


def test_all_problems_are_told_at_once(hub, tmp_path):
    settings = one_source("org/gone", tmp_path)
    more = ModelConfig(name="b", model=str(tmp_path / "gone"))
    settings = settings.model_copy(update={"sources": (*settings.sources, more)})
    with pytest.raises(UserError) as caught:
        preflight(settings)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "sources.a",
        "sources.b",
    ]


def test_an_export_finds_the_steps_of_a_hub_model(hub, model, tmp_path):
    hub.add("org/name", model)
    settings = one_source("org/name", tmp_path).model_copy(
        update={"target": TargetConfig(name="t", model="org/name")}
    )
    with pytest.raises(UserError, match="the preference rows are not there yet"):
        export_preferences(settings, str(tmp_path / "rows.jsonl"), Form())


# --- an object store -----------------------------------------------------------------------------


def test_a_killed_copy_of_an_object_store_goes_on(bucket, tmp_path, monkeypatch):
    """Files that arrived stay as they are; none is half, and the folder is not taken for whole."""
    monkeypatch.setenv("WRPO_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    for number in range(80):
        (source / "below" / f"{number:03}").write_bytes(os.urandom(100_000))
    folder = Folder(bucket) / "rows"
    folder.upload(source)
    with fetching(folder) as process:
        while not (there := finished(tmp_path / "cache", ".part")):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    there = finished(tmp_path / "cache", ".part")
    assert 0 < len(there) < 80
    copy = folder.local()
    now = finished(tmp_path / "cache", "")
    assert there.items() <= now.items()
    assert len(now) == 80
    assert all(
        (copy / "below" / p.name).read_bytes() == p.read_bytes()
        for p in (source / "below").iterdir()
    )
    assert not list(copy.rglob(".*"))


def finished(cache: Path, suffix: str) -> dict[str, int]:
    """{file: when it was last written} of the copy's files."""
    files = [p for d in cache.glob(f"*{suffix}") if d.suffix == suffix for p in d.glob("below/*")]
    return {p.name: p.stat().st_mtime_ns for p in files if not p.name.startswith(".")}


def test_a_trained_model_in_an_object_store_comes_to_the_node_once(
    bucket, model, tmp_path, monkeypatch
):
    monkeypatch.setenv("WRPO_CACHE", str(tmp_path / "cache"))
    folder = Folder(bucket) / "sft" / "model"
    folder.upload(model)
    (folder / "checkpoint").write("optimizer.bin", b"not for an engine")
    processes = [fetching(folder) for _ in range(4)]
    (place,) = {p.communicate("")[0].strip() for p in processes}
    assert {p.name for p in Path(place).iterdir()} == {p.name for p in model.iterdir()}
    record = json.loads(Path(f"{place}.json").read_text())
    assert record["of"] == "s3://wrpo/run/sft/model"


# --- eviction ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_the_least_recently_used_are_evicted_and_no_more_than_needed(tmp_path_factory, asked):
    """Against a list in order of use; the copy `i` has 100 * (i + 1) bytes, the limit is 1000."""
    cache = NodeCache(tmp_path_factory.mktemp("cache"), limit=1000)
    sources = [Sized(100 * (i + 1)) for i in range(6)]
    order: list[int] = []
    fetched = [0] * 6
    for i in asked:
        cache.copy(f"key{i}", sources[i])
        let_go()
        if i in order:
            order.remove(i)
        else:
            fetched[i] += 1
            while sum(100 * (k + 1) for k in order) + 100 * (i + 1) > 1000:
                order.pop(0)
        order.append(i)
        there = {p.name for p in cache.folder.iterdir() if p.is_dir()}
        assert there == {f"key{k}" for k in order}
    assert [s.fetched for s in sources] == fetched


HOLD = """
import sys
from pathlib import Path
sys.path += sys.argv[2:]
from test_weights import NodeCache, Sized
NodeCache(Path(sys.argv[1]), 1000).copy("held", Sized(600))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_copy_in_use_is_never_evicted_and_a_killed_process_lets_go(tmp_path):
    cache = NodeCache(tmp_path, limit=1000, patience=0.3)
    paths = [str(ROOT / "tests"), str(ROOT / "tests" / "unit" / "storage")]
    command = [sys.executable, "-c", HOLD, str(tmp_path), *paths]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        cache.copy("idle", Sized(300))
        let_go()
        with pytest.raises(UserError, match="big takes 5e-07 GB and does not fit: the cache"):
            cache.copy("big", Sized(500, "big"))
        assert (tmp_path / "held" / "data").stat().st_size == 600
        assert (tmp_path / "idle").is_dir()  # evicting it would not have been enough
        let_go()
        cache.copy("fits", Sized(400))
        assert not (tmp_path / "idle").exists()
        let_go()
        holder.kill()
    cache.copy("big", Sized(500, "big"))
    assert not (tmp_path / "held").exists()
    assert (tmp_path / "fits").is_dir()


def test_a_copy_that_is_brought_ahead_is_not_locked_and_spares_what_is_needed_before(tmp_path):
    cache = NodeCache(tmp_path, limit=1000, patience=600)
    assert cache.bring("first", Sized(500)) == {"data": hashlib.sha256(bytes(500)).hexdigest()}
    cache.bring("old", Sized(400))
    with pytest.raises(UserError, match="does not fit"):  # at once
        cache.bring("ahead", Sized(700), spared=["first"])
    assert (tmp_path / "old").is_dir()
    source = Sized(450)
    for _ in range(2):
        assert cache.bring("ahead", source, spared=["first"]) == {
            "data": hashlib.sha256(bytes(450)).hexdigest()
        }
    assert source.fetched == 1
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"first", "ahead"}
    cache.copy("needed", Sized(900))  # both let go of at once
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"needed"}


def test_pieces_of_a_copy_are_read_before_and_after_it_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 4)
    content, part = b"0123456789", tmp_path / "key.part"
    part.mkdir()
    listed = Listed(10, hashlib.sha256(content).hexdigest())
    with pytest.raises(OSError, match="key has no data"):
        read_piece(tmp_path / "key", "data", 0)
    with pytest.raises(OSError, match="the content of data does not match its hash"):
        write_pieces([b"012345678_"], "data", listed, part)
    assert not (part / "data").exists()
    assert write_pieces([content[:3], content[3:]], "data", listed, part) == listed.hash
    assert [read_piece(tmp_path / "key", "data", i) for i in (0, 4, 8)] == [b"0123", b"4567", b"89"]
    part.rename(tmp_path / "key")
    assert read_piece(tmp_path / "key", "data", 8) == b"89"


def test_each_byte_is_hashed_once(hub, bucket, model, tmp_path, monkeypatch):
    """On its way from a store; when the hub's client has written it, which does not hash it too."""
    hashed = Counter()

    class Counting:
        def __init__(self, kind, start=b"", **more):
            self.kind, self.hash = kind, getattr(hashlib, kind)(start, **more)

        def update(self, data):
            hashed[self.kind] += len(data)
            self.hash.update(data)

        def hexdigest(self):
            return self.hash.hexdigest()

    def refuse(*_):
        raise AssertionError("the hub's client hashes a file")

    fake = SimpleNamespace(**{kind: partial(Counting, kind) for kind in ("sha256", "sha1")})
    monkeypatch.setattr(remote, "hashlib", fake)
    monkeypatch.setattr("huggingface_hub.file_download.sha_fileobj", refuse)
    monkeypatch.setattr("huggingface_hub.utils._verification.compute_file_hash", refuse)
    sizes = {p.name: p.stat().st_size for p in model.iterdir()}
    Folder(f"hf://org/name@{hub.add('org/name', model)}").local()
    large = sizes["model.safetensors"]
    assert hashed == {"sha256": large, "sha1": sum(sizes.values()) - large}
    hashed.clear()
    folder = Folder(bucket) / "once"
    folder.upload(model)
    copy = folder.local()
    assert hashed == {"sha256": sum(sizes.values())}
    record = json.loads(Path(f"{copy}.json").read_text())
    assert record["hashes"] == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in model.iterdir()
    }


def test_what_can_never_fit_is_refused_at_once(tmp_path):
    cache = NodeCache(tmp_path, limit=1000, patience=600)
    cache.copy("held", Sized(900))
    with pytest.raises(UserError, match=r"does not fit: .* 9e-07 GB are copies in use; raise cl"):
        cache.copy("big", Sized(1001))


def test_a_waiting_copy_is_made_when_another_is_let_go(tmp_path):
    import threading

    cache = NodeCache(tmp_path, limit=1000, patience=30)
    cache.copy("held", Sized(900))
    threading.Timer(0.5, let_go).start()
    assert cache.copy("next", Sized(800)).is_dir()
    assert not (tmp_path / "held").exists()


@pytest.mark.parametrize("moment", ["key.part", ".arriving"])
def test_a_copy_that_is_finished_while_another_looks_for_room_is_counted(
    tmp_path, monkeypatch, moment
):
    """Two runs share a cache: the folder that one looks into is renamed by the other."""
    entry, scandir = caches._Entry(tmp_path, "key"), os.scandir
    (entry.part / ".arriving").mkdir(parents=True)
    (entry.part / "data").write_bytes(bytes(300))
    entry.record("key", 400)

    def look(path):
        if Path(path).name == moment and entry.part.exists():
            entry.part.rename(entry.copy)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", look)
    assert entry.written == 400


def test_a_full_disk_evicts_too(tmp_path, monkeypatch):
    """The disk's free bytes as they would be beside these copies on a disk of 1 GB and 1000 B."""
    cache = NodeCache(tmp_path)

    def usage(folder: Path) -> object:
        taken = sum(p.stat().st_size for p in tmp_path.rglob("data"))
        return type("Usage", (), {"free": GB + 1000 - taken})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    for key in ("one", "two"):
        cache.copy(key, Sized(400))
    let_go()
    cache.copy("one", Sized(400))
    let_go()
    cache.copy("three", Sized(500))
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"one", "three"}
    with pytest.raises(UserError, match="raise cluster.cache_gb, free the disk, or set WRPO_CACHE"):
        cache.copy("four", Sized(GB))


def test_a_file_of_another_size_is_refused(tmp_path):
    class Short(Sized):
        def fetch(self, name: str, file: Listed, to: Path) -> str:
            return write_pieces([b"half"], name, file, to)

    with pytest.raises(OSError, match="data arrived with 4 bytes in place of 10"):
        NodeCache(tmp_path).copy("key", Short(10))
    assert not (tmp_path / "key").exists()
    assert (NodeCache(tmp_path).copy("key", Sized(10)) / "data").stat().st_size == 10


def test_the_limit_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WRPO_CACHE", str(tmp_path))
    monkeypatch.setenv("WRPO_CACHE_GB", "1.5")
    assert caches.node_cache() == NodeCache(tmp_path, 1_500_000_000)
    monkeypatch.setenv("WRPO_CACHE_GB", "much")
    with pytest.raises(UserError, match="WRPO_CACHE_GB=much: not a number of GB"):
        caches.node_cache()


# --- a folder that others could write to ---------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The cache without WRPO_CACHE: in the temporary folder, where anyone may put one."""
    monkeypatch.delenv("WRPO_CACHE")
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"wrpo-cache-{os.getuid()}"


def test_a_cache_is_its_users_own(own, tmp_path):
    assert caches.node_cache().folder == own
    assert own.stat().st_mode & 0o777 == 0o700
    for mode in (0o720, 0o702, 0o777):
        own.chmod(mode)
        with pytest.raises(UserError, match="others may write to it"):
            caches.node_cache()
    own.rmdir()
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="set WRPO_CACHE to a folder of your own"):
        caches.node_cache()


def test_a_planted_cache_of_another_user_is_not_read(own, monkeypatch):
    """Its copies would be taken for complete models."""
    own.mkdir()
    if os.getuid() == 0:
        os.chown(own, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match="is another user's"):
        caches.node_cache()


def test_a_disk_that_others_may_write_to_has_a_folder_of_ones_own(tmp_path, monkeypatch):
    """Such as a node's scratch disk, or a volume of Kubernetes."""
    monkeypatch.setenv("WRPO_CACHE", str(tmp_path))
    assert caches.node_cache().folder == tmp_path
    tmp_path.chmod(0o777)
    folder = caches.node_cache().folder
    assert folder == tmp_path / f"wrpo-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UserError, match="others may write to it"):
        caches.node_cache()


# --- ways of loading -----------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["performance", "engine"])
def test_a_way_of_loading_without_its_package_is_told_before_any_work(
    model, tmp_path, section, monkeypatch
):
    settings = one_source(str(model), tmp_path, **{section: {"load_format": "runai_streamer"}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="a: load_format: runai_streamer needs its package: on ev"):
        preflight(settings)
    monkeypatch.undo()
    preflight(one_source(str(model), tmp_path, **{section: {"load_format": "safetensors"}}))
