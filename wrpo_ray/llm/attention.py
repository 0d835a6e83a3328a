"""Attention of packed rows with a shared prompt, through transformers' AttentionInterface.

Model code is not forked: the model is loaded with `attn_implementation=SHARED_PROMPT`, and the
layout of the micro-batch comes as a keyword of its forward. For a name that has no mask function
transformers makes no mask (5.23: `_preprocess_mask_arguments`). Two ways, equal in value:
`by_blocks` runs anywhere; `by_varlen` is for CUDA in half precision without a soft cap.
H query heads, K key heads, T tokens, D head size.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor

SHARED_PROMPT = "wrpo_shared_prompt"
SPANS = re.compile(r"window|chunk|local|block|span|top_?k|stride|floor_scale")
"""Words in the keys of a config whose numbers limit attention, in tokens."""


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens that attend causally to themselves, and to all of an earlier block, `prefix`."""

    length: int
    prefix: int | None = None
    """Index of the block of the row's prompt; None for a prompt."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The blocks of a packed sequence, in order; together they cover it."""

    blocks: tuple[Block, ...]
    masks: dict[Any, Tensor] = field(default_factory=dict, compare=False)
    """Masks and indices of the attention, computed once for all layers."""

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Self:
        """That of rows, each its tokens of the prompt, which may be none, and of each answer."""
        blocks: list[Block] = []
        for prompt, *answers in rows:
            prefix = len(blocks) if prompt else None
            blocks += [Block(prompt)] * bool(prompt)
            blocks += [Block(answer, prefix) for answer in answers]
        return cls(tuple(blocks))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each block."""
        return [block.length for block in self.blocks]

    @property
    def positions(self) -> Tensor:
        """The position of each token, (T,): an answer's go on from its prompt's."""
        befores = [(self.prefix_length(block), block) for block in self.blocks]
        return torch.cat([torch.arange(n, n + block.length) for n, block in befores])

    def prefix_length(self, block: Block) -> int:
        """Tokens of the block's prompt."""
        return 0 if block.prefix is None else self.blocks[block.prefix].length


def register() -> None:
    """Register SHARED_PROMPT with transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)


def shared_prompt_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    Takes (1, H, T, D) and twice (1, K, T, D), returns (1, T, H, D).

    Dropout is not applied: it is off in training here (see `model.disable_dropout`).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_one_kernel(query, softcap):
        return by_varlen(query, key, value, layout, scale, sliding_window), None
    return by_blocks(query, key, value, layout, scale, sliding_window, softcap), None


def is_one_kernel(query: Tensor, softcap: float | None) -> bool:
    """Whether attention of such queries is `by_varlen`."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type in ("cuda", "meta") and half and softcap is None


def by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention block by block; (1, T, H, D)."""
    # split, unlike a slice for each block, has a backward that touches each token once
    queries, keys, values = (t.split(layout.lengths, dim=2) for t in (query, key, value))
    out = []
    for number, block in enumerate(layout.blocks):
        own_keys, own_values = keys[number], values[number]
        if block.prefix is not None:
            own_keys = torch.cat([keys[block.prefix], own_keys], dim=2)
            own_values = torch.cat([values[block.prefix], own_values], dim=2)
        mask = _mask(layout, block, window, query.device)
        out.append(_attend(queries[number], own_keys, own_values, mask, scale, softcap))
    return torch.cat(out, dim=2).transpose(1, 2)


def _mask(layout: Layout, block: Block, window: int | None, device: torch.device) -> Tensor | None:
    """(queries, keys), true where a query attends to a key; None for a plain causal mask."""
    before = layout.prefix_length(block)
    narrow = window is not None and before + block.length > window
    if before == 0 and not narrow:
        return None
    key = before, block.length, window if narrow else None
    if key not in layout.masks:
        place = torch.arange(before + block.length, device=device)
        distance = place[before:, None] - place  # (queries, keys)
        seen = distance >= 0
        layout.masks[key] = seen & (distance < window) if narrow and window else seen
    return layout.masks[key]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, is_causal=mask is None, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).tril()
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide)
    return weights.to(value.dtype) @ value


def by_varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None
) -> Tensor:
    """Attention of all blocks in one flash kernel; (1, T, H, D).

    Each block is one sequence whose keys are its prompt's and its own. Queries are at the end of
    their keys (the kernel aligns causal masks at the bottom right).
    """
    from torch.nn.attention.varlen import varlen_attn

    at = _sequences(layout, query.device)
    queries, keys, values = (  # (T, heads, D)
        t.squeeze(0).transpose(0, 1) for t in (query, key, value)
    )
    keys, values = _Copies.apply(keys, values, at["sequences"], at["sorted"], at["copies_at"])
    out = varlen_attn(
        queries,
        keys,
        values,
        at["queries_at"],
        at["keys_at"],
        max(layout.lengths),
        max(layout.prefix_length(block) + block.length for block in layout.blocks),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


class _Copies(torch.autograd.Function):  # type: ignore[misc]
    """Keys and values (T, K, D) of each block's prompt and its own, (copies, K, D).

    The gradient of a token is the sum of its copies', in fp32 and always in the same order.
    """

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, values: Tensor, index: Tensor, in_order: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(in_order, starts)
        return keys.index_select(0, index), values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, keys: Tensor, values: Tensor) -> tuple[Tensor | None, ...]:
        in_order, starts = ctx.saved_tensors
        sums = (
            F.embedding_bag(in_order, t.flatten(1), starts, mode="sum").view(-1, *t.shape[1:])
            for t in (keys, values)
        )
        return *sums, None, None, None


def _sequences(layout: Layout, device: torch.device) -> dict[Any, Tensor]:
    """Indices of all blocks' keys, and where each block's queries and keys start.

    And for each token its copies among these keys: where they are, sorted by token (`sorted`), and
    where in that order they start (`copies_at`).
    """
    if "sequences" not in layout.masks:
        tokens = sum(layout.lengths)
        places = torch.arange(tokens).split(layout.lengths)
        keys = [
            own if block.prefix is None else torch.cat([places[block.prefix], own])
            for block, own in zip(layout.blocks, places, strict=True)
        ]
        index = torch.cat(keys)
        counts = index.bincount(minlength=tokens)
        made = {
            "sequences": index,
            "sorted": index.argsort(stable=True),
            "copies_at": counts.cumsum(0) - counts,
            "queries_at": _starts(layout.lengths),
            "keys_at": _starts([len(k) for k in keys]),
        }
        layout.masks.update({name: tensor.to(device) for name, tensor in made.items()})
    return layout.masks


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# --- what a config says of attention -----------------------------------------------------------


def reachable_spans(settings: Any, max_length: int) -> list[int]:
    """The windows, chunks and the like of a model's config that rows can exceed, in tokens."""
    return [span for span in spans(settings.to_dict()) if span < max_length]


def spans(settings: Any, key: str = "") -> Iterator[int]:
    """Numbers of a config whose key, or a parent's key, names a span of tokens."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from spans(value, f"{key}.{name}")
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from spans(value, key)
    elif isinstance(settings, int) and not isinstance(settings, bool) and SPANS.search(key):
        yield settings


def changing_positions(settings: Any, max_length: int) -> tuple[str, int] | None:
    """The kind of positions that depend on the longest row of a forward pass, and from where on.

    None where no row of `max_length` tokens is that long. transformers 5.23 chooses the scaling of
    these kinds by the greatest position of a forward pass.
    """
    rope = getattr(settings, "rope_parameters", None) or {}
    for kind in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if (name := kind.get("rope_type")) not in ("longrope", "dynamic"):
            continue
        original = kind.get("original_max_position_embeddings") or settings.max_position_embeddings
        if max_length > original:
            return name, original
    return None
