"""Numbers that are not finite: every step tells its gradient norm, and none finishes on a NaN.

One worker with real DeepSpeed at every stage and precision, in this process, without Ray.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import preference_rows, write_model

from wrpo_ray.config import AlphaConfig, LoraConfig, ReferenceConfig, TrainConfig, WrpoConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.train import deepspeed, model, probe
from wrpo_ray.stages.train.loop import Trainer
from wrpo_ray.stages.train.rows import SUFFIX, Row, Tokenizing, write_rows
from wrpo_ray.stages.train.task import METRICS, SFT_ANSWERS, WRPO_ANSWERS, Task
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

SETTINGS: dict[str, Any] = {
    "batch_size": 4, "learning_rate": 1e-3, "max_length": 64, "precision": "fp32", "clip": 0.5,
    "micro_batch_tokens": 60, "checkpoint_every": 1000, "zero_stage": 0, "warmup": 0,
}  # fmt: skip
WRPO = WrpoConfig(**SETTINGS, beta=0.1, alpha=AlphaConfig(end=0.4))
STEPS = 3
STAGES = [(0, "fp32"), *((stage, kind) for stage in (1, 2, 3) for kind in ("fp32", "bf16"))]
STAGES.append((0, "bf16"))  # becomes stage 1
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tied=True)


@pytest.fixture(scope="module")
def rows(base) -> dict[tuple[str, ...], list[Row]]:
    """Twelve tokenized rows, of one answer and of three, with made-up reference log-probs."""
    tokenizer = load_tokenizer(base)
    records, found = preference_rows(4 * STEPS), {}
    for names in (SFT_ANSWERS, WRPO_ANSWERS):
        tokenizing = Tokenizing(tokenizer, frozenset({tokenizer.eos_token_id}), names, WRPO)
        found[names] = tokenizing.rows(records, "rows").kept
    return found


def create(folder: Path, base: Path, rows: list[Row], config: TrainConfig) -> Trainer:
    """A trainer on DeepSpeed; rows without reference log-probs get the model's own."""
    deepspeed.prepare(config)
    stored = isinstance(config, WrpoConfig) and config.reference.mode == "stored"
    if stored and not rows[0].reference:
        rows = model.Reference(base, config, on_gpu=False)(rows)
    prepared = Folder(str(folder / "rows"))
    write_rows(prepared, f"00000-of-00001{SUFFIX}", rows, {})
    run = Run(Folder(str(folder)), 1)
    task = Task(run, Step("wrpo"), prepared, Folder(str(base)), "base", config, seed=3)
    return Trainer.create(task)


def records(trainer: Trainer) -> list[dict[str, Any]]:
    lines = trainer.task.folder.read(METRICS).splitlines()
    return [json.loads(line) for line in lines]


def plain_norm(base: Path, rows: list[Row], config: TrainConfig) -> float:
    """The norm of the mean WRPO gradient at the start, with torch alone.

    Reference and policy are equal, so with margins 0 each row's slope is -beta / 2.
    """
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base, dtype=model.DTYPES[config.precision])
    for row in rows:
        logps = [
            probe._plain_logp(network, row.prompt, answer, torch.device("cpu"))
            for answer in row.answers
        ]
        (-0.5 * 0.1 * (logps[1] - logps[2]) / len(rows)).backward()  # alpha is 0 at first
    return float(torch.nn.utils.get_total_norm([p.grad.float() for p in network.parameters()]))


def spoil(trainer: Trainer, name: str, steps: int) -> None:
    """From a step on, one element of a tensor's gradient is NaN."""
    parameters = dict(trainer.policy.module.named_parameters())

    def make_nan(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.policy.global_steps < steps:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = math.nan
        return gradient

    parameters[name].register_hook(make_nan)


@pytest.mark.parametrize(
    ("stage", "precision", "clip"),
    [
        *((*stage, 0.001) for stage in STAGES),
        (0, "fp32", 0),
        *(pytest.param(*stage, 0, marks=pytest.mark.soak) for stage in STAGES[1:]),
    ],
)
def test_every_stage_tells_the_norm_and_none_finishes_on_nan(
    tmp_path, base, rows, stage, precision, clip
):
    """The norm is that before clipping; in the last step a gradient is NaN.

    Its tensor is named, and no weight has been spoilt.
    """
    change = {"zero_stage": stage, "precision": precision, "clip": clip}
    trainer = create(tmp_path, base, rows[WRPO_ANSWERS], WRPO.model_copy(update=change))
    tensor = "model.layers.1.mlp.up_proj.weight"
    spoil(trainer, f"model.{tensor}", STEPS - 1)
    told = rf"the gradient's norm is (inf|nan) at step 2: the gradient of {tensor} is not finite"
    with pytest.raises(UserError, match=told):
        trainer.run(0)
    got = [record["grad_norm"] for record in records(trainer)]
    assert len(got) == STEPS - 1
    first = [trainer.rows[i] for i in trainer.train_rows[list(trainer.order.batch(0))]]
    close = 1e-4 if precision == "fp32" else 3e-2
    assert got[0] == pytest.approx(plain_norm(base, first, trainer.task.config), rel=close)
    for parameter in trainer.policy.module.parameters():
        assert torch.isfinite(getattr(parameter, "ds_tensor", parameter)).all()


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("source_chosen", math.inf),
        ("target_chosen", -math.inf),
        ("rejected", math.nan),
        *(
            pytest.param(answer, value, marks=pytest.mark.soak)
            for answer, value in [
                ("source_chosen", math.nan),
                ("source_chosen", -math.inf),
                ("target_chosen", math.nan),
                ("target_chosen", math.inf),
                ("rejected", math.inf),
                ("rejected", -math.inf),
            ]
        ),
    ],
)
def test_a_stored_log_prob_that_is_not_finite_is_named(tmp_path, base, rows, answer, value):
    """It is the stored row that is at fault, and no learning rate.

    An infinite one can leave the loss finite: log sigmoid(inf) is 0.
    """
    given = [Row(r.prompt_id, r.prompt, r.answers, (-9.0, -9.0, -9.0)) for r in rows[WRPO_ANSWERS]]
    wrong = list(given[5].reference)
    wrong[WRPO_ANSWERS.index(answer)] = value
    given[5] = Row(given[5].prompt_id, given[5].prompt, given[5].answers, tuple(wrong))
    trainer = create(tmp_path, base, given, WRPO.model_copy(update={"alpha": AlphaConfig(
        end=0.4, schedule="static")}))  # fmt: skip
    with pytest.raises(UserError) as caught:
        trainer.run(0)
    text = str(caught.value)
    what = f"the log-prob of {answer} under the reference of prompt {given[5].prompt_id} is {value}"
    assert what in text
    assert str(trainer.task.rows) in text
    assert "learning_rate" not in text


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_weight_that_is_not_finite_is_named(tmp_path, base, rows, stage, lora):
    """Also a frozen one, and of sharded weights one on any worker; at a step or at the end."""
    live = ReferenceConfig(mode="live")
    config = WRPO.model_copy(update={"zero_stage": stage, "lora": lora, "reference": live})
    trainer = create(tmp_path, base, rows[WRPO_ANSWERS], config)
    name, parameter = next(
        (n, p) for n, p in trainer.policy.module.named_parameters() if "layers.0" in n
    )
    part = getattr(parameter, "ds_tensor", parameter)
    part.data.view(-1)[-1] = math.inf
    found = f"the weight {name.removeprefix('model.')} is not finite"
    with pytest.raises(UserError, match=rf"after the last step {found}"):
        trainer.save()
    assert not trainer.task.folder.exists("model")
    if stage == 0:  # with ZeRO-3 small weights stay gathered, beside the share
        with pytest.raises(UserError, match=rf"the loss is nan at step 0: {found}"):
            trainer.run(0)


def test_a_held_out_row_that_is_not_finite_is_named(tmp_path, base, rows):
    given = [Row(r.prompt_id, r.prompt, r.answers, (-9.0, -9.0, -9.0)) for r in rows[WRPO_ANSWERS]]
    config = WRPO.model_copy(update={"holdout": 0.4, "holdout_every": 1})
    trainer = create(tmp_path / "a", base, given, config)
    held = trainer.rows[trainer.held_rows[0]].prompt_id
    given = [
        Row(r.prompt_id, r.prompt, r.answers, (-9.0, math.nan, -9.0)) if r.prompt_id == held else r
        for r in given
    ]
    trainer = create(tmp_path / "b", base, given, config)
    told = f"the loss of the rows held out is nan at step 0: .*target_chosen.* of prompt {held} "
    with pytest.raises(UserError, match=told):
        trainer.run(0)


def test_sft_names_the_row_too(tmp_path, base, rows, monkeypatch):
    """A row whose log-prob alone is not finite, by whatever kernel."""
    config = TrainConfig(**SETTINGS)
    trainer = create(tmp_path, base, rows[SFT_ANSWERS], config)
    wrong, forward = rows[SFT_ANSWERS][3], model.Policy.forward

    def spoilt(policy: Any, batch: Any) -> torch.Tensor:
        logps = forward(policy, batch)
        ids = [int(i) for i in batch.ids[0]]
        text = [*wrong.prompt.tolist(), *wrong.answers[0].tolist()]
        starts = [i for i in range(len(ids)) if ids[i : i + len(text)] == text]
        return logps * math.inf if starts and len(logps) == 1 else logps

    monkeypatch.setattr(model.Policy, "forward", spoilt)
    trainer.task.config.__dict__["micro_batch_tokens"] = 1  # a row a micro-batch
    told = f"the log-prob of source_chosen of prompt {wrong.prompt_id} is -inf; lower learning_rate"
    with pytest.raises(UserError, match=told):
        trainer.run(0)
