"""The paper's whole run as pools, trainings and pauses for the simulator: what needs what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from roofline import FEED, MODELS, PEAK, TRAIN_MFU, training_step
from simulation import Chunk, Gang, Pause, Source

from wrpo_ray import config

SIGMA = 0.8
"""Spread of the answers' lengths, the standard deviation of their logarithms."""
START = 60.0
"""Seconds from the process of an engine to its first answer, without its weights: imports, NCCL,
memory profile and CUDA graphs."""
TRAINING_START, SAVE = 90.0, 30.0
"""Seconds until workers train, with the weights; and to write what they trained."""
FILLS = 6
"""Times that the buckets in hand fill an engine's slots; at least two are."""
SHORT = 15.0
"""Seconds of a step without a model, such as choosing y_ws: tasks, and reading and writing."""
SPLITS = ("sft", "preference")
Overlap = Literal["", "branches", "all"]
"""Parts of the chain that run side by side: none, SFT and its answers beside the sources, or also
reference log-probs bucket by bucket and the start of WRPO."""
ALL: Overlap = "all"


def lengths(count: int, mean: float, most: int, seed: int) -> np.ndarray:
    """Tokens of answers: log-normal, cut at `most`, and then of this mean."""
    drawn = np.exp(np.random.default_rng(seed).normal(0, SIGMA, count))
    scale = mean
    for _ in range(20):
        scale *= mean / np.minimum(drawn * scale, most).mean()
    return np.maximum(1, np.minimum(drawn * scale, most).round())


def cut(tokens: np.ndarray, buckets: int, chunk: int, seed: int) -> list[list[Chunk]]:
    """Prompts (rows of their answers' tokens) into buckets by hash, and those into chunks."""
    bucket = np.random.default_rng(seed).integers(0, buckets, len(tokens))
    order = np.argsort(bucket, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(bucket, minlength=buckets))[:-1])
    return [
        [tokens[part[i : i + chunk]].ravel().tolist() for i in range(0, len(part), chunk)]
        for part in parts
    ]


@dataclass(frozen=True)
class Fusion:
    """The run of a config, cut into buckets, for so many nodes."""

    settings: config.Config
    nodes: int
    gpus: int = 8
    buckets: int = 1024
    chunk: int = 64
    share: float = 1.0
    """Of the prompts."""
    fills: float = FILLS
    """0: an engine has as many buckets in hand as the policy says."""
    is_wide: bool = True
    """Whether trainings have as many nodes as their steps feed; else one."""
    overlaps: Overlap = "all"
    """What begins as soon as it can; all else waits for the phase before."""

    @cached_property
    def prompts(self) -> int:
        """Of both splits."""
        return round((self.settings.plan.prompts or 0) * self.share)

    @property
    def batch(self) -> int:
        """Rows of a training step."""
        return self.settings.wrpo.batch_size

    @cached_property
    def splits(self) -> dict[str, tuple[int, int]]:
        """(prompts, buckets) of each split."""
        sft = self.settings.split.sft
        prompts, buckets = round(self.prompts * sft), max(1, round(self.buckets * sft))
        rest = (self.prompts - prompts, max(1, self.buckets - buckets))
        return {"sft": (prompts, buckets), "preference": rest}

    def pool(self, name: str, seed: int, splits: Sequence[str] = SPLITS) -> Source:
        """A model that answers the prompts of these splits, one split after the other."""
        model, plan, sampling = MODELS[name], self.settings.plan, self.settings.sampling
        count = sum(self.splits[split][0] for split in splits)
        drawn = lengths(count * sampling.samples, plan.output_tokens, sampling.max_tokens, seed)
        # the answers that are under way at some moment are the longer ones
        context = plan.prompt_tokens + (drawn**2).mean() / (2 * drawn.mean())
        steps = model.steps(context, plan.prompt_tokens / sampling.samples, drawn.mean())
        tokens, first = drawn.reshape(count, sampling.samples), 0
        buckets: list[Sequence[Chunk]] = []
        groups: list[str] = []
        for split in splits:
            prompts, number = self.splits[split]
            buckets += cut(tokens[first : first + prompts], number, self.chunk, seed)
            groups += [f"{name} {split}"] * number
            first += prompts
        return Source(
            name, model.gpus, self.nodes * self.gpus // model.gpus,
            (len(steps) - 1) / steps[-1], START, buckets, slots=len(steps) - 1, steps=steps,
            in_hand=self._in_hand(len(steps) - 1, len(drawn) / len(buckets)),
            bytes=model.bytes, groups=groups,
        )  # fmt: skip

    def _in_hand(self, slots: int, bucket: float) -> int:
        """Buckets of so many answers that an engine works on."""
        return max(2, math.ceil(self.fills * slots / bucket)) if self.fills else 0

    @cached_property
    def sources(self) -> list[Source]:
        """The pools that answer all prompts."""
        return [self.pool(m.name, seed) for seed, m in enumerate(self.settings.models)]

    def forward(self, name: str, model: str, work: Sequence[float], **fields: object) -> Source:
        """A pool that reads so many tokens for each bucket."""
        size = MODELS[model]
        made = Source(
            name, size.gpus, self.nodes * self.gpus, size.forward_rate, START,
            [[[tokens]] for tokens in work], slots=1, half=0, bytes=size.bytes,
        )  # fmt: skip
        return replace(made, **fields)  # type: ignore[arg-type]

    def read(self, source: Source) -> list[float]:
        """Tokens of prompts and answers of each bucket, as a reward reads them."""
        prompt = self.settings.plan.prompt_tokens
        return [sum(prompt + n for c in bucket for n in c) for bucket in source.buckets]

    def width(self, tokens: float) -> int:
        """Nodes of a training whose steps have so many tokens: all that these feed."""
        return min(self.nodes, max(1, int(tokens / FEED / self.gpus)))

    def training_seconds(self, rows: int, tokens: float, nodes: int) -> float:
        """Of rows of so many tokens."""
        weights, gpus = MODELS["llama3-8b"].weights, self.gpus
        step = training_step(weights, self.batch * tokens, nodes * gpus, gpus)
        return rows / self.batch * step + SAVE

    def training(self, name: str, rows: int, answers: int, nodes: int = 0) -> Gang:
        """SFT or WRPO, on so many nodes; 0 is as many as it feeds, if they may be wide."""
        plan, weights = self.settings.plan, MODELS["llama3-8b"].weights
        tokens = plan.prompt_tokens + answers * plan.output_tokens
        nodes = nodes or (self.width(self.batch * tokens) if self.is_wide else 1)
        useful = 8 * weights * rows * tokens / (PEAK * TRAIN_MFU)
        seconds = self.training_seconds(rows, tokens, nodes)
        return Gang(name, nodes, seconds, useful, TRAINING_START)

    def chain(self) -> tuple[list[Source], list[Gang | Pause]]:
        """All pools, trainings and pauses.

        Serial: all answers and their scores side by side, then SFT, then answers of target-SFT and
        their scores, then pairs, reference log-probs and WRPO. With branches, as jobs run where
        there is room, SFT and the answers of target-SFT run beside the sources.
        """
        sources = self.sources
        target = replace(self.pool("sft", 99, SPLITS[1:]), after=frozenset({"sft training"}))
        rewards = self._scores("scores", sources)
        number = {place: n for n, (place,) in enumerate(rewards.fed_by)}
        others = self._scores("scores of target-SFT", [target])
        early = {"scores sft"} if self.overlaps else {"scores sft", "scores preference"}
        select = Pause("select", SHORT + SHORT, frozenset(early))  # and SFT's rows
        rows = {split: prompts for split, (prompts, _) in self.splits.items()}
        sft = self.training("sft training", rows["sft"], 1, 1)
        sft = replace(sft, after=frozenset({"select"}))
        wrpo = self.training("wrpo training", rows["preference"], 3)
        answers = frozenset(f"{s.name} preference" for s in [*sources, target])
        starts_after = answers if self.overlaps == ALL else None
        wrpo = replace(wrpo, after=frozenset({"reference"}), starts_after=starts_after)
        pair = Pause("pair", SHORT, frozenset({"scores of target-SFT", "scores preference"}))
        last = self._reference(number)
        return [*sources, target, rewards, others, last], [select, sft, pair, wrpo]

    def _scores(self, name: str, pools: Sequence[Source]) -> Source:
        """The reward of each bucket of these pools, in the order of the splits."""
        order = sorted(
            (s.groups[b].split()[-1] == "preference", b, s.name)
            for s in pools for b in range(len(s.buckets))
        )  # fmt: skip
        read = {s.name: self.read(s) for s in pools}
        return self.forward(
            name, "reward-8b", [read[source][b] for _, b, source in order],
            fed_by=[[(source, b)] for _, b, source in order], weights="reward",
            groups=[
                name if len(pools) == 1 else f"{name} {SPLITS[is_preference]}"
                for is_preference, *_ in order
            ],
        )  # fmt: skip

    def _reference(self, number: dict[tuple[str, int], int]) -> Source:
        """Reference log-probs of a bucket's pairs, as soon as all its answers have scores."""
        plan = self.settings.plan
        prompts, buckets = self.splits["preference"]
        first = self.splits["sft"][1]
        each = prompts / buckets * (plan.prompt_tokens + 3 * plan.output_tokens)
        made = self.forward("reference", "llama3-8b", [each] * buckets, weights="sft")
        if self.overlaps != ALL:
            return replace(made, after=frozenset({"pair"}))
        fed_by = [
            [("scores", number[s.name, first + b]) for s in self.sources]
            + [("scores of target-SFT", b)]
            for b in range(buckets)
        ]  # fmt: skip
        return replace(made, fed_by=fed_by)
