"""Which answers become y_ws, y_wt and y_l: pure functions of scored candidates.

Equal rewards are told apart by a hash of (prompt_id, source, sample), so that no source wins
all ties and the same candidates always give the same choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from wrpo_ray.core.records import ANSWER, unit_interval

Candidate = dict[str, Any]
"""A SCORED record."""
Row = dict[str, Any]

Reason = Literal["too_few", "same_text", "equal_reward", "source_below_target"]


def tie(candidate: Candidate) -> float:
    """The place in [0, 1) of a candidate among those of equal reward; greater wins."""
    return unit_interval("tie", candidate["prompt_id"], candidate["source"], candidate["sample"])


def rank(candidate: Candidate) -> tuple[float, float]:
    """Sorts candidates of one prompt from worst to best."""
    return candidate["reward"], tie(candidate)


def by_prompt(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates grouped by prompt."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate["prompt_id"], []).append(candidate)
    return groups


def answer(candidate: Candidate) -> Row:
    """The ANSWER part of a candidate."""
    return {field.name: candidate[field.name] for field in ANSWER}


def scores(candidates: Iterable[Candidate]) -> list[Row]:
    """The CANDIDATES part: whose answer, which, and its reward."""
    kept = [{name: c[name] for name in ("source", "sample", "reward")} for c in candidates]
    return sorted(kept, key=lambda c: (c["source"], c["sample"]))


def select(prompt: Row, candidates: list[Candidate]) -> Row:
    """The SELECTION record of a prompt: y_ws is the best answer over all sources."""
    return {
        "prompt_id": prompt["prompt_id"],
        "messages": prompt["messages"],
        "split": prompt["split"],
        "source_chosen": answer(max(candidates, key=rank)),
        "candidates": scores(candidates),
    }


def pair(
    selection: Row, own: list[Candidate], source_below_target: Literal["keep", "drop"]
) -> Row | Reason:
    """The PREFERENCE record of a prompt, or why there is none.

    y_wt and y_l are the best and the worst of the target's own answers. They have to differ in
    text and in reward: equal ones say nothing about which is better.
    """
    if len(own) < 2:
        return "too_few"
    best, worst = max(own, key=rank), min(own, key=rank)
    if best["reward"] == worst["reward"]:
        return "equal_reward"
    if best["text"] == worst["text"]:
        return "same_text"
    source = selection["source_chosen"]
    if source["reward"] < best["reward"] and source_below_target == "drop":
        return "source_below_target"
    return {
        "prompt_id": selection["prompt_id"],
        "messages": selection["messages"],
        "source_chosen": source,
        "target_chosen": answer(best),
        "rejected": answer(worst),
        "source_margin": source["reward"] - best["reward"],
        "target_margin": best["reward"] - worst["reward"],
        "candidates": selection["candidates"] + scores(own),
    }
