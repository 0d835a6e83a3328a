"""ArmoRM in our own small module: where the gate reads, what is computed, and which weights."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from wrpo_ray.config import ScoreConfig
from wrpo_ray.errors import UserError
from wrpo_ray.stages.score.armorm import (
    HEADER,
    ArmoReward,
    NoTurnError,
    check_tensors,
    gate_position,
    shapes,
)
from wrpo_ray.stages.score.base import Item
from wrpo_ray.stages.score.reward_models import load_classifier
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.tensors import read_tensors

BOS, START, END, EOT, GAP = 128000, 128006, 128007, 128009, 271
USER, ASSISTANT, PAD = 882, 78191, 128256
SPECIAL = {
    "<|begin_of_text|>": BOS,
    "<|start_header_id|>": START,
    "<|end_header_id|>": END,
    "<|eot_id|>": EOT,
    "[PAD]": PAD,
}
WORDS = {f"w{i}": 1000 + i for i in range(20)} | {"user": USER, "assistant": ASSISTANT, "\n\n": GAP}
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONFIG = LlamaConfig(
    architectures=["LlamaForRewardModelWithGating"],
    vocab_size=128257,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    initializer_range=0.5,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOT,
    num_objectives=19,
    gating_hidden_dim=12,
    gating_n_hidden=3,
    gating_temperature=2,
)
PART = ScoreConfig(model="armorm", max_length=100)


def published_names() -> dict[str, tuple[int, ...]]:
    """Name and shape of the heads of RLHFlow/ArmoRM-Llama3-8B-v0.1, as its files list them."""
    sizes = [4096, 1024, 1024, 1024, 19]
    layers = {
        f"gating.layers.{i}.{kind}": shape
        for i in range(4)
        for kind, shape in (("weight", (sizes[i + 1], sizes[i])), ("bias", (sizes[i + 1],)))
    }
    return layers | {
        "gating.logit_scale": (1,),
        "model.embed_tokens.weight": (128257, 4096),
        "model.norm.weight": (4096,),
        "regression_layer.weight": (19, 4096),
        "reward_transform_matrix": (19, 19),
    }


def llama_layer(number: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of one layer of Llama 3 8B."""
    inner = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
        "input_layernorm": (4096,),
        "post_attention_layernorm": (4096,),
    }
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in inner.items()}


def write_tokenizer(folder: Path) -> None:
    """Whole words under Llama 3's ids; it adds a BOS by itself, as Llama 3's does."""
    from tokenizers.processors import TemplateProcessing

    vocabulary = SPECIAL | WORDS | {"<unk>": 0, " ": 1}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\n\n| "), "isolated")
    inner.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="[PAD]",
        unk_token="<unk>",
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ArmoRM in two files, under the published names, with the published code's mark."""
    folder = tmp_path_factory.mktemp("armorm")
    torch.manual_seed(0)
    heads = {
        name: torch.randn(shape)
        for name, shape in shapes(CONFIG).items()
        if not name.startswith("model.")
    }
    heads["reward_transform_matrix"] = torch.eye(19)
    heads["reward_transform_matrix"][4] -= torch.rand(19)  # as published: verbosity is taken off
    heads["gating.logit_scale"] = torch.tensor([0.9])
    backbone = {f"model.{n}": t for n, t in LlamaModel(CONFIG).state_dict().items()}
    save_file(backbone, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(heads, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    places = dict.fromkeys(backbone, "model-00001-of-00002.safetensors")
    places |= dict.fromkeys(heads, "model-00002-of-00002.safetensors")
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = CONFIG.to_dict() | {
        "architectures": ["LlamaForRewardModelWithGating"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.Missing"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def turn(role: int, *words: int) -> list[int]:
    return [START, role, END, GAP, *words, EOT]


def item(words: int, answer: int, turns: int = 1) -> Item:
    roles = ("user", "assistant")
    messages = [
        {"role": roles[i % 2], "content": " ".join(f"w{(i + j) % 20}" for j in range(words))}
        for i in range(2 * turns - 1)
    ]
    return Item(messages, " ".join(f"w{3 * j % 20}" for j in range(answer)), None)


# --- the gate's place --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "position"),
    [
        ([BOS, *turn(USER, 1, 2), *turn(ASSISTANT, 3)], 7),
        ([BOS, *turn(USER, 1), *turn(ASSISTANT, 2), *turn(USER, 3), *turn(ASSISTANT, 4)], 18),
        ([*HEADER], 0),
        ([5, *HEADER, PAD, PAD], 1),
    ],
)
def test_the_gate_reads_where_the_last_turn_of_the_assistant_begins(ids, position):
    assert gate_position(ids) == position
    assert ids[position] == EOT


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [BOS, *turn(USER, 1, 2)],
        [BOS, START, ASSISTANT, END, GAP, 1, EOT],  # no turn before it
        [BOS, *turn(USER, 1), START, ASSISTANT, END, 198, 1, EOT],  # one line break
        list(HEADER[:-1]),
    ],
)
def test_a_conversation_without_that_turn_is_refused(ids):
    with pytest.raises(NoTurnError, match="assistant's header"):
        gate_position(ids)


# --- the computation ---------------------------------------------------------------------------


def by_hand(folder: Path, ids: list[int]) -> float:
    """ArmoRM of one row in float64, by loops over plain numbers; the Llama's states are given."""
    llama = LlamaModel.from_pretrained(folder, config=CONFIG, dtype=torch.float64)
    states = llama(input_ids=torch.tensor([ids])).last_hidden_state[0].tolist()
    weights = {n: t.double().tolist() for n, t in load_file(folder / HEADS).items()}

    def times(matrix: list[list[float]], vector: list[float]) -> list[float]:
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    start = max(
        i for i in range(len(ids)) if ids[i : i + 5] == [128009, 128006, 78191, 128007, 271]
    )
    ratings = times(weights["regression_layer.weight"], states[-1])
    matrix = weights["reward_transform_matrix"]
    adjusted = [sum(ratings[j] * matrix[j][k] for j in range(19)) for k in range(19)]
    hidden = states[start]
    for layer in range(4):
        hidden = times(weights[f"gating.layers.{layer}.weight"], hidden)
        bias = weights[f"gating.layers.{layer}.bias"]
        hidden = [h + b for h, b in zip(hidden, bias, strict=True)]
        if layer < 3:
            hidden = [max(h, 0.0) for h in hidden]
    powers = [math.exp(h / 2) for h in hidden]  # gating_temperature is 2
    scale = weights["gating.logit_scale"][0]
    return sum(scale * p / sum(powers) * a for p, a in zip(powers, adjusted, strict=True))


HEADS = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def test_rewards_are_those_of_the_plain_reference_alone_and_in_any_batch(folder):
    items = [item(3, 4), item(9, 1), item(1, 30), item(2, 2, turns=3), item(20, 20)]
    alone, together = (
        load_classifier(PART.model_copy(update={"batch_size": n}), folder, on_gpu=False)
        for n in (1, 5)
    )
    assert isinstance(alone, ArmoReward)
    wanted = [by_hand(folder, alone.encode(i)) for i in items]
    assert len({round(w, 3) for w in wanted}) == 5
    assert alone.score(items) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert together.score(items) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_the_gate_sees_the_prompt_only_and_padding_is_seen_by_nobody(folder, monkeypatch):
    reward = load_classifier(PART, folder, on_gpu=False)
    gates = []
    reward.heads.gating.register_forward_hook(lambda _, inputs, out: gates.append(out))
    scores = reward.score([item(3, 4), item(3, 9)])
    assert scores[0] != scores[1]
    torch.testing.assert_close(gates[0][0], gates[0][1])  # one prompt, two answers
    with torch.no_grad():
        reward.llama.embed_tokens.weight[PAD] += 100
    assert reward.score([item(3, 4), item(3, 9)]) == pytest.approx(scores, rel=1e-5)


def test_conversations_are_rendered_with_one_bos_and_text_that_spells_a_header_is_text(folder):
    reward = load_classifier(PART, folder, on_gpu=False)
    ids = reward.encode(Item([{"role": "user", "content": "w0 w1"}], "w2", None))
    space = 1
    assert ids == [BOS, *turn(USER, 1000, space, 1001), *turn(ASSISTANT, 1002)]
    spelled = "w2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nw3"
    ids = reward.encode(Item([{"role": "user", "content": "w0"}], spelled, None))
    assert (ids.count(BOS), ids.count(START), gate_position(ids)) == (1, 2, 6)


def test_rows_fail_by_themselves_and_the_prompt_can_be_cut(folder):
    reward = load_classifier(PART, folder, on_gpu=False)
    long, short = reward.score([item(60, 9), item(3, 3)])
    assert "above 100" in str(long)
    assert isinstance(short, float)
    part = PART.model_copy(update={"overflow": "cut_prompt"})
    cut = load_classifier(part, folder, on_gpu=False)
    ids = cut.encode(item(60, 9))
    whole = load_classifier(PART.model_copy(update={"max_length": 128}), folder, on_gpu=False)
    full = whole.encode(item(54, 5))
    assert len(ids) == 100
    assert (ids[0], ids.count(BOS), ids[-1]) == (BOS, 1, EOT)
    assert full[0] == BOS
    assert all(isinstance(s, float) for s in cut.score([item(60, 9), item(3, 3)]))
    (hopeless,) = cut.score([item(3, 60)])
    assert "leaves the prompt no room" in str(hopeless)


def test_a_row_without_the_turn_fails_with_its_type(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("\n\n", " "))
    (score,) = load_classifier(PART, tmp_path, on_gpu=False).score([item(3, 3)])
    assert type(score) is NoTurnError


# --- the weights -------------------------------------------------------------------------------


def test_every_published_tensor_is_known_by_name_and_shape():
    config = LlamaConfig(
        vocab_size=128257,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    wanted = published_names()
    for number in range(32):
        wanted |= llama_layer(number)
    assert shapes(config) == wanted
    assert sum(math.prod(shape) for shape in wanted.values()) == 7_511_320_957  # "7.51B"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("gating.logit_scale"), "gating.logit_scale is missing"),
        (lambda w: w.update({"score.weight": torch.ones(1)}), "score.weight is unknown"),
        (
            lambda w: w.update({"regression_layer.weight": torch.ones(18, 16)}),
            r"regression_layer.weight has shape \(18, 16\), not \(19, 16\)",
        ),
        (lambda w: w.clear(), "missing; .* missing; .* missing and 8 more"),
    ],
)
def test_weights_that_are_not_armorms_are_told(folder, tmp_path, change, told):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    weights = load_file(folder / HEADS)
    change(weights)
    (tmp_path / HEADS).unlink()
    save_file(weights, tmp_path / HEADS, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    others = {n: f for n, f in index["weight_map"].items() if f != HEADS}
    (tmp_path / INDEX).unlink()
    index["weight_map"] = others | dict.fromkeys(weights, HEADS)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=told):
        load_classifier(PART, tmp_path, on_gpu=False)


def test_no_tensor_may_be_missing_or_have_another_name(folder):
    """Each of them in turn, from headers alone."""
    tensors = read_tensors(Folder(str(folder)))
    check_tensors(folder, tensors)
    for name, header in tensors.items():
        others = {n: t for n, t in tensors.items() if n != name}
        for changed in (others, others | {f"_orig_mod.{name}": header}):
            with pytest.raises(UserError, match=f"not ArmoRM's: {re.escape(name)} is missing"):
                check_tensors(folder, changed)
    assert len(tensors) == len(shapes(CONFIG)) == 31
