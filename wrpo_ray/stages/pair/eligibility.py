"""Which answers may be chosen or rejected, by the config's section `answers` and a verifier."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.config import AnswersConfig
from wrpo_ray.data.records import UNFINISHED
from wrpo_ray.errors import UserError
from wrpo_ray.stages.pair.candidates import Candidates, Verdicts
from wrpo_ray.stages.pair.select import Bools


@dataclass(frozen=True)
class Eligible:
    """Which of N candidates may be chosen and which rejected, (N,) each."""

    chosen: Bools
    rejected: Bools
    counts: Counter[str]
    """`answers.<policy>.<source>`: answers that a policy drops, or that may only be rejected."""


def eligible_answers(
    candidates: Candidates, config: AnswersConfig, verdicts: Verdicts | None = None
) -> Eligible:
    """Apply the policies one after another, each to the answers that no earlier one matched.

    Of the answers left, only right ones may be chosen and only wrong ones rejected. An answer
    without a reward, or that ended within its reasoning, is never used.
    """
    chosen: Bools = np.ones(len(candidates), bool)
    rejected = chosen.copy()
    counts: Counter[str] = Counter()

    def restrict(policy: str, hit: Bools, *, drop: bool = True) -> None:
        hit = hit & chosen & rejected
        chosen[hit] = False
        rejected[hit] = not drop
        for source, count in candidates.by_source(np.flatnonzero(hit)).items():
            counts[f"answers.{policy}.{source}"] += count

    restrict("no_reward", np.isnan(candidates.rewards))
    restrict("unfinished_reasoning", candidates.has("reasoning_state", UNFINISHED))
    if config.empty == "drop":
        texts = candidates.table["text"]
        is_empty = pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))
        restrict("empty", candidates.mask(is_empty))
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


def _is_refusal(texts: pa.ChunkedArray, patterns: tuple[str, ...]) -> pa.ChunkedArray:
    straight = pc.replace_substring(texts, "’", "'")
    any_of = "|".join(f"(?:{pattern})" for pattern in patterns)
    return pc.match_substring_regex(straight, any_of or "$.", ignore_case=True)


def _is_repeated(candidates: Candidates, among: Bools) -> Bools:
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
        UserError: a pattern is not a valid RE2 expression.
    """
    for pattern in patterns:
        try:
            pc.match_substring_regex(pa.array([""]), pattern)
        except pa.ArrowInvalid as error:
            raise UserError(f"answers.refusal_patterns: {error}; see RE2's syntax") from None
