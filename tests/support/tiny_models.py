"""Tiny models, tokenizers and training rows for tests, made from a seed in a moment."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.data.buckets import buckets, write_shard
from wrpo_ray.data.records import PREFERENCE, SELECTION
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

WORDS = [f"w{i}" for i in range(40)]
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<assistant>' }}"
    "{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> Any:
    """Whole words as tokens, `<end>` as end of turn, no BOS."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate([*special, "<unk>", " ", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+| "), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=special[2:],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed: int = 0, *, tied: bool = False, width: int = 32) -> Any:
    """A randomly initialised Llama of two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=6 + len(WORDS),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            initializer_range=0.2,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def write_model(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A model folder."""
    make_model(seed, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def preference_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """PREFERENCE records of made-up words; the target's answers have token ids."""
    rng = random.Random(seed)
    tokenizer = make_tokenizer()

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    def answer(source: str) -> dict[str, Any]:
        text = words()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {
            "text": text,
            "token_ids": [7, 7, 7] if source == "other" else ids,
            "finish_reason": "stop",
            "source": source,
            "sample": 0,
            "reward": rng.random(),
        }

    return [
        {
            "prompt_id": digest([seed, i]),
            "messages": [{"role": "user", "content": words()}],
            "source_chosen": answer("other"),
            "target_chosen": answer("target-sft"),
            "rejected": answer("target-sft"),
            "source_margin": 0.1,
            "target_margin": 0.1,
            "candidates": [],
        }
        for i in range(count)
    ]


def write_preferences(folder: Folder, rows: list[dict[str, Any]], count: int = 4) -> None:
    """PREFERENCE shards in `count` buckets."""
    _write(folder, PREFERENCE, rows, count)


def write_selection(folder: Folder, rows: list[dict[str, Any]], count: int = 4) -> None:
    """SELECTION shards of the same rows, one in four of them not of the split sft."""
    selected = [
        {name: row[name] for name in ("prompt_id", "messages", "source_chosen", "candidates")}
        | {"split": "preference" if i % 4 == 3 else "sft"}
        for i, row in enumerate(rows)
    ]
    _write(folder, SELECTION, selected, count)


def _write(folder: Folder, schema: Any, rows: list[dict[str, Any]], count: int) -> None:
    for bucket in buckets(count):
        part = [row for row in rows if row["prompt_id"] in bucket]
        if part:
            write_shard(folder, bucket, schema, part, "rows")


def one_source(model: str, output: Path, **more: Any) -> Config:
    """A run with one source, whose rewards come from a function."""
    prompts = output / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "w1"}) + "\n")
    return Config(
        output=str(output / "out"),
        prompts={"path": str(prompts)},
        sources=[{"name": "a", "model": model} | more],
        reward={"function": "wrpo_ray.zoo.skills:verify"},
    )
