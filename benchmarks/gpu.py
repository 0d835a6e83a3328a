"""What only a GPU shows of a training step, part by part; `gpu.sh` runs all of them.

    python benchmarks/gpu.py step --output FOLDER           # on a GPU
    python benchmarks/gpu.py step --output FOLDER --small   # tiny sizes, on a CPU

Each part appends its rows to FOLDER/gpu.jsonl as soon as it has them. The layers have the shape of
Llama-3 8B's, but there are few of them. The parts reuse the contenders of `train`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
from before import TokenLogps
from report import Cell, machine
from train import (
    Contender,
    Ours,
    Published,
    Shape,
    Trl,
    check_gradients,
    make_rows,
    measure,
    peak_bytes,
    seconds,
    weights,
)

from wrpo_ray.config import LoraConfig
from wrpo_ray.stages.train.logprobs import token_logps
from wrpo_ray.stages.train.model import with_lora

PEAK_FLOPS = 989e12
"""Of an H100 or H200 in bf16, dense, as its maker states."""
LARGE = Shape(4096, 4, 128_256, head=128, groups=4, inner=3.5)
SMALL = Shape(128, 2, 512)
CELL = Cell(1.0)


class Adapted(Ours):
    """Ours with adapters on all linear layers."""

    def __init__(self, shape: Shape, device: torch.device):
        super().__init__(shape, device)
        self.model = with_lora(self.model, LoraConfig(rank=16))
        self.policy.model = self.model
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)


class TrlLiger(Trl):
    """TRL's DPO with Liger's kernels in its layers, which it applies where a training starts."""

    def __init__(self, shape: Shape, device: torch.device):
        from transformers.integrations.liger import apply_liger_kernel

        super().__init__(shape, device)
        apply_liger_kernel(self.model, {"fused_linear_cross_entropy": False})  # as TRL does


class Part:
    """Sizes and the device of all parts."""

    def __init__(self, *, small: bool):
        self.small = small
        self.device = torch.device("cpu" if small else "cuda")
        self.shape = SMALL if small else LARGE
        self.answer = 16 if small else 1024  # two rows are 8,192 tokens
        self.repeats = 2 if small else 5

    def rows(self) -> list[Any]:
        """Two micro-batches."""
        return make_rows(4, self.answer, CELL.ratio, 0.3, self.shape.vocabulary)

    def median(self, action: Callable[[], Any]) -> float:
        """Seconds, after a first time."""
        action()
        return statistics.median(seconds(action, self.device) for _ in range(self.repeats))


def step(part: Part) -> dict[str, tuple[float, float, str]]:
    """Time, memory and share of the peak FLOPS of a step, ours and the published algorithm's."""
    contenders: dict[str, Contender] = {"ours": Ours(part.shape, part.device)}
    contenders |= {"published": Published(part.shape, part.device)} | trl_with_liger(part)
    for contender in contenders.values():  # gradients and the optimizer's states
        contender.take(make_rows(2, 8, 1.0, 0.0, part.shape.vocabulary))
        contender.step()
    m = measure(CELL, part.rows(), contenders, part.repeats)
    check_gradients([m], part.device)
    size = weights(contenders["ours"].model)
    body, head = size["body"], size["head"]
    flops = {  # a weight costs 2 a token forward and 4 backward; the reference is forward alone
        "ours": 6 * body * m.tokens["ours"] + 6 * head * m.answers["all"],
        "published": 8 * (body + head) * m.tokens["published"],
    }
    ours, published = (flops[n] / m.times[n] / PEAK_FLOPS for n in ("ours", "published"))
    of_trl = {}
    if "trl_liger" in contenders:
        each = (m.times["ours"] / m.answers["all"], m.times["trl_liger"] / m.answers["pairs"])
        of_trl = {"trl_liger.step_time": (1e3 * each[0], 1e3 * each[1], "ms/answer token")}
    return of_trl | {
        "step_time": (m.times["ours"], m.times["published"], "s"),
        "peak_memory": (m.peaks["ours"] / 1e6, m.peaks["published"] / 1e6, "MB"),
        "mfu": (ours, published, "share of the peak, without attention"),
    }


def trl_with_liger(part: Part) -> dict[str, Contender]:
    """TRL's DPO with Liger's kernels, where it can run; else a line says why it is left out."""
    absent = [n for n in ("trl", "datasets", "liger_kernel") if not importlib.util.find_spec(n)]
    if absent or part.device.type != "cuda":
        why = f"absent: {', '.join(absent)}" if absent else "its kernels need a GPU"
        print(f"TRL with Liger is not measured: {why}", flush=True)
        return {}
    return {"trl_liger": TrlLiger(part.shape, part.device)}


def head(part: Part) -> dict[str, tuple[float, float, str]]:
    """Time and memory of the head on answers, forward and backward, now and before."""
    width, vocabulary = part.shape.hidden, part.shape.vocabulary
    tokens, dtype = part.answer * 8, torch.float32 if part.small else torch.bfloat16
    hidden = torch.randn(tokens, width, device=part.device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=part.device, dtype=dtype) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), device=part.device)
    weight.requires_grad_()

    def now() -> None:
        token_logps(hidden, weight, None, targets).sum().backward()

    def before() -> None:
        TokenLogps.apply(hidden, weight, targets).sum().backward()

    times = part.median(now), part.median(before)
    peaks = (peak_bytes(action, part.device) / 1e6 for action in (now, before))
    return {"head_time": (*times, "s"), "head_memory": (*peaks, "MB")}


def launches(part: Part) -> dict[str, tuple[float, float, str]]:
    """Kernels of a step, ours and the published; and the seconds that launching as many takes."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [] if part.small else [torch.profiler.ProfilerActivity.CUDA]
    counts = []
    for contender in (Ours(part.shape, part.device), Published(part.shape, part.device)):
        contender.take(part.rows())
        contender.step()
        with torch.profiler.profile(activities=kinds) as profiler:
            contender.accumulate()
        events = profiler.events()
        on_gpu = torch.autograd.DeviceType.CUDA
        counts.append(sum(e.device_type == on_gpu or part.small for e in events))
    one = torch.ones(1, device=part.device)

    def many() -> None:
        for _ in range(1000):
            one.add_(1)

    each = part.median(many) / 1000
    return {
        "kernels": (*counts, "kernels/step"),
        "launching": (*(each * count for count in counts), "s/step"),
    }


def lora(part: Part) -> dict[str, tuple[float, float, str]]:
    """Time and memory of a step with adapters of rank 16, against all weights trained."""
    times, peaks = [], []
    for kind in (Adapted, Ours):
        contender = kind(part.shape, part.device)
        contender.take(part.rows())
        times.append(part.median(contender.step))
        peaks.append(peak_bytes(contender.step, part.device) / 1e6)
    return {"lora.step_time": (*times, "s"), "lora.peak_memory": (*peaks, "MB")}


PARTS = {"step": step, "head": head, "launches": launches, "lora": lora}
"""In order of value."""


def main() -> None:
    """Run one part and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    options = parser.parse_args()
    part, started = Part(small=options.small), time.monotonic()
    if options.small:
        torch.set_num_threads(1)
    about = {"machine": machine(part.device), "versions": results.versions("torch", "transformers")}
    with (options.output / "gpu.jsonl").open("a") as file:
        for name, figures in PARTS[options.part](part).items():
            row = results.row(f"gpu.train.8b_layers.{name}", *figures, about)
            file.write(json.dumps(row) + "\n")
            print(name, *figures, flush=True)
    print(f"{options.part}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
