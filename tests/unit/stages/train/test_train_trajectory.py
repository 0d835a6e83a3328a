"""Whole runs of the training loop against the published algorithm, written here on its own.

One worker on the CPU, without Ray. In DeepSpeed's place is a plain torch AdamW, so nothing but
this project's own parts is between the prepared rows and the weights; DeepSpeed has its tests in
`tests/ray`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from support.tiny_models import preference_rows, write_model

from wrpo_ray.config import AlphaConfig, LoraConfig, TrainConfig, WrpoConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.train import deepspeed, model
from wrpo_ray.stages.train.loop import Trainer
from wrpo_ray.stages.train.order import Order
from wrpo_ray.stages.train.rows import SUFFIX, Row, Tokenizing, write_rows
from wrpo_ray.stages.train.task import METRICS, MODEL, SFT_ANSWERS, WRPO_ANSWERS, Task
from wrpo_ray.storage.fingerprints import unit_interval
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

ROWS, BATCH, EPOCHS, STEPS = 37, 8, 4, 20
"""The last step of each epoch has 5 rows."""
PEAK, BETA, ALPHA, DECAY = 1e-3, 0.1, 0.4, 0.1
SETTINGS: dict[str, Any] = {
    "epochs": EPOCHS, "batch_size": BATCH, "learning_rate": PEAK, "weight_decay": DECAY, "clip": 0,
    "max_length": 64, "precision": "fp32", "micro_batch_tokens": 60, "checkpoint_every": 1000,
    "zero_stage": 0,
}  # fmt: skip
WRPO = WrpoConfig(**SETTINGS, beta=BETA, alpha=AlphaConfig(end=ALPHA))
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), tied=True)


@pytest.fixture(scope="module")
def rows(base) -> dict[tuple[str, ...], list[Row]]:
    """Tokenized rows with one answer (SFT) and with three, in the order of their prompts."""
    records = sorted(preference_rows(ROWS), key=lambda record: record["prompt_id"])
    tokenizer = load_tokenizer(base)
    ends = frozenset({tokenizer.eos_token_id})
    return {
        names: Tokenizing(tokenizer, ends, names, WRPO).rows(records, "rows").kept
        for names in (SFT_ANSWERS, WRPO_ANSWERS)
    }


@pytest.fixture
def plain(base, monkeypatch, wide) -> Any:
    """The model as transformers gives it, with nothing of ours; all is in float64 from now on."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float64, attn_implementation="eager"
    )
    ours = {packing: model.load(base, torch.float64, packing=packing) for packing in (True, False)}
    monkeypatch.setattr(model, "load", lambda *_, packing: copy.deepcopy(ours[packing]))
    wide(torch.float64)
    return network


class PlainEngine:
    """What the loop asks of DeepSpeed's engine, with torch's AdamW."""

    def __init__(self, policy: model.Policy, config: TrainConfig):
        self.module = policy
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, weight_decay=config.weight_decay)
        self.is_last = False

    def __call__(self, batch: Any) -> torch.Tensor:
        return self.module(batch)

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        self.is_last = is_last

    def zero_optimization_stage(self) -> int:
        return 0

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        if self.is_last:
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.fixture(scope="module", autouse=True)
def _plain_engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "policy_engine", lambda p, config, _: PlainEngine(p, config))
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


def create(folder: Path, base: Path, rows: list[Row], config: TrainConfig) -> Trainer:
    """A trainer of prepared rows."""
    prepared = Folder(str(folder / "rows"))
    if isinstance(config, WrpoConfig) and config.reference.mode == "stored":
        rows = model.Reference(base, config, on_gpu=False)(rows)
    write_rows(prepared, f"00000-of-00001{SUFFIX}", rows, {})
    run = Run(Folder(str(folder)), 1)
    return Trainer.create(
        Task(run, Step("wrpo"), prepared, Folder(str(base)), "base", config, seed=3)
    )


def train(folder: Path, base: Path, rows: list[Row], config: TrainConfig) -> Trainer:
    """A whole run; its metrics lie in the folder of its step."""
    trainer = create(folder, base, rows, config)
    trainer.run(0)
    return trainer


def records(trainer: Trainer) -> list[dict[str, Any]]:
    lines = trainer.task.folder.read(METRICS).splitlines()
    return [json.loads(line) for line in lines]


# --- the published algorithm ------------------------------------------------------------------


def plain_logps(network: Any, pairs: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """(B,) from all logits of padded sequences of prompt and answer."""
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    attention, of_answer = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(pairs):
        length = len(prompt) + len(answer)
        ids[i, :length] = torch.tensor([*prompt, *answer])
        attention[i, :length] = 1
        of_answer[i, len(prompt) : length] = 1
    table = network(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    return (table.gather(2, ids[:, 1:, None])[:, :, 0] * of_answer[:, 1:]).sum(1)


def published(network: Any, rows: list[Row], order: Order) -> tuple[list[float], Any]:
    """WRPO with a live reference: y_ws, y_wt and y_l concatenated, the mean over the rows.

    alpha grows with the rows seen, from 0 at the first step to ALPHA at the last; the rate is
    a cosine with a warm-up of a tenth of the steps.
    """
    reference = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=DECAY)
    losses, seen, before_last = [], 0, EPOCHS * ROWS - 5
    for step in range(STEPS):
        batch = [rows[i] for i in order.batch(step)]
        pairs = [(row.prompt, row.answers[answer]) for answer in range(3) for row in batch]
        gain = plain_logps(network, pairs) - plain_logps(reference, pairs)
        source, target, rejected = (BETA * gain).chunk(3)
        alpha = ALPHA * seen / before_last
        chosen = alpha * source + (1 - alpha) * target
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seen += len(batch)
    return losses, network


def rate(step: int) -> float:
    """Two steps of warm-up, then half a cosine over 18."""
    if step < 2:
        return PEAK * (step + 1) / 3
    return PEAK * (1 + math.cos(math.pi * (step - 2) / 18)) / 2


def check_weights(trainer: Trainer, want: Any, start: Any) -> None:
    got, moved = trainer.policy.module.model.state_dict(), 0.0
    for name, value in want.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-8)
        moved = max(moved, (value - start.state_dict()[name]).abs().max().item())
    assert moved > PEAK


# --- tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "mode"),
    [
        (True, "stored"),
        (False, "live"),
        (True, "split"),
        pytest.param(True, "live", marks=pytest.mark.soak),
        pytest.param(False, "stored", marks=pytest.mark.soak),
        pytest.param(False, "split", marks=pytest.mark.soak),
    ],
)
def test_wrpo_is_the_published_algorithm(tmp_path, base, rows, plain, mode, packing):
    """20 steps in float64: losses and weights to 1e-8."""
    config = WRPO.model_copy(
        update={"packing": packing, "reference": WRPO.reference.model_copy(update={"mode": mode})}
    )
    trainer = train(tmp_path, base, rows[WRPO_ANSWERS], config)
    assert (trainer.reference is None) == (mode != "live")
    assert trainer.order == Order(ROWS, EPOCHS, BATCH, seed=3)  # the task's
    losses, want = published(copy.deepcopy(plain), rows[WRPO_ANSWERS], trainer.order)
    got = records(trainer)
    assert [record["loss"] for record in got] == pytest.approx(losses, rel=0, abs=1e-8)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-9)
    assert losses[-1] < 0.6
    assert [record["lr"] for record in got] == pytest.approx([rate(s) for s in range(STEPS)])
    assert [record["rows"] for record in got] == [8, 8, 8, 8, 5] * EPOCHS
    assert (got[0]["alpha"], got[-1]["alpha"]) == (0, ALPHA)
    check_weights(trainer, want, plain)


def test_sft_is_cross_entropy_over_answer_tokens(tmp_path, base, rows, plain):
    """Each step's mean is over the answer tokens of its rows, however they are assigned."""
    config = TrainConfig(**SETTINGS)
    trainer = train(tmp_path, base, rows[SFT_ANSWERS], config)
    network = copy.deepcopy(plain)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=DECAY)
    losses = []
    for step in range(STEPS):
        batch = [rows[SFT_ANSWERS][i] for i in trainer.order.batch(step)]
        total = -plain_logps(network, [(row.prompt, row.answers[0]) for row in batch]).sum()
        loss = total / sum(len(row.answers[0]) for row in batch)
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    got = [record["loss"] for record in records(trainer)]
    assert got == pytest.approx(losses, rel=0, abs=1e-8)
    check_weights(trainer, network, plain)


@pytest.fixture(scope="module")
def curve(tmp_path_factory, base, rows) -> list[float]:
    """The losses in fp32 with each row in a micro-batch of its own."""
    config = WRPO.model_copy(update={"micro_batch_tokens": 1})
    trainer = train(tmp_path_factory.mktemp("curve"), base, rows[WRPO_ANSWERS], config)
    return [record["loss"] for record in records(trainer)]


@pytest.mark.parametrize(
    ("packing", "budget"),
    [
        (True, 60),
        (True, 10**6),
        (False, 150),
        pytest.param(True, 150, marks=pytest.mark.soak),
        *(pytest.param(False, budget, marks=pytest.mark.soak) for budget in (1, 60, 10**6)),
    ],
)
def test_micro_batches_and_packing_change_nothing(tmp_path, base, rows, curve, packing, budget):
    config = WRPO.model_copy(update={"micro_batch_tokens": budget, "packing": packing})
    trainer = train(tmp_path, base, rows[WRPO_ANSWERS], config)
    got = [record["loss"] for record in records(trainer)]
    assert got == pytest.approx(curve, rel=1e-6, abs=0)


def test_metrics_of_a_step(tmp_path, base, rows):
    """The first step of all rows at once: policy and reference are equal still."""
    config = WRPO.model_copy(update={"batch_size": 64, "micro_batch_tokens": 200, "epochs": 1})
    (record,) = records(train(tmp_path, base, rows[WRPO_ANSWERS], config))
    assert record["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert record["rewards/margins"] == pytest.approx(0, abs=1e-5)
    lengths = [[len(answer) for answer in row.answers] for row in rows[WRPO_ANSWERS]]
    for number, name in enumerate(WRPO_ANSWERS):
        mean = np.mean([three[number] for three in lengths])
        assert record[f"lengths/{name}"] == pytest.approx(mean)
    assert (record["step"], record["steps"], record["rows"]) == (0, 1, ROWS)
    assert record["padding"] == 0  # packed
    assert record["grad_norm"] > 0
    assert record["alpha"] == ALPHA


def test_rows_held_out_are_measured_and_not_trained_on(tmp_path, base, rows):
    """At the last step and every 6 steps, at the greatest alpha, without moving the weights."""
    held = WRPO.model_copy(update={"holdout": 0.3, "holdout_every": 6})
    trainer = train(tmp_path, base, rows[WRPO_ANSWERS], held)
    ids = [row.prompt_id for row in rows[WRPO_ANSWERS]]
    expected = [i for i, name in enumerate(ids) if unit_interval("holdout", name) < 0.3]
    assert 0 < len(expected) < ROWS
    assert trainer.held_rows.tolist() == expected
    assert trainer.train_rows.tolist() == [i for i in range(ROWS) if i not in expected]
    got = records(trainer)
    measured = [record["step"] for record in got if "holdout/loss" in record]
    assert measured == [5, 11, 15]
    policy = trainer.policy.module
    gains = []
    with torch.no_grad():
        for index in expected:
            row = trainer.rows[index]
            gains.append(policy(model.collate([row], held)) - torch.tensor(row.reference))
    source, target, rejected = (BETA * torch.stack(gains)).unbind(1)
    margins = ALPHA * source + (1 - ALPHA) * target - rejected
    assert got[-1]["holdout/loss"] == pytest.approx(-F.logsigmoid(margins).mean().item(), rel=1e-5)
    assert got[-1]["holdout/accuracies"] == pytest.approx((margins > 0).float().mean().item())


def test_all_rows_held_out_is_an_error_with_a_remedy(tmp_path, base, rows):
    first = next(r for r in rows[WRPO_ANSWERS] if unit_interval("holdout", r.prompt_id) < 0.5)
    config = WRPO.model_copy(update={"holdout": 0.5})
    with pytest.raises(UserError, match="wrpo: all 1 rows are held out; lower holdout"):
        create(tmp_path, base, [first], config)


def test_new_adapters_depend_on_the_seed_alone(tmp_path, base, rows):
    """Else two runs of one config would differ, and so would the workers of one."""
    config, found = WRPO.model_copy(update={"lora": LoraConfig(rank=2)}), []
    for number in range(2):
        trainer = create(tmp_path / str(number), base, rows[WRPO_ANSWERS], config)
        found.append({n: p for n, p in trainer.policy.module.named_parameters() if "lora_A" in n})
    assert found[0]
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_what_is_saved_is_the_trained_model(tmp_path, base, rows, lora):
    from transformers import AutoModelForCausalLM

    config = WRPO.model_copy(update={"lora": lora, "epochs": 1})
    trainer = train(tmp_path, base, rows[WRPO_ANSWERS], config)
    trainer.save()
    network = AutoModelForCausalLM.from_pretrained((trainer.task.folder / MODEL).local())
    row = rows[WRPO_ANSWERS][0]
    with torch.no_grad():
        got = plain_logps(network, [(row.prompt, answer) for answer in row.answers])
        want = trainer.policy(model.collate([row], config))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, base, rows):
    config = WRPO.model_copy(update={"learning_rate": 1e30, "clip": 0})
    told = (
        r"wrpo: the (loss|gradient's norm) is \S+ at step \d+: .* is not finite.*; lower learning_r"
    )
    with pytest.raises(UserError, match=told):
        train(tmp_path, base, rows[WRPO_ANSWERS], config)
