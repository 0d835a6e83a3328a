"""Temporary folders whose paths are too long for sockets, or that cannot be used."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from wrpo_ray.errors import UserError
from wrpo_ray.runtime import temporary
from wrpo_ray.runtime.temporary import MAX_PATH_BYTES, VARIABLES, shorten_temporary_folders

LENGTHS = (MAX_PATH_BYTES - 1, MAX_PATH_BYTES, MAX_PATH_BYTES + 1, 100, 107, 108, 250, 900)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def short():
    """A folder whose path is short enough to be made longer byte by byte."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:
        yield folder


def of_length(folder: str, count: int, letter: str = "x") -> str:
    """A folder below, whose path has so many bytes."""
    while (left := count - len(os.fsencode(folder))) > 0:
        part = min(left - 1, 200)
        if left - 1 - part == 1:  # no room for a slash and a letter
            part -= 1
        rest = part % len(letter.encode())
        folder += "/" + letter * (part // len(letter.encode())) + "x" * rest
    os.makedirs(folder)
    assert len(os.fsencode(folder)) == count
    return folder


@pytest.mark.parametrize("letter", ["x", "ü", "語"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", VARIABLES)
def test_a_folder_of_any_length_has_a_path_for_sockets(name, length, letter, short, monkeypatch):
    folder = of_length(short, length, letter)
    monkeypatch.setenv(name, folder)
    shorten_temporary_folders()
    used = os.environ[name]
    assert (used == folder) == (length <= MAX_PATH_BYTES)
    assert len(os.fsencode(used)) <= MAX_PATH_BYTES
    assert len(os.fsencode(used + temporary.SOCKET)) <= 107
    Path(used, "file").write_text("here")
    assert Path(folder, "file").read_text() == "here"
    if name != "RAY_TMPDIR":
        assert tempfile.gettempdir() == used


def test_links_go_with_the_process(short):
    code = (
        "import os; from wrpo_ray.runtime.temporary import shorten_temporary_folders as shorten;"
        "shorten(); shorten(); print(os.environ['TMPDIR'])"
    )
    folder = of_length(short, 120)
    Path(folder, "kept").touch()
    env = os.environ | {"TMPDIR": folder}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    link = Path(result.stdout.strip())
    assert len(str(link)) < MAX_PATH_BYTES
    assert not link.parent.exists()
    assert Path(folder, "kept").exists()


def test_a_relative_folder_is_that_of_this_process(short, monkeypatch):
    monkeypatch.chdir(short)
    os.makedirs("below")
    monkeypatch.setenv("RAY_TMPDIR", "below")
    shorten_temporary_folders()
    assert os.environ["RAY_TMPDIR"] == f"{os.path.realpath(short)}/below"


@pytest.mark.parametrize("name", VARIABLES[:2])
@pytest.mark.parametrize("inside", ["file", "file/below", "/proc/nowhere", "x" * 300])
def test_a_folder_that_cannot_be_written_is_told_in_a_line(name, inside, short, monkeypatch):
    Path(short, "file").touch()
    monkeypatch.setenv(name, os.path.join(short, inside))
    with pytest.raises(UserError, match=rf"^{name}: .* cannot be used .*; set it to a folder"):
        shorten_temporary_folders()


@pytest.mark.parametrize("name", VARIABLES[2:])
def test_what_only_python_looks_at_and_passes_over_is_left(name, short, monkeypatch):
    monkeypatch.setenv(name, value := f"{short}/none")
    shorten_temporary_folders()
    assert os.environ[name] == value
    assert not os.path.exists(value)


def test_without_a_place_for_a_link_the_remedy_is_told(short, monkeypatch):
    monkeypatch.setattr(temporary, "PLACES", (f"{short}/none",))
    monkeypatch.setenv("TMPDIR", of_length(short, 100))
    with pytest.raises(UserError, match="^TMPDIR: .* has 100 bytes, and Ray.*; set RAY_TMPDIR"):
        shorten_temporary_folders()
