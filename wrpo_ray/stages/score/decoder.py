"""A decoder's hidden states at the tokens that a reward reads; answers to a prompt share it.

Rows are the token ids of whole conversations. What all answers to a prompt begin with is computed
once: the rest of each is packed behind it, and attends to it and to itself (`llm.attention`). Where
the loaded model gives other states so, rows are computed one by one, padded on the right.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wrpo_ray.llm import attention
from wrpo_ray.llm.attention import Layout, changing_positions, reachable_spans

log = logging.getLogger(__name__)
Row = list[int]
Group = list[Row]
"""Conversations with the answers to one prompt, or any one conversation."""
Tokens = Callable[[Row], list[int]]
"""The places in a row at which states are read, as many for each."""
PROMPT, ANSWERS, ALONE = 4, (2, 3, 7), 5
"""Tokens of the shortest probe: a prompt with its answers, and a row on its own."""


class Decoder:
    """The body of a transformers decoder, whose hidden states are read at some tokens."""

    def __init__(self, body: Any, pad: int, device: str, max_length: int):
        self.body, self.pad, self.device = body, pad, device
        self.shares = self._can_share(max_length)
        """Whether the answers of a group share the computation of their prompt."""

    def states(self, groups: list[Group], tokens: Tokens) -> Tensor:
        """One forward pass: the states at P tokens of each of the groups' B rows, (B, P, H)."""
        return (self._packed if self.shares else self._padded)(groups, tokens)

    def _padded(self, groups: list[Group], tokens: Tokens) -> Tensor:
        """Padding is masked, and on the right, so that no token sees it."""
        rows = [row for group in groups for row in group]
        ids, mask = padded(rows, self.pad, self.device)
        states = self.body(input_ids=ids, attention_mask=mask, use_cache=False)[0]  # (B, T, H)
        return states[torch.arange(len(rows))[:, None], torch.tensor([*map(tokens, rows)])]

    def _packed(self, groups: list[Group], tokens: Tokens) -> Tensor:
        ids, layout, places = pack(groups, tokens)
        states = self.body(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=layout.positions[None].to(self.device),
            use_cache=False,
            layout=layout,
        )[0]  # (1, T, H)
        return states[0][torch.tensor(places)]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _can_share(self, max_length: int) -> bool:
        """Whether packed rows have the states of rows on their own, but for rounding.

        Then the body is left with the attention of packed rows, else as it was.
        """
        settings, own = self.body.config.get_text_config(), self.body.config._attn_implementation
        if changing_positions(settings, max_length):
            return False
        groups = probe(settings, max_length)
        try:
            each = [self._padded([[row]], ends) for group in groups for row in group]
            attention.register()
            self.body.set_attn_implementation(attention.SHARED_PROMPT)
            if agree(self._packed(groups, ends), torch.cat(each)):
                return True
        except Exception as error:  # a model's code can raise anything; rows on their own may work
            log.info("%s shares no prompts: %s", settings.model_type, error)
        self.body.set_attn_implementation(own)
        return False


def padded(rows: list[Row], pad: int, device: str) -> tuple[Tensor, Tensor]:
    """Return token ids (B, T) with padding on the right, and their attention mask (B, T)."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


def pack(groups: list[Group], tokens: Tokens) -> tuple[Row, Layout, list[list[int]]]:
    """Return the groups as one sequence, its layout, and the places of each row's tokens in it.

    Example:
        >>> ids, layout, places = pack([[[5, 6, 7], [5, 6, 8, 9]], [[5, 4]]], ends)
        >>> ids, places, layout.positions.tolist()
        ([5, 6, 7, 8, 9, 5, 4], [[2], [4], [6]], [0, 1, 2, 2, 3, 0, 1])
    """
    ids: Row = []
    lengths, places = [], []
    for rows in groups:
        shared, start = shared_tokens(rows), len(ids)
        ids += rows[0][:shared]
        lengths.append([shared, *(len(row) - shared for row in rows)])
        for row in rows:
            own = len(ids) - shared
            places.append([(start if place < shared else own) + place for place in tokens(row)])
            ids += row[shared:]
    return ids, Layout.of(lengths), places


def shared_tokens(rows: Group) -> int:
    """How many tokens all rows begin with; each has at least one more of its own."""
    if len(rows) == 1:
        return 0
    first, last = min(rows), max(rows)  # rows between these begin with what both begin with
    pairs = enumerate(zip(first, last, strict=False))
    common = next((place for place, (one, other) in pairs if one != other), len(first))
    return min(common, min(map(len, rows)) - 1)


def ends(row: Row) -> list[int]:
    """The place of a row's last token."""
    return [len(row) - 1]


def probe(settings: Any, max_length: int) -> list[Group]:
    """Answers to a prompt, and a row alone.

    The prompt is twice as long as all spans that rows can exceed, if rows can be: a model that
    applies them by its own mask, which packed rows lack, then has very different states.
    """
    longest = max(PROMPT, max_length - max(ANSWERS))
    reached = [2 * span for span in reachable_spans(settings, max_length)]
    prompt = min(longest, max([PROMPT, *reached]))
    ids = [7 * n % settings.vocab_size for n in range(1, prompt + sum(ANSWERS) + ALONE + 1)]
    shared, rest = ids[:prompt], ids[prompt:]
    parts = [rest[sum(ANSWERS[:n]) :][:length] for n, length in enumerate((*ANSWERS, ALONE))]
    return [[shared + part for part in parts[:-1]], [parts[-1]]]


def agree(packed: Tensor, plain: Tensor) -> bool:
    """Whether all states (..., H) are equal but for the rounding of their precision.

    In bf16, transformers' own ways of attention are up to 0.023 apart for SmolLM2-135M; a window
    that is left out makes 0.16 to 0.45.
    """
    tolerance = 1e-4 if packed.dtype in (torch.float32, torch.float64) else 5e-2
    packed, plain = packed.double(), plain.double()
    return bool(((packed - plain).norm(dim=-1) <= tolerance * plain.norm(dim=-1)).all())
