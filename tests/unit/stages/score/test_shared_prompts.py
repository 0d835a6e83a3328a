"""Answers that share their prompt's computation: the rewards are those of transformers one by one.

Tiny random models, with windows of 20 tokens and conversations up to 100.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import WORDS, make_tokenizer

from wrpo_ray.config import RewardConfig
from wrpo_ray.llm import attention
from wrpo_ray.llm.attention import Block, Layout
from wrpo_ray.stages.score import decoder
from wrpo_ray.stages.score.base import Item, TooLongError
from wrpo_ray.stages.score.reward_models import ClassifierReward, load_classifier

SPAN, LENGTH = 20, 100
SHAPE: dict[str, Any] = {
    "vocab_size": 6 + len(WORDS), "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "sliding_window": SPAN, "attention_chunk_size": SPAN,
    "use_sliding_window": True, "max_window_layers": 1, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "num_labels": 1,
}  # fmt: skip
SHARING = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3",
    "gpt2", "starcoder2", "opt",
)  # fmt: skip
ALONE = ("qwen2_moe", "gpt_oss", "bloom", "stablelm")
"""A window in the mask alone, attention sinks, positions in the scores, layers without keywords."""


def write(folder: Path, kind: str, **changes: Any) -> Path:
    """A random classifier with one label; its layers are as its config makes them."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    made = AutoConfig.for_model(kind)
    fields = {name: value for name, value in (SHAPE | changes).items() if hasattr(made, name)}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(type(made)(**fields))
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, **part: Any) -> ClassifierReward:
    config = RewardConfig(**{"model": "m", "max_length": LENGTH} | part)
    reward = load_classifier(config, folder, on_gpu=False)
    assert isinstance(reward, ClassifierReward)
    reward.tokenizer = make_tokenizer()  # transformers makes Qwen2's own, of bytes, of the folder's
    return reward


def words(seed: int, count: int) -> str:
    return " ".join(f"w{(seed + 7 * i) % 40}" for i in range(count))


def items(prompt: int, *answers: str) -> list[Item]:
    asked = [{"role": "user", "content": words(prompt, prompt)}]
    return [Item(asked, text, None) for text in answers]


def all_kinds() -> list[Item]:
    """Prompts around a window's length; equal answers, empty ones, beginnings of others, one alone.

    A word and the space after it are two tokens.
    """
    some = [words(3, 2), words(3, 2), words(3, 9), "", words(8, 1)]
    return [
        *items(1, *some),
        *items(9, words(1, 4)),
        *items(10, *some, words(5, 30)),
        *items(33, words(4, 5), words(5, 6), words(4, 5)),
        *items(2, "", ""),
    ]


def plain(folder: Path, reward: ClassifierReward, asked: list[Item]) -> list[float]:
    """By transformers' own attention and head, an answer at a time, read at its last token."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        each = [model.base_model(torch.tensor([reward.encode(item)]))[0] for item in asked]
        return [model.score(states[0, -1]).item() for states in each]


# --- the packed sequence -----------------------------------------------------------------------


def test_a_sequence_worked_by_hand():
    """5 6 with 7 / 8 9, then 4 3 alone; read at the first token and the last."""
    groups = [[[5, 6, 7], [5, 6, 8, 9]], [[4, 3]]]
    ids, layout, places = decoder.pack(groups, lambda row: [0, len(row) - 1])
    assert ids == [5, 6, 7, 8, 9, 4, 3]
    assert layout.blocks == (Block(2), Block(1, 0), Block(2, 0), Block(2))
    assert layout.positions.tolist() == [0, 1, 2, 2, 3, 0, 1]
    assert places == [[0, 2], [0, 4], [5, 6]]


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # each reads a token of its own
        ([[1, 2], [1, 2, 3], [1, 2, 4]], 1),
        ([[1, 2], [2, 2]], 0),
        ([[1], [1]], 0),
    ],
)
def test_what_rows_share_leaves_each_a_token(rows, shared):
    assert decoder.shared_tokens(rows) == shared
    ids, layout, _ = decoder.pack([rows], decoder.ends)
    assert sum(layout.lengths) == len(ids) == sum(map(len, rows)) - shared * (len(rows) - 1)
    assert min(layout.lengths) > 0


# --- rewards -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("kind", [*SHARING, *ALONE])
def test_rewards_are_those_of_each_answer_on_its_own(tmp_path, kind, batch_size):
    reward = loaded(write(tmp_path, kind), batch_size=batch_size)
    assert reward.shares == (kind in SHARING)
    asked = all_kinds()
    wanted = plain(tmp_path, reward, asked)
    assert len({round(value, 4) for value in wanted}) == 13  # of 17; four are repeated
    assert reward.score(asked) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_equal_answers_have_equal_rewards_and_are_computed_once(tmp_path):
    reward = loaded(write(tmp_path, "llama"))
    computed = counted(reward)
    scores = reward.score(items(9, *3 * [words(3, 9)], words(5, 9)))
    assert len(set(scores)) == 2
    prompt, answers = 1 + 17 + 1 + 1, [17 + 1] * 2  # <user> ... <end> <assistant>, ... <end>
    assert computed == [prompt + sum(answers)]


def counted(reward: ClassifierReward) -> list[int]:
    """The tokens of each forward pass from now on."""
    computed: list[int] = []
    embedding = reward.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, given, out: computed.append(given[0].numel()))
    return computed


def test_a_prompt_is_computed_once_for_its_answers(tmp_path):
    """Five answers to each of two prompts, in one pass; in halves, the prompts are in both."""
    folder = write(tmp_path, "llama")
    answers = [words(n, 9) for n in range(5)]
    asked = [*items(30, *answers), *items(10, *answers)]
    prompts, each = (59 + 3) + (19 + 3), 17 + 1
    reward = loaded(folder, batch_size=10)
    computed = counted(reward)
    whole = reward.score(asked)
    assert computed == [prompts + 10 * each]
    reward = loaded(folder, batch_size=3)
    computed = counted(reward)
    assert reward.score(asked) == pytest.approx(whole, abs=1e-5)
    assert sum(computed) == 2 * prompts + 10 * each


def test_prompts_that_are_cut_and_answers_too_long_by_themselves(tmp_path):
    """Cut rows begin with other tokens, so they share nothing."""
    reward = loaded(write(tmp_path, "llama"), overflow="cut_prompt", max_length=60)
    asked = items(25, *(words(3 * n, n) for n in (1, 12, 14, 40)))
    assert len(asked) == 4
    *scores, hopeless = reward.score(asked)
    assert isinstance(hopeless, TooLongError)
    assert scores == pytest.approx(plain(tmp_path, reward, asked[:3]), rel=1e-4, abs=1e-4)


# --- which models ------------------------------------------------------------------------------


def test_half_precision_has_the_same_rewards_but_for_its_rounding(tmp_path):
    reward = loaded(write(tmp_path, "llama"), dtype="bfloat16")
    assert reward.shares
    asked = all_kinds()
    got, wanted = (torch.tensor(s) for s in (reward.score(asked), plain(tmp_path, reward, asked)))
    assert (got - wanted).norm() < 0.03 * wanted.norm()


def test_windows_beyond_the_longest_conversation_count_for_nothing(tmp_path):
    """qwen2_moe has its window in the mask, which packed rows lack."""
    write(tmp_path, "qwen2_moe", sliding_window=LENGTH)
    assert loaded(tmp_path).shares
    assert not loaded(tmp_path, max_length=LENGTH + 1).shares


def test_positions_that_depend_on_the_longest_row_are_left_alone(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    write(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=64)
    part = {"model": "m", "max_length": 64}
    assert load_classifier(RewardConfig(**part), tmp_path, on_gpu=False).shares
    assert attention.changing_positions(loaded(tmp_path).model.config, 65) == ("dynamic", 64)


def without_prompts(query: Any, key: Any, value: Any, layout: Layout, *rest: Any) -> Any:
    """Breaks `by_blocks`: answers do not see their prompt."""
    alone = Layout(tuple(Block(block.length) for block in layout.blocks))
    return BY_BLOCKS(query, key, value, alone, *rest)


def in_one(query: Any, key: Any, value: Any, layout: Layout, *rest: Any) -> Any:
    """Breaks `by_blocks`: all see all that comes before."""
    return BY_BLOCKS(query, key, value, Layout((Block(sum(layout.lengths)),)), *rest)


BY_BLOCKS = attention.by_blocks
BREAKS = {
    "no prompt is seen": (attention, "by_blocks", without_prompts),
    "answers see each other": (attention, "by_blocks", in_one),
    "positions begin anew": (Layout, "positions", property(lambda layout: torch.cat(
        [torch.arange(length) for length in layout.lengths]))),
    "positions go on": (Layout, "positions", property(lambda layout: torch.arange(
        sum(layout.lengths)))),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_model_with_other_states_computes_rows_alone(tmp_path, monkeypatch, kind, what):
    """As if the model did so: it is seen when it is loaded, and rewards are right."""
    monkeypatch.setattr(*BREAKS[what])
    reward = loaded(write(tmp_path, kind))
    assert not reward.shares
    asked = all_kinds()
    assert reward.score(asked) == pytest.approx(plain(tmp_path, reward, asked), rel=1e-4, abs=1e-4)
