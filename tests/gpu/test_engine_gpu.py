"""The vLLM engine on a GPU, in this process, as a generation actor holds it.

Skipped without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import write_model

from wrpo_ray.config import Actors, ModelConfig, SamplingConfig
from wrpo_ray.llm.vllm_settings import engine_env
from wrpo_ray.stages.generate.vllm_engine import Request, SamplingIdentity, VllmEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SAMPLING = SamplingConfig(samples=3, max_tokens=12)
SMALL = {"enforce_eager": True, "gpu_memory_utilization": 0.2, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / str(seed), seed, width=64) for seed in (0, 1)]


@pytest.fixture(scope="module")
def engine(folders):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_env(on_gpu=True).items():
            patch.setenv(name, value)
        # as vLLM does it in an actor; a fork of a process that has looked for GPUs has none
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        model = ModelConfig(
            name="m", model=str(folders[0]), actors=Actors(num_gpus=1), engine=SMALL
        )
        yield VllmEngine(model, folders[0], seed=0)


def asked(first: int = 0, count: int = 3) -> list[Request]:
    words = ("w1", "w2", "w3", "w4")
    return [Request(w, [{"role": "user", "content": w}], first, count) for w in words]


def ids(engine: VllmEngine, identity: SamplingIdentity | None = None, **which: int) -> dict:
    rows = [r for rows, _ in engine.answers(asked(**which), SAMPLING, identity) for r in rows]
    return {(r["prompt_id"], r["sample"]): r["token_ids"] for r in rows}


def alike(one: dict, other: dict) -> float:
    """The share of equal answers: what else is in a batch can change bf16's last bit."""
    assert one.keys() == other.keys()
    return sum(one[key] == other[key] for key in one) / len(one)


def test_all_samples_come_and_a_second_call_gives_them_again(engine):
    first = ids(engine)
    assert len(first) == 4 * SAMPLING.samples
    assert len({tuple(answer) for answer in first.values()}) > 4
    assert alike(first, ids(engine)) > 0.7


def test_samples_can_be_asked_for_one_at_a_time(engine):
    whole = {key: answer for key, answer in ids(engine).items() if key[1] == 2}
    assert alike(whole, ids(engine, first=2, count=1)) > 0.7


def test_models_of_one_shape_take_turns(engine, folders):
    first, other = ids(engine), ids(engine, SamplingIdentity("m", 0, folders[1]))
    assert alike(first, other) < 0.3
    assert alike(first, ids(engine)) > 0.7
