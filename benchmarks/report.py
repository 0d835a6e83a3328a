"""What `train.py` measured as tables, a report and rows of results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import results
import torch

PREFIX = "train."
LLAMA_8B = {"body": 6_979_321_856, "head": 525_336_576}
"""Weights of Llama-3 8B's layers and of its head."""


@dataclass(frozen=True)
class Cell:
    """A prompt/answer ratio, with spread lengths or all equal."""

    ratio: float
    equal: bool = False

    @property
    def name(self) -> str:
        """As in the names of results."""
        return f"r{self.ratio:g}" + ("_equal" if self.equal else "")

    @property
    def bound(self) -> float:
        """Tokens saved at most by sharing the prompt of three answers: 3(r + 1) / (r + 3)."""
        return 3 * (self.ratio + 1) / (self.ratio + 3)


@dataclass(frozen=True)
class Measured:
    """A cell's figures; keys are `ours`, `published`, `trl`."""

    cell: Cell
    times: dict[str, float]
    """Seconds of a step, and of `reference`, our pass of the reference model over its rows."""
    peaks: dict[str, int]
    """Bytes above the persistent states."""
    tokens: dict[str, int]
    """Tokens that go through the layers, padding included."""
    answers: dict[str, int]
    """Tokens of `all` three answers, and of the `pairs` that TRL trains on."""
    difference: float
    """Of the gradients of ours and published, as a part of their size."""

    @property
    def speedup(self) -> float:
        """Published against ours."""
        return self.times["published"] / self.times["ours"]

    @property
    def speedup_with_reference(self) -> float:
        """The same where our step pays for the reference pass over its rows."""
        return self.times["published"] / (self.times["ours"] + self.times["reference"])

    @property
    def token_times(self) -> tuple[float, float]:
        """Milliseconds an answer token, of ours and of TRL."""
        return (
            1e3 * self.times["ours"] / self.answers["all"],
            1e3 * self.times["trl"] / self.answers["pairs"],
        )

    @property
    def speedup_to_trl(self) -> float:
        """TRL against ours, an answer token."""
        ours, trl = self.token_times
        return trl / ours

    @property
    def memory_ratio(self) -> float:
        """Published against ours."""
        return self.peaks["published"] / self.peaks["ours"]

    def work_ratio(self, weights: dict[str, int]) -> float:
        """Multiplications with weights, published against ours.

        A weight costs 2 a token forward and 4 backward. Ours: layers on all tokens, the head on
        answers and once more backward. Published: both on all tokens, padding included, and
        forward in the reference model too.
        """
        body, head = weights["body"], weights["head"]
        ours = 6 * body * self.tokens["ours"] + 8 * head * self.answers["all"]
        return 8 * (body + head) * self.tokens["published"] / ours


@dataclass(frozen=True)
class Report:
    """All cells, and what they were measured with."""

    measured: Sequence[Measured]
    weights: dict[str, int]
    options: dict[str, Any]
    machine: str

    def tables(self) -> str:
        """Speed against both, then memory, in Markdown."""
        return "\n\n".join([self._published(), self._trl(), self._memory()])

    def _published(self) -> str:
        columns: dict[str, Callable[[Measured], str]] = {
            "ours, s": lambda m: f"{m.times['ours']:.3g}",
            "published, s": lambda m: f"{m.times['published']:.3g}",
            "ratio": lambda m: f"**{m.speedup:.2f}**",
            "with our reference pass": lambda m: f"{m.speedup_with_reference:.2f}",
            "bound of sharing": lambda m: f"{m.cell.bound:.2f}",
            "and no reference, x 4/3": lambda m: f"{m.cell.bound * 4 / 3:.2f}",
            "by work": lambda m: f"{m.work_ratio(self.weights):.2f}",
            "by work, 8B": lambda m: f"{m.work_ratio(LLAMA_8B):.2f}",
        }
        return self._table(columns)

    def _trl(self) -> str:
        columns: dict[str, Callable[[Measured], str]] = {
            "ours, ms/answer token": lambda m: f"{m.token_times[0]:.3g}",
            "TRL, ms/answer token": lambda m: f"{m.token_times[1]:.3g}",
            "ratio": lambda m: f"**{m.speedup_to_trl:.2f}**",
            "bound of sharing": lambda m: f"{m.cell.bound:.2f}",
        }
        return self._table(columns)

    def _memory(self) -> str:
        columns: dict[str, Callable[[Measured], str]] = {
            "ours, MB": lambda m: f"{_mb(m.peaks['ours']):.0f}",
            "published, MB": lambda m: f"{_mb(m.peaks['published']):.0f}",
            "ratio": lambda m: f"**{m.memory_ratio:.2f}**",
            "TRL (two answers a row), MB": lambda m: f"{_mb(m.peaks['trl']):.0f}",
        }
        return self._table(columns)

    def _table(self, columns: dict[str, Callable[[Measured], str]]) -> str:
        lines = [["r", "lengths", *columns], ["---"] * (2 + len(columns))]
        for m in self.measured:
            head = [f"{m.cell.ratio:g}", "equal" if m.cell.equal else "spread"]
            lines.append(head + [column(m) for column in columns.values()])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    # --- files

    def write(self, folder: Path) -> None:
        """Into RESULTS.md and results.json."""
        names = tuple(self._prefix + part for part in ("step_time", "peak_memory"))
        results.save(folder, names, self.rows(), self.text())

    @property
    def _on_gpu(self) -> bool:
        return self.options["device"] == "cuda"

    @property
    def _prefix(self) -> str:
        return f"gpu.{PREFIX}" if self._on_gpu else PREFIX

    def rows(self) -> list[dict[str, Any]]:
        """Named figures; `ratio` is peer / ours, so above 1 ours is better."""
        rows = [row for m in self.measured for row in self._rows(m)]
        peaks = {
            n: geometric_mean([m.peaks[n] for m in self.measured]) for n in ("ours", "published")
        }
        return [*rows, self._row("peak_memory.vs_published", *map(_mb, peaks.values()), "MB")]

    def _rows(self, m: Measured) -> list[dict[str, Any]]:
        times, cell = m.times, m.cell.name
        whole = times["ours"] + times["reference"]
        peaks = {name: _mb(peak) for name, peak in m.peaks.items()}
        figures = [
            (f"step_time.{cell}.vs_published", times["ours"], times["published"], "s"),
            (f"step_time_with_reference.{cell}.vs_published", whole, times["published"], "s"),
            (f"step_time.{cell}.vs_trl", *m.token_times, "ms/answer token"),
            (f"peak_memory.{cell}.vs_published", peaks["ours"], peaks["published"], "MB"),
            (f"peak_memory.{cell}.vs_trl", peaks["ours"], peaks["trl"], "MB"),
        ]
        return [self._row(*figure) for figure in figures]

    def _row(self, name: str, ours: float, peer: float, unit: str) -> dict[str, Any]:
        about = {"machine": self.machine, "versions": versions()}
        return results.row(self._prefix + name, ours, peer, unit, about)

    def text(self) -> str:
        """The section of RESULTS.md."""
        options, weights = self.options, self.weights
        if self._on_gpu:
            return self._gpu_text()
        share = weights["head"] / (weights["head"] + weights["body"])
        share_8b = LLAMA_8B["head"] / sum(LLAMA_8B.values())
        return TEXT.format(
            **options,
            machine=self.machine,
            versions=", ".join(f"{name} {v}" for name, v in versions().items()),
            weights=weights["all"] / 1e6,
            load=os.getloadavg()[2],
            share=share,
            share_8b=share_8b,
            targets=self._targets(),
            published=self._published(),
            trl=self._trl(),
            memory=self._memory(),
        )

    def _gpu_text(self) -> str:
        differences = [m.difference for m in self.measured]
        tokens = [
            f"{m.cell.ratio:g}: {m.tokens['ours']:,} and {m.tokens['published']:,}"
            for m in self.measured
        ]
        return GPU_TEXT.format(
            **self.options,
            machine=self.machine,
            versions=", ".join(f"{name} {v}" for name, v in versions().items()),
            weights=self.weights["all"] / 1e6,
            share=self.weights["head"] / (self.weights["head"] + self.weights["body"]),
            tokens="; ".join(tokens),
            difference=max(differences),
            published=self._published(),
            trl=self._trl(),
            memory=self._memory(),
        )

    def _targets(self) -> str:
        lines = ["| peer / ours | at least | measured | |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {what} | {least:g}x | {value:.2f}x | {'met' if value >= least else 'missed'} |"
            for what, least, value in self._checks()
        ]
        return "\n".join(lines)

    def _checks(self) -> list[tuple[str, float, float]]:
        """What the project aims at: what, at least, measured."""
        speedups = {m.cell.name: m.speedup for m in self.measured}
        memory = [m.memory_ratio for m in self.measured]
        return [
            ("step against published, r 0.4", 2.0, speedups["r0.4"]),
            ("step against published, r 4", 3.0, speedups["r4"]),
            ("step against TRL, worst cell", 1.0, min(m.speedup_to_trl for m in self.measured)),
            ("peak memory against published, geometric mean", 2.0, geometric_mean(memory)),
            ("peak memory against published, worst cell", 2.0, min(memory)),
        ]


TEXT = """# Training: one step, side by side

{targets}

One WRPO step (forward and backward of {rows} rows, and the optimizer's) on {machine},
{threads} thread(s) of torch, {device}. `make bench` repeats the measurements and writes this
section and [results.json](results.json); `train.py --help` lists options.

## Speed

**ours**: rows packed with a shared prompt, the head on answer tokens only, stored reference
log-probs. **published**: a plain implementation of the published algorithm: three padded sequences
per row, logits of all tokens, a live reference model, `sdpa` attention.

{published}

- r is the mean prompt length divided by the mean answer length. Lengths are log-normal (sigma 0.6)
  or all equal; an answer has {answer_mean} tokens on average.
- "with our reference pass": the time of our step includes its share of the pass that stores the
  reference log-probs once. The paper trains one epoch, so this is the gain of a whole run; in each
  further epoch the gain is "ratio".
- "bound of sharing" is 3(r+1)/(r+3), the ratio of tokens without and with a shared prompt. Without
  the reference's forward pass, a step gains a further factor of 4/3. Gains beyond that come from
  padding and from the head on prompts.
- "by work" is the ratio of multiplications with weights on these rows, without attention; "8B" is
  the same for the shape of Llama-3 8B.
- With equal lengths nothing is padded, so the ratio shows the gain of sharing, the reference and
  the head alone. At r 0.4 it is below 2: the rest of that target comes from padding.

**TRL**: `DPOTrainer` on the pairs (y_wt, y_l) of the same rows, its own collation and
`training_step`, `precompute_ref_log_probs=True`. It trains two answers per row and ours three, so
times are compared per answer token.

{trl}

## Memory

The peak of tensor memory in a step, beyond weights, gradients and optimizer states, with two rows
per micro-batch. The reference's weights in `published` are not counted either.

{memory}

With sharing and packing, activations of fewer tokens are kept, and our step never holds the logits
of all tokens. The published algorithm peaks in the reference's forward pass, while the policy's
activations and logits are kept for the backward pass. With short prompts and no padding, both keep
nearly the same activations, so the ratio is smallest.

## How it was measured

- A Llama of {weights:.0f}M random weights, the same for all three: width {hidden}, {layers}
  layers, vocabulary {vocabulary}; fp32 on the CPU, bf16 on a GPU. The learning rate is 0: the work
  is the same, and every cell starts from the same weights.
- The same seeded rows, in micro-batches of two rows as in the published script. Ours assigns rows
  by a token budget; it is set to the smallest value at which micro-batches hold two rows on
  average.
- Plain fused AdamW for all instead of DeepSpeed, to compare the step and not the engine. No
  gradient checkpointing; it is off in our defaults and was switched off in TRL.
- The three take turns (ours, published, TRL, ours, ...); medians of {repeats} steps after a
  warm-up. On one CPU thread, times are CPU time of the process, which other processes disturb
  less. The machine's load average over 15 minutes was {load:.1f}, of which this run was 1.
- Memory on the CPU is the maximum of the running sum of allocations in torch's profiler.
- Each cell checks that the gradients of ours and published agree (relative difference below 1e-3).
- TRL computes logits of answer tokens only on a GPU, and of all tokens on a CPU; here it is set to
  answer tokens.
- Versions: {versions}.

## What it does not show

- GPUs: there, our attention uses another kernel ([two
  cells](#on-a-gpu-training-one-step-side-by-side)).
- Other shapes: here the head has {share:.0%} of the weights used in multiplications, in Llama-3 8B
  {share_8b:.0%}. With a larger share, ours gains more on long prompts and less on short ones.
- A caching allocator: on the CPU, large tensors get new pages from the system. This took 8 to 15%
  of a published step, 6 to 10% of ours, and almost nothing of TRL's.
- Several workers, ZeRO, communication, checkpoints, reading rows, storing log-probs.
- TRL with a live reference, its default, which needs one more forward pass.
- Real data: the lengths of a row's answers are independent here; in real rows they are often
  similar.
"""


GPU_TEXT = """# On a GPU: training, one step side by side

One WRPO step (forward and backward of {rows} rows, and the optimizer's) on {machine}, in bf16. The
contenders and columns are those of [the measurement on a CPU](#training-one-step-side-by-side).
`train.py --device cuda` measures it.

{published}

{trl}

{memory}

- A Llama of {weights:.0f}M random weights: width {hidden}, {layers} layers, vocabulary
  {vocabulary}; the head has {share:.0%} of the weights used in multiplications. An answer has
  {answer_mean} tokens on average.
- Medians of {repeats} steps after a warm-up, in turn, with the GPU synchronised. Tokens of a step
  by r, for ours and for published with its padding: {tokens}.
- The gradients of ours and published differ by at most {difference:.3f} of their norm: ours come
  from the varlen kernel, published's from `sdpa`, both in bf16.
- Versions: {versions}.

What it does not show: other values of r; FlashAttention in the peers; a fully used GPU. Where our
step takes the same time at a larger r with more tokens, kernel launches limit it, and the ratios
stay below those of the work: to be comparable, micro-batches hold two short rows here, while our
training fills them to `micro_batch_tokens`, by default what fits.
"""


def _mb(size: float) -> float:
    return size / 1e6


def machine(device: torch.device) -> str:
    """The kind of machine, without its name."""
    return results.machine(gpu=device.type == "cuda")


def versions() -> dict[str, str]:
    """Of what was compared."""
    return results.versions("torch", "transformers", "trl", "wrpo-ray")
