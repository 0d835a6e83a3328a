"""A study of two variants: what they share is made once, and a second call adds a variant to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml
from support.harness import ROOT, shards

VARIANTS = {
    "sft": {"model": "target-sft"},
    "wrpo": {},
    "wrpo-static": {"set": {"wrpo.alpha.schedule": "static"}},
}


def test_variants_share_what_they_have_in_common(zoo, tmp_path):
    source = {"name": "llama-bytes", "model": str(zoo / "sources" / "llama-bytes")}
    small = {
        "sources": [source],
        "prompts.path": str(zoo / "prompts.jsonl"),
        "prompts.limit": 240,
        "evaluate.prompts.path": str(zoo / "eval.jsonl"),
        "evaluate.prompts.limit": 90,
        "target.model": str(zoo / "target"),
        "reward.model": str(zoo / "reward"),
        "sft.batch_size": 16,
        "wrpo.batch_size": 16,
        "sft.workers": 1,
        "wrpo.workers": 1,
        "storage.buckets": 4,
    }
    case = {"config": str(ROOT / "jobs" / "demo.yaml"), "set": small}
    tree = {
        "output": str(tmp_path / "study"),
        "cases": {"near": case},
        "variants": VARIANTS,
        "contrasts": [["wrpo", "sft"], ["wrpo", "wrpo-static"]],
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tree))

    output = tmp_path / "study" / "near"
    study(file, "--only=wrpo")
    assert not (tmp_path / "study" / "study.json").exists()  # it is of all variants
    (table,) = output.glob("study-*/table.json")
    first = json.loads(table.read_text())["accuracy"]["variants"]
    assert set(first) == {"wrpo"}
    finished = shards(output, "**/*.parquet")
    study(file)
    result = json.loads((tmp_path / "study" / "study.json").read_text())
    whole = result["cases"]["near"]["accuracy"]
    assert set(whole["variants"]) == set(VARIANTS)
    assert set(whole["contrasts"]) == {"wrpo - sft", "wrpo - wrpo-static"}
    assert whole["variants"]["wrpo"] == first["wrpo"]
    assert finished.items() <= shards(output, "**/*.parquet").items()  # none was made again
    steps = [folder.name.rpartition("-")[0] for folder in output.iterdir()]
    assert [steps.count(s) for s in ("sft", "pair", "rows-wrpo", "wrpo")] == [1, 1, 1, 2]


def study(file: Path, *options: str) -> None:
    """Run `wrpo study`."""
    command = [sys.executable, "-m", "wrpo_ray", "study", str(file), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
