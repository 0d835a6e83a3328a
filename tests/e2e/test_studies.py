"""A study of two variants: what they share is made once, and a second call adds a variant to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from support.harness import shards

from wrpo_ray.cli.entry import main

VARIANTS = {
    "sft": {"model": "target-sft"},
    "wrpo": {},
    "wrpo-static": {"set": {"wrpo.alpha.schedule": "static"}},
}


def test_variants_share_what_they_have_in_common(demo, fused, on_cluster, tmp_path):
    """In the output of a finished run, so that all that is left is what one variant changes."""
    output = Path(shutil.copytree(fused, tmp_path / "study" / "near"))
    before = shards(output, "**/*.parquet")
    case = {"config": str(demo(output).config)}
    tree = {
        "output": str(tmp_path / "study"),
        "cases": {"near": case},
        "variants": VARIANTS,
        "contrasts": [["wrpo", "sft"], ["wrpo", "wrpo-static"]],
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tree))

    study(file, "--only=wrpo")
    assert not (tmp_path / "study" / "study.json").exists()  # it is of all variants
    (table,) = output.glob("study-*/table.json")
    first = json.loads(table.read_text())["accuracy"]["variants"]
    assert set(first) == {"wrpo"}
    finished = shards(output, "**/*.parquet")
    assert before.items() <= finished.items()
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
    assert main(["study", str(file), *options]) == 0
