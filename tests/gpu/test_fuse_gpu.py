"""The whole chain on one GPU, as a user starts it: engines share it, then training has it.

Skipped without a GPU. `tests/e2e/test_fuse.py` looks closer at the same on the CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ROOT = Path(__file__).parents[2]
ENGINE = {
    "enforce_eager": True,
    "gpu_memory_utilization": 0.15,
    "kv_cache_memory_bytes": 2 * 10**9,  # engines that start together do not measure each other
    "max_num_seqs": 256,
}
QUARTER = {"actors": {"num_gpus": 0.25}}
TRAINING = {"precision": "bf16", "workers": 1, "num_gpus": 1, "num_cpus": 1}


def write_config(file: Path, output: Path, zoo: Path) -> None:
    """The demo's, with four parts of a GPU for engines and a whole one for training."""
    tree = yaml.safe_load((ROOT / "jobs/demo.yaml").read_text().replace(".cache/zoo", str(zoo)))
    tree["output"] = str(output)
    for model in (*tree["sources"], tree["target"]):
        model |= QUARTER | {"engine": ENGINE}
    tree["reward"] |= QUARTER
    for training in (tree["sft"], tree["wrpo"]):
        training |= TRAINING
    file.write_text(yaml.safe_dump(tree))


def test_fuses_the_zoo(zoo, tmp_path):
    config, output = tmp_path / "gpu.yaml", tmp_path / "out"
    write_config(config, output, zoo)
    command = [sys.executable, "-m", "wrpo_ray", "fuse", str(config)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    print(result.stdout, result.stderr, sep="\n")
    assert result.returncode == 0, result.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert {step["state"] for step in summary["steps"]} == {"done"}
    accuracy = summary["evaluation"]["accuracy"]["models"]
    assert accuracy["fused"]["all"]["low"] > accuracy["target"]["all"]["high"]
    for name in ("sft", "wrpo"):
        (file,) = output.glob(f"{name}-*/metrics.jsonl")
        assert all(json.loads(s)["peak_memory_gb"] > 0 for s in file.read_text().splitlines())
