"""Log-probs through a real, randomly initialised Llama."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import make_model

from wrpo_ray.train.logprobs import answer_logps, collate, sum_answers
from wrpo_ray.train.loss import Logps, wrpo_loss
from wrpo_ray.train.model import without_dropout

PAIRS = [([2, 9, 10, 1, 3], [11, 12, 1]), ([2, 8, 3], [7, 1]), ([2, 20, 3], [13, 14, 15, 16, 1])]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return make_model().double().eval()


def naive(model, prompt: list[int], answer: list[int]) -> float:
    """Token by token, one sequence at a time, without padding."""
    ids = torch.tensor([prompt + answer])
    table = model(input_ids=ids).logits[0].log_softmax(-1)
    positions = range(len(prompt), len(prompt) + len(answer))
    return sum(table[i - 1, ids[0, i]].item() for i in positions)


def test_equals_the_naive_sum(model):
    got = answer_logps(model, collate(PAIRS))
    want = [naive(model, *pair) for pair in PAIRS]
    assert got.tolist() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("left", [False, True])
def test_padding_and_company_change_nothing(model, left):
    padded = answer_logps(model, collate([*PAIRS, ([2, 5, 3] * 10, [1])], pad=1, left=left))
    alone = torch.cat([answer_logps(model, collate([pair])) for pair in PAIRS])
    torch.testing.assert_close(padded[:3], alone, rtol=1e-12, atol=1e-10)


def test_only_answer_tokens_count():
    """Two tokens of vocabulary 2 with logits (0, ln 3): the probabilities are 1/4 and 3/4."""
    logits = torch.tensor([0.0, math.log(3.0)]).expand(1, 4, 2)
    ids, mask = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[False, False, True, True]])
    want = math.log(3 / 4) + math.log(1 / 4)
    assert sum_answers(logits, ids, mask).item() == pytest.approx(want, abs=1e-6)


def test_bf16_logits_are_summed_in_fp32():
    """300 tokens of a vocabulary of 4 with equal logits: each ln 1/4, in all -415.888."""
    ids, mask = torch.zeros(1, 301, dtype=torch.long), torch.ones(1, 301, dtype=torch.bool)
    got = sum_answers(torch.zeros(1, 301, 4, dtype=torch.bfloat16), ids, mask)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(-300 * math.log(4), abs=1e-3)


def test_first_step_loss_is_ln_2():
    """fp32, training mode for the policy, evaluation mode for the reference, dropout set."""
    policy, reference = make_model(seed=3), make_model(seed=3)
    for module in policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    without_dropout(policy.train())
    batch = collate(PAIRS)
    own = Logps(*answer_logps(policy, batch).split(1))
    ref = Logps(*answer_logps(reference.eval(), batch).split(1))
    loss = wrpo_loss(own, ref, alpha=0.1, beta=1.0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
