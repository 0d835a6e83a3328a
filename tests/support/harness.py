"""Runs of the command line on the zoo, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Wrpo:
    """The command `wrpo` with one config."""

    config: Path

    def arguments(self, *arguments: str) -> list[str]:
        command, *rest = arguments
        return [sys.executable, "-m", "wrpo_ray", command, str(self.config), *rest]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            self.arguments(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=900
        )

    def killed_when(self, is_time: Callable[[], bool], *arguments: str) -> str:
        """Run until `is_time`, then kill -9 the driver; returns what it logged."""
        with subprocess.Popen(
            self.arguments(*arguments),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process:
            deadline = time.monotonic() + 600
            while not is_time():
                assert process.poll() is None, (
                    f"ended before it was killed: {process.stderr.read()}"
                )
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            return process.stderr.read()


@pytest.fixture(scope="session")
def demo(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Wrpo]:
    """Makes the demo's config, with fewer prompts and what else a test changes."""

    def make(output: str | Path, **changes: Any) -> Wrpo:
        tree = yaml.safe_load(
            (ROOT / "jobs" / "demo.yaml").read_text().replace(".cache/zoo", str(zoo))
        )
        tree["output"] = str(output)
        tree["report"] = False  # it takes seconds; test_fuse and test_import have it
        tree["prompts"]["limit"] = 360
        tree["evaluate"]["prompts"]["limit"] = 200
        for training in (tree["sft"], tree["wrpo"]):  # as many steps on fewer prompts
            # tests/ray/test_train.py and test_autoscaling.py have several workers
            training |= {"batch_size": 8, "checkpoint_every": 10, "workers": 1}
        tree["sft"]["epochs"] = 3
        tree["wrpo"]["epochs"] = 2
        path = tmp_path_factory.mktemp("config") / "demo.yaml"
        path.write_text(yaml.safe_dump(tree | changes))
        return Wrpo(path)

    return make


def shards(output: Path, pattern: str) -> dict[str, int]:
    """{path within the output: time of last change in ns} of finished Parquet shards."""
    files = (f for f in output.glob(pattern) if not f.name.startswith("."))
    return {str(f.relative_to(output)): f.stat().st_mtime_ns for f in files}


def rows(output: Path, step: str, *columns: str) -> list[tuple]:
    """The rows of all of a step's shards, as sorted tuples of some columns."""
    files = sorted(shards(output, f"{step}-????????????/*.parquet"))
    assert files, f"no shards of {step} in {output}"
    table = pa.concat_tables(pq.read_table(output / f, columns=list(columns)) for f in files)
    return sorted(tuple(str(v) for v in row.values()) for row in table.to_pylist())


def processes_of(output: str | Path) -> set[int]:
    """Live processes that work for an output folder."""
    from wrpo_ray.runtime.cluster import OUTPUT, output_mark
    from wrpo_ray.storage.folder import Folder

    wanted, found = f"{OUTPUT}={output_mark(Folder(str(output)))}".encode(), set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            continue
    return found - {os.getpid()}


def wait_until(is_true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what takes a moment, such as processes that are ending."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def failures(output: Path) -> list[dict[str, Any]]:
    """All failed rows that a run has kept, ordered by where they come from."""
    files = output.glob("*/failures/*/*.parquet")
    rows = [row for f in files for row in pq.read_table(f).to_pylist()]
    return sorted(rows, key=lambda row: row["where"] or "")


def submit_command(api: str, output: Path, sets: dict[str, Any], *rest: str) -> list[str]:
    """`wrpo submit jobs/demo.yaml` with what differs from the demo."""
    overrides = [f"--set={name}={value}" for name, value in (sets | {"output": output}).items()]
    command = [sys.executable, "-m", "wrpo_ray", "submit", "jobs/demo.yaml"]
    return [*command, f"--address={api}", *overrides, *rest]
