"""Commands on an output whose JSON files were cut off or changed, and on files of any content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.made_run import MadeRun
from support.request_values import places, replaced

from wrpo_ray import cli
from wrpo_ray.errors import UserError
from wrpo_ray.runtime import lease
from wrpo_ray.runtime import submission as submit
from wrpo_ray.storage.folder import Folder

CONTENTS = (
    b"", b'{"counts": {"rows', b"[]", b"null", b"7", b'"text"', b"{}", b"[1, 2]", b"\xff\xfe",
    b"[" * 100_000, b'{"steps": 7}', b"<html>", b"9" * 5000,
)  # fmt: skip
LEASE_FILE = lease.file_name("s")
LEASE = {
    "session": "s", "host": "elsewhere", "machine": "m", "pid": 7, "started": 0, "held": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's output with a lease and a summary."""
    folder = tmp_path_factory.mktemp("output")
    run = MadeRun(folder, rows=16, buckets=2)
    run.write()
    run.root.write_json(LEASE_FILE, LEASE)
    run.root.write_json("summary.json", {"steps": {}})
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says went wrong in one line; empty where it did its work."""
    code = cli.main(list(words))
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) in ((0, 0), (2, 1)), (words, code, lines)
    assert not lines or lines[0].startswith("wrpo: error: ")
    return "".join(lines)


def json_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.json*") if p.suffix in (".json", ".jsonl"))


def test_status_of_an_output_with_a_broken_file_is_a_line_that_names_it(output, capsys):
    files = json_files(output)
    assert {"chain.json", "ledger.json", "manifest.json", LEASE_FILE} <= {f.name for f in files}
    named = set()
    for file in files:
        kept = file.read_bytes()
        for content in CONTENTS:
            file.write_bytes(content)
            line = told(capsys, "status", str(output))
            if line:
                assert str(file) in line
                named.add(file.name)
        file.write_bytes(kept)
    assert {"chain.json", "ledger.json", "manifest.json"} <= named
    assert told(capsys, "status", str(output)) == ""


def changed(file: Path) -> Iterator[bytes]:
    """A JSON file with each of its values of another type in turn."""
    whole = json.loads(file.read_text())
    for place in places(whole)[:12]:
        for value in (None, "x", [1]):
            yield json.dumps(replaced(whole, place, value)).encode()


def test_status_of_an_output_with_changed_values_is_told_in_a_line(output, capsys):
    seen = set()
    for file in json_files(output):
        if file.suffix == ".jsonl" or file.name in seen:
            continue
        seen.add(file.name)
        kept = file.read_bytes()
        for content in changed(file):
            file.write_bytes(content)
            line = told(capsys, "status", str(output))
            assert not line or str(output) in line
        file.write_bytes(kept)


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_a_record_is_an_object_with_its_fields_or_an_error_that_names_the_file(tmp_path, content):
    folder = Folder(str(tmp_path))
    folder.write("a.json", content)
    with pytest.raises(UserError, match=r"a\.json: .*put it back") as caught:
        folder.read_record("a.json", counts=dict)
    assert len(str(caught.value)) < 600
    assert not folder.holds_json("a.json", {"counts": {}})
    folder.write_json("a.json", {"counts": {}})
    assert folder.read_record("a.json", counts=dict) == {"counts": {}}
    assert folder.holds_json("a.json", {"counts": {}})
    assert not folder.holds_json("absent.json", None)


# --- configs -----------------------------------------------------------------------------------

CONFIGS = ("", "[", "- 1", "7", "text", "a: &x {b: *x}", "[" * 3000, "1: 2", "models: 7", "\x00",
           "models: [7]", "models: {a: 1}", "models: [{name: [], model: {}}]", "? [a]\n: b",
           "models: [{name: a, model: b, actors: 7}]", "timeout: .nan", "a: !!python/object:x {}",
           "reward: []", "models: null", "a: 2001-99-99", "port: " + "9" * 5000)  # fmt: skip


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("words", [("serve", "--config"), ("fuse",), ("submit",)], ids=" ".join)
def test_a_config_of_any_content_is_told_in_lines(tmp_path, capsys, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    assert cli.main([*words, "c.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("wrpo: error: ") for line in lines)


@pytest.mark.parametrize(
    "text",
    ["[", "- 1", "7", "text", "a: &x {b: *x}", "env_vars: 7", "env_vars: {A: 1}", "1: 2", "\x00",
     "pip: {packages: 7}", "a: 2001-99-99", "conda: []", "working_dir: 7"],
)  # fmt: skip
def test_a_runtime_env_of_any_content_is_told_in_a_line_or_taken(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("jobs").mkdir()
    Path(submit.RUNTIME_ENV).write_text(text)
    try:
        told = str(submit._runtime_env())
    except UserError as error:
        told = str(error)
    assert told.startswith((f"{submit.RUNTIME_ENV}: ", "{"))
    assert "'working_dir': '.'" in told or len(told.splitlines()) == 1
