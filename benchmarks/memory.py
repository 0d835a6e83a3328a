"""The estimate of a training worker's memory against measured peaks, on the CPU.

    python benchmarks/memory.py           # all cells, as a table; exit code 1 above 20 %
    python benchmarks/memory.py --quick   # the smallest, with both kinds of layers
    python benchmarks/memory.py --rows    # the longest rows on GPUs of 80 GB, by the estimate alone

Each cell is a process of its own, with the environment of a worker and real DeepSpeed but no Ray.
It trains a Llama of random weights for two optimizer steps of two micro-batches, and reports the
highest resident memory of its steps (VmHWM). What a worker holds before it loads a model is
measured, not estimated.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 0.2
"""Largest relative error of an estimate."""
PROMPT = ANSWER = 128
"""Tokens of a row's prompt, and of each of its three answers."""
STEPS, PARTS = 2, 2
"""Optimizer steps of a cell, and micro-batches of a step."""


@dataclass(frozen=True)
class Cell:
    """A model and how it is trained."""

    width: int
    layers: int
    vocabulary: int
    tokens: int
    settings: dict[str, Any]

    def model(self) -> dict[str, Any]:
        """Its config.json; heads of 64, a third of them with keys, as SmolLM2's."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.width * 8 // 3,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // 64,
            "num_key_value_heads": self.width // 192,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def cells() -> list[Cell]:
    """Models of 20M and 135M parameters (SmolLM2-135M's sizes)."""
    small, smol = (384, 8, 32768), (576, 30, 49152)
    wide, lora = {"precision": "fp32"}, {"lora": {"rank": 16}}
    again = {"gradient_checkpointing": True}
    return [
        Cell(*small, 1024, {}),
        Cell(*small, 4096, wide),
        Cell(*small, 4096, wide | again),
        Cell(*small, 2048, wide | lora),
        Cell(*smol, 1024, {}),
        Cell(*smol, 2048, again),
        Cell(*smol, 1024, {"zero_stage": 3}),
        Cell(*smol, 1024, lora),
    ]


def measure(cell: Cell) -> dict[str, float]:
    """Run a cell in a process; {"process", "peak", "estimate"} in GB."""
    from wrpo_ray.config import WrpoConfig
    from wrpo_ray.stages.train.stage import worker_env

    config = WrpoConfig.model_validate(cell.settings)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(cell.model()))
        (Path(folder) / "cell.json").write_text(json.dumps(vars(cell)))
        code = [sys.executable, "-c", MAKE, folder]
        subprocess.run(code, check=True, capture_output=True)
        done = subprocess.run(
            [sys.executable, __file__, "--in", folder],
            env=os.environ | worker_env(config) | alone(),
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


MAKE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
model.to(torch.bfloat16).save_pretrained(sys.argv[1])
"""


def alone() -> dict[str, str]:
    """The environment of a process group of one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HF_HUB_OFFLINE": "1"}


def train(folder: Path) -> dict[str, float]:
    """Train the cell of a folder in this process."""
    import transformers.models.llama.modeling_llama  # noqa: F401 (part of the process's own memory)

    from wrpo_ray.config import WrpoConfig
    from wrpo_ray.runtime.context import Run
    from wrpo_ray.stages.train import checkpoint, deepspeed
    from wrpo_ray.stages.train.loop import Trainer
    from wrpo_ray.stages.train.memory import Shape, worker_memory
    from wrpo_ray.stages.train.rows import SUFFIX, write_rows
    from wrpo_ray.stages.train.sizes import Sizes
    from wrpo_ray.stages.train.task import Task
    from wrpo_ray.storage.folder import Folder
    from wrpo_ray.storage.steps import Step

    cell = Cell(**json.loads((folder / "cell.json").read_text()))
    in_step = PARTS * cell.tokens // (PROMPT + 3 * ANSWER)
    config = WrpoConfig.model_validate(
        cell.settings | {"micro_batch_tokens": cell.tokens, "batch_size": in_step}
    )
    rows = Folder(str(folder / "rows"))
    write_rows(rows, f"00000-of-00001{SUFFIX}", _rows(STEPS * in_step, cell.vocabulary), {})
    deepspeed.prepare(config)
    checkpoint.Saver.is_node_leaving = lambda saver: False  # type: ignore[method-assign] # no Ray
    process = _resident("VmRSS")
    run, base = Run(Folder(str(folder)), 1), Folder(str(folder))
    Trainer.create(Task(run, Step("wrpo"), rows, base, "base", config, seed=3)).run(0)
    shape = Shape(PROMPT, ANSWER, 3)
    sizes, known = Sizes.of(cell.model()), {"slim": True, "process": process * 1e9}
    estimate = worker_memory(sizes, config, cell.tokens, shape, **known)
    return {"process": process, "peak": _resident("VmHWM"), "estimate": estimate.total / 1e9}


def _rows(count: int, vocabulary: int) -> list[Any]:
    """Rows of random tokens, with made-up log-probs under the reference."""
    import numpy as np

    from wrpo_ray.stages.train.rows import Row

    rng = np.random.default_rng(0)

    def ids(length: int) -> Any:
        return rng.integers(5, vocabulary, length).astype(np.int32)

    return [
        Row(str(i), ids(PROMPT), (ids(ANSWER), ids(ANSWER), ids(ANSWER)), (-900.0,) * 3)
        for i in range(count)
    ]


def _resident(name: str) -> float:
    """GB; unlike getrusage's, VmHWM does not begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024 / 1e9


TARGETS = {
    "1B": (2048, 16, 16, 8192),
    "8B": (4096, 32, 32, 14336),
    "32B": (5120, 64, 64, 25600),
    "70B": (8192, 80, 64, 28672),
}
"""Width, layers, query heads and MLP width of Llamas and a Qwen 3; key heads and the rest alike."""
USABLE = 0.97 * 80e9
"""Bytes of a GPU."""
WAYS: list[dict[str, Any]] = [{}, {"offload": "optimizer"}, {"offload": "all"}, {"lora": {}}]


def longest_row(numbers: tuple[int, ...], workers: int, way: dict[str, Any]) -> int:
    """Tokens of the longest row, a tenth of it prompt, with ZeRO-3 and checkpointing; 0 if none."""
    from wrpo_ray.config import WrpoConfig
    from wrpo_ray.stages.train.memory import Shape, worker_memory
    from wrpo_ray.stages.train.sizes import Sizes

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    more = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
    sizes = Sizes.of(dict(zip(names, numbers, strict=True)) | more)
    gpus = {"num_gpus": 1, "workers": workers, "zero_stage": 3, "gradient_checkpointing": True}
    config = WrpoConfig(**gpus | way)

    def is_too_long(tokens: int) -> bool:
        shape = Shape(0.1 * tokens, 0.3 * tokens, 3)
        return worker_memory(sizes, config, tokens, shape, slim=True).total > USABLE

    return bisect.bisect_left(range(1, 2**20), True, key=is_too_long)


def print_rows() -> None:
    """A table of the longest rows, in thousands of tokens."""
    for name, numbers in TARGETS.items():
        found = [longest_row(numbers, n, way) / 1000 for n in (8, 32) for way in WAYS]
        told = [f"{n:.0f}k" if n >= 10 else f"{n:.1f}k" if n else "none" for n in found]
        print(f"| {name} | {' | '.join(told)} |")


def main() -> None:
    """Print a table, or the result of one cell as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--in", dest="folder")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", action="store_true")
    asked = parser.parse_args()
    if asked.rows:
        print_rows()
        return
    if asked.folder:
        print(json.dumps(train(Path(asked.folder))), flush=True)
        os._exit(0)
    print("| model | tokens | settings | measured | estimate |\n| --- | --- | --- | --- | --- |")
    worst = 0.0
    for cell in cells()[: 2 if asked.quick else None]:
        found = measure(cell)
        ratio = found["estimate"] / found["peak"]
        worst = max(worst, abs(ratio - 1))
        told = ", ".join(f"{name}: {value}" for name, value in cell.settings.items()) or "defaults"
        print(
            f"| {cell.layers} x {cell.width} | {cell.tokens:,} | {told} | "
            f"{found['peak']:.2f} GB | {found['estimate']:.2f} GB ({ratio:.2f}) |",
            flush=True,
        )
    sys.exit(int(worst > LIMIT))


if __name__ == "__main__":
    main()
