"""Packs rows into micro-batches: the prompt of a row once, then its answers, without padding.

A packed micro-batch is one sequence: prompt, answer, answer, answer, prompt, answer, ... An
answer attends to its own row's prompt and to itself; its positions continue the prompt's. `pad`
makes the usual form of the same micro-batch: a padded sequence of prompt and answer per answer.

R rows, A answers of all rows, S sequences, T tokens, N answer tokens of all answers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from wrpo_ray.llm.attention import Layout
from wrpo_ray.stages.train.rows import Row


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, packed or padded, for the log-probs of its A answers."""

    ids: Tensor  # (S, T); S is 1 if packed
    positions: Tensor  # (S, T)
    predict: Tensor  # (N,): the flat index of the token that predicts each answer token
    targets: Tensor  # (N,): the answer tokens
    answer_mask: Tensor  # (A, longest answer): true on the tokens of each answer
    attention_mask: Tensor | None = None  # (S, T): 1 on tokens, if padded
    layout: Layout | None = None  # if packed

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, (A,)."""
        return self.answer_mask.sum(1)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self.size if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def size(self) -> int:
        """Tokens with padding."""
        return int(self.ids.numel())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{n: v.to(device) if torch.is_tensor(v) else v for n, v in moved.items()})


def costs(lengths: np.ndarray, *, packed: bool) -> list[int]:
    """Tokens of each row in a forward pass, from its (R, 1 + answers) prompt and answer tokens.

    Padded, every row costs as much as the longest, whatever rows share its micro-batch.
    """
    if packed:
        return [int(total) for total in lengths.sum(1)]
    longest = int((lengths[:, 0] + lengths[:, 1:].max(1)).max())
    return [longest * (lengths.shape[1] - 1)] * len(lengths)


def pack(rows: Sequence[Row]) -> Batch:
    """Pack rows into one sequence, each prompt once.

    Example:
        >>> ids = np.array([5, 6, 7], np.int32)
        >>> row = Row("p1", prompt=ids, answers=(ids[:1], ids[:2], ids[:1]))
        >>> batch = pack([row])
        >>> batch.size, batch.lengths.tolist()
        (7, [1, 2, 1])
    """
    layout = Layout.of([row.lengths for row in rows])
    ends = np.cumsum(layout.lengths)
    answers = [answer for row in rows for answer in row.answers]
    predict = [
        _predictors(int(ends[block.prefix]) - 1, int(end) - block.length, block.length)
        for block, end in zip(layout.blocks, ends, strict=True)
        if block.prefix is not None
    ]
    return Batch(
        _tensor([part for row in rows for part in (row.prompt, *row.answers)])[None],
        layout.positions[None],
        _tensor(predict),
        _tensor(answers),
        _answer_mask([len(answer) for answer in answers]),
        layout=layout,
    )


def pad(rows: Sequence[Row]) -> Batch:
    """Pad rows to one sequence per answer; padding is on the right.

    Example:
        >>> ids = np.array([5, 6, 7], np.int32)
        >>> row = Row("p1", prompt=ids, answers=(ids[:1], ids[:2], ids[:1]))
        >>> pad([row]).ids.shape
        torch.Size([3, 5])
    """
    pairs = [(row.prompt, answer) for row in rows for answer in row.answers]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros((len(pairs), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    predict = []
    for number, (prompt, answer) in enumerate(pairs):
        length, start = len(prompt) + len(answer), number * longest
        ids[number, :length] = _tensor([prompt, answer])
        mask[number, :length] = 1
        last = start + len(prompt)
        predict.append(_predictors(last - 1, last, len(answer)))
    return Batch(
        ids,
        (mask.cumsum(1) - 1).clamp(min=0),
        _tensor(predict),
        _tensor([answer for _, answer in pairs]),
        _answer_mask([len(answer) for _, answer in pairs]),
        attention_mask=mask,
    )


def _predictors(prompt_end: int, start: int, length: int) -> np.ndarray:
    """Indices of the tokens that predict an answer at `start`: one before each of its tokens."""
    return np.array([prompt_end, *range(start, start + length - 1)])[:length]


def _tensor(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _answer_mask(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# --- micro-batches ------------------------------------------------------------------


TRIES = 6
"""Most numbers of micro-batches that are tried to find the least one."""


def assign_micro_batches(
    costs: Sequence[int], workers: int, budget: int
) -> list[list[tuple[int, ...]]]:
    """Assign rows to micro-batches: for each worker a list of tuples of indices into `costs`.

    All workers get the same number of micro-batches, some of them empty if rows are few, and about
    the same number of tokens. A micro-batch exceeds `budget` only if a single row does. Takes
    R log R steps.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    bins = _least_bins(costs, order, workers, budget)
    loads = [sum(costs[i] for i in rows) for rows in bins]
    ranked = sorted(range(len(bins)), key=lambda number: (-loads[number], bins[number]))
    assigned: list[list[tuple[int, ...]]] = [[] for _ in range(workers)]
    for place, number in enumerate(ranked):  # in alternating order, so that loads are even
        turn, worker = divmod(place, workers)
        assigned[worker if turn % 2 == 0 else workers - 1 - worker].append(tuple(bins[number]))
    return assigned


def micro_batches_of(
    worker: int, costs: Sequence[int], workers: int, budget: int
) -> list[tuple[tuple[int, ...], bool]]:
    """One worker's micro-batches, tuples of indices into `costs`, and whether each is real.

    In place of an empty one is a dummy, which keeps the number of forward passes equal on all
    workers (ZeRO-3 gathers weights in each); what it gives has to be left out.
    """
    cheapest = int(np.argmin(costs))
    assigned = assign_micro_batches(costs, workers, budget)
    return [(part or (cheapest,), bool(part)) for part in assigned[worker]]


def _least_bins(
    costs: Sequence[int], order: Sequence[int], workers: int, budget: int
) -> list[list[int]]:
    """Bins within the budget, as few as are found.

    Bins whose number grows as they are filled are always enough. If the number is given from the
    start, loads are more even, and often fewer are enough.
    """
    low = _at_least(costs, workers, budget)
    found = _fill(costs, order, low * workers, budget, more=workers)
    assert found is not None  # it grows
    high = len(found) // workers
    if high > low:
        found = _fill(costs, order, high * workers, budget) or found
    for _ in range(TRIES):
        if low >= high:
            break
        middle = (low + high) // 2
        tried = _fill(costs, order, middle * workers, budget)
        if tried is None:
            low = middle + 1
        else:
            found, high = tried, middle
    return found


def _at_least(costs: Sequence[int], workers: int, budget: int) -> int:
    """Fewer micro-batches of each worker cannot hold the rows; those above budget / 2 are alone."""
    alone = sum(2 * cost > budget for cost in costs)
    whole = math.ceil(sum(min(cost, budget) for cost in costs) / budget)
    return max(1, math.ceil(min(max(alone, whole), len(costs)) / workers))


def _fill(
    costs: Sequence[int], order: Sequence[int], count: int, budget: int, more: int = 0
) -> list[list[int]] | None:
    """Longest row first (`order`), each into the bin with the fewest tokens.

    Where not even that one has room, `more` bins are added; None if that is 0.
    """
    heap = [(0, number) for number in range(count)]
    filled: list[list[int]] = [[] for _ in range(count)]
    for index in order:
        if heap[0][0] and heap[0][0] + costs[index] > budget:
            if not more:
                return None
            for number in range(len(filled), len(filled) + more):
                heapq.heappush(heap, (0, number))
                filled.append([])
        load, number = heap[0]
        filled[number].append(index)
        heapq.heapreplace(heap, (load + costs[index], number))
    return filled
