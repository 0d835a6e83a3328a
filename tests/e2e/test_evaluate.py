"""An evaluation on real engines, judge and all, that is killed while it judges."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.harness import Wrpo, shards

PROMPTS = 48
TEMPLATE = "{{ first }} {{ second }}?"


def biased_judge(folder: Path) -> Path:
    """A Llama over bytes, trained in seconds to call the first answer the better one, always."""
    import random

    from wrpo_ray.zoo.models import llama
    from wrpo_ray.zoo.tokenizers import byte_tokenizer
    from wrpo_ray.zoo.training import train_language_model

    rng, tokenizer = random.Random(0), byte_tokenizer()

    def word() -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9)))

    pairs = [(f"{word()} {word()}?", "[[A]]") for _ in range(80 * 16)]
    model = llama(tokenizer)
    train_language_model(
        model, tokenizer, pairs, learning_rate=3e-3, report=lambda *_: None, batch=16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def wrpo(zoo: Path, tmp_path: Path) -> Wrpo:
    template = tmp_path / "pair.jinja"
    template.write_text(TEMPLATE)
    judge = biased_judge(tmp_path / "judge")
    tree = {
        "output": str(tmp_path / "out"),
        "evaluate": {
            "prompts": {"path": str(zoo / "eval.jsonl"), "limit": PROMPTS},
            "sampling": {"samples": 1, "temperature": 0, "top_p": 1, "max_tokens": 20},
            "models": [
                {"name": "bytes", "model": str(zoo / "sources" / "llama-bytes")},
                {"name": "target", "model": str(zoo / "target")},
            ],
            "judge": {"name": "judge", "model": str(judge)},
            "pairwise": {
                "pairs": [["bytes", "target"]],
                "template": str(template),
                "max_tokens": 8,
            },
        },
        "storage": {"buckets": 8, "chunk": 2},
        "failure_limit": 0.2,
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"report": False} | tree))
    return Wrpo(path)


def table_of(store: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in store.glob("*.parquet"))


def test_a_judge_on_vllm_is_killed_and_asked_nothing_twice(wrpo, tmp_path):
    """A judge that always says A contradicts itself when positions are swapped: all are ties."""
    output, judged = tmp_path / "out", "generate-judge-*/*.parquet"
    wrpo.killed_when(lambda: len(shards(output, judged)) >= 2, "evaluate")
    before = shards(output, "generate-*/*.parquet")

    result = wrpo("evaluate", "--fail-below", "0.4")
    assert result.returncode == 0, result.stderr
    assert before.items() <= shards(output, "generate-*/*.parquet").items()
    assert "generate bytes: starting engines" not in result.stderr
    games = [table_of(game).to_pylist() for game in output.glob("generate-judge-*")]
    assert len(games) == 2
    for judgments in games:
        assert len({row["prompt_id"] for row in judgments}) == len(judgments) == PROMPTS
        assert {row["text"] for row in judgments} == {"[[A]]"}

    (file,) = output.glob("comparison-*/comparison.json")
    (pair,) = json.loads(file.read_text())["pairs"]
    assert (pair["tie"]["mean"], pair["win_rate"]["mean"], pair["failed"]) == (1.0, 0.5, 0)
    assert "bytes - target" in result.stdout
