"""The key of every step of the shipped configs, and of one with all features, stays as recorded.

A step's key names its folder: a key that changes without a reason makes finished work be done
again, and one that stays although the result is another lets a wrong result be used again. So a
change of `step_keys.json` needs a reason in the commit that makes it. To record:
`PYTHONPATH=.:tests python tests/unit/config/test_step_keys.py`. The models and data are small
files that are made here, so the keys depend on no machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import yaml
from support import benchmark_files

from wrpo_ray.config import Config
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.runtime.job import JobKind
from wrpo_ray.storage.steps import Step

ROOT = Path(__file__).parents[3]
RECORDED = Path(__file__).with_name("step_keys.json")
JUDGED = {
    "evaluate.judge": {"name": "judge", "model": "models/judge", "sampling": {"temperature": 0}},
    "evaluate.pairwise": {"pairs": [["fused", "target"]], "by": "judge"},
    "evaluate.baselines": {"best_of_sources": True, "mixture": "target"},
    "evaluate.benchmarks": {
        "alpaca_eval": {"path": "benchmarks/alpaca_eval"},
        "arena_hard": {"path": "benchmarks/arena_hard", "style_control": True},
        "mt_bench": {"path": "benchmarks/mt_bench"},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"evaluate.verifier": "exact", "reward": {"verifier": "exact"}},
    "number": {"evaluate.verifier": "number", "reward": {"verifier": "number"}},
    "code": {"evaluate.verifier": "code", "reward": {"verifier": "code"}},
    "verified pairs": {"pair.verifier": "wrpo_ray.zoo.skills:verify"},
    "fusechat3": {"pair.policy": "fusechat3", "wrpo.alpha.end": 0},
    "lora": {"wrpo.lora": {"rank": 4}, "sft.lora": {"rank": 4}},
    "published": {
        "wrpo.compat": "published",
        "wrpo.max_prompt_length": 60,
        "wrpo.overflow": "cut",
    },
    "judged": JUDGED,
    "groups": {
        "reward.by_group": {"upper": {"verifier": "exact"}, "sort": {"model": "models/other"}},
        "sources.0.groups": ["sort", "vowels"],
        "pair.by_group": {"upper": {"min_margin": 1}},
    },
    "endpoint": {
        "sources.0": {
            "name": "remote",
            "model": "some/model",
            "endpoint": {"url": "http://127.0.0.1:9/v1", "key_env": "NO_KEY"},
        }
    },
}
"""{name: what differs from the demo}"""


def trees() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, config as a tree) of the shipped configs and of variants with other features."""
    for name in ("demo", "import-real", "llama3-8b-wrpo"):
        yield name, yaml.safe_load((ROOT / "jobs" / f"{name}.yaml").read_text())
    demo = yaml.safe_load((ROOT / "jobs" / "demo.yaml").read_text())
    study = yaml.safe_load((ROOT / "jobs" / "study.yaml").read_text())
    variants = {f"study {name}": v.get("set", {}) for name, v in study["variants"].items()}
    for name, changes in (variants | VARIANTS).items():
        yield name, with_values(demo, changes)


def with_values(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of the tree with some values set, each by its dotted path."""
    changed = json.loads(json.dumps(tree))
    for path, value in values.items():
        *parents, last = path.split(".")
        place: Any = changed
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        place[int(last) if isinstance(place, list) else last] = value
    return changed


def make_inputs(tree: Any, folder: Path, key: str = "") -> None:
    """Files with fixed content wherever the config names a model folder or a data file."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            make_inputs(value, folder, name)
    elif isinstance(tree, list):
        for value in tree:
            make_inputs(value, folder, key)
    elif key == "model" and isinstance(tree, str) and "/" in tree:
        (folder / tree).mkdir(parents=True, exist_ok=True)
        (folder / tree / "config.json").write_text(json.dumps({"name": tree}))
        settings = {
            "chat_template": "{{ messages }}</s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
        }
        (folder / tree / "tokenizer_config.json").write_text(json.dumps(settings))
    elif key == "path" and tree.startswith("benchmarks/"):
        (folder / tree).parent.mkdir(exist_ok=True)
        getattr(benchmark_files, Path(tree).name)(folder / tree)
    elif key == "path":
        (folder / tree).parent.mkdir(parents=True, exist_ok=True)
        (folder / tree).write_text(json.dumps({"prompt": tree}) + "\n")


def step_keys() -> dict[str, list[str]]:
    """{config: "stage folder key" of each step}."""
    found = {}
    for name, tree in trees():
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            make_inputs(tree, Path(folder))
            stages = Chain(Config.model_validate(tree)).build()
            steps: list[tuple[str, Step]] = [(s.name, step) for s in stages for step in s.steps]
            found[name] = [f"{stage} {step.folder} {step.key}" for stage, step in steps]
    return found


def test_no_step_key_changes_unnoticed() -> None:
    found, recorded = step_keys(), json.loads(RECORDED.read_text())
    assert found.keys() == recorded.keys()
    for name, keys in found.items():
        assert keys == recorded[name], f"{name}: see the docstring of {Path(__file__).name}"
    assert sum(map(len, found.values())) > 400


def test_a_verifiers_scores_are_verdicts_and_a_rewards_are_not(tmp_path, monkeypatch) -> None:
    tree = with_values(dict(trees())["demo"], {"pair.verifier": "wrpo_ray.zoo.skills:verify"})
    make_inputs(tree, tmp_path)
    monkeypatch.chdir(tmp_path)
    stages = Chain(Config.model_validate(tree)).build()
    scores = [j for s in stages for phase in s.phases for j in phase if j.kind is JobKind.SCORE]
    found = {(job.reward.name, job.outcome) for job in scores}
    assert found == {("verifier", "verdict"), ("reward", "reward")}


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(step_keys(), indent=1) + "\n")
