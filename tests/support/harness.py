"""Runs of the command line on the zoo, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from support.waiting import LIMIT, wait_until

ROOT = Path(__file__).parents[2]
SOURCES = ("llama-bytes", "qwen3-bpe", "gemma2-chars")
PROMPTS, HELD_OUT = 300, 240
"""How many of the zoo's prompts the demo is run on."""


@dataclass(frozen=True)
class Wrpo:
    """The command `wrpo` with one config."""

    config: Path

    def arguments(self, *arguments: str) -> list[str]:
        command, *rest = arguments
        return [sys.executable, "-m", "wrpo_ray", command, str(self.config), *rest]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run to the end in a process of its own."""
        return subprocess.run(
            self.arguments(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
        )

    def here(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run to the end in this process, which spares the seconds that imports take."""
        from wrpo_ray.cli.entry import main

        command, *rest = arguments
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main([command, str(self.config), *rest])
        return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())

    def killed_when(self, is_time: Callable[[], bool], *arguments: str) -> str:
        """Run until `is_time`, then kill -9 the driver; returns what it logged."""
        with subprocess.Popen(
            self.arguments(*arguments),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process:
            try:
                wait_until(is_time, process)
                assert process.poll() is None, "it ended before it was killed"
            except AssertionError as error:
                raise AssertionError(f"{error}: {process.stderr.read()}") from None
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
        tree["report"] = False  # it takes seconds; `fused` and test_import have it
        tree["prompts"]["limit"] = PROMPTS
        tree["evaluate"]["prompts"]["limit"] = HELD_OUT
        for training in (tree["sft"], tree["wrpo"]):  # as many steps on fewer prompts
            # tests/ray/test_train.py and test_autoscaling.py have several workers
            training |= {"batch_size": 8, "checkpoint_every": 10, "workers": 1}
        tree["sft"]["epochs"] = 3
        tree["wrpo"]["epochs"] = 2
        path = tmp_path_factory.mktemp("config") / "demo.yaml"
        path.write_text(yaml.safe_dump(tree | changes))
        return Wrpo(path)

    return make


def greedy(
    demo: Callable[..., Wrpo],
    zoo: Path,
    output: str | Path,
    prompts: dict[str, Any] | None = None,
    sources: Sequence[str] = SOURCES[:1],
    **more: Any,
) -> Wrpo:
    """The demo with one answer to a prompt, which is decided by it, in 16 shards of each source.

    `more` are settings of the sources.
    """
    long = {"engine": {"hf_overrides": {"max_position_embeddings": 2048}, "max_model_len": 2048}}
    return demo(
        output,
        prompts=prompts or {"path": str(zoo / "prompts.jsonl"), "limit": 120},
        sources=[
            {"name": name, "model": str(zoo / "sources" / name), **long, **more} for name in sources
        ],
        sampling={"samples": 1, "temperature": 0, "max_tokens": 16},
        reward={"model": str(zoo / "reward"), "overflow": "cut_prompt"},
        storage={"buckets": 16, "commit_seconds": 2},
        evaluate=None,
    )


def shards(output: Path, pattern: str) -> dict[str, int]:
    """{path within the output: time of last change in ns} of finished Parquet shards."""
    files = (f for f in output.glob(pattern) if not f.name.startswith("."))
    return {str(f.relative_to(output)): f.stat().st_mtime_ns for f in files}


def rows(output: Path, step: str, *columns: str) -> list[tuple]:
    """The rows of all of a step's shards, as sorted tuples of some columns."""
    files = sorted(shards(output, f"{step}-????????????/*/*.parquet"))
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


def failures(output: Path) -> list[dict[str, Any]]:
    """All failed rows that a run has kept, ordered by where they come from."""
    files = output.glob("*/failures/*/*/[!.]*.parquet")
    rows = [row for f in files for row in pq.read_table(f).to_pylist()]
    return sorted(rows, key=lambda row: row["where"] or "")


def submit_command(api: str, output: Path, sets: dict[str, Any], *rest: str) -> list[str]:
    """`wrpo submit jobs/demo.yaml` with what differs from the demo."""
    overrides = [f"--set={name}={value}" for name, value in (sets | {"output": output}).items()]
    command = [sys.executable, "-m", "wrpo_ray", "submit", "jobs/demo.yaml"]
    return [*command, f"--address={api}", *overrides, *rest]
