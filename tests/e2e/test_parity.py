"""Greedy answers of vLLM equal those of transformers, for each generative model of the zoo."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.generate.engine import Engine, Request

folder, prompts = Path(sys.argv[1]), json.loads(sys.argv[2])
engine = Engine(ModelConfig(name="m", model=str(folder)), folder, seed=0)
asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
requests = [Request(f"{i:032x}", messages, 0, 1) for i, messages in enumerate(asked)]
sampling = SamplingConfig(samples=1, temperature=0, top_p=1, max_tokens=20)
rows, failures = engine.generate(requests, sampling)
assert not failures, failures
Path(sys.argv[3]).write_text(json.dumps([r["token_ids"] for r in rows]))
"""
MODELS = ("sources/llama-bytes", "sources/qwen3-bpe", "sources/gemma2-chars", "target")


def transformers_answers(folder, prompts: list[str]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    from wrpo_ray.core.chat import load_tokenizer, prompt_ids

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": prompt}])])
        out = model.generate(ids, do_sample=False, max_new_tokens=20)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


@pytest.mark.parametrize("model", MODELS)
def test_greedy_vllm_equals_transformers(zoo, tmp_path, model):
    from wrpo_ray.generate.engine import CPU_ENV, ENV

    lines = (zoo / "eval.jsonl").read_text().splitlines()[:20]
    prompts = [json.loads(line)["prompt"] for line in lines]
    out = tmp_path / "ids.json"
    command = [sys.executable, "-c", SCRIPT, str(zoo / model), json.dumps(prompts), str(out)]
    result = subprocess.run(command, env=os.environ | ENV | CPU_ENV, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(out.read_text()) == transformers_answers(zoo / model, prompts)
