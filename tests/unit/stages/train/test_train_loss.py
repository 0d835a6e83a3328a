"""The objectives against numbers worked by hand, autograd, DPO's formula, and TRL's own code."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from support.tiny_models import make_model, make_tokenizer

from wrpo_ray.config import AlphaConfig, TrainConfig, WrpoConfig
from wrpo_ray.stages.train import loss as losses
from wrpo_ray.stages.train.loss import (
    Answers,
    Ipo,
    Simpo,
    Wrpo,
    preference_loss,
    rewards,
    row_metrics,
)
from wrpo_ray.stages.train.model import Policy
from wrpo_ray.stages.train.objectives import preference_objective, training_objective
from wrpo_ray.stages.train.order import alpha_at
from wrpo_ray.stages.train.packing import pad
from wrpo_ray.stages.train.rows import Row

NAMES = Answers._fields
OBJECTIVES = {
    "wrpo": WrpoConfig(beta=0.7),
    "smoothed": WrpoConfig(beta=0.7, label_smoothing=0.2),
    "with-sft": WrpoConfig(beta=0.7, sft_weight=0.3),
    "ipo": WrpoConfig(objective="ipo", beta=0.4, sft_weight=0.1),
    "simpo": WrpoConfig(objective="simpo", beta=2.0, margin=0.6),
    "simpo-smoothed": WrpoConfig(objective="simpo", beta=2.0, margin=0.6, label_smoothing=0.1),
}


def answers(*values: list[float], dtype: torch.dtype = torch.float64) -> Answers:
    return Answers(*(torch.tensor(value, dtype=dtype) for value in values))


POLICY = answers([-10.0], [-4.0], [-6.0])
REFERENCE = answers([-14.0], [-6.0], [-5.0])
LENGTHS = answers([8.0], [2.0], [1.0])


def drawn(seed: int, rows: int, scale: float = 1.0) -> tuple[Answers, Answers, Answers]:
    """Policy, reference, lengths in float64; the policy's are leaves that want a gradient."""
    torch.manual_seed(seed)
    policy, reference = torch.randn(2, 3, rows, dtype=torch.float64) * scale
    leaves = (value.clone().requires_grad_() for value in policy)
    return Answers(*leaves), Answers(*reference), Answers(*torch.randint(1, 30, (3, rows)).double())


# --- by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "consumed", "margin", "expected"),
    [
        ("dynamic", 0.0, 1.5, 0.201413),
        ("dynamic", 0.5, 1.625, 0.179745),
        ("dynamic", 1.0, 1.75, 0.160224),
        ("static", 0.0, 1.75, 0.160224),
    ],
)
def test_wrpo_worked_by_hand(schedule, consumed, margin, expected):
    """One row, beta 0.5, alpha 0.25 at the end.

    policy (ws, wt, l) = (-10, -4, -6), reference = (-14, -6, -5)
    r_ws = 0.5 * 4 = 2, r_wt = 0.5 * 2 = 1, r_l = 0.5 * -1 = -0.5
    alpha 0:     1 + 0.5 = 1.5
    alpha 0.125: 0.125 * 2 + 0.875 * 1 + 0.5 = 1.625
    alpha 0.25:  0.25 * 2 + 0.75 * 1 + 0.5 = 1.75
    loss = ln(1 + e^-margin), such as ln(1 + e^-1.75) = ln(1.173774) = 0.160224
    """
    alpha = alpha_at(AlphaConfig(end=0.25, schedule=schedule), consumed)
    loss = preference_loss(POLICY, REFERENCE, LENGTHS, Wrpo(beta=0.5), alpha)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-12)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 0.9 * 0.160224 + 0.1 * (0.160224 + 1.75), as -log s(-m) = m - log s(m)
        (Wrpo(beta=0.5, label_smoothing=0.1), 0.335224),
        # 0.160224 + 0.2 * 10 / 8
        (Wrpo(beta=0.5, sft_weight=0.2), 0.410224),
        # gains a token 4/8, 2/2, -1/1: 0.25 * 0.5 + 0.75 * 1 + 1 = 1.875; (1.875 - 1 / (2 * 0.5))^2
        (Ipo(beta=0.5), 0.765625),
        # log-probs a token -1.25, -2, -6, times 2: 0.25 * -2.5 + 0.75 * -4 + 12 = 8.375;
        # less 7 it is 1.375: ln(1 + e^-1.375)
        (Simpo(beta=2.0, margin=7.0), 0.225413),
        # the same, smoothed: 0.225413 + 0.2 * 1.375
        (Simpo(beta=2.0, margin=7.0, label_smoothing=0.2), 0.500413),
    ],
)
def test_other_objectives_worked_by_hand(objective, expected):
    """The same row with answers of 8, 2 and 1 tokens, alpha 0.25."""
    loss = preference_loss(POLICY, REFERENCE, LENGTHS, objective, 0.25)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_gradient_by_hand(kind, alpha):
    """With weights w = (alpha, 1 - alpha, -1), lengths n, gains g and smoothing s.

    wrpo:  d loss / d log pi = beta * w * (-(1 - s) * sigmoid(-m) + s * sigmoid(m))
    simpo: the same over n, at m - margin
    ipo:   2 * (sum of w * g / n - 1 / (2 * beta)) * w / n
    SFT:   less sft_weight / n for y_ws
    """
    config = OBJECTIVES[kind]
    policy, reference, lengths = drawn(seed=1, rows=8)
    preference_loss(
        policy, reference, lengths, preference_objective(config), alpha
    ).sum().backward()
    weights = (alpha, 1 - alpha, -1.0)
    with torch.no_grad():
        scales = [1 / n if config.objective != "wrpo" else torch.ones(8) for n in lengths]
        gains = policy if config.objective == "simpo" else map(torch.sub, policy, reference)
        gain = sum(w * g * s for w, g, s in zip(weights, gains, scales, strict=True))
        if config.objective == "ipo":
            slope = 2 * (gain - 1 / (2 * config.beta))
        else:
            m, s = config.beta * gain - config.margin, config.label_smoothing
            slope = config.beta * (-(1 - s) * torch.sigmoid(-m) + s * torch.sigmoid(m))
    for name, weight, scale in zip(NAMES, weights, scales, strict=True):
        want = slope * weight * scale
        if name == "source_chosen":
            want = want - config.sft_weight / lengths.source_chosen
        got = getattr(policy, name).grad
        got = torch.zeros_like(want) if got is None else got
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_gradcheck(kind):
    objective = preference_objective(OBJECTIVES[kind])
    policy, reference, lengths = drawn(seed=2, rows=4)
    inputs = (*policy, *(value.requires_grad_() for value in reference))

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return preference_loss(Answers(*values[:3]), Answers(*values[3:]), lengths, objective, 0.3)

    assert torch.autograd.gradcheck(loss, inputs)


# --- special cases ----------------------------------------------------------------------------


def dpo(chosen, rejected, reference_chosen, reference_rejected, beta):
    """DPO (Rafailov et al. 2023, equation 7), written on its own."""
    difference = beta * (chosen - reference_chosen) - beta * (rejected - reference_rejected)
    return -F.logsigmoid(difference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "chosen"), [(0.0, "target_chosen"), (1.0, "source_chosen")])
def test_ends_of_alpha_are_dpo_exactly(alpha, chosen, dtype):
    policy, reference, lengths = drawn(seed=0, rows=64, scale=20)
    policy, reference = (Answers(*(v.to(dtype) for v in a)) for a in (policy, reference))
    own, ref = getattr(policy, chosen), getattr(reference, chosen)
    expected = dpo(own, policy.rejected, ref, reference.rejected, 0.1)
    loss = preference_loss(policy, reference, lengths, Wrpo(beta=0.1), alpha)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_models_give_ln_2(dtype, smoothing):
    policy = answers([-300.0, -1.0], [-50.0, -2.0], [-80.0, -3.0], dtype=dtype)
    objective = Wrpo(label_smoothing=smoothing)
    loss = preference_loss(policy, policy, policy, objective, 0.1)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=4e-3, atol=0)


def test_equal_models_give_ipo_its_squared_target():
    """(0 - 1 / (2 * 0.1))^2 = 25."""
    assert preference_loss(POLICY, POLICY, LENGTHS, Ipo(beta=0.1), 0.5).item() == pytest.approx(25)


def test_simpo_knows_no_reference():
    simpo = Simpo(beta=2.0, margin=0.6)
    got = [preference_loss(POLICY, ref, LENGTHS, simpo, 0.3) for ref in (POLICY, REFERENCE)]
    assert torch.equal(*got)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("wrpo", [0.0, 1.4e4]), ("smoothed", [2.8e3, 1.12e4]), ("simpo", [0.0, 4e4])],
)
def test_large_margins_stay_finite(kind, expected):
    """Rewards of +-7,000 (simpo: +-20,000) in fp32; smoothing 0.2 takes 1/5 of the other side."""
    far = torch.tensor([1e4, -1e4])
    policy = Answers(*(far.clone().requires_grad_() for _ in range(2)), -far)
    zero, one = Answers(*torch.zeros(3, 2)), Answers(*torch.ones(3, 2))
    loss = preference_loss(policy, zero, one, preference_objective(OBJECTIVES[kind]), 0.5)
    assert loss.tolist() == pytest.approx(expected, rel=1e-4)
    loss.sum().backward()
    assert torch.isfinite(policy.source_chosen.grad).all()


# --- metrics ----------------------------------------------------------------------------------


def test_metrics_worked_by_hand():
    """The row from above: rewards 2, 1, -0.5, of which 0.25 * 2 + 0.75 * 1 = 1.25 is weighed."""
    metrics = row_metrics(POLICY, REFERENCE, LENGTHS, Wrpo(beta=0.5), 0.25)
    assert {name: value.item() for name, value in metrics.items()} == {
        "logps/source_chosen": -10.0,
        "logps/target_chosen": -4.0,
        "logps/rejected": -6.0,
        "lengths/source_chosen": 8,
        "lengths/target_chosen": 2,
        "lengths/rejected": 1,
        "rewards/source_chosen": 2.0,
        "rewards/target_chosen": 1.0,
        "rewards/rejected": -0.5,
        "rewards/weighted": 1.25,
        "rewards/margins": 1.75,
        "rewards/margins_source": 2.5,
        "rewards/margins_target": 1.5,
        "rewards/accuracies": 1.0,
        "rewards/accuracies_source": 1.0,
        "rewards/accuracies_target": 1.0,
    }


def test_rewards_of_each_objective():
    """Gains 4, 2, -1 and log-probs -10, -4, -6 over 8, 2 and 1 tokens; beta 0.5."""
    expected = {Wrpo: [2, 1, -0.5], Ipo: [0.25, 0.5, -0.5], Simpo: [-0.625, -1, -3]}
    for kind, values in expected.items():
        got = rewards(POLICY, REFERENCE, LENGTHS, kind(beta=0.5))
        assert [value.item() for value in got] == values


def test_metrics_are_per_row():
    """Three rows: each is compared with its own rejected answer alone, and a tie is no win."""
    policy = answers([1.0, -3.0, 0.0], [2.0, -1.0, 0.0], [0.0, 0.0, 0.0])
    zero, one = answers(*[[0.0] * 3] * 3), answers(*[[1.0] * 3] * 3)
    metrics = row_metrics(policy, zero, one, Wrpo(beta=1.0), 0.5)
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.0]
    assert metrics["rewards/margins"].tolist() == [1.5, -2.0, 0.0]
    assert all(value.shape == (3,) for value in metrics.values())


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_metrics_have_no_gradient(kind):
    policy, reference, lengths = drawn(seed=3, rows=4)
    metrics = row_metrics(policy, reference, lengths, preference_objective(OBJECTIVES[kind]), 0.3)
    assert not any(value.requires_grad for value in metrics.values())


# --- the training loop's interface ------------------------------------------------------------


def test_each_name_of_the_config_has_its_objective():
    settings = {"beta": 0.3, "sft_weight": 0.2}
    smoothed = settings | {"label_smoothing": 0.1}
    expected = {
        "wrpo": Wrpo(**smoothed),
        "ipo": Ipo(**settings),
        "simpo": Simpo(**smoothed, margin=0.6),
    }
    given = {"wrpo": smoothed, "ipo": settings, "simpo": smoothed | {"margin": 0.6}}
    for name, keys in given.items():
        assert preference_objective(WrpoConfig(objective=name, **keys)) == expected[name]


def test_sft_is_a_mean_over_answer_tokens_and_preferences_over_rows():
    """Two rows of 3 + 2 and 4 + 5 tokens: SFT divides by 2 + 5."""
    sft, wrpo = training_objective(TrainConfig()), training_objective(WrpoConfig())
    assert sft.divisor(np.array([[3, 2], [4, 5]])) == 7
    assert wrpo.divisor(np.array([[3, 2, 1, 1], [4, 5, 1, 1]])) == 2
    assert (sft.answers, wrpo.answers) == (NAMES[:1], NAMES)
    logps = torch.tensor([-1.5, -2.0])
    got, metrics = sft.at(0.5).losses(logps, torch.zeros(2), torch.tensor([2, 5]))
    assert torch.equal(got, -logps)
    assert metrics["lengths/source_chosen"].tolist() == [2, 5]
    assert sft.coefficients == {}


def test_preferences_have_the_alpha_of_their_step():
    """Dynamic to 0.25: at half of the way 0.125, as in the table above (margin 1.625)."""
    config = WrpoConfig(beta=0.5, alpha=AlphaConfig(end=0.25))
    objective = training_objective(config).at(0.5)
    assert objective.coefficients == {"alpha": 0.125}
    assert training_objective(config).at(1).coefficients == {"alpha": 0.25}
    row = (torch.cat(list(three)) for three in (POLICY, REFERENCE, LENGTHS))
    got, metrics = objective.losses(*row)
    assert got.item() == pytest.approx(0.179745, abs=1e-6)
    assert metrics["rewards/margins"].item() == 1.625


def test_the_docstring_example():
    found = doctest.testmod(losses)
    assert found.attempted
    assert not found.failed


# --- TRL --------------------------------------------------------------------------------------


PROMPT, ANSWERS = [4, 9, 17], ([6, 7, 8, 1], [9, 10, 1], [11, 12, 13, 14, 15, 1])
TRL_ROWS = [
    Row("a", np.array(PROMPT), tuple(map(np.array, ANSWERS))),
    Row("b", np.array([30]), tuple(map(np.array, reversed(ANSWERS)))),
    Row("c", np.array(PROMPT + PROMPT), (np.array([5]), np.array([40, 1]), np.array([41]))),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trl")


def trl_trainer(folder: Path, kind: str, **settings: Any) -> Any:
    """TRL's trainer of a tiny policy; the row it is given is never used."""
    import datasets
    import trl

    common = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "max_length": 64,
    }
    data = datasets.Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    rest = {"train_dataset": data, "processing_class": make_tokenizer()}
    if kind == "cpo":
        from trl.experimental import cpo

        config = cpo.CPOConfig(**common, **settings)
        return cpo.CPOTrainer(make_model(0).eval(), config, **rest)
    config = trl.DPOConfig(**common, **settings)
    return trl.DPOTrainer(make_model(0).eval(), make_model(1).eval(), config, **rest)


def own_loss(row: Row, config: WrpoConfig, alpha: float) -> float:
    """Our loss of one row under the same policy and reference."""
    with torch.no_grad():
        logps = [Policy(make_model(seed).eval())(pad([row])) for seed in (0, 1)]
    policy, reference = (Answers(*values.reshape(-1, 3).unbind(1)) for values in logps)
    lengths = Answers(*(torch.tensor([len(answer)]) for answer in row.answers))
    return preference_loss(policy, reference, lengths, preference_objective(config), alpha).item()


def check_against_dpo_trainer(trainer: Any, config: WrpoConfig) -> None:
    """Each row alone, with y_wt (alpha 0) and y_ws (alpha 1) as what TRL calls chosen."""
    for row in TRL_ROWS:
        for alpha, chosen in ((0.0, 1), (1.0, 0)):
            example = {
                "prompt_ids": row.prompt.tolist(),
                "chosen_ids": row.answers[chosen].tolist(),
                "rejected_ids": row.answers[2].tolist(),
            }
            loss = trainer.compute_loss(trainer.model, trainer.data_collator([example]))
            assert loss.item() == pytest.approx(own_loss(row, config, alpha), rel=2e-5)


def test_dpo_is_trls(folder):
    trainer = trl_trainer(folder, "dpo", loss_type=["sigmoid"], beta=0.3)
    check_against_dpo_trainer(trainer, WrpoConfig(beta=0.3))


def test_label_smoothing_is_trls(folder):
    """TRL 1.16's `sigmoid` ignores label_smoothing; its `aot`, of one row, is smoothed DPO."""
    trainer = trl_trainer(folder, "dpo", loss_type=["aot"], beta=0.3, label_smoothing=0.2)
    check_against_dpo_trainer(trainer, WrpoConfig(beta=0.3, label_smoothing=0.2))


def test_ipo_is_trls(folder):
    """TRL divides by answer tokens, as IPO's authors told it."""
    trainer = trl_trainer(folder, "dpo", loss_type=["ipo"], beta=0.3)
    check_against_dpo_trainer(trainer, WrpoConfig(objective="ipo", beta=0.3))


def test_sft_term_is_trls(folder):
    """The term is on y_ws, so y_ws is chosen."""
    types = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.25]}
    trainer = trl_trainer(folder, "dpo", **types, beta=0.3)
    for row in TRL_ROWS:
        prompt, (chosen, _, rejected) = row.prompt.tolist(), row.answers
        example = {"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist()}
        inputs = trainer.data_collator([example | {"prompt_ids": prompt}])
        loss = trainer.compute_loss(trainer.model, inputs)
        config = WrpoConfig(beta=0.3, sft_weight=0.25)
        assert loss.item() == pytest.approx(own_loss(row, config, 1.0), rel=2e-5)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_is_trls(folder, smoothing):
    settings = {"loss_type": "simpo", "simpo_gamma": 0.8, "cpo_alpha": 0.0}
    trainer = trl_trainer(folder, "cpo", **settings, beta=2.5, label_smoothing=smoothing)
    config = WrpoConfig(objective="simpo", beta=2.5, margin=0.8, label_smoothing=smoothing)
    for row in TRL_ROWS:
        for alpha, chosen in ((0.0, 1), (1.0, 0)):
            inputs = {}
            for name, answer in (("chosen", row.answers[chosen]), ("rejected", row.answers[2])):
                ids = torch.tensor([[*row.prompt, *answer]])
                labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(row.prompt), -100)
                inputs |= {f"{name}_input_ids": ids, f"{name}_labels": labels}
                inputs[f"{name}_attention_mask"] = torch.ones_like(ids)
            loss, _ = trainer.get_batch_loss_metrics(trainer.model, inputs)
            assert loss.item() == pytest.approx(own_loss(row, config, alpha), rel=2e-5)
