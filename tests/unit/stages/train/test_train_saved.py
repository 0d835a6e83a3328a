"""What is written of a trained policy computes what the policy does, in bf16 as in fp32.

Real DeepSpeed, one worker in this process. Log-probs are compared in fp32: what a bf16 forward
pass computes differs by more than anything here, from itself.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, make_tokenizer, preference_rows
from test_train_faults import SETTINGS, create

from wrpo_ray.config import AlphaConfig, LoraConfig, WrpoConfig
from wrpo_ray.llm.rounding import Rounding, Tensors
from wrpo_ray.stages.train import model, probe
from wrpo_ray.stages.train.rows import Row, Tokenizing
from wrpo_ray.stages.train.stage import _rounding_note
from wrpo_ray.stages.train.task import ADAPTERS, MODEL, WRPO_ANSWERS

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=8)
WRPO = WrpoConfig(
    **SETTINGS | {"schedule": "constant"}, beta=0.5, alpha=AlphaConfig(end=0.4), lora=LORA
)
DEFAULT = WrpoConfig().learning_rate  # 3e-7
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    for name, value in {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": "0",
        "TORCHDYNAMO_DISABLE": "1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model in bf16, as most are published; its layers are as large as real ones' weights."""
    folder = tmp_path_factory.mktemp("base")
    make_model(width=64).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    tokenizing = Tokenizing(make_tokenizer(), frozenset({1}), WRPO_ANSWERS, WRPO)
    return tokenizing.rows(preference_rows(12), "rows").kept


def logps(network: Any, rows: list[Row]) -> torch.Tensor:
    """By transformers alone, in fp32, an answer at a time."""
    network = copy.deepcopy(network).float().eval()
    network.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(
            [probe._plain_logp(network, r.prompt, a, CPU) for r in rows for a in r.answers]
        )


def trained_logps(trainer: Any, base: Path, rows: list[Row]) -> torch.Tensor:
    """Of the policy with the very numbers that its forward pass has, as fp32."""
    from deepspeed import zero

    config, found = trainer.task.config, {}
    for name, parameter in trainer.policy.module.model.named_parameters():
        with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().float().clone()
    network = model.load(base, torch.float32, packing=False)
    if config.lora:
        network = model.with_lora(network, config.lora)
    network.load_state_dict(found, strict=False)
    return logps(network, rows)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


CASES = [
    (1, "bf16", LORA, DEFAULT), (3, "bf16", LORA, 1e-2), (0, "fp32", LORA, 1e-2),
    (1, "bf16", None, DEFAULT), (3, "bf16", None, 1e-2), (0, "fp32", None, 1e-2),
]  # fmt: skip
MORE = [(3, "bf16", LORA, DEFAULT), (1, "bf16", LORA, 1e-4), (3, "bf16", None, DEFAULT)]
COMPARED = 4
"""Rows whose log-probs are compared; all are trained on."""


@pytest.mark.parametrize(
    ("stage", "precision", "lora", "rate"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.soak) for case in MORE)],
)
def test_the_saved_model_is_the_trained_policy(tmp_path, base, rows, stage, precision, lora, rate):
    change = {"zero_stage": stage, "precision": precision, "lora": lora, "learning_rate": rate}
    trainer = create(tmp_path, base, rows, WRPO.model_copy(update=change))
    trainer.run(0)
    lost = trainer.save()
    folder, rows = trainer.task.folder, rows[:COMPARED]
    saved, want = load((folder / MODEL).local()), trained_logps(trainer, base, rows)
    assert (logps(saved, rows) - want).abs().max() < 1e-4  # nats an answer
    is_bf16 = precision == "bf16" and lora is None
    assert saved.dtype == saved.config.dtype == (torch.bfloat16 if is_bf16 else torch.float32)
    if rate == 1e-2:
        assert (logps(load(base), rows) - want).abs().max() > 0.1
    if lora:
        from peft import PeftModel

        beside = PeftModel.from_pretrained(load(base).float(), (folder / ADAPTERS).local())
        assert (logps(beside, rows) - want).abs().max() < 1e-4
    if lora or is_bf16:
        assert lost > 0.9 if rate == DEFAULT else lost < 0.95 if rate == 1e-4 else lost < 0.3
    else:
        assert lost is None


def test_what_rounding_loses_worked_by_hand():
    """bf16 has steps of 2^-7 from 1 to 2: of 1 + 2^-9 nothing is left, of 1 + 2^-7 all.

    1 + 3 * 2^-9 is rounded up, which is a change; what did not change is not counted.
    """
    before = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16)
    trained = torch.tensor([1 + 2**-9, 1 + 2**-7, 1 + 3 * 2**-9, 1.0])
    rounding = Rounding()
    rounding.add(trained, before, torch.bfloat16)
    assert (rounding.changed, rounding.lost, rounding.share) == (3, 1, pytest.approx(1 / 3))
    rounding.add(trained, None, torch.bfloat16)
    rounding.add(trained, before[:2], torch.bfloat16)
    assert rounding.changed == 3
    assert Rounding().share is None


def test_tensors_are_read_from_all_files(tmp_path):
    network = make_model()
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tensors = Tensors(tmp_path)
    for name, value in network.state_dict().items():
        assert torch.equal(tensors.get(name), value)
    assert tensors.get("none") is None
    assert "none" not in tensors


@pytest.mark.parametrize("lora", [LORA, None])
def test_the_loss_is_told_in_words(lora):
    assert "96.9%" in _rounding_note(WRPO.model_copy(update={"lora": lora}), 0.9687)


def test_adapters_change_the_key_of_their_training_alone():
    """A model that was merged in bf16 is made again; all others keep their keys."""
    plain = WRPO.model_copy(update={"lora": None})
    assert plain.identity()["lora"] is None
    assert WRPO.identity()["lora"]["merged"] == "fp32"
