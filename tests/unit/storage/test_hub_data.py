"""Data sets of the hub as input files: what an address takes, its commit, and what is refused."""

import io
import json
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from wrpo_ray.config import Config, PromptsConfig
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.model_sections import PINS, keep_pins, pinned, read_pins
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.planning.estimate import plan
from wrpo_ray.stages.ingest.readers import input_files, read_rows
from wrpo_ray.storage.folder import Folder

NAME = "hf://datasets/org/data"
SHARDS = [f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)]


def parquet(*prompts: str, column: str = "prompt") -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({column: prompts, "skill": ["a"] * len(prompts)}), file)
    return file.getvalue()


def jsonl(*prompts: str) -> bytes:
    return "".join(json.dumps({"prompt": p}) + "\n" for p in prompts).encode()


SOURCE = {
    "sources": [{"name": "a", "model": "m", "endpoint": {"url": "http://127.0.0.1:9/v1"}}],
    "reward": {"function": "wrpo_ray.zoo.skills:verify"},
}
BY, REFERENCE = {"verifier": "exact"}, {"reference": "skill"}
FILES = {
    "README.md": b"# data",
    SHARDS[0]: parquet("a", "b"),
    SHARDS[1]: parquet("c"),
    "data/test-00000-of-00001.parquet": parquet("t"),
    "extra/one/rows.jsonl": jsonl("x", "y"),
    "old/rows.csv": b"prompt",
}


@pytest.fixture
def data(hub):
    """A hub with one data set."""
    return put(hub, FILES)


def put(hub, files, name="org/data", ref="main"):
    """Add a commit to a data set; returns the hub."""
    from support.hub_server import Repo

    hub.repos.setdefault(f"datasets/{name}", Repo()).commit(files, ref)
    return hub


def commit(hub, ref: str = "main", name: str = "org/data") -> str:
    return hub.repos[f"datasets/{name}"].refs[ref]


def config(tmp_path, path: str = f"{NAME}/data/train-*", **more) -> Config:
    return Config(output=str(tmp_path / "out"), prompts={"path": path} | more, **SOURCE)


def files_of(settings: Config) -> list[str]:
    assert settings.prompts
    return input_files(settings.prompts.path, "prompts")


def key(settings: Config) -> str:
    return Chain(settings, "prompts").build()[0].steps[0].key


def refusal(settings: Config) -> str:
    with pytest.raises(UserError) as caught:
        preflight(settings)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("prompts: ")
    return line


# --- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "names"),
    [
        ("/data/train-*.parquet", SHARDS),
        ("/data/train-*", SHARDS),
        (f"/{SHARDS[1]}", SHARDS[1:]),
        ("/data/*", ["data/test-00000-of-00001.parquet", *SHARDS]),
        ("/extra", ["extra/one/rows.jsonl"]),
        ("/extra/one/", ["extra/one/rows.jsonl"]),
        ("/extra/one/rows.jsonl", ["extra/one/rows.jsonl"]),
    ],
)
def test_an_address_names_a_folder_a_file_or_a_pattern(data, tmp_path, inside, names):
    settings = preflight(config(tmp_path, NAME + inside))
    assert files_of(settings) == [f"{NAME}@{commit(data)}/{name}" for name in names]


def test_a_data_set_with_one_folder_of_one_split_needs_no_more_than_its_name(hub, tmp_path):
    put(hub, {name: FILES[name] for name in ("README.md", *SHARDS)})
    assert len(files_of(preflight(config(tmp_path, NAME)))) == 2


@pytest.mark.parametrize(
    ("inside", "told"),
    [
        ("", "holds no .jsonl or .parquet file; there are data/, extra/, old/, README.md; give a "),
        (
            "/data",
            r"holds files of several splits \(test, train\); give one, such as .*/data/test\*",
        ),
        ("/old", "there are rows.csv; .*try `revision: refs/convert/parquet`"),
        ("/data/dev-*", "no such .jsonl or .parquet file; there are test-00000-of-00001.parquet"),
        ("/gone/rows.jsonl", "the data set has no folder 'gone'"),
        ("/data/[t]*", "no such .jsonl or .parquet file"),
    ],
)
def test_what_an_address_does_not_decide_is_refused(data, tmp_path, inside, told):
    import re

    assert re.search(told, refusal(config(tmp_path, NAME + inside)))


@pytest.mark.parametrize(
    "path", ["hf://org/data", "hf://datasets/data", "hf://spaces/org/x/a.jsonl"]
)
def test_another_address_of_the_hub_is_refused(hub, tmp_path, path):
    assert "its address is hf://datasets/org/name" in refusal(config(tmp_path, path))
    assert not hub.asked


def test_only_a_data_set_of_the_hub_has_a_revision(data, tmp_path):
    with pytest.raises(ValueError, match="revision: rows.jsonl is no data set of the hub; only"):
        PromptsConfig(path="rows.jsonl", revision="main")
    twice = config(tmp_path, f"{NAME}@v1/data/train-*", revision="v2")
    assert "has one already; drop it, or 'v2'" in refusal(twice)


def test_a_data_set_is_only_read(data):
    for uri in (NAME, f"{NAME}/data"):
        with pytest.raises(UserError, match="is only an input, read at a commit"):
            Folder(uri).write("x", b"")


# --- commits ---------------------------------------------------------------------------------


def test_a_moved_branch_is_a_new_input_and_a_tag_at_the_old_commit_is_not(data, tmp_path):
    first = commit(data)
    data.repos["datasets/org/data"].refs["v1"] = first
    branch = preflight(config(tmp_path))
    put(data, FILES | {SHARDS[1]: parquet("d")})
    moved = preflight(config(tmp_path))
    tagged = preflight(config(tmp_path, revision="v1"))
    inline = preflight(config(tmp_path, f"{NAME}@v1/data/train-*"))
    exact = preflight(config(tmp_path, revision=first))
    assert tagged == inline == exact == branch
    assert key(exact) == key(branch) != key(moved)
    assert key(preflight(config(tmp_path, f"{NAME}/data/*"))) != key(moved)


def test_an_output_keeps_the_commits_of_its_first_run(data, tmp_path):
    pins: dict[str, str] = {}
    first = preflight(config(tmp_path), pins)
    root = Folder(first.output)
    assert not root.exists(PINS)  # a check writes nothing
    keep_pins(root, pins)
    old = commit(data)
    put(data, FILES | {SHARDS[1]: parquet("d")})
    put(data, FILES | {SHARDS[1]: parquet("e")}, ref="v2")
    asked = data.asked.copy()
    again = preflight(config(tmp_path))
    assert again == pinned(config(tmp_path)) == first
    assert not [path for (_, path) in data.asked - asked if "revision" in path and old not in path]
    other = preflight(config(tmp_path, revision="v2"), more := {})
    assert commit(data, "v2") in str(other.prompts)
    keep_pins(root, more)
    assert read_pins(first.output) == {
        "datasets/org/data@main": old,
        "datasets/org/data@v2": commit(data, "v2"),
    }
    elsewhere = config(tmp_path).model_copy(update={"output": str(tmp_path / "other")})
    assert commit(data) in str(preflight(elsewhere).prompts)


def test_two_inputs_of_one_data_set_have_one_commit(data, tmp_path):
    """The hub is asked once, so that they cannot differ where the branch moves."""
    settings = Config(
        output=str(tmp_path / "out"),
        prompts={"path": f"{NAME}/data/train-*"},
        evaluate={"prompts": {"path": f"{NAME}/data/test-*", "columns": REFERENCE}} | BY,
        target={"name": "t", "model": str(tmp_path / "gone")},
        **SOURCE,
    )
    found = pinned(settings)
    assert found.evaluate
    assert commit(data) in str(found.prompts)
    assert commit(data) in str(found.evaluate.prompts)
    assert data.asked["GET", "/api/datasets/org/data"] == 1


# --- content ---------------------------------------------------------------------------------


def test_rows_are_those_of_the_commit(data, tmp_path):
    files = files_of(preflight(config(tmp_path)))
    extra = files_of(preflight(config(tmp_path, f"{NAME}/extra")))
    put(data, dict.fromkeys(FILES, b"changed"))
    rows = [row for uri in files + extra for row in read_rows(uri, ["prompt"])]
    assert rows == [
        ("train-00000-of-00002.parquet:1", {"prompt": "a"}),
        ("train-00000-of-00002.parquet:2", {"prompt": "b"}),
        ("train-00001-of-00002.parquet:1", {"prompt": "c"}),
        ("rows.jsonl:1", {"prompt": "x"}),
        ("rows.jsonl:2", {"prompt": "y"}),
    ]


@pytest.fixture
def received(monkeypatch):
    """The sizes of what this process reads from its connections to servers.

    A server cannot tell: a client that reads one block of a file and leaves has up to
    32 MB of it waiting unread in its socket.
    """
    sizes = []
    read = socket.socket.recv

    def recv(self, *args):
        part = read(self, *args)
        sizes.append(len(part))
        return part

    monkeypatch.setattr(socket.socket, "recv", recv)
    return sizes


def test_a_check_reads_little_of_large_files(hub, tmp_path, received):
    """The driver asks for the ends of Parquet files and the beginnings of others."""
    long = [os.urandom(3000).hex() for _ in range(4000)]
    rows = "".join(json.dumps({"prompt": text, "skill": "a"}) + "\n" for text in long)
    put(hub, {"data/train-0.parquet": parquet(*long), "rows/train-0.jsonl": rows.encode()})
    for path in (f"{NAME}/data", f"{NAME}/rows"):  # of 24 MB each
        settings = config(tmp_path, path, columns={"group": "skill"})
        received.clear()
        key(preflight(settings))
        assert 0 < sum(received) < 2 * 2**20
        assert plan(settings, "prompts").works[0].rows == pytest.approx(4000, rel=0.01)
        assert sum(received) < 6 * 2**20  # read as often as it is asked for


def test_a_column_that_is_not_there_is_told_before_any_work(data, tmp_path):
    line = refusal(config(tmp_path, columns={"prompt": "question"}))
    assert "has no column 'question'; it has prompt, skill; set `columns`" in line


def test_files_without_rows_are_told(hub, tmp_path):
    put(hub, {"train.jsonl": b""})
    assert "has no rows; give a file with at least one" in refusal(config(tmp_path, NAME))


# --- what the hub refuses --------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["/data/train-*", "/extra"])
def test_a_gated_data_set(data, tmp_path, monkeypatch, inside):
    data.repos["datasets/org/data"].is_gated = True
    line = refusal(config(tmp_path, NAME + inside))
    assert (
        f"datasets/org/data: is gated; accept its licence on {data.url}/datasets/org/data" in line
    )
    assert "set HF_TOKEN, on every node" in line
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    settings = preflight(config(tmp_path, NAME + inside))
    assert [row for uri in files_of(settings) for row in read_rows(uri, ["prompt"])]
    assert "hf_granted" not in repr(settings)


def test_a_missing_data_set_and_revision(data, tmp_path):
    line = refusal(config(tmp_path, "hf://datasets/org/gone"))
    assert "datasets/org/gone: no data set that" in line
    assert "correct `path`, or set HF_TOKEN" in line
    for revision in ("v9", "0" * 40):
        line = refusal(config(tmp_path, revision=revision))
        assert f"datasets/org/data: has no revision '{revision}'; give a branch, tag or" in line


def test_no_network(data, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refusal(config(tmp_path))
    assert "cannot be read while HF_HUB_OFFLINE is set; put that right" in line
    assert "`hf download org/data --repo-type dataset --local-dir FOLDER`" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    exact = config(tmp_path, revision=commit(data))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    for settings in (config(tmp_path), exact):
        assert "http://127.0.0.1:9" in refusal(settings)
    guess = exact.model_copy(update={"plan": exact.plan.model_copy(update={"prompts": 7})})
    assert plan(guess, "prompts").works[0].rows == 7


def test_all_inputs_are_told_at_once(data, tmp_path):
    settings = Config(
        output=str(tmp_path / "out"),
        prompts={"path": "hf://datasets/org/gone"},
        evaluate={"prompts": {"path": f"{NAME}/old", "columns": REFERENCE}} | BY,
        target={"name": "t", "model": str(tmp_path / "gone")},
        **SOURCE,
    )
    with pytest.raises(UserError) as caught:
        preflight(settings)
    lines = str(caught.value).splitlines()
    assert {"prompts", "evaluate.prompts"} < {line.split(":")[0] for line in lines}
    assert len(lines) == 3  # and the target
