"""The peak memory of a training worker, as a pure function of the model's sizes and the config.

Sums what exists at once in the backward pass of a micro-batch, term by term of the code: weights,
gradients and optimizer by DeepSpeed's stage (`deepspeed`), what the layers keep for the backward
pass (`attention`, transformers' decoder layers), the head (`logprobs`). `benchmarks/memory.py`
holds it against measured peaks. Not covered: fragmentation, and models whose layers are no decoder
layers with gated MLPs. P parameters, W workers, T tokens, H width; s bytes of the precision.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from wrpo_ray.config import LoraConfig, TrainConfig
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.node_memory import Room
from wrpo_ray.stages.train.sizes import Sizes

CHUNK, MOST_CHUNK = 2**24, 2**27
"""Most logits in memory at once: 64 MB in fp32 on CPUs, up to 512 MB on GPUs (`chunk_on`)."""
BUCKET = 50_000_000
"""Elements that ZeRO reduces or gathers at once."""
SUB_GROUP = 100_000_000
"""Elements that ZeRO stage 3 updates at once; their gradients are copied for it."""
FILE_BYTES = 1 << 30
"""Bytes of a checkpoint's file, which are copied before it is written."""
FORWARD_TOKENS = 4
"""Factor on the micro-batch size of a forward pass without a backward pass."""
BESIDE_TRAINING = 2
"""The same on training workers: it keeps no more than a step, whose backward pass with
checkpointing keeps a layer with its gradients (`_activations`)."""
PROCESS = 0.75e9
"""A worker with torch, Ray, transformers and DeepSpeed, before it loads anything: 0.57 without Ray,
measured; Ray is a guess."""
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Shape:
    """The mean row of a micro-batch, in tokens, which decides what attention keeps."""

    prompt: float
    answer: float
    answers: int

    @property
    def tokens(self) -> float:
        """Tokens of a packed row."""
        return self.prompt + self.answers * self.answer

    @property
    def keys(self) -> float:
        """Keys of all blocks for each token: an answer's are its prompt's and its own."""
        return 1 + self.answers * self.prompt / self.tokens

    @property
    def pairs(self) -> float:
        """Elements of the masks of answers, for each token."""
        return self.answers * self.answer * (self.prompt + self.answer) / self.tokens


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    reference: float = 0.0
    process: float = 0.0

    @property
    def total(self) -> float:
        """All terms."""
        return float(sum(asdict(self).values()))

    def __str__(self) -> str:
        parts = [f"{name} {value / 1e9:.1f}" for name, value in asdict(self).items() if value]
        return f"{self.total / 1e9:.1f} GB ({', '.join(parts)})"


def worker_memory(
    sizes: Sizes,
    config: TrainConfig,
    tokens: int,
    shape: Shape,
    *,
    slim: bool,
    workers: int | None = None,
    process: float = PROCESS,
) -> Memory:
    """The peak of one of `workers` workers with micro-batches of `tokens` tokens.

    `slim`: whether layers keep less (`slimming`). On GPUs it is the memory of the GPU, where state
    that is offloaded is not counted.
    """
    workers = workers or config.workers
    stage, wide = config.stage_of(workers), BYTES[config.precision]
    whole, gpu = sizes.parameters, config.num_gpus > 0
    trained = sizes.adapters(config.lora.rank) if config.lora else whole
    held = whole + (trained if config.lora else 0)
    share = workers if stage == 3 else 1
    weights = wide * held / share
    if stage == 3:  # the layer at work, and what is fetched ahead
        weights += wide * min(held, sizes.layer + max(BUCKET, sizes.layer, sizes.head))
    if gpu and config.offload == "all":
        weights -= wide * held / share
    kept, at_work = _activations(sizes, config, tokens, shape, slim=slim)
    again = at_work if config.gradient_checkpointing else 0.0  # exists once the head's are gone
    return Memory(
        weights=weights,
        gradients=_gradients(trained, stage, wide, workers),
        optimizer=_optimizer(trained, stage, config, workers),
        activations=kept + at_work,
        head=max(0.0, _head(sizes, config, tokens, wide) - again),
        reference=wide * whole / share if config.has_second_model else 0.0,
        process=0.0 if gpu else process,
    )


def offloaded(sizes: Sizes, config: TrainConfig, workers: int) -> float:
    """Bytes of the node's memory that a worker on a GPU keeps its state in.

    fp32 masters, moments and gradients; with `all` the weights as well.
    """
    if not config.num_gpus or config.offload == "none":
        return 0.0
    whole = sizes.parameters
    trained = sizes.adapters(config.lora.rank) if config.lora else whole
    weights = BYTES[config.precision] * (whole + (trained if config.lora else 0))
    return (16.0 * trained + (weights if config.offload == "all" else 0)) / workers + PROCESS


def _gradients(trained: int, stage: int, wide: int, workers: int) -> float:
    """Sums in fp32; those of a micro-batch beside them, all of them up to stage 1."""
    if stage == 0:
        return 4.0 * trained
    if stage == 1:
        return 4.0 * trained + wide * trained
    own = trained / workers
    return 4.0 * own + 4.0 * min(own, SUB_GROUP) + 2 * wide * min(trained, BUCKET)


def _optimizer(trained: int, stage: int, config: TrainConfig, workers: int) -> float:
    """Adam's moments in fp32, and with ZeRO fp32 masters."""
    if stage == 0:
        return 8.0 * trained
    if config.num_gpus and config.offload != "none":
        return 0.0
    return 12.0 * trained / workers


def _activations(
    sizes: Sizes, config: TrainConfig, tokens: int, shape: Shape, *, slim: bool
) -> tuple[float, float]:
    """The tensors that layers keep, and the work of the layer whose gradient is computed.

    With checkpointing that layer is whole, and in it nothing else is computed again. The logits of
    routers that have a loss, and their softmax, are kept in any case.
    """
    wide, layer = BYTES[config.precision], _layer_bytes(sizes, config, shape, slim=slim)
    work = _work_bytes(sizes, config) if slim else layer
    routers = tokens * sizes.layers * 2 * wide * sizes.routed
    if not config.gradient_checkpointing:
        return tokens * sizes.layers * layer + routers, tokens * work
    again = wide * (sizes.inner + 2 * sizes.width) if slim else 0
    kept = sizes.layers * tokens * sizes.width * wide
    return kept + routers, tokens * (layer + again + work)


def _layer_bytes(sizes: Sizes, config: TrainConfig, shape: Shape, *, slim: bool) -> float:
    """Bytes for each token that a layer keeps for its backward pass.

    Two norms: each has its input; if not `slim` in fp32, and the normalized one before and after
    its gain. Attention: queries, keys, values, output, and the output's copy in the order of
    tokens. The MLP: both halves; if not `slim` also the activation and the product.
    """
    wide = BYTES[config.precision]
    norms = 2 * (wide if slim else 4 + 2 * wide) * sizes.width
    if config.num_gpus and config.precision == "bf16" and config.packing:
        attention = wide * (2 * sizes.queries + 2 * shape.keys * sizes.keys)  # one flash kernel
    else:
        keys = shape.keys if config.packing else 1  # heads of keys are repeated for the queries'
        masks = shape.pairs if config.packing else 0
        attention = wide * (3 * sizes.queries + 2 * keys * sizes.queries + masks)
    return norms + attention + (2 if slim else 4) * wide * sizes.inner


def _work_bytes(sizes: Sizes, config: TrainConfig) -> float:
    """Bytes for each token of a slim layer's gradients at once, with what is computed again.

    Either of the MLP's product, its halves and their gradients, or of a norm in fp32.
    """
    wide = BYTES[config.precision]
    return max(5 * wide * sizes.inner, 16 * sizes.width) + 3 * wide * sizes.width


def _head(sizes: Sizes, config: TrainConfig, tokens: int, wide: int) -> float:
    """Logits of a chunk with their copies; the gradient of the head's weight in fp32.

    On GPUs a chunk is counted as large as on the largest of them.
    """
    weight = 0 if config.lora else (4 + (wide if wide < 4 else 0)) * sizes.head
    if config.num_gpus == 0:
        return (12.0 + wide) * max(CHUNK, sizes.vocabulary) + weight
    logits = min(MOST_CHUNK, tokens * sizes.vocabulary)
    return 8.0 * max(logits, sizes.vocabulary) + weight


def chunk_on(memory: int) -> int:
    """Most logits at once on a GPU of so many bytes: 2^27 on 80 GB, 2^25 on 24, a power of two.

    They take 1 % of it. A head's traffic is its weights' for each chunk, so few chunks are fast.
    """
    return min(MOST_CHUNK, max(CHUNK, 1 << (memory // 512).bit_length() - 1))


def forward_tokens(config: TrainConfig) -> int:
    """Tokens of a micro-batch without a backward pass, which keeps one layer's activations only."""
    given = config.micro_batch_tokens
    if given == "auto":
        given = 8192 if config.num_gpus else MOST_CPU
    return FORWARD_TOKENS * given


# --- what fits ----------------------------------------------------------------------------------

LEAST = 512
"""Smallest micro-batch that `auto` chooses, in tokens: below it, matrix products are slow."""
MOST_CPU, MOST_GPU = 2048, 16384
"""Largest micro-batches of `auto`: more tokens are no faster there."""
SPARE = 0.85
"""Share of the free memory that `auto` fills by the estimate, which holds within 20 %."""
CERTAIN = 1.5
"""An estimate of so many times the free memory is refused although memory may become free."""


class Choice(NamedTuple):
    """A choice by the free memory; another one would add numbers in another order."""

    tokens: int
    """Of a micro-batch."""
    workers: int


@dataclass(frozen=True)
class Estimate:
    """Peaks of a worker of one training, for any of its settings."""

    sizes: Sizes
    config: TrainConfig
    shape: Shape
    longest: int
    """Tokens of the longest row, which is a micro-batch of its own if it has to be."""
    workers: int
    process: float = PROCESS
    is_slim: bool = True
    """Whether the model's layers keep less (`slimming`)."""

    def at(self, tokens: int, **changes: Any) -> Memory:
        """The peak with micro-batches of so many tokens, and these changes of the config."""
        config = self.config.model_copy(update=changes)
        workers = changes.get("workers", self.workers)
        return worker_memory(
            self.sizes,
            config,
            max(tokens, self.longest),
            self.shape,
            slim=self.is_slim,
            workers=workers,
            process=self.process,
        )

    def tokens(self, free: float) -> int:
        """`micro_batch_tokens`; for `auto` the largest power of two whose peak leaves a reserve.

        `free` is the memory for the worker with its process, in bytes.
        """
        given = self.config.micro_batch_tokens
        if given != "auto":
            return given
        tokens = MOST_GPU if self.config.num_gpus else MOST_CPU
        while tokens > LEAST and self.at(tokens).total > SPARE * free:
            tokens //= 2
        return tokens

    def choice(self, free: float, before: Choice | None = None) -> Choice:
        """Micro-batches for so many bytes, with the process.

        The choice of `before`, an interrupted try of as many workers, is kept while it fits.
        """
        if before and self._is_still_good(before, free):
            return before
        return Choice(self.tokens(free), self.workers)

    def _is_still_good(self, before: Choice, free: float) -> bool:
        given = self.config.micro_batch_tokens
        is_alike = before.workers == self.workers and given in ("auto", before.tokens)
        return is_alike and self.at(before.tokens).total <= free

    def check(self, room: Room, what: str, before: Choice | None = None) -> tuple[Choice, str]:
        """The choice, and a line that gives the peak and warns if memory is short.

        Raises:
            UserError: the peak exceeds the memory of the node or GPU, or by far what is free of it.
        """
        chosen = self.choice(room.free, before)
        tokens = chosen.tokens
        peak = self.at(tokens)
        told = f"{what}: micro-batches of {tokens:,} tokens need about {peak} for each worker"
        if peak.total <= room.free:
            return chosen, told
        most = min(room.total, CERTAIN * room.free)
        lack = f"{told}, of which {room.free / 1e9:.1f} GB are free"
        line = f"{lack}; {self.remedy(tokens, min(room.total, room.free))}"
        if peak.total > most:
            raise UserError(line)
        return chosen, f"{line} (it may fit if other processes end)"

    def check_node(self, room: Room, what: str) -> None:
        """Check that the node has memory for the state that GPUs offload to it.

        Raises:
            UserError: a worker's part is more than its room.
        """
        need = offloaded(self.sizes, self.config, self.workers)
        if need > room.total:
            raise UserError(
                f"{what}: offload: {self.config.offload} needs about {need / 1e9:.1f} GB of a "
                f"node's memory for each worker, and there are {room.total / 1e9:.1f} GB; set more "
                f"workers, on more nodes, or lora: {{rank: 16}}"
            )

    def remedy(self, tokens: int, room: float) -> str:
        """Which settings to change so that the peak is at most `room` bytes; few before many."""
        options = list(self._options(max(tokens, self.longest)))
        together = accumulate(options, lambda held, option: held | option)
        for changes in (*options, *together):
            if self._peak(tokens, changes) <= room:
                listed = ", ".join(f"{name}: {_yaml(value)}" for name, value in changes.items())
                return f"set {listed}"
        least = min([self._peak(tokens, o) for o in accumulate(options, dict.__or__)], default=0.0)
        least = least or self.at(tokens).total
        return (
            f"no setting makes it fit (the least is {least / 1e9:.1f} GB): take a smaller model, a "
            "lower max_length, or more memory"
        )

    def _peak(self, tokens: int, changes: dict[str, Any]) -> float:
        others = {name: value for name, value in changes.items() if name != "micro_batch_tokens"}
        return self.at(changes.get("micro_batch_tokens", tokens), **others).total

    def _options(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Changes that need less memory, those that cost least first."""
        config, smaller = self.config, 2 ** int(math.log2(max(2, tokens - 1)))
        while smaller >= max(LEAST, self.longest):
            yield {"micro_batch_tokens": smaller}
            smaller //= 2
        if not config.gradient_checkpointing:
            yield {"gradient_checkpointing": True}
        if self.workers > 1 and config.stage_of(self.workers) < 3:
            yield {"zero_stage": 3}
        if config.num_gpus and config.offload == "none":
            yield {"zero_stage": 3, "offload": "optimizer"}
        if config.num_gpus:
            yield from ({"zero_stage": 3, "workers": self.workers * n} for n in (2, 4, 8))
        if not config.lora:
            yield {"lora": LoraConfig()}


def _yaml(value: Any) -> str:
    if isinstance(value, LoraConfig):
        return f"{{rank: {value.rank}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
