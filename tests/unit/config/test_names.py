"""Names of files: each character comes back as it is, on disk and in an object store."""

import glob
import os
import string
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from wrpo_ray.errors import UserError
from wrpo_ray.planning.input_rows import count_rows
from wrpo_ray.stages.ingest.input_checks import check_columns, check_some_rows
from wrpo_ray.stages.ingest.readers import input_files, read_rows
from wrpo_ray.storage.fingerprints import data_fingerprint, model_fingerprint
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.addresses import OPTIONS_MARK

SPECIAL = [*(set(string.punctuation) - {"/"}), " "]
OTHERS = [*"äßéñ¿“„–…", *"λЖ中日本語한", "e\u0301", "\u00a0", "\u2028", "🙂"]
LIKE_ADDRESSES = [
    *("%20", "a%2Fb", "100% sure", "what?x=1", "what?x=1&y=2", "what?scheme=http", "a?&", "??"),
    *("a?&scheme=http", "s3:", "file:", "~root", "a@b:c", "KEY:SECRET@bucket", "hf:", "a?b?c=d"),
]
NAMES = sorted(
    {string.ascii_letters + string.digits, *LIKE_ADDRESSES, *OTHERS, "".join(OTHERS)}
    | {f"a{c}b" for c in SPECIAL}
    | {f"{c}a" for c in SPECIAL}
    | {f"a{c}" for c in SPECIAL}
)


@pytest.fixture(params=["disk", "store", "store without options"])
def place(request, tmp_path, monkeypatch) -> Iterator[Folder]:
    """A folder, on disk or in an object store."""
    if request.param == "disk":
        yield Folder(str(tmp_path))
        return
    folder = Folder(request.getfixturevalue("bucket")) / "names"
    if request.param == "store without options":
        host = folder.uri.partition("endpoint_override=")[2].partition("&")[0]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
        folder = Folder("s3://wrpo/names")
    yield folder
    folder.delete("")


def test_each_name_comes_back_as_it_is(place):
    """Written, listed, appended, opened anew by its address, and shown."""
    names = LIKE_ADDRESSES if place.uri == "s3://wrpo/names" else NAMES
    for name in names:
        place.write(name, name.encode())
    assert place.files() == sorted(names)
    for name in place.files():
        file = Folder((place / name).uri)
        assert str(file) == f"{place}/{name}"
        assert file.path == f"{place.path}/{name}"
        assert file.read("") == name.encode()
        assert str(file / "x") == f"{place}/{name}/x"


@pytest.mark.parametrize("name", ["a# 1", "~what?", "100%20", "[x]*?a=b"])
def test_data_of_that_name_is_read(place, name, tmp_path):
    """As prompts, as a folder of them, as tables, and copied: by all that opens files."""
    folder = place / name
    file = f"{name}.jsonl"
    folder.write(file, b'{"prompt": "a"}\n{"prompt": "b"}\n')
    table = pa.table({"prompt": ["a", "b", "c"]})
    folder.write_table(f"{name}.parquet", table)
    uris = input_files(folder.uri, "prompts")
    assert [str(Folder(uri)) for uri in uris] == [f"{folder}/{file}", f"{folder}/{name}.parquet"]
    assert [count_rows(uri) for uri in uris] == [2, 3]
    check_some_rows(uris, "prompts")
    for uri in uris:
        check_columns(uri, ["prompt"], "prompts")
        assert input_files(uri, "prompts") == [uri]
    assert [where for where, _ in read_rows(uris[0], ["prompt"])] == [f"{file}:1", f"{file}:2"]
    assert [row["prompt"] for _, row in read_rows(uris[1], ["prompt"])] == ["a", "b", "c"]
    assert folder.read_table(f"{name}.parquet").equals(table)
    there = [f"{folder.path}/{name}.parquet"]
    assert ds.dataset(there, format="parquet", filesystem=folder.filesystem).count_rows() == 3
    assert data_fingerprint(uris) == data_fingerprint(uris)
    assert model_fingerprint(folder)
    (folder / "copy").upload(_local_folder(tmp_path, name))
    assert (folder / "copy").files() == [file]
    assert (folder.local(name) / file).read_bytes() == folder.read(file)
    folder.delete(file)
    assert not (folder / file).exists()


def _local_folder(tmp_path, name):
    local = tmp_path / f"local {name}"
    local.mkdir()
    (local / f"{name}.jsonl").write_text("{}\n")
    return local


def test_an_engine_finds_the_weights_of_a_folder_and_no_others(tmp_path):
    """As vLLM searches (DefaultModelLoader), in folders whose names are patterns of others."""
    names = ["run1", "run?", "run*", "run[1]", "run{1}", "run 1", "run#1", "run%31", "rün", "a:b"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    for name in names:
        place = Folder(str(tmp_path / name)).local()
        assert place == Folder(str(tmp_path / name)).local()  # made once
        files = glob.glob(os.path.join(place, "*.safetensors"))
        assert [Path(file).read_text() for file in files] == [name]


def test_a_local_path_has_neither_options_nor_credentials(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run?", "run?a=b", "u:p@host", "x://y"):
        local = Folder(f"{tmp_path}/{name}")
        assert not local.is_remote
        assert str(local) == f"{tmp_path}/{name}"
        local.write("f", b"")
        assert os.path.exists(f"{tmp_path}/{name}/f")
    assert Folder("run?").absolute().path == f"{tmp_path}/run?"
    assert Folder(f"file://{tmp_path}/a b%20").path == f"{tmp_path}/a b%20"
    assert Folder("~/x").path == os.path.expanduser("~/x")
    assert Folder("./~").path == f"{tmp_path}/~"


def test_options_are_what_follows_the_last_question_mark():
    given = "?endpoint_override=h:1&scheme=http"
    for name in ("a?b", "a?b=c", f"a{OPTIONS_MARK}"):
        folder = Folder(f"s3://b/r{given}") / name
        assert str(folder) == f"s3://b/r/{name}"
        assert (folder / "x").path == f"b/r/{name}/x"
    assert Folder(f"s3://b/what?x=1{OPTIONS_MARK}scheme=http&region=r").path == "b/what?x=1"
    with pytest.raises(UserError, match="the option 'x', and"):
        Folder("s3://b/what?x=1")
    with pytest.raises(UserError, match=r"'regoin' \(did you mean 'region'\?\)"):
        Folder("s3://b/run?regoin=r")
