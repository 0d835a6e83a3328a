"""Mixtures of experts are trained as other models: packed, at every ZeRO stage, with adapters.

Tiny random Mixtral and Qwen3-MoE, real DeepSpeed, no Ray; compared with transformers alone.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_tokenizer, preference_rows
from test_train_faults import STEPS, WRPO, create, plain_norm, records

from wrpo_ray.config import LoraConfig, SftConfig
from wrpo_ray.errors import UserError
from wrpo_ray.stages.train import model, probe
from wrpo_ray.stages.train.packing import pack, pad
from wrpo_ray.stages.train.rows import Row, Tokenizing
from wrpo_ray.stages.train.task import WRPO_ANSWERS
from wrpo_ray.storage.folder import Folder

KINDS = ("mixtral", "qwen3_moe")
CPU = torch.device("cpu")
COEFFICIENT = 2.0
"""Of the router's loss."""
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "initializer_range": 0.3, "router_jitter_noise": 0.5,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    for name, value in (
        ("DS_ACCELERATOR", "cpu"),
        ("TORCHDYNAMO_DISABLE", "1"),
        ("LOCAL_RANK", "0"),
    ):
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory) -> Path:
    """A model folder; its router would add noise in training, as some configs ask for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp(request.param), make_tokenizer()
    made = AutoConfig.for_model(request.param)
    given = SHAPE | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = type(made)(**{name: value for name, value in given.items() if hasattr(made, name)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    tokenizing = Tokenizing(make_tokenizer(), frozenset({1}), WRPO_ANSWERS, WRPO)
    return tokenizing.rows(preference_rows(4 * STEPS), "rows").kept


@pytest.fixture(scope="module")
def balanced(base, tmp_path_factory) -> Path:
    """The same model, whose config.json asks for the loss of its router."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("balanced") / base.name)
    config = json.loads((folder / "config.json").read_text())
    asked = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    (folder / "config.json").write_text(json.dumps(config | asked))
    return folder


def logps(policy: Any, rows: list[Row]) -> torch.Tensor:
    with torch.no_grad():
        return policy(pack(rows))


def plain_logps(network: Any, rows: list[Row]) -> torch.Tensor:
    with torch.no_grad():
        each = [probe._plain_logp(network, r.prompt, a, CPU) for r in rows for a in r.answers]
    return torch.stack(each)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 0},
        {"zero_stage": 1, "precision": "bf16"},
        {"zero_stage": 3},
        {"zero_stage": 3, "gradient_checkpointing": True},
    ],
)
def test_the_gradient_is_that_of_the_plain_model(tmp_path, base, rows, settings):
    """Of rows that are packed; the first loss is ln 2, as policy and reference are equal."""
    trainer = create(tmp_path, base, rows, WRPO.model_copy(update=settings))
    first = [trainer.rows[i] for i in trainer.train_rows[list(trainer.order.batch(0))]]
    trainer.run(0)
    found, close = records(trainer), 3e-2 if "precision" in settings else 1e-4
    want = plain_norm(base, first, trainer.task.config)
    assert found[0]["grad_norm"] == pytest.approx(want, rel=close)
    assert found[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert len({line["loss"] for line in found}) == STEPS


def test_all_experts_of_a_layer_are_one_module(base):
    """So ZeRO-3 gathers them at once, and workers whose tokens choose others do not wait."""
    network = model.load(base, torch.float32, packing=True)
    experts = [part for name, part in network.named_modules() if name.endswith(".experts")]
    assert len(experts) == 2
    for part in experts:
        assert {p.shape[0] for p in part.parameters(recurse=False)} == {4}
        assert not any(True for child in part.children() for _ in child.parameters())


# --- the router's loss ---------------------------------------------------------------------------


def transformers_loss(network: Any, rows: list[Row]) -> torch.Tensor:
    """The weighted loss of the router by transformers' own forward pass, of all sequences."""
    padded = pad(rows)
    found = network(input_ids=padded.ids, attention_mask=padded.attention_mask, use_cache=False)
    return COEFFICIENT * found.aux_loss


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 0},
        {"zero_stage": 0, "packing": False},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 3, "gradient_checkpointing": True},
    ],
)
def test_the_routers_loss_is_that_of_transformers(tmp_path, balanced, rows, settings):
    """In the loss of a step, in its metrics, and in the gradient, beside the preference loss."""
    from transformers import AutoModelForCausalLM

    more = settings | {"micro_batch_tokens": 4096, "holdout": 0.5}
    trainer = create(tmp_path, balanced, rows, WRPO.model_copy(update=more))
    first = [trainer.rows[i] for i in trainer.train_rows[list(trainer.order.batch(0))]]
    trainer.run(0)
    found = records(trainer)
    network = AutoModelForCausalLM.from_pretrained(balanced, dtype=torch.float32)
    network.eval()  # no noise of the router
    want = transformers_loss(network, first)
    assert found[0]["router_loss"] == pytest.approx(want.item(), rel=1e-5)
    assert found[0]["loss"] == pytest.approx(0.6931472 + want.item(), abs=1e-5)
    for row in first:
        each = [probe._plain_logp(network, row.prompt, answer, CPU) for answer in row.answers]
        (-0.5 * 0.1 * (each[1] - each[2]) / len(first)).backward()
    without = norm_of(network)
    want.backward()
    assert norm_of(network) > 1.05 * without
    assert found[0]["grad_norm"] == pytest.approx(norm_of(network), rel=1e-4)
    # rows held out are measured by the preference loss alone
    assert found[-1]["holdout/loss"] == pytest.approx(0.6931472, abs=0.05)
    assert found[-1]["router_loss"] > 0.1


def norm_of(network: Any) -> float:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def test_in_sft_the_routers_loss_is_a_mean_over_answer_tokens(tmp_path, balanced, rows):
    """Micro-batches of one row each: their losses of the router count by their answer tokens."""
    from transformers import AutoModelForCausalLM

    config = SftConfig(batch_size=4, precision="fp32", micro_batch_tokens=1, zero_stage=0)
    sft = [replace(row, answers=row.answers[:1], reference=()) for row in rows]
    trainer = create(tmp_path, balanced, sft, config)
    first = [trainer.rows[i] for i in trainer.train_rows[list(trainer.order.batch(0))]]
    record = trainer.step(0)
    network = AutoModelForCausalLM.from_pretrained(balanced, dtype=torch.float32).eval()
    tokens = [len(row.answers[0]) for row in first]
    assert len(set(tokens)) > 1
    with torch.no_grad():
        each = [float(transformers_loss(network, [row])) for row in first]
        plain = -float(plain_logps(network, first).sum())
    shares = sum(map(math.prod, zip(each, tokens, strict=True)))
    assert record["loss"] == pytest.approx((plain + shares) / sum(tokens), rel=1e-5)
    assert record["router_loss"] == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_a_reference_without_adapters_leaves_the_routers_loss_of_the_policy(
    tmp_path, balanced, rows
):
    """The second pass of the same model is without gradients, and has none."""
    change = {"reference": WRPO.reference.model_copy(update={"mode": "live"})}
    more = change | {"lora": LoraConfig(rank=2), "micro_batch_tokens": 4096}
    trainer = create(tmp_path, balanced, rows, WRPO.model_copy(update=more))
    assert trainer.step(0)["router_loss"] > 0.1


def test_the_routers_loss_is_given_once_and_keeps_no_pass_alive(balanced, rows):
    policy = model.load_policy(balanced, WRPO, CPU)
    policy(pack(rows[:2]))
    assert policy.take_router_loss().requires_grad
    assert policy.take_router_loss() is None
    policy(pack(rows[:2]))
    with torch.no_grad():
        policy(pack(rows[:2]))
    assert policy.take_router_loss() is None
    copy.deepcopy(policy)


def test_a_mixture_of_dense_layers_alone_has_no_loss_of_a_router(tmp_path, rows):
    """As a config may say, whatever else it asks for."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    given = {name: value for name, value in SHAPE.items() if hasattr(Qwen3MoeConfig(), name)}
    config = Qwen3MoeConfig(
        **given, vocab_size=46, mlp_only_layers=[0, 1], output_router_logits=True
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = model.load_policy(tmp_path, WRPO, CPU)
    probe.check_forward(policy, WRPO, CPU)
    policy(pack(rows[:2]))
    assert policy.take_router_loss() is None


@pytest.mark.parametrize("packing", [True, False])
def test_a_rate_that_is_no_noise_is_noticed(tmp_path, packing):
    """PhiMoE chooses experts by what its config calls a jitter, also when it answers."""
    from transformers import AutoModelForCausalLM, PhimoeConfig

    given = {name: value for name, value in SHAPE.items() if hasattr(PhimoeConfig(), name)}
    config = PhimoeConfig(**given, vocab_size=46)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = WRPO.model_copy(update={"packing": packing})
    policy = model.load_policy(tmp_path, settings, CPU)
    with pytest.raises(UserError, match="phimoe: its log-probs of p.* rows differ from those"):
        probe.check_forward(policy, settings, CPU)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_saved_mixture_is_the_trained_one(tmp_path, base, rows, lora):
    """Adapters of experts and routers are merged too."""
    from transformers import AutoModelForCausalLM

    config = WRPO.model_copy(update={"lora": lora})
    policy = model.load_policy(base, config, CPU)
    before = logps(policy, rows)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and (lora is None or "lora_B" in name):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save(policy, base, config, make_tokenizer(), Folder(str(tmp_path / "m")), write=True)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    want = logps(policy, rows)
    assert not torch.allclose(want, before, atol=0.1)
    torch.testing.assert_close(plain_logps(got, rows), want, rtol=1e-4, atol=1e-4)
