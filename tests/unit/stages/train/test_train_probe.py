"""Which models are trained: those whose log-probs of rows in our form are their own.

Tiny models of many architectures, with windows or chunks of 20 tokens and rows up to 100.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wrpo_ray.config import TrainConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm.attention import spans
from wrpo_ray.stages.train import model, probe
from wrpo_ray.stages.train.packing import pack, pad
from wrpo_ray.stages.train.rows import Row

CPU = torch.device("cpu")
SPAN, LENGTH = 20, 100
SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "sliding_window": SPAN, "attention_chunk_size": SPAN,
    "use_sliding_window": True, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GOOD = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi",
    "phi3", "olmo2", "gpt2", "gpt_neox", "starcoder2", "smollm3", "exaone4", "apertus",
)  # fmt: skip
REFUSED = {
    "qwen2_moe": "its log-probs of packed rows differ",  # its window is in the mask alone
    "phimoe": "its log-probs of packed rows differ",  # routers that training changes
    "gpt_oss": "its log-probs of packed rows differ",  # attention sinks
    "cohere": "its log-probs of packed rows differ",  # scaled logits
    "cohere2": "its log-probs of packed rows differ",
    "minimax": "its log-probs of packed rows differ",  # a recurrent state
    "bloom": "its log-probs of packed rows differ",
    "stablelm": r"it cannot be given rows in this form \(TypeError: .*layout",
    "nemotron": r"it cannot be given rows in this form \(TypeError: .*layout",
    "llama4_text": "its body and its head cannot be told apart; it cannot be trained here",
    "gptj": r"it cannot be loaded to train \(KeyError: 'wrpo_shared_prompt'\); set packing: false",
}
SAFE_UNPACKED = ("qwen2_moe", "stablelm", "nemotron", "minimax")


def write(folder: Path, kind: str, **changes: Any) -> Path:
    """A tiny random model of an architecture; its layers are as its config makes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(kind)
    fields = {name: value for name, value in (SHAPE | changes).items() if hasattr(made, name)}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(type(made)(**fields)).save_pretrained(folder)
    return folder


def checked(folder: Path, config: TrainConfig, *, slim: bool = False) -> model.Policy:
    loaded = model.load(folder, torch.float32, packing=config.packing).eval()
    policy = model.Policy(loaded, slim=slim)
    probe.check_forward(policy, config, CPU)
    return policy


def long_row(length: int) -> Row:
    """Its prompt and its first answer are longer than a span; together they fill the length."""
    ids = np.random.default_rng(0).integers(3, 97, length * 2).astype(np.int32)
    first, other, last = length * 2 // 5, length + length // 4, length + length // 4 + 2
    return Row("long", ids[:first], (ids[first:length], ids[length:other], ids[other:last]))


def difference(policy: model.Policy, row: Row, config: TrainConfig) -> float:
    """Between log-probs of the row in our form and of the model's own logits, in nats."""
    with torch.no_grad():
        plain = probe._plain_logps(policy, row, CPU)
        own = policy((pack if config.packing else pad)([row]))
    return (own - plain).abs().max().item()


@pytest.mark.parametrize(
    ("packing", "slim"),
    [(True, False), (True, True), (False, False)],
    ids=["packed", "slim", "padded"],
)
@pytest.mark.parametrize("kind", GOOD)
def test_what_is_accepted_is_right_for_rows_of_any_length(tmp_path, kind, packing, slim):
    config = TrainConfig(precision="fp32", max_length=LENGTH, packing=packing)
    policy = checked(write(tmp_path, kind), config, slim=slim)
    for length in (12, SPAN, SPAN + 1, 2 * SPAN + 1, LENGTH):
        assert difference(policy, long_row(length), config) < 2e-4, length


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_wrong_beyond_a_span_or_cannot_be_packed_is_refused_in_words(tmp_path, kind):
    config = TrainConfig(precision="fp32", max_length=LENGTH)
    with pytest.raises(UserError, match=rf"^{kind}: {REFUSED[kind]}") as caught:
        checked(write(tmp_path, kind), config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", SAFE_UNPACKED)
def test_the_remedy_is_one(tmp_path, kind):
    config = TrainConfig(precision="fp32", max_length=LENGTH, packing=False)
    policy = checked(write(tmp_path, kind), config)
    for length in (12, SPAN + 1, LENGTH):
        assert difference(policy, long_row(length), config) < 2e-4


@pytest.mark.parametrize(
    "span",
    [
        20,
        LENGTH - 8,
        LENGTH - 3,
        *(pytest.param(n, marks=pytest.mark.soak) for n in (13, 50, *range(93, 97))),
    ],
)
def test_every_span_below_the_longest_row_is_probed(tmp_path, span):
    """Rows that no window cuts are right even there."""
    folder = write(tmp_path, "qwen2_moe", sliding_window=span)
    with pytest.raises(UserError, match="differ from those of its own logits"):
        checked(folder, TrainConfig(precision="fp32", max_length=LENGTH))
    config = TrainConfig(precision="fp32", max_length=span)
    assert difference(checked(folder, config), long_row(span - 3), config) < 2e-4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError(probe.NO_MEMORY)])
@pytest.mark.parametrize("part", ["_plain_logps", "pack"])
def test_too_little_memory_for_a_window_is_no_fault_of_the_model(
    tmp_path, monkeypatch, part, error
):
    def fails(*_: Any) -> None:
        raise error

    folder = write(tmp_path, "mistral")
    monkeypatch.setattr(probe, part, fails)
    remedy = f"window of {SPAN} tokens; set max_length to at most {SPAN}$"
    with pytest.raises(UserError, match=f"^mistral: too little memory for .*{remedy}"):
        checked(folder, TrainConfig(precision="fp32", max_length=LENGTH))
    with pytest.raises(UserError, match="its own forward|in this form"):
        checked(folder, TrainConfig(precision="fp32", max_length=SPAN))


def test_spans_are_found_wherever_a_config_has_them():
    settings = {
        "sliding_window": 7, "attention_chunk_size": 8, "use_sliding_window": True,
        "rope": {"beta": 3}, "layers": [{"local_window": [9, 10]}, {"x": 4}], "hidden_size": 5,
        "index_topk": 11, "vocab_size": 6, "sliding_window_pattern": None,
    }  # fmt: skip
    assert sorted(spans(settings)) == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True])
def test_positions_that_depend_on_the_longest_row_are_refused(tmp_path, kind, nested):
    """A long row in a micro-batch would change the others' log-probs.

    Up to the model's own length they are as they should be.
    """
    import types

    rope = {"rope_type": kind, "original_max_position_embeddings": 64}
    settings = types.SimpleNamespace(
        model_type="phi3", max_position_embeddings=256,
        rope_parameters={"full_attention": rope} if nested else rope,
    )  # fmt: skip
    with pytest.raises(UserError, match=rf"phi3: rows above 64 tokens .*{kind}.*max_length to 64"):
        probe._check_rope(settings, 65)
    probe._check_rope(settings, 64)


def test_a_model_with_such_positions_is_refused_before_training(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = write(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=64)
    with pytest.raises(UserError, match="llama: rows above 64 tokens would change the log-probs"):
        checked(folder, TrainConfig(precision="fp32", max_length=65))
    checked(folder, TrainConfig(precision="fp32", max_length=64))
