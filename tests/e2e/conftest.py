"""Runs of the whole chain that several tests look at; each test that changes one takes a copy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.harness import ROOT, Wrpo, demo, greedy
from support.ray_head import RayHead
from support.waiting import LIMIT, wait_until

__all__ = ["demo"]


@dataclass(frozen=True)
class Finished:
    """A run of the demo from its first stage to its last, on a Ray of its own."""

    output: Path
    stdout: str
    stderr: str
    process: int
    """Its process id, which is gone."""
    status: str
    """What `wrpo status --watch` showed meanwhile."""


@pytest.fixture(scope="session")
def finished(demo: Callable[..., Wrpo], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The demo's chain, with its report, watched by `wrpo status --watch`."""
    output = tmp_path_factory.mktemp("fused")
    wrpo, files = demo(output, report=True), tmp_path_factory.mktemp("logs")
    watch = [sys.executable, "-m", "wrpo_ray", "status", str(output), "--watch", "--every", "10"]
    with (files / "out").open("w") as out, (files / "err").open("w") as err:
        run = subprocess.Popen(wrpo.arguments("fuse"), cwd=ROOT, stdout=out, stderr=err)
        wait_until(lambda: (output / "chain.json").exists(), run)
        status = subprocess.run(watch, capture_output=True, text=True, timeout=LIMIT)
        code = run.wait(LIMIT)
    stdout, stderr = ((files / name).read_text() for name in ("out", "err"))
    assert code == 0, stderr
    assert status.returncode == 0, status.stderr
    return Finished(output, stdout, stderr, run.pid, status.stdout)


@pytest.fixture(scope="session")
def fused(finished: Finished) -> Path:
    """The output folder of the run."""
    return finished.output


@pytest.fixture(scope="session")
def greedy_run(
    demo: Callable[..., Wrpo], zoo: Path, head: RayHead, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of `harness.greedy`, undisturbed, up to the selection."""
    output = tmp_path_factory.mktemp("greedy")
    result = greedy(demo, zoo, output).here(
        "fuse", "--until", "select", "--set", f"cluster.address={head.address}"
    )
    assert result.returncode == 0, result.stderr
    return output
