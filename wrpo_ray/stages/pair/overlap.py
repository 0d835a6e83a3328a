"""Overlap of texts: of training prompts with evaluation prompts, and of answers with each other."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from wrpo_ray.stages.pair.select import Floats, Ints

Hashes = NDArray[np.uint64]

_BASE = np.uint64(0x9E3779B97F4A7C15)
"""An odd number whose powers spread the words of an n-gram over 64 bits."""


SCRIPTS = (
    "Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tai_Le",
    "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Javanese", "Balinese",
)  # fmt: skip
"""Scripts that put no spaces between words."""
_UNSPACED = "".join(rf"\p{{{script}}}" for script in SCRIPTS)


def are_unspaced(texts: pa.Array) -> pa.Array:
    """Whether each text has a character of a script without spaces."""
    return pc.match_substring_regex(texts, f"[{_UNSPACED}]")


def ngrams(texts: pa.Array, n: int) -> tuple[Hashes, Ints]:
    """Return 64-bit hashes of the texts' K word n-grams, and the text of each n-gram; both (K,).

    Words are runs of letters and digits, in lower case; in scripts without spaces each letter and
    vowel sign is a word. A text of fewer than n words is one n-gram; one without words has none.
    The hashes are the same in every process.
    """
    plain = pc.replace_substring_regex(pc.utf8_lower(texts), r"[^\pL\pN\pM]+", " ")
    apart = pc.replace_substring_regex(plain, f"([{_UNSPACED}])", r" \1 ")
    spaced = pc.replace_substring_regex(apart, rf"[^\pL\pN{_UNSPACED}]+", " ")
    words = pc.split_pattern(pc.utf8_trim(spaced, " "), " ")  # a text without words gives [""]
    encoded = words.flatten().dictionary_encode()
    hashes = np.array([_hash(word) for word in encoded.dictionary.to_pylist()], np.uint64)
    hashes = hashes[encoded.indices.to_numpy()]
    lengths = pc.list_value_length(words).to_numpy()
    owners = np.repeat(np.arange(len(texts)), lengths)
    ends = np.cumsum(lengths)[owners]
    places = np.arange(len(owners))
    is_first = places == ends - lengths[owners]
    starts = np.flatnonzero((hashes != _hash("")) & ((places + n <= ends) | is_first))
    grams = np.zeros(len(starts), np.uint64)
    for offset in range(n):
        inside = starts + offset < ends[starts]
        word = hashes[np.where(inside, starts + offset, starts)]
        grams = np.where(inside, grams * _BASE + word, grams)
    return grams, owners[starts]


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def overlaps(texts: pa.Array, n: int, known: Hashes) -> Floats:
    """The share of each of B texts' n-grams that `known` (sorted) has, (B,); 0 without n-grams."""
    grams, owners = ngrams(texts, n)
    places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
    hits = known[places] == grams if len(known) else np.zeros(len(grams), bool)
    counts = np.bincount(owners, minlength=len(texts))
    shares: Floats = np.bincount(owners[hits], minlength=len(texts)) / np.maximum(counts, 1)
    return shares


def similarity(one: str, other: str, n: int = 5) -> float:
    """Jaccard index of two texts' character n-grams, regardless of case and spacing."""
    a, b = (_characters(text, n) for text in (one, other))
    return len(a & b) / len(a | b)


def _characters(text: str, n: int) -> set[str]:
    plain = " ".join(text.lower().split())
    return {plain[i : i + n] for i in range(max(len(plain) - n, 0) + 1)}
