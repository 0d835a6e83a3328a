"""An endpoint as a source of a whole run, on a server that misbehaves."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.openai_server import Call, Server, serving
from support.waiting import LIMIT

ROOT = Path(__file__).parents[2]
KEY = "sk-trial-3f8a91c2d7e64b05"
PROMPTS, REFUSED = 60, "prompt 7"


def plan(call: Call) -> str:
    """One prompt is refused for good; 30 % of the calls fail at first, in every way there is."""
    if call.prompt == REFUSED:
        return "400"
    faults = ("429", "500", "cut", "no json", "shape", "reset")
    number = int(call.body["seed"])
    return faults[number % len(faults)] if number % 10 < 3 and call.attempt == 1 else "ok"


def generate(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wrpo_ray", "generate", str(config)],
        cwd=ROOT,
        env=os.environ | {"TRIAL_KEY": KEY, "RAY_TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def stored(output: Path) -> list[tuple[str, int]]:
    files = output.glob("generate-far-*/*/[!.]*.parquet")
    table = pa.concat_tables(pq.read_table(f, columns=["prompt_id", "sample"]) for f in files)
    return sorted(zip(*(column.to_pylist() for column in table.columns), strict=True))


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray logs to; the path of a socket in it has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="wrpo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_an_endpoint_is_asked_once_for_each_answer_and_its_key_is_nowhere(tmp_path, ray_folder):
    lines = [json.dumps({"prompt": f"prompt {i}"}) for i in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    with serving(Server(plan, delay=0.2)) as server:
        tree = {
            "output": str(tmp_path / "out"),
            "prompts": {"path": str(tmp_path / "prompts.jsonl")},
            "sources": [
                {
                    "name": "far",
                    "model": "served",
                    "endpoint": {"url": server.url, "key_env": "TRIAL_KEY", "concurrency": 16},
                }
            ],
            "reward": {"function": "wrpo_ray.zoo.skills:verify"},
            "sampling": {"samples": 2, "max_tokens": 8},
            "storage": {"buckets": 4},
            "failure_limit": 0.1,
        }
        config = tmp_path / "job.yaml"

        def run(samples: int) -> subprocess.CompletedProcess[str]:
            tree["sampling"]["samples"] = samples
            config.write_text(yaml.safe_dump({"report": False} | tree))
            server.calls.clear()
            result = generate(config, ray_folder)
            assert result.returncode == 0, result.stderr
            return result

        told = run(2)
        first = stored(tmp_path / "out")
        assert len(first) == len(set(first)) == (PROMPTS - 1) * 2
        assert server.most_in_flight == 16
        assert {call.headers["Authorization"] for call in server.calls} == {f"Bearer {KEY}"}
        failed = pq.read_table(
            next((tmp_path / "out").glob("generate-far-*/failures/*/*/[!.]*.parquet"))
        )
        assert set(failed["error"].to_pylist()) == {"RefusedError"}
        assert failed.num_rows == 2

        run(2)
        assert not server.calls
        run(3)
        assert {call.body["seed"] for call in server.calls if call.prompt != REFUSED}.isdisjoint(
            seeds(first, tmp_path / "out")
        )
        assert len(set(stored(tmp_path / "out"))) == (PROMPTS - 1) * 3
    assert KEY not in told.stdout + told.stderr
    texts = [f for folder in (tmp_path, ray_folder) for f in folder.rglob("*") if f.is_file()]
    assert any("raylet" in f.name for f in texts)
    assert not [f for f in texts if KEY.encode() in f.read_bytes()]


def seeds(keys: list[tuple[str, int]], output: Path) -> set[int]:
    """The seeds of answers that were there before."""
    files = output.glob("generate-far-*/*/[!.]*.parquet")
    table = pa.concat_tables(
        pq.read_table(f, columns=["prompt_id", "sample", "seed"]) for f in files
    )
    return {r["seed"] for r in table.to_pylist() if (r["prompt_id"], r["sample"]) in set(keys)}
