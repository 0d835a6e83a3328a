"""One step of WRPO against prefix sharing as published for DPO, each at its best micro-batch.

    python benchmarks/sharing.py

Wang, Hegde: Accelerating Direct Preference Optimization with Prefix Sharing (arXiv 2410.20305):
answers are packed behind one prompt, and a mask keeps them from attending to each other. Here with
WRPO's three answers. Ours and this peer train the same rows, tokens and micro-batches, in turn in
one process, at each size of micro-batch; each has its fastest one within the same memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from report import Cell
from torch import Tensor
from train import (
    ALPHA,
    LOSS,
    MICRO_ROWS,
    SIGMA,
    Contender,
    Ours,
    Shape,
    gradients_differ,
    least_budget,
    make_rows,
    peak_bytes,
    seconds,
)

from wrpo_ray.llm.attention import Layout
from wrpo_ray.stages.train.loss import Answers, preference_loss
from wrpo_ray.stages.train.packing import Batch, assign_micro_batches, costs, pack
from wrpo_ray.stages.train.rows import Row

CELL = Cell(1.6)
SIZES = (1, 2, 3, 6)
"""Rows of a micro-batch, on average."""


# --- the peer -----------------------------------------------------------------------------------


class Sharing(Contender):
    """Prefix sharing with a mask, in transformers' own attention; stored reference log-probs.

    Its head sees answer tokens only, all of a micro-batch at once. FlexAttention on GPUs, as
    published, and `sdpa` on CPUs, where FlexAttention has no gradients.
    """

    def __init__(self, shape: Shape, device: torch.device):
        self.kind = "flex_attention" if device.type == "cuda" else "sdpa"
        super().__init__(shape.build(self.kind, device), device)

    def take(self, rows: list[Row]) -> None:
        """Set the budget, and store the log-probs of the reference."""
        self.rows = rows
        self.costs = costs(np.array([row.lengths for row in rows]), packed=True)
        self.tokens = sum(self.costs)
        self.budget = least_budget(self.costs)
        with torch.no_grad():
            self.stored = torch.cat([self.logps([row]) for row in rows])

    def accumulate(self) -> None:
        """Micro-batch by micro-batch."""
        for part in assign_micro_batches(self.costs, 1, self.budget)[0]:
            rows = [self.rows[i] for i in part]
            lengths = torch.tensor([row.lengths[1:] for row in rows], device=self.device)
            of_policy, of_reference, lengths = (
                Answers(*t.unbind(1)) for t in (self.logps(rows), self.stored[list(part)], lengths)
            )
            losses = preference_loss(of_policy, of_reference, lengths, LOSS, ALPHA)
            (losses.sum() / len(self.rows)).backward()

    def logps(self, rows: Sequence[Row]) -> Tensor:
        """Summed log-probs of the answers, (rows, 3)."""
        batch = pack(rows).to(self.device)
        hidden = self.model.model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=self._mask(batch),
            use_cache=False,
        ).last_hidden_state[0, batch.predict]
        logits = self.model.lm_head(hidden).float()
        each = -F.cross_entropy(logits, batch.targets, reduction="none")
        answers = each.split([len(answer) for row in rows for answer in row.answers])
        return torch.stack([answer.sum() for answer in answers]).reshape(-1, 3)

    def _mask(self, batch: Batch) -> Any:
        assert batch.layout is not None
        block, prompt = (t.to(self.device) for t in blocks_of(batch.layout))
        if self.kind == "sdpa":
            place = torch.arange(len(block))
            return sees(block, prompt, place[:, None], place)[None, None]
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(block, prompt, query, key)

        return create_block_mask(rule, None, None, len(block), len(block), device=self.device)


def blocks_of(layout: Layout) -> tuple[Tensor, Tensor]:
    """Of each token the number of its block, a prompt or an answer, and that of its prompt."""
    prompts = [n if block.prefix is None else block.prefix for n, block in enumerate(layout.blocks)]
    block = torch.repeat_interleave(torch.tensor(layout.lengths))
    return block, torch.tensor(prompts)[block]


def sees(block: Tensor, prompt: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether a query attends to a key: an earlier token of its own block or of its prompt."""
    shared = (block[query] == block[key]) | (prompt[query] == block[key])
    return (query >= key) & shared


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """A contender's step with micro-batches of so many rows."""

    rows: int
    peak: int
    """Bytes above weights, gradients and optimizer states."""
    time: float
    """Seconds, the median."""


def measure(
    contenders: dict[str, Contender], rows: list[Row], sizes: Sequence[int], repeats: int
) -> dict[str, list[Tried]]:
    """Peaks and times of both at each size, in turn.

    Raises:
        AssertionError: their gradients differ.
    """
    found: dict[str, list[Tried]] = {name: [] for name in contenders}
    device = contenders["ours"].device
    for contender in contenders.values():
        contender.take(rows)
    for size in sizes:
        for contender in contenders.values():
            contender.budget = least_budget(contender.costs, size)
        peaks = {name: peak_bytes(c.step, device) for name, c in contenders.items()}
        apart = gradients_differ(*(c.model for c in contenders.values()))
        assert apart < (1e-3 if device.type == "cpu" else 0.05), f"gradients differ by {apart}"
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(repeats):
            for name, contender in contenders.items():
                times[name].append(seconds(contender.step, device))
        for name, taken in times.items():
            found[name].append(Tried(size, peaks[name], statistics.median(taken)))
        print(size, peaks, times, f"gradients differ by {apart:.2g}", flush=True)
    return found


def best(tried: Sequence[Tried], memory: int) -> Tried:
    """The fastest within so many bytes."""
    return min((t for t in tried if t.peak <= memory), key=lambda t: t.time)


# --- the command line ---------------------------------------------------------------------------


SECTION = """# Training: one step against prefix sharing

Prefix sharing as published for DPO ([arXiv 2410.20305](https://arxiv.org/abs/2410.20305)), written
again for WRPO's three answers, and given what it can have: `sharing.py` packs them behind their
prompt under a mask, takes logits of answer tokens alone, and stores the reference's log-probs. So
both train the same tokens, in the same micro-batches. Each has its fastest size of micro-batch
within the same memory above weights, gradients and optimizer: the peer's with two rows, {limit:.0f}
MB. Ratio: peer / ours.

| each at its best | ours | prefix sharing | ratio |
| --- | --- | --- | --- |
| step, s | {time:.3g} | {peer_time:.3g} | **{ratio:.2f}** |
| rows a micro-batch | {rows} | {peer_rows} | |

| rows a micro-batch | ours, s | prefix sharing, s | ratio | ours, MB | prefix sharing, MB | ratio |
| --- | --- | --- | --- | --- | --- | --- |
{lines}

- {machine}, one thread, CPU time; medians of {repeats} steps, in turn. A Llama of width {hidden},
  {layers} layers, vocabulary {vocabulary}, fp32; {count} rows, prompts {prompts:g} times as long as
  an answer (48 tokens), lengths spread. Gradients agree within 1e-3. Load average {load:.1f}.
- On a CPU the mask is dense in `sdpa`, so attention between rows is computed and thrown away, the
  more so the more rows there are; the published code has FlexAttention on GPUs, which skips blocks.
  What is left of the difference is the head, by chunks in ours. On a GPU it is not measured.
- Published by others, not measured here, and not comparable with a step on a CPU: open-instruct's
  DPO with packing, OLMo2-7B, 16 H100s, 16k tokens: 22.5 % MFU
  ([pull request 1466](https://github.com/allenai/open-instruct/pull/1466)), and later about 32 %
  ([1720](https://github.com/allenai/open-instruct/pull/1720)). OpenRLHF states 1.22 to 1.68 times
  verl's speed in RL with long answers ([arXiv 2405.11143](https://arxiv.org/abs/2405.11143)), and
  none for DPO that we found.
- Versions: {versions}.
"""


def told(found: dict[str, list[Tried]], options: argparse.Namespace) -> tuple[list[Any], str]:
    """Rows of results.json, and the section."""
    pairs = list(zip(found["ours"], found["sharing"], strict=True))
    limit = next(peer.peak for _, peer in pairs if peer.rows == MICRO_ROWS)
    ours, peer = (best(found[name], limit) for name in ("ours", "sharing"))
    versions = results.versions("torch", "transformers", "wrpo-ray")
    about = {"machine": results.machine(), "versions": versions}
    name = f"train.sharing.{CELL.name}"
    same_rows, same_peer = next(pair for pair in pairs if pair[1].rows == MICRO_ROWS)
    rows = [
        results.row(f"{name}.step_time", ours.time, peer.time, "s", about),
        results.row(f"{name}.memory", same_rows.peak / 1e6, same_peer.peak / 1e6, "MB", about),
    ]
    lines = [
        f"| {a.rows} | {a.time:.3g} | {b.time:.3g} | {b.time / a.time:.2f} "
        f"| {a.peak / 1e6:.0f} | {b.peak / 1e6:.0f} | {b.peak / a.peak:.2f} |"
        for a, b in pairs
    ]
    section = SECTION.format(
        **vars(options),
        limit=limit / 1e6, time=ours.time, rows=ours.rows, peer_time=peer.time,
        peer_rows=peer.rows, ratio=peer.time / ours.time, lines="\n".join(lines),
        machine=about["machine"], prompts=CELL.ratio, load=os.getloadavg()[2],
        versions=", ".join(f"{name} {v}" for name, v in versions.items()),
    )  # fmt: skip
    return rows, section


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=2**15)
    parser.add_argument("--count", type=int, default=6, help="rows of a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    shape = Shape(options.hidden, options.layers, options.vocabulary)
    contenders = {"ours": Ours(shape, device), "sharing": Sharing(shape, device)}
    for contender in contenders.values():  # gradients and the optimizer's states
        contender.take(make_rows(MICRO_ROWS, 8, 1.0, 0.0, shape.vocabulary))
        contender.step()
    rows = make_rows(options.count, 48, CELL.ratio, SIGMA, shape.vocabulary)
    found = measure(contenders, rows, SIZES, options.repeats)
    made, section = told(found, options)
    print(section)
    results.save(options.output, "train.sharing.", made, section)


if __name__ == "__main__":
    main()
