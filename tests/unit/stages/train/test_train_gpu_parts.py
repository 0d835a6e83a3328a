"""The parts that are measured on a GPU run in small form on the CPU, so none fails there first."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))

import gpu

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("name", gpu.PARTS)
def test_a_part_gives_figures_of_both(name):
    found = gpu.PARTS[name](gpu.Part(small=True))
    assert len(found) >= 2
    assert all(ours > 0 and peer > 0 and unit for ours, peer, unit in found.values())


def test_trl_with_liger_is_left_out_in_words(monkeypatch, capsys):
    known = {"trl", "datasets"}
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name in known)
    assert gpu.trl_with_liger(gpu.Part(small=False)) == {}
    assert "not measured: absent: liger_kernel" in capsys.readouterr().out
    known.add("liger_kernel")
    assert gpu.trl_with_liger(gpu.Part(small=True)) == {}
    assert "need a GPU" in capsys.readouterr().out


def test_adapters_alone_are_trained():
    contender = gpu.Adapted(gpu.SMALL, gpu.Part(small=True).device)
    trained = [name for name, p in contender.policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B, two layers
    assert all("lora_" in name for name in trained)


def test_the_script_runs_each_part_within_eight_minutes():
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    parts = re.findall(r"^part (\d+) (\w+)", script, flags=re.M)
    assert [name for _, name in parts] == ["agree", *gpu.PARTS]
    assert sum(int(limit) for limit, _ in parts) <= 480
    for name in gpu.PARTS:
        assert f"gpu.py {name} " in script
