"""Greedy answers of vLLM equal those of transformers, for each model that a run evaluates."""

import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from support.harness import SOURCES

SCRIPT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.stages.generate.vllm_engine import Request, VllmEngine, SamplingIdentity

folder, prompts, start = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[4])
model = ModelConfig(name="m", model=str(start), dtype="float32", performance={"max_num_seqs": 7})
engine = VllmEngine(model, start, seed=0)
assert engine.engine.vllm_config.scheduler_config.max_num_seqs == 7
identities = [SamplingIdentity("m", 0, folder), SamplingIdentity("m", 0, start)]
asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
requests = [Request(f"{i:032x}", messages, 0, 1) for i, messages in enumerate(asked)]
sampling = SamplingConfig(samples=1, temperature=0, top_p=1, max_tokens=20)

def answers(part, identity):  # two buckets in hand, as in an actor
    return list(engine.answers(part, sampling, identity))

halves = requests[::2], requests[1::2]
parts = [(half, identity) for identity in dict.fromkeys(identities) for half in halves]
with ThreadPoolExecutor(4) as threads:  # of both weights at once
    done = list(threads.map(answers, *zip(*parts)))
assert not any(failed for part in done for _, failed in part)
rows = [row for part in done[:2] for rows, _ in part for row in rows]  # of the first identity
rows.sort(key=lambda row: row["prompt_id"])
Path(sys.argv[3]).write_text(json.dumps([r["token_ids"] for r in rows]))

# a sample does not depend on how many others are asked for with it
def drawn(first, count, seeds="request"):
    sampling = SamplingConfig(samples=4, max_tokens=20, seeds=seeds)
    asked = [Request(r.prompt_id, r.messages, first, count) for r in requests[:5]]
    rows = [row for rows, _ in engine.answers(asked, sampling, identities[0]) for row in rows]
    return {(r["prompt_id"], r["sample"]): (r["seed"], r["token_ids"]) for r in rows}
together, apart = drawn(0, 4), drawn(0, 1) | drawn(1, 3)
assert together == apart and len(together) == 20

# without seeds of requests all are drawn anew
first, second = drawn(0, 4, "run"), drawn(0, 4, "run")
assert first.keys() == second.keys() == together.keys() and first != second
assert {seed for seed, _ in [*first.values(), *second.values()]} == {None}
"""


def transformers_answers(folder, prompts: list[str]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    from wrpo_ray.llm.chat import prompt_ids
    from wrpo_ray.llm.rendering import load_tokenizer

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


def upside_down(folder, other):
    """A model of the same shape whose layers have changed places, so that it says other things."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, other)
    swapped = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    weights = {
        next((name.replace(a, b) for a, b in swapped.items() if a in name), name): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


def questions(zoo) -> list[str]:
    lines = (zoo / "eval.jsonl").read_text().splitlines()[:20]
    return [json.loads(line)["prompt"] for line in lines]


@pytest.mark.parametrize("name", [*SOURCES, "target", "target-sft", "fused"])
def test_the_answers_of_an_evaluation_are_those_of_transformers(fused, zoo, name):
    prompts = questions(zoo)
    asked = {r["prompt_id"]: r["messages"] for r in table(fused, "eval-prompts")}
    of_prompt = {messages[0]["content"]: key for key, messages in asked.items()}
    said = {r["prompt_id"]: r["token_ids"] for r in table(fused, f"generate-{name}")}
    folders = {"target-sft": "sft-*/model", "fused": "wrpo-*/model"}
    if name in folders:
        (folder,) = fused.glob(folders[name])
    else:
        folder = zoo / "sources" / name if name in SOURCES else zoo / name
    assert [said[of_prompt[p]] for p in prompts] == transformers_answers(folder, prompts)


def table(output, step: str) -> list[dict]:
    files = output.glob(f"{step}-????????????/*/[!.]*.parquet")
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_an_engine_answers_with_two_sets_of_weights_in_turn(zoo, tmp_path):
    """Started with weights of another model, it answers by both at the same time."""
    from wrpo_ray.llm.vllm_settings import engine_env

    model, prompts, out = zoo / "target", questions(zoo), tmp_path / "ids.json"
    start = upside_down(model, tmp_path / "other")
    arguments = [str(model), json.dumps(prompts), str(out), str(start)]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    result = subprocess.run(
        command, env=os.environ | engine_env(on_gpu=False), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(out.read_text()) == transformers_answers(model, prompts)


PLAIN = """
import json, sys
from pathlib import Path
import vllm
from wrpo_ray.llm.vllm_settings import CPU_ENGINE

llm = vllm.LLM(model=sys.argv[1], dtype="float32", **CPU_ENGINE)
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
asked = vllm.SamplingParams(temperature=0, max_tokens=40)
outputs = llm.generate(prompts, asked, use_tqdm=False)  # its bar divides by a time of 0
answers = [(o.outputs[0].token_ids, o.outputs[0].finish_reason) for o in outputs]
Path(sys.argv[3]).write_text(json.dumps(answers))
"""


def test_a_saved_model_ends_its_answers_where_only_its_template_does(zoo, tmp_path):
    """In vLLM as anyone starts it, and in transformers: its end of turn is no eos of the base."""
    import torch
    from transformers import AutoModelForCausalLM

    from wrpo_ray.config import SftConfig
    from wrpo_ray.llm.chat import prompt_ids
    from wrpo_ray.llm.rendering import load_tokenizer
    from wrpo_ray.llm.vllm_settings import engine_env
    from wrpo_ray.stages.train.model import Policy, save
    from wrpo_ray.storage.folder import Folder

    base = shutil.copytree(zoo / "target", tmp_path / "base")
    tokenizer = load_tokenizer(base)
    end, tokenizer.eos_token = tokenizer.eos_token_id, tokenizer.pad_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.pad_token_id
    model.save_pretrained(base)
    saved = tmp_path / "saved"
    save(Policy(model), base, SftConfig(), tokenizer, Folder(str(saved)), write=True)

    asked = [json.loads(line)["prompt"] for line in (zoo / "eval.jsonl").read_text().splitlines()]
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": a}]) for a in asked[:5]]
    out = tmp_path / "answers.json"
    command = [sys.executable, "-c", PLAIN, str(saved), json.dumps(prompts), str(out)]
    result = subprocess.run(
        command, env=os.environ | engine_env(on_gpu=False), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(out.read_text())
    assert all(ids[-1] == end and reason == "stop" for ids, reason in answers)
    loaded = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")
    for prompt, (ids, _) in zip(prompts, answers, strict=True):
        told = loaded.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
        assert told[0, len(prompt) :].tolist() == ids
