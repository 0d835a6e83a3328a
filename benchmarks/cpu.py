"""Tokens per second on a CPU: threads, precisions and engine settings, with a real model.

    wrpo zoo smollm2 --recipe smollm2
    python benchmarks/cpu.py smollm2                  # all cells, as tables
    python benchmarks/cpu.py smollm2 --part generate --tokens 64

Each cell is a process of its own (or two at once), with the environment of an actor but no Ray:
the same engine, trainer and settings as in a run. The cells of a table run one after another, all
of them `--repeat` times, and the best of each counts: others may work on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memory import alone

QUESTION = "A shop sells {a} apples on Monday and {b} times as many on Tuesday, at {c} dollars. "
PROMPT = ANSWER = 64
"""Tokens of a row in training: of its prompt, and of each of its three answers."""
LOADED = "loaded\n"
"""The line of a process whose model is loaded."""


@dataclass(frozen=True)
class Cell:
    """One way to work."""

    told: str
    part: str
    threads: int = 1
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)
    """Of generation: arguments of the engine. Of training: of its config."""
    env: dict[str, str] = field(default_factory=dict)
    actors: int = 1
    """Processes that work at once."""
    beside: int = 0
    """Busy processes of others beside them."""


def cells(cores: int) -> list[Cell]:
    """The tables' cells, for a machine of this many cores."""
    return [
        Cell("1 thread, fp32", "generate"),
        Cell(f"{cores} threads, fp32", "generate", cores),
        Cell(f"{cores} actors of 1 thread, fp32", "generate", actors=cores),
        Cell("1 thread, bf16", "generate", dtype="bfloat16"),
        Cell(f"{cores} threads, bf16", "generate", cores, "bfloat16"),
        Cell(f"{cores} threads, bf16, 16 at once", "generate", cores, "bfloat16",
             {"max_num_seqs": 16}),
        Cell(f"{cores} threads, bf16, 4 GiB KV", "generate", cores, "bfloat16",
             env={"VLLM_CPU_KVCACHE_SPACE": "4"}),
        Cell("1 thread, fp32, beside a busy process", "generate", beside=1),
        Cell(f"{cores} threads, fp32, beside a busy process", "generate", cores, beside=1),
        Cell("1 thread, fp32", "train", dtype="fp32"),
        Cell(f"{cores} threads, fp32", "train", cores, "fp32"),
        Cell("1 thread, bf16", "train", dtype="bf16"),
        Cell(f"{cores} threads, bf16", "train", cores, "bf16"),
        Cell("1 thread, fp32, beside a busy process", "train", dtype="fp32", beside=1),
        Cell(f"{cores} threads, fp32, beside a busy process", "train", cores, "fp32", beside=1),
    ]  # fmt: skip


def measure(cell: Cell, options: argparse.Namespace) -> float:
    """Run a cell; tokens per second of all its processes together, which begin at once."""
    from wrpo_ray.llm.vllm_settings import engine_env
    from wrpo_ray.runtime.placement import thread_env

    own = thread_env(cell.threads) | {"DS_ACCELERATOR": "cpu"} | cell.env
    busy = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(busy) for _ in range(cell.beside)]
    working = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--cell", json.dumps(asdict(cell))],
            env=os.environ | engine_env(on_gpu=False) | own | alone(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
        )
        for _ in range(cell.actors)
    ]
    try:
        for process in working:
            if not any(line == LOADED for line in process.stdout or ()):
                raise SystemExit(f"{cell.told}: it ended; --verbose shows why")
        for process in working:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        told = [process.communicate()[0] for process in working]
        return float(sum(json.loads(out.splitlines()[-1]) for out in told))
    finally:
        for begun in [*working, *others]:
            begun.kill()  # type: ignore[attr-defined]
            begun.wait()  # type: ignore[attr-defined]


def _wait_for_others() -> None:
    print(LOADED, end="", flush=True)
    sys.stdin.readline()


def generate(cell: Cell, options: argparse.Namespace) -> float:
    """Answers to questions; output tokens per second."""
    from wrpo_ray.config import ModelConfig, SamplingConfig
    from wrpo_ray.stages.generate.vllm_engine import Request, VllmEngine

    model = Path(options.model)
    config = ModelConfig(
        name="m", model=str(model), dtype=cell.dtype, max_model_len=1024, engine=cell.settings
    )
    engine = VllmEngine(config, model, 0)
    asked = [
        Request(f"{i:032x}", [{"role": "user", "content": text}], 0, 2)
        for i, text in enumerate(_questions(options))
    ]
    list(engine.answers(asked[:1], SamplingConfig(samples=2, max_tokens=8)))
    _wait_for_others()
    started = time.perf_counter()
    answers = list(engine.answers(asked, SamplingConfig(samples=2, max_tokens=options.tokens)))
    seconds = time.perf_counter() - started
    assert not any(failed for _, failed in answers)
    return float(sum(r["output_tokens"] for rows, _ in answers for r in rows) / seconds)


def _questions(options: argparse.Namespace) -> list[str]:
    if options.questions:
        import pyarrow.parquet as pq

        found = dict.fromkeys(pq.read_table(options.questions)["question"].to_pylist())
        return list(found)[: options.prompts]
    return [
        QUESTION.format(a=3 + i, b=2 + i % 7, c=1 + i % 5) + "How much money does it take in?"
        for i in range(options.prompts)
    ]


def train(cell: Cell, options: argparse.Namespace) -> float:
    """Preference training on rows of random tokens; tokens per second of the best step."""
    import numpy as np

    from wrpo_ray.config import WrpoConfig
    from wrpo_ray.runtime.context import Run
    from wrpo_ray.stages.train import deepspeed
    from wrpo_ray.stages.train.loop import Trainer
    from wrpo_ray.stages.train.metrics import read_metrics
    from wrpo_ray.stages.train.rows import SUFFIX, Row, write_rows
    from wrpo_ray.stages.train.task import Task
    from wrpo_ray.storage.folder import Folder
    from wrpo_ray.storage.steps import Step

    rng, each = np.random.default_rng(0), (PROMPT, *[ANSWER] * 3)

    def row(number: int) -> Row:
        prompt, *answers = (rng.integers(5, 49000, n).astype(np.int32) for n in each)
        return Row(str(number), prompt, tuple(answers), (-900.0,) * 3)

    config = WrpoConfig(
        precision=cell.dtype, micro_batch_tokens=1024, batch_size=2, **cell.settings
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(name)
        write_rows(folder / "rows", f"00000-of-00001{SUFFIX}", [row(i) for i in range(4)], {})
        deepspeed.prepare(config)
        base = Folder(options.model)
        trainer = Trainer.create(
            Task(Run(folder, 1), Step("wrpo"), folder / "rows", base, "base", config, seed=3)
        )
        _wait_for_others()
        trainer.run(0)
        steps = read_metrics(trainer.task.folder)
    return max(float(step["tokens_per_s"]) for step in steps)


def main() -> None:
    """Print the tables, or the result of one process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model folder, such as the one of `wrpo zoo`")
    parser.add_argument("--part", choices=("generate", "train"), help="this table only")
    parser.add_argument("--questions", help="a Parquet file with a column `question`")
    parser.add_argument("--prompts", type=int, default=32, help="two answers to each")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", help="cells with this text")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--cell")
    options = parser.parse_args()
    if options.cell:
        cell = Cell(**json.loads(options.cell))
        work = generate if cell.part == "generate" else train
        print(json.dumps(work(cell, options)), flush=True)
        os._exit(0)
    cores = len(os.sched_getaffinity(0))
    wanted = [c for c in cells(cores) if options.part in (None, c.part)]
    wanted = [c for c in wanted if (options.only or "") in c.told]
    best = dict.fromkeys(range(len(wanted)), 0.0)
    for _ in range(options.repeat):
        for number, cell in enumerate(wanted):
            best[number] = max(best[number], measure(cell, options))
            print(f"{cell.part}, {cell.told}: {best[number]:.1f}", file=sys.stderr, flush=True)
    print("| part | how | tokens/s |\n| --- | --- | --- |")
    for number, cell in enumerate(wanted):
        print(f"| {cell.part} | {cell.told} | {best[number]:,.0f} |")


if __name__ == "__main__":
    main()
