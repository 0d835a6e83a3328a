"""Rates of the simulator: against the hardware's bounds, and against figures from elsewhere."""

import pytest

from benchmarks.roofline import BANDWIDTH, MODELS, NVLINK, PEAK, training_step

TYPICAL = {"context": 600.0, "prompt": 40.0, "output": 450.0}
SEEN = {
    # from memory, in bf16 on H100s with full batches: what vLLM and others report, in tokens/s
    "llama3-8b": (8_000, 20_000),
    "llama3-70b": (3_000, 9_000),
}
"""Lower and upper figure for an engine."""


@pytest.mark.parametrize("name", MODELS)
def test_no_engine_is_faster_than_its_memory_and_arithmetic(name):
    model = MODELS[name]
    rate, slots = model.rate(**TYPICAL), model.slots(TYPICAL["context"])
    step = slots / rate
    assert 2 * model.active / (model.gpus * BANDWIDTH) < step
    assert 2 * model.active * rate < 0.5 * model.gpus * PEAK
    assert model.bytes + slots * TYPICAL["context"] * model.kv < model.gpus * 80e9


@pytest.mark.parametrize("name", SEEN)
def test_rates_are_those_that_others_report(name):
    low, high = SEEN[name]
    assert low < MODELS[name].rate(**TYPICAL) < high


def test_a_dense_model_of_67b_is_within_a_factor_of_two_of_the_published_rate():
    """On 8 H800s DeepSeek 67B made 8,700 tokens/s (arXiv 2405.04434, section 3.2.3).

    DeepSeek-V2 made over 50,000, in 8 bits and with larger batches.
    """
    ours = 2 * MODELS["llama3-70b"].rate(**TYPICAL)
    assert 8_700 / 2 < ours < 2 * 8_700
    assert MODELS["deepseek-v2-chat"].rate(**TYPICAL) < 50_000 / 4


def test_a_step_of_one_answer_reads_the_experts_of_one_token():
    """DeepSeek-V2: 21B of 236B weights, up to the shared ones; of many answers nearly all."""
    model = MODELS["deepseek-v2-chat"]
    assert model.read(1) == pytest.approx(model.active, rel=0.05)
    assert model.read(256) == pytest.approx(model.weights, rel=0.01)
    dense = MODELS["llama3-70b"]
    assert dense.read(1) == dense.read(256) == dense.weights


def test_a_step_by_hand():
    """Llama-3-8B, 256 answers of 600 tokens: (16 GB + 256 x 600 x 131 kB) at 2.01 TB/s, + 8 ms."""
    kv = 32 * 2 * 8 * 128 * 2
    by_hand = (16e9 + 256 * 600 * kv) / (0.6 * 3.35e12) + 8e-3
    assert MODELS["llama3-8b"].step(256, 600.0) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(26e-3, rel=0.02)


def test_slots_are_what_the_cache_holds():
    """Gemma-2-27B on one GPU: (72 - 3 - 54.4) GB for keys and values of 377 kB a token."""
    assert MODELS["gemma2-27b"].slots(600.0) == int(14.6e9 / 376_832 / 600) == 64
    assert MODELS["llama3-8b"].slots(600.0) == 256


def test_a_training_step_is_bound_by_flops_or_by_what_is_moved():
    many, few = training_step(8e9, 1e6, 8), training_step(8e9, 1.0, 8)
    assert many == pytest.approx(8 * 8e9 * 1e6 / (8 * PEAK * 0.35) + 0.05)
    assert few == pytest.approx(3 * 16e9 / NVLINK + 0.05)
