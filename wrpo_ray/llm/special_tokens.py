"""Texts that spell special tokens: they stay text, in every message.

Only the chat template writes special tokens. Where a text spells one, a mark hides the spelling
from the template and the tokenizer, and is dropped when the text is encoded.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from wrpo_ray.data.records import Message
from wrpo_ray.errors import SpelledTokenError, TokenizeError

Encode = Callable[[str], list[int]]
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters, which no text for interchange contains."""


@dataclass(frozen=True)
class SpecialTokens:
    """A tokenizer's special tokens, without `unk`, which any unknown character becomes."""

    ids: frozenset[int]
    spelled: re.Pattern[str]
    """Any of them, as text."""
    starts: re.Pattern[str]
    """The first character of any of them, also of those that overlap."""
    normalizer: Any
    """The tokenizer's normalizer, where it runs before the search for special tokens; else None."""

    def are_in(self, text: str) -> bool:
        """Whether a text spells a special token."""
        if self.normalizer is not None and self.spelled.search(self.normalizer.normalize_str(text)):
            return True
        return self.spelled.search(text) is not None

    def within(self, ids: list[int]) -> list[int]:
        """Return the special tokens among token ids."""
        return [token for token in ids if token in self.ids]


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the tokenizer's special tokens."""
    tokens = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    words = "|".join(re.escape(t.content) for t in tokens.values()) or r"(?!)"
    is_normalized = tokenizer.is_fast and any(t.normalized for t in tokens.values())
    return SpecialTokens(
        ids=frozenset(tokens) - {tokenizer.unk_token_id},
        spelled=re.compile(words),
        starts=re.compile(f"(?={words})(.)", re.DOTALL),
        normalizer=tokenizer.backend_tokenizer.normalizer if is_normalized else None,
    )


def encoder(tokenizer: Any) -> Encode:
    """Return the function text -> token ids, which adds no special tokens.

    It raises TokenizeError where the tokenizer fails.
    """

    def encode(text: str) -> list[int]:
        try:
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # such as a TypeError for text that is no Unicode
            raise TokenizeError(f"tokenizer: {type(error).__name__}: {error}") from error
        return ids

    return encode


def escape_special_tokens(
    tokenizer: Any, messages: list[Message], spared: tuple[str, str] | None = None
) -> tuple[list[Message], Encode]:
    """Return messages that spell no special token, and the encoder for their rendering.

    `spared` are the markers of reasoning that the last message may begin with: a model writes them
    as tokens, which special ones stay.

    A mark is put behind the first character of each spelled token, so that neither template nor
    tokenizer reads it as the token. The encoder finds the template's special tokens, drops the
    marks, and tokenizes the pieces of text between them as usual. So the ids are those of a
    tokenizer that knows the template's special tokens but not their spelling in texts. Where no
    text spells one, nothing changes.

    Raises:
        SpelledTokenError: the tokenizer cannot keep the text apart from the token.
    """
    *before, last = [[message["content"]] for message in messages]
    texts = [*before, _around(spared, *last)]  # texts and markers in turn
    special, plain = special_tokens(tokenizer), [text for parts in texts for text in parts[::2]]
    if not any(map(special.are_in, plain)):
        return messages, encoder(tokenizer)
    mark = next((mark for mark in MARKS if not any(mark in text for text in plain)), None)
    for parts in texts:
        parts[::2] = [special.starts.sub(rf"\g<1>{mark}", text) for text in parts[::2]]
    hidden = (text for parts in texts for text in parts[::2])
    if mark is None or any(map(special.spelled.search, hidden)) or not tokenizer.is_fast:
        raise SpelledTokenError("a text spells a special token and cannot be kept apart from it")
    pairs = zip(messages, map("".join, texts), strict=True)
    return [m | {"content": text} for m, text in pairs], _mark_dropping_encoder(tokenizer, mark)


def _around(markers: tuple[str, str] | None, text: str) -> list[str]:
    """Return the parts of a text around the markers of reasoning that it begins with, and these."""
    if markers is None or not text.lstrip().startswith(markers[0]):
        return [text]
    space, opening, rest = text.partition(markers[0])
    return [space, opening, *rest.partition(markers[1])]


def _mark_dropping_encoder(tokenizer: Any, mark: str) -> Encode:
    plain, special = encoder(tokenizer), special_tokens(tokenizer)
    tokenizer_without_marks = _mark_dropping_tokenizer(tokenizer, mark)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer_without_marks.encode(text, add_special_tokens=False).ids
        if special.within(ids) != special.within(plain(text)):
            raise SpelledTokenError("a text spells a special token, which its tokens would become")
        return ids

    return encode


@lru_cache(maxsize=2)
def _mark_dropping_tokenizer(tokenizer: Any, mark: str) -> Any:
    """Return a copy of the tokenizer that drops marks after its search for special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Replace, Sequence

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in tree["added_tokens"]:
        token["normalized"] &= not token["special"]
    copy = Tokenizer.from_str(json.dumps(tree | {"truncation": None, "padding": None}))
    own = [copy.normalizer] if copy.normalizer is not None else []
    copy.normalizer = Sequence([Replace(mark, ""), *own])
    return copy
