"""The sidecar that keeps logs: what it copies, when, and that the component starts it as tested."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.manifests import objects, overlays_of

from wrpo_ray.kubernetes import keep_logs
from wrpo_ray.kubernetes.keep_logs import LogKeeper
from wrpo_ray.storage.folder import Folder

SESSION = "session_2026-01-02_03-04-05_000001_1"


@pytest.fixture(params=["disk", "object store"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """Where the logs go."""
    if request.param == "disk":
        return Folder(str(tmp_path / "kept"))
    return Folder(request.getfixturevalue("bucket")) / f"logs-{time.time_ns()}"


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    """Ray's folder with a log, one of an actor, and what is no log."""
    folder = tmp_path / "ray"
    for name in ("logs/raylet.out", "logs/old/worker-1.err", "sockets/raylet"):
        file = folder / SESSION / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"of {name}\n")
    (folder / "session_latest").symlink_to(folder / SESSION)
    (folder / SESSION / "logs" / "link").symlink_to("/etc/hostname")
    return folder


def test_logs_are_copied_again_when_they_grew(ray, kept, monkeypatch):
    keeper, written = LogKeeper(ray, kept), []
    write = Folder.write
    monkeypatch.setattr(
        Folder, "write", lambda to, name, data: written.append(name) or write(to, name, data)
    )
    names = [f"{SESSION}/logs/old/worker-1.err", f"{SESSION}/logs/raylet.out"]
    keeper.copy_changed()
    keeper.copy_changed()
    assert written == names
    with (ray / names[1]).open("a") as file:
        file.write("more\n")
    keeper.copy_changed()
    assert written == [*names, names[1]]
    assert kept.read(names[1]) == b"of logs/raylet.out\nmore\n"
    assert kept.read(names[0]) == b"of logs/old/worker-1.err\n"


def test_a_long_log_keeps_its_end(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(keep_logs, "TAIL", 6)
    LogKeeper(ray, Folder(str(tmp_path / "kept"))).copy_changed()
    assert (tmp_path / "kept" / SESSION / "logs" / "raylet.out").read_text() == "t.out\n"[-6:]


def test_what_a_store_does_not_take_is_tried_again(ray, tmp_path, monkeypatch):
    kept = Folder(str(tmp_path / "kept"))
    keeper = LogKeeper(ray, kept)
    monkeypatch.setattr(Folder, "write", _fails)
    keeper.copy_changed()
    monkeypatch.undo()
    keeper.copy_changed()
    assert kept.read(f"{SESSION}/logs/raylet.out") == b"of logs/raylet.out\n"


@pytest.mark.parametrize("name", [b"worker-\xff.err", b"a\nb.out", b"100% sure?.out"])
def test_a_log_of_any_name_keeps_no_other_from_being_copied(ray, kept, name, capfd):
    """Files are named by those that write them; the first of the folder has the odd name."""
    odd = Path(os.fsdecode(os.fsencode(ray / SESSION / "logs") + b"/a-" + name))
    odd.write_text("of the odd one\n")
    keeper = LogKeeper(ray, kept)
    keeper.copy_changed()
    keeper.copy_changed()
    assert kept.read(f"{SESSION}/logs/raylet.out") == b"of logs/raylet.out\n"
    told = capfd.readouterr().err.splitlines()
    assert all("is not copied yet" in line for line in told), "a line for each, whatever its name"


def _fails(*_: object) -> None:
    raise OSError("the store is down")


@pytest.mark.parametrize("overlay", overlays_of("logs"))
def test_each_pod_has_the_sidecar(overlay: str):
    found = objects(overlay, "logs")
    sidecars = [c for body in found.values() for c in _init_containers(body)]
    assert len(sidecars) == sum(_templates(body) for body in found.values()) > 1
    assert all(c["name"] == "logs" and c["restartPolicy"] == "Always" for c in sidecars)
    mounted = {m["name"]: m["mountPath"] for c in sidecars for m in c["volumeMounts"]}
    assert mounted == {"ray-logs": "/tmp/ray", "cache": "/cache"}


def _init_containers(body: object) -> list[dict]:
    if isinstance(body, dict):
        here = list(body.get("initContainers", []))
        return here + [c for value in body.values() for c in _init_containers(value)]
    return [c for item in body for c in _init_containers(item)] if isinstance(body, list) else []


def _templates(body: dict) -> int:
    """Pods of a Ray cluster in an object: a head, and one of each group."""
    spec = body.get("spec", {})
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    groups = cluster.get("workerGroupSpecs")
    return 0 if groups is None else 1 + len(groups)


def test_its_command_copies_the_last_lines_when_it_is_terminated(ray, kept):
    """The component's own command, with what Kubernetes puts into it; a round is 30 s away."""
    body = objects("raycluster", "logs")["RayCluster", "wrpo"]
    sidecar = body["spec"]["headGroupSpec"]["template"]["spec"]["initContainers"][0]
    values = {"$(WRPO_LOGS)": kept.uri, "$(POD_NAME)": "fusion-head", "/tmp/ray": str(ray)}
    program, *rest = sidecar["command"]
    assert program == "python"
    command = [sys.executable, *(values.get(part, part) for part in rest)]
    assert str(ray) in command
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert "keeping the logs" in process.stderr.readline()
        with (ray / SESSION / "logs" / "raylet.out").open("a") as file:
            file.write("the last line\n")
        process.terminate()
        assert process.wait() == 0
    assert (kept / "fusion-head").exists(f"{SESSION}/logs/raylet.out")
    assert (kept / "fusion-head").read(f"{SESSION}/logs/raylet.out").endswith(b"last line\n")
