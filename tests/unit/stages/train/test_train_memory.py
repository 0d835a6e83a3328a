"""The memory of a training worker: terms worked by hand, what fits, and one measured cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import write_model

from wrpo_ray.config import LoraConfig, ReferenceConfig, SftConfig, WrpoConfig
from wrpo_ray.errors import UserError
from wrpo_ray.runtime import node_memory
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.node_memory import Room
from wrpo_ray.stages.train import fitting
from wrpo_ray.stages.train.memory import (
    BESIDE_TRAINING,
    PROCESS,
    Choice,
    Estimate,
    Shape,
    chunk_on,
    forward_tokens,
    offloaded,
)
from wrpo_ray.stages.train.sizes import Sizes
from wrpo_ray.stages.train.task import MEMORY, Task
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

ROOT = Path(__file__).parents[4]
GB = 1e9
SMOL = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip
SHAPE = Shape(128, 128, 3)
GPUS: dict[str, Any] = {"workers": 8, "num_gpus": 1}


def estimate(longest: int = 512, sizes: dict[str, Any] = SMOL, **settings: Any) -> Estimate:
    config = WrpoConfig(**settings)
    return Estimate(Sizes.of(sizes), config, SHAPE, longest, config.workers)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SMOL, 134_515_008),  # as transformers counts them
        (LLAMA_8B, 8_030_261_248),
        ({"text_config": SMOL}, 134_515_008),
    ],
)
def test_parameters_are_those_of_the_model(config, parameters):
    assert Sizes.of(config).parameters == parameters


def test_a_mixture_holds_all_experts_and_works_with_some():
    mixture = LLAMA_8B | {"num_local_experts": 8, "num_experts_per_tok": 2}
    sizes, plain = Sizes.of(mixture), Sizes.of(LLAMA_8B)
    assert sizes.inner == 2 * plain.inner
    assert sizes.parameters - plain.parameters == 32 * 7 * 3 * 4096 * 14336


@pytest.mark.parametrize(
    "kind",
    ["mixtral", "qwen3_moe", "deepseek_v2", "glm4_moe", "ernie4_5_moe", "dots1", "afmoe",
     "hunyuan_v1_moe"],
)  # fmt: skip
def test_mixtures_of_all_makers_hold_their_experts(kind):
    """Their configs name them differently. Within a quarter of what transformers counts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(kind)
    given = {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "vocab_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
        "num_experts": 32, "num_local_experts": 32, "n_routed_experts": 32, "moe_num_experts": 32,
        "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_shared_experts": 1,
        "moe_num_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 0,
        "num_dense_layers": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 3, "n_group": 1,
        "topk_group": 1, "pad_token_id": 0, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip
    config = type(made)(**{name: value for name, value in given.items() if hasattr(made, name)})
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in network.parameters())
    sizes = Sizes.of(json.loads(config.to_json_string(use_diff=False)))
    assert sizes.parameters == pytest.approx(counted, rel=0.25)
    assert sizes.inner < sizes.all_inner / 8


def test_the_sizes_of_a_real_model_are_counted_right(tmp_path):
    folder = write_model(tmp_path / "m", tied=True)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    network = AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in network.parameters())
    assert Sizes.of(config.to_dict()).parameters == counted


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "gpt_neo", "opt", "codegen", "gemma2", "qwen2"])
def test_configs_of_all_makers_tell_the_sizes(kind, tmp_path):
    """As transformers writes them: with names of its own, and without what is the class's default.

    Within a third: MLPs without a gate count as if they had one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(kind, vocab_size=5000)
    made.save_pretrained(tmp_path)
    found = Sizes.of(json.loads((tmp_path / "config.json").read_text()))
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(made)
    assert (found.width, found.layers) == (made.hidden_size, made.num_hidden_layers)
    assert found.tied is (
        network.get_output_embeddings().weight is network.get_input_embeddings().weight
    )
    counted = sum(p.numel() for p in network.parameters())
    assert found.parameters == pytest.approx(counted, rel=0.34)


def test_a_size_that_is_null_or_a_list_of_layers():
    for odd in ({"intermediate_size": [96, 1536]}, {"num_key_value_heads": [1, 3]}):
        assert Sizes.of(SMOL | odd) == Sizes.of(SMOL)
    assert Sizes.of(SMOL | {"intermediate_size": None}).inner == 4 * 576
    assert Sizes.of(SMOL | {"num_key_value_heads": None}).keys == 576
    for kind, tied in (("none", False), ("llama", False), ("gemma2", True)):
        assert Sizes.of(LLAMA_8B | {"model_type": kind}).tied is tied  # as the class has it


def test_the_state_by_hand():
    """P = 134.5M: in fp32 without ZeRO 4P, 4P and 8P; in bf16 2P, 4P + 2P and 12P."""
    p = Sizes.of(SMOL).parameters
    alone = estimate(precision="fp32").at(1024)
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * p, 4 * p, 8 * p)
    narrow = estimate().at(1024)
    assert (narrow.weights, narrow.gradients, narrow.optimizer) == (2 * p, 6 * p, 12 * p)
    spread = estimate(sizes=LLAMA_8B, **GPUS).at(1024)
    p = Sizes.of(LLAMA_8B).parameters
    assert spread.optimizer == pytest.approx(12 * p / 8)
    assert spread.process == 0
    off = estimate(sizes=LLAMA_8B, offload="optimizer", **GPUS).at(1024)
    assert off.optimizer == 0


@pytest.mark.parametrize(
    ("settings", "workers", "stage"),
    [
        ({"precision": "fp32"}, 1, 0),
        ({}, 1, 1),  # bf16 without ZeRO has no fp32 weights
        ({}, 2, 3),
        ({"num_gpus": 1}, 1, 3),
        ({"offload": "optimizer"}, 1, 3),
        ({"zero_stage": 3}, 1, 3),
        ({"zero_stage": 2}, 2, 2),
    ],
)
def test_the_stage_of_auto(settings, workers, stage):
    assert SftConfig(**settings).stage_of(workers) == stage


def test_a_layer_by_hand():
    """Row: 128 + 3 x 128 tokens, keys 128 + 3 x 256, so 1.75 for each token; masks 192 each."""
    layer = 4 * 576 + 2 * (3 * 576 + 2 * 1.75 * 576 + 192) + 4 * 1536
    work = 10 * 1536 + 6 * 576
    assert estimate().at(1000).activations == pytest.approx(1000 * (30 * layer + work))
    again = estimate(gradient_checkpointing=True).at(1000).activations
    whole = layer + 2 * 1536 + 4 * 576
    assert again == pytest.approx(30 * 1000 * 576 * 2 + 1000 * (whole + work))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("is_text", [False, True])
def test_the_loss_of_a_router_keeps_its_logits_and_their_softmax(checkpointing, is_text):
    """128 experts: twice so many numbers of two bytes for each token and layer."""
    mixture = SMOL | {"num_experts": 128, "num_experts_per_tok": 8}
    asks = mixture | {"output_router_logits": True}
    plain, more = (
        estimate(sizes={"text_config": s} if is_text else s, gradient_checkpointing=checkpointing)
        for s in (mixture, asks)
    )
    kept = more.at(1000).activations - plain.at(1000).activations
    assert kept == pytest.approx(1000 * 30 * 128 * 2 * 2)


def test_a_layer_that_is_not_slim_by_hand():
    layer = 16 * 576 + 2 * (3 * 576 + 2 * 1.75 * 576 + 192) + 8 * 1536
    plain = replace(estimate(), is_slim=False)
    assert plain.at(1000).activations == pytest.approx(31 * 1000 * layer)
    again = plain.at(1000, gradient_checkpointing=True).activations
    assert again == pytest.approx(30 * 1000 * 576 * 2 + 2 * 1000 * layer)


def test_a_chunk_takes_a_hundredth_of_a_gpu():
    """2^27 logits are 512 MB: on 80 GB; 24 GB have 2^25 of 128 MB, and 1 GB the CPU's 2^24."""
    assert [chunk_on(int(n * GB)) for n in (1, 24, 80, 200)] == [2**24, 2**25, 2**27, 2**27]
    head = estimate(sizes=LLAMA_8B, **GPUS).at(16384).head
    assert head == 8 * 2**27 + 6 * 128256 * 4096


def test_state_that_is_offloaded_lies_in_the_nodes_memory():
    """8B: 16 bytes each on 8 workers, and 2 of the weights; refused before the kernel ends them."""
    p = Sizes.of(LLAMA_8B).parameters
    for offload, each in (("none", 0), ("optimizer", 16), ("all", 18)):
        asked = estimate(sizes=LLAMA_8B, offload=offload, **GPUS)
        need = each * p / 8 + (PROCESS if each else 0)
        assert offloaded(asked.sizes, asked.config, 8) == pytest.approx(need)
        asked.check_node(Room(need + 1, 0), "wrpo")
        if each:
            with pytest.raises(
                UserError, match=f"^wrpo: offload: {offload} needs about 1.* GB; set"
            ):
                asked.check_node(Room(need - 1, 0), "wrpo")
    with_lora = WrpoConfig(offload="optimizer", lora=LoraConfig(), **GPUS)
    assert offloaded(Sizes.of(LLAMA_8B), with_lora, 8) < 2 * PROCESS
    assert offloaded(Sizes.of(SMOL), WrpoConfig(offload="optimizer"), 1) == 0  # counted with all


def test_what_needs_less():
    whole = estimate().at(2048).total
    for change in (
        {"gradient_checkpointing": True},
        {"lora": LoraConfig()},
        {"precision": "bf16", "micro_batch_tokens": 1024},
    ):
        tokens = change.pop("micro_batch_tokens", 2048)
        assert estimate().at(tokens, **change).total < whole
    live = estimate(reference=ReferenceConfig(mode="live")).at(2048)
    assert live.total - whole == live.reference == 2 * Sizes.of(SMOL).parameters
    assert estimate(reference=ReferenceConfig(mode="split")).at(2048).total == whole
    with_lora = estimate(reference=ReferenceConfig(mode="live"), lora=LoraConfig()).at(2048)
    assert with_lora.reference == 0
    one, many = (estimate(sizes=LLAMA_8B, **GPUS | {"workers": n}).at(2048) for n in (1, 8))
    assert many.total < one.total / 3


@pytest.mark.parametrize("sizes", [SMOL, LLAMA_8B])
@pytest.mark.parametrize("settings", [{}, GPUS, GPUS | {"packing": False}])
def test_the_pass_of_a_split_reference_keeps_less_than_a_step(sizes, settings):
    """A layer's tensors, and the hidden states before and after it in fp32."""
    step = {
        again: estimate(sizes=sizes, **settings | {"gradient_checkpointing": again}).at(1024)
        for again in (False, True)
    }
    found = Sizes.of(sizes)
    layer = step[False].activations / (found.layers + 1)
    passed = BESIDE_TRAINING * (layer + 1024 * 2 * 4 * found.width)
    assert all(passed < memory.activations for memory in step.values())


def test_auto_takes_what_fits():
    found = [estimate().tokens(n * GB) for n in (100, 6.0, 5.2, 0.1)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 2048
    assert found[-1] == 512
    for tokens, room in zip(found[1:-1], (6.0, 5.2), strict=True):
        one, two = (estimate().at(n).total for n in (tokens, 2 * tokens))
        assert one <= 0.85 * room * GB < two
    assert estimate(sizes=LLAMA_8B, **GPUS).tokens(1000 * GB) == 16384
    assert estimate(micro_batch_tokens=77).tokens(0.1 * GB) == 77


def test_an_interrupted_training_keeps_its_choice_while_it_fits():
    """Other micro-batches add the same numbers in another order, so that results differ in bits."""
    auto, roomy = estimate(), 100 * GB
    before = auto.choice(5.2 * GB)
    assert before.tokens < auto.choice(roomy).tokens
    assert auto.choice(roomy, before) == before
    least = auto.at(before.tokens).total
    assert auto.choice(least, before) == before  # without the reserve
    assert auto.choice(least - 1, before) != before
    fixed = Choice(2048, workers=1)
    assert estimate(micro_batch_tokens=2048).choice(roomy, fixed) == fixed
    for changed in (estimate(workers=2), estimate(micro_batch_tokens=1024)):
        assert changed.choice(roomy, before) == changed.choice(roomy)


def test_forward_passes_take_four_times_as_many():
    assert forward_tokens(SftConfig(micro_batch_tokens=100)) == 400
    assert forward_tokens(SftConfig()) == 8192
    assert forward_tokens(SftConfig(num_gpus=1)) == 32768


@pytest.mark.parametrize(
    ("settings", "room", "told"),
    [
        ({"micro_batch_tokens": 8192}, 5, "set micro_batch_tokens: 2048"),
        ({"micro_batch_tokens": 600}, 4.1, "set gradient_checkpointing: true"),
        ({"gradient_checkpointing": True}, 3, "set lora: {rank: 16}"),
        ({"micro_batch_tokens": 512}, 1, "no setting makes it fit"),
    ],
)
def test_what_is_too_large_says_what_to_change(settings, room, told):
    with pytest.raises(UserError) as error:
        estimate(**settings).check(Room(room * GB, room * GB), "wrpo")
    line = str(error.value)
    assert told in line
    assert line.startswith("wrpo: micro-batches of ")
    assert "\n" not in line


@pytest.mark.parametrize("settings", [{"micro_batch_tokens": 8192}, {"micro_batch_tokens": 4096}])
def test_the_remedy_fits(settings):
    asked, room = estimate(**settings), 5.5 * GB
    name, value = (
        asked.remedy(asked.config.micro_batch_tokens, room).removeprefix("set ").split(": ")
    )
    assert name == "micro_batch_tokens"
    assert asked.at(int(value)).total <= room < asked.at(2 * int(value)).total


def test_memory_that_others_hold_only_warns():
    """Estimated 4.9 GB: the node has 100 GB, of which 4.5 are free now."""
    chosen, line = estimate(micro_batch_tokens=2048).check(Room(100 * GB, 4.5 * GB), "sft")
    assert chosen.tokens == 2048
    assert "of which 4.5 GB are free; set micro_batch_tokens: 1024" in line
    assert line.endswith("(it may fit if other processes end)")
    with pytest.raises(UserError):
        estimate(micro_batch_tokens=2048).check(Room(100 * GB, 2 * GB), "sft")
    assert "free" not in estimate().check(Room(100 * GB, 50 * GB), "sft")[1]


def test_a_gpu_run_that_does_not_fit_gets_more_workers_or_offload():
    asked = estimate(sizes=LLAMA_8B, num_gpus=1, gradient_checkpointing=True)
    assert "offload: optimizer" in asked.remedy(4096, 80 * GB)


# --- on the workers -----------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path) -> Task:
    run, folder = Run(Folder(str(tmp_path)), 1), Folder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(SMOL | {"model_type": "llama"}))
    return Task(run, Step("wrpo"), folder, folder, "base", WrpoConfig(), seed=3)


@pytest.mark.usefixtures("alone")
def test_workers_choose_and_tell(task, tmp_path, monkeypatch):
    lengths = np.array([[10, 5, 5, 5], [300, 200, 100, 300]])
    monkeypatch.setattr(fitting, "node_memory", lambda: Room(100 * GB, 50 * GB))
    found = fitting.fitted(task, tmp_path, lengths, torch.device("cpu"))
    assert found.config.micro_batch_tokens == 2048
    assert task.config.micro_batch_tokens == "auto"
    assert "2,048 tokens" in task.folder.read_json(MEMORY)
    before = Choice(512, workers=1)
    again = fitting.fitted(task, tmp_path, lengths, torch.device("cpu"), before)
    assert again.config.micro_batch_tokens == 512
    monkeypatch.setattr(fitting, "node_memory", lambda: Room(3 * GB, 1.5 * GB))
    with pytest.raises(UserError, match="set gradient_checkpointing: true, lora|set lora"):
        fitting.fitted(task, tmp_path, lengths, torch.device("cpu"))
    # a node's memory is shared by its workers
    monkeypatch.setattr(fitting, "node_memory", lambda: Room(6 * GB, 3 * GB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError):
        fitting.fitted(task, tmp_path, lengths, torch.device("cpu"))


@pytest.mark.usefixtures("alone")
def test_memory_is_counted_for_layers_that_cannot_keep_less(task, tmp_path, monkeypatch):
    """Phi has other norms and an MLP without a gate; it gets less at once, not a full memory."""
    lengths = np.array([[10, 5, 5, 5]])
    monkeypatch.setattr(fitting, "_room", lambda device: Room(50 * GB, 6 * GB))
    found = {}
    for kind in ("llama", "phi"):
        (tmp_path / "config.json").write_text(json.dumps(SMOL | {"model_type": kind}))
        config = fitting.fitted(task, tmp_path, lengths, torch.device("cpu")).config
        found[kind] = config.micro_batch_tokens
    assert found["phi"] < found["llama"]
    whole = estimate(sizes=LLAMA_8B, **GPUS)
    assert replace(whole, is_slim=False).tokens(60 * GB) < whole.tokens(60 * GB)


def test_a_long_row_counts_as_a_micro_batch(task):
    short, long = (estimate(longest=n).at(512).total for n in (100, 5000))
    assert long > short
    assert long == estimate().at(5000).total


# --- the node -----------------------------------------------------------------------------------


def test_the_smallest_limit_counts(tmp_path, monkeypatch):
    own = node_memory._folders()
    assert all(isinstance(folder, Path) for folder in own)
    free = node_memory.node_memory()
    assert 0 < free.free <= free.total
    for name, text in {
        "memory.max": "2000000000\n",
        "memory.current": "1500000000\n",
        "memory.stat": "anon 5\ninactive_file 250000000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(node_memory, "_folders", lambda: [tmp_path])
    assert node_memory.node_memory() == Room(2e9, 0.75e9)
    (tmp_path / "memory.max").write_text("max\n")
    assert node_memory.node_memory().total == free.total
    assert Room(8, 4).among(2) == Room(4, 2)


# --- measured -----------------------------------------------------------------------------------


def measured(*options: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "benchmarks/memory.py", *options],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_longest_rows_are_those_of_the_decision():
    page = (ROOT / "docs/adr/0024-long-rows.md").read_text()
    told = measured("--rows")
    assert told.count("\n") == 4
    assert told in page


def test_the_estimate_is_within_a_fifth_of_the_measured_peak():
    measured("--quick")


@pytest.mark.soak
def test_the_estimates_of_all_cells_are():
    measured()
