"""What benchmarks of generation and scoring share: a model, texts, and how a run is timed."""

from __future__ import annotations

import json
import math
import os
import random
import string
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from wrpo_ray.data.records import prompt_id

Message = dict[str, str]

SAMPLES = 5
"""Answers to a prompt."""
CONTEXT = 1024
"""Tokens that the model is made for."""
ENDS = 3
"""Token ids that end an answer, of 260 that are about equally likely."""


# --- models and texts --------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama over bytes."""

    hidden: int = 512
    layers: int = 12

    def write(
        self,
        folder: Path,
        *,
        classifier: bool = False,
        dtype: str = "float32",
        context: int = CONTEXT,
    ) -> None:
        """Make a model folder, always of the same random weights."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

        from wrpo_ray.zoo.tokenizers import byte_tokenizer

        tokenizer = byte_tokenizer()
        tokenizer.model_max_length = context
        heads = self.hidden // 64
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=context,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=1,
        )
        torch.manual_seed(0)
        model = (LlamaForSequenceClassification if classifier else LlamaForCausalLM)(config)
        if not classifier:
            more = range(len(tokenizer) - ENDS + 1, len(tokenizer))
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, *more]
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def weights(folder: Path) -> int:
    """How many a model folder holds."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "numpy") as file:
        shapes = (file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
        return sum(map(math.prod, shapes))


def texts(count: int, mean: int, seed: str) -> list[str]:
    """Random letters; lengths are log-normal (sigma 0.6) and at most four times the mean."""
    rng = random.Random(seed)
    sizes = [rng.lognormvariate(0, 0.6) for _ in range(count)]
    scale = mean * count / sum(sizes)
    letters = string.ascii_lowercase + 5 * " "
    return ["".join(rng.choices(letters, k=min(4 * mean, int(n * scale) + 4))) for n in sizes]


def user(text: str) -> list[Message]:
    """The conversation that a prompt is."""
    return [{"role": "user", "content": text}]


def key(messages: list[Message], sample: int) -> str:
    """An answer's."""
    return f"{prompt_id(messages)}/{sample}"


def write_prompts(file: Path, prompts: list[list[Message]]) -> None:
    """As the pipeline reads them."""
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


# --- timing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContenderRun:
    """What a contender made, and when, on the machine's monotonic clock."""

    started: float
    """The first request to a warm model."""
    ended: float
    """The last result."""
    results: dict[str, Any]
    """By an answer's key its token ids, or its score."""


@dataclass(frozen=True)
class Measured:
    """What a contender took."""

    results: dict[str, Any]
    seconds: float
    """From the first request to a warm model to the last result."""
    cpu: float
    """CPU seconds in that time, of all processes of the run."""
    whole: float
    """Seconds with all else: imports, the start of Ray and of the engine, their end."""


class Clock:
    """Started when the model is warm, and kept in a file, since actors leave nothing else."""

    def __init__(self, file: Path):
        self.file, self.started = file, time.monotonic()

    def lap(self) -> None:
        """Note that there was a result."""
        self.file.write_text(json.dumps([self.started, time.monotonic()]))

    @staticmethod
    def read(file: Path) -> list[float]:
        """When it was started, and the last lap."""
        return json.loads(file.read_text())


def alone(contender: Callable[..., ContenderRun], *args: Any) -> Measured:
    """Run it in a process of its own, and watch what that and its descendants use."""
    import numpy as np

    started, used, seen = time.monotonic(), [], {}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        future = process.submit(_quiet_end, contender, *args)
        while not wait([future], timeout=0.5).done:
            seen |= _cpu_seconds()
            used.append((time.monotonic(), sum(seen.values())))
        made = future.result()
    whole = time.monotonic() - started
    cpu = np.interp([made.started, made.ended], *zip(*used, strict=True))
    return Measured(made.results, made.ended - made.started, float(cpu[1] - cpu[0]), whole)


def _quiet_end(contender: Callable[..., ContenderRun], *args: Any) -> ContenderRun:
    made = contender(*args)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # vLLM's libraries list their leaks at exit
    return made


def _cpu_seconds() -> dict[psutil.Process, float]:
    """Of each descendant of this process; one that has ended is known by what was seen before."""
    used = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            used[process] = sum(process.cpu_times()[:2])
    return used
