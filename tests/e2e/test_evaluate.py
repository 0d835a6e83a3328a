"""A judge on a real engine that is killed while it judges the answers of a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.harness import HELD_OUT, Wrpo, shards

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
def wrpo(demo: Callable[..., Wrpo], fused: Path, tmp_path: Path) -> Wrpo:
    """Asks a judge about two models' answers of a finished run, in a copy of its output."""
    template = tmp_path / "pair.jinja"
    template.write_text(TEMPLATE)
    output = shutil.copytree(fused, tmp_path / "out")
    evaluate = yaml.safe_load(demo(output).config.read_text())["evaluate"]
    pairwise = {"pairs": [["llama-bytes", "target"]], "template": str(template), "max_tokens": 8}
    judge = {"name": "judge", "model": str(biased_judge(tmp_path / "judge"))}
    return demo(output, evaluate=evaluate | {"judge": judge, "pairwise": pairwise})


def table_of(store: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in store.glob("*/[!.]*.parquet"))


def test_a_judge_on_vllm_is_killed_and_asked_nothing_twice(wrpo, on_cluster, tmp_path):
    """A judge that always says A contradicts itself when positions are swapped: all are ties."""
    output, judged = tmp_path / "out", "generate-judge-*/*/[!.]*.parquet"
    wrpo.killed_when(lambda: len(shards(output, judged)) >= 2, "evaluate")
    before = shards(output, "generate-*/*/*.parquet")

    result = wrpo.here("evaluate", "--fail-below", "0.4")
    assert result.returncode == 0, result.stderr
    assert before.items() <= shards(output, "generate-*/*/*.parquet").items()
    assert "generate llama-bytes: starting engines" not in result.stderr
    games = [table_of(game).to_pylist() for game in output.glob("generate-judge-*")]
    assert len(games) == 2
    for judgments in games:
        assert len({row["prompt_id"] for row in judgments}) == len(judgments) == HELD_OUT
        assert {row["text"] for row in judgments} == {"[[A]]"}

    (file,) = output.glob("comparison-*/comparison.json")
    (pair,) = json.loads(file.read_text())["pairs"]
    assert (pair["tie"]["mean"], pair["win_rate"]["mean"], pair["failed"]) == (1.0, 0.5, 0)
    assert "llama-bytes - target" in result.stdout
