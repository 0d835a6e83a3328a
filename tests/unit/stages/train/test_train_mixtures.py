"""Mixtures of experts are trained as other models: packed, at every ZeRO stage, with adapters.

Tiny random Mixtral and Qwen3-MoE, real DeepSpeed, no Ray; compared with transformers alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_tokenizer, preference_rows
from test_train_faults import STEPS, WRPO, create, plain_norm, records

from wrpo_ray.config import LoraConfig
from wrpo_ray.stages.train import model, probe
from wrpo_ray.stages.train.packing import pack
from wrpo_ray.stages.train.rows import Row, Tokenizing
from wrpo_ray.stages.train.task import WRPO_ANSWERS
from wrpo_ray.storage.folder import Folder

KINDS = ("mixtral", "qwen3_moe")
CPU = torch.device("cpu")
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
