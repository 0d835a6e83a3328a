"""Which answers may be chosen or rejected: the policies of `answers`, and right and wrong ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.config import AnswersConfig
from wrpo_ray.errors import UserError
from wrpo_ray.stages.pair.candidates import Candidates, Verdicts


@dataclass(frozen=True)
class Eligible:
    """What each of N candidates may be, (N,) each, and how many fell under which policy."""

    chosen: np.ndarray
    rejected: np.ndarray
    counts: Counter[str]
    """`answers.<policy>.<source>`, for answers that are dropped or may only be rejected."""


def judge(
    candidates: Candidates, config: AnswersConfig, verdicts: Verdicts | None = None
) -> Eligible:
    """Apply the policies, each to what the ones before it left.

    Of what is left only right answers may be chosen, and only wrong ones rejected.
    """
    chosen = np.ones(len(candidates), bool)
    rejected = chosen.copy()
    counts: Counter[str] = Counter()

    def restrict(policy: str, hit: np.ndarray, *, drop: bool = True) -> None:
        hit = hit & chosen & rejected
        chosen[hit] = False
        rejected[hit] = not drop
        for source, count in candidates.by_source(np.flatnonzero(hit)).items():
            counts[f"answers.{policy}.{source}"] += count

    if config.empty == "drop":
        restrict("empty", candidates.mask(_is_blank(candidates.table["text"])))
    if config.refusals == "drop":
        matches = _is_refusal(candidates.table["text"], config.refusal_patterns)
        restrict("refusal", candidates.mask(matches))
    if config.cut_off != "keep":
        restrict("cut_off", candidates.cut_off, drop=config.cut_off == "drop")
    if config.duplicates == "drop":
        restrict("duplicate", _is_repeated(candidates, chosen & rejected))
    if verdicts is not None:
        restrict("unverified", ~(verdicts.right | verdicts.wrong))
        chosen &= verdicts.right
        rejected &= verdicts.wrong
    return Eligible(chosen, rejected, counts)


def _is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.equal(pc.utf8_trim_whitespace(texts), "")


def _is_refusal(texts: pa.ChunkedArray, patterns: tuple[str, ...]) -> pa.ChunkedArray:
    straight = pc.replace_substring(texts, "’", "'")
    any_of = "|".join(f"(?:{pattern})" for pattern in patterns)
    return pc.match_substring_regex(straight, any_of or "$.", ignore_case=True)


def _is_repeated(candidates: Candidates, among: np.ndarray) -> np.ndarray:
    """Whether an earlier sample of the same prompt and source has the same text, (N,)."""
    places = np.flatnonzero(among)
    texts = candidates.texts(places).combine_chunks().dictionary_encode()
    codes = texts.indices.to_numpy().astype(np.int64)
    keys = candidates.groups[places] * (len(texts.dictionary) + 1) + codes
    _, first = np.unique(keys, return_index=True)
    repeated = among.copy()
    repeated[places[first]] = False
    return repeated


def check_patterns(patterns: tuple[str, ...]) -> None:
    """Compile each pattern.

    Raises:
        UserError: one is no regular expression of RE2's.
    """
    for pattern in patterns:
        try:
            pc.match_substring_regex(pa.array([""]), pattern)
        except pa.ArrowInvalid as error:
            raise UserError(f"answers.refusal_patterns: {error}; see RE2's syntax") from None
