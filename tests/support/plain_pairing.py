"""Selection and pairing, row by row in plain Python: what the columns have to agree with."""

from __future__ import annotations

import re
from collections import Counter
from itertools import groupby
from typing import Any

from wrpo_ray.config import AnswersConfig, PairConfig
from wrpo_ray.data.records import ANSWER
from wrpo_ray.stages.pair.overlap import similarity
from wrpo_ray.storage.fingerprints import unit_interval

Row = dict[str, Any]


def key(row: Row) -> tuple:
    return row["prompt_id"], row["source"], row["sample"]


def rank(row: Row) -> tuple[float, float]:
    """Sorts candidates of one prompt from worst to best."""
    return row["reward"], unit_interval("tie", *key(row))


def judged(rows: list[Row], config: AnswersConfig, prompts: dict[str, Row]) -> list[Row]:
    """The rows in order, each with what it may be, and the policy it fell under.

    A prompt with a reference and an answer's `right` (True, False, None) gate where they are given.
    """
    seen, done = set(), []
    for row in sorted(rows, key=key):
        policy = _policy(row, config)
        text = (row["prompt_id"], row["source"], row["text"])
        if policy is None and config.duplicates == "drop":
            policy = "duplicate" if text in seen else None
            seen.add(text)
        chosen, rejected = policy is None, policy is None
        if policy == "cut_off":
            rejected = config.cut_off == "reject_only"
        if "right" in row and prompts[row["prompt_id"]]["reference"] is not None:
            if row["right"] is None and policy is None:
                policy = "unverified"
            chosen, rejected = chosen and row["right"] is True, rejected and row["right"] is False
        done.append(row | {"policy": policy, "chosen": chosen, "rejected": rejected})
    return done


def _policy(row: Row, config: AnswersConfig) -> str | None:
    if row["reward"] is None:
        return "no_reward"
    if config.empty == "drop" and not row["text"].strip():
        return "empty"
    text = row["text"].replace("’", "'")
    patterns = config.refusal_patterns if config.refusals == "drop" else ()
    if any(re.search(pattern, text, re.IGNORECASE) for pattern in patterns):
        return "refusal"
    if config.cut_off != "keep" and row["finish_reason"] == "length":
        return "cut_off"
    return None


def answer(row: Row) -> Row:
    return {field.name: row[field.name] for field in ANSWER}


def scores(rows: list[Row]) -> list[Row]:
    return [{name: r[name] for name in ("source", "sample", "reward")} for r in rows]


def select(prompts: list[Row], rows: list[Row], config: AnswersConfig) -> list[Row]:
    """The SELECTION records."""
    by_id = {p["prompt_id"]: p for p in prompts}
    rows = judged([r for r in rows if r["prompt_id"] in by_id], config, by_id)
    selected = []
    for prompt_id, group in groupby(rows, key=lambda r: r["prompt_id"]):
        group = list(group)
        chosen = [r for r in group if r["chosen"]]
        if chosen:
            prompt = {n: by_id[prompt_id][n] for n in ("prompt_id", "messages", "split")}
            best = {"source_chosen": answer(max(chosen, key=rank))}
            selected.append(prompt | best | {"candidates": scores(group)})
    return selected


def pair(
    prompts: list[Row], selection: list[Row], rows: list[Row], answers: AnswersConfig,
    config: PairConfig,
) -> tuple[list[Row], Counter]:  # fmt: skip
    """The PREFERENCE records, and how many prompts were dropped by which reason."""
    by_id = {p["prompt_id"]: p for p in prompts}
    ids = {s["prompt_id"] for s in selection}
    rows = judged([r for r in rows if r["prompt_id"] in ids], answers, by_id)
    found, dropped = [], Counter()
    for selected in selection:
        own = [r for r in rows if r["prompt_id"] == selected["prompt_id"]]
        groups = [list(g) for _, g in groupby(own, key=lambda r: r["source"])]
        results = [pair_of(selected, group, config) for group in groups]
        pairs = [r for r in results if isinstance(r, tuple)]
        if not pairs:
            reasons = [r for r in results if isinstance(r, str)]
            dropped[max(reasons, key=ORDER.index, default="too_few")] += 1
            continue
        best, worst = max(pairs, key=lambda pair: rank(pair[0]))
        is_wrpo = config.policy == "wrpo"
        source = selected["source_chosen"] if is_wrpo else answer(best)
        found.append(
            {
                "prompt_id": selected["prompt_id"],
                "messages": selected["messages"],
                "source_chosen": source,
                "target_chosen": answer(best),
                "rejected": answer(worst),
                "source_margin": source["reward"] - best["reward"],
                "target_margin": best["reward"] - worst["reward"],
                "candidates": selected["candidates"] + (scores(own) if is_wrpo else []),
            }
        )
    return found, dropped


ORDER = (
    "too_few", "none_chosen", "none_rejected", "equal_reward", "margin", "same_text",
    "similar_text", "source_below_target",
)  # fmt: skip


def pair_of(selected: Row, group: list[Row], config: PairConfig) -> tuple[Row, Row] | str:
    """The best and worst of one model's answers to a prompt, or why there are none."""
    chosen, rejected = ([r for r in group if r[name]] for name in ("chosen", "rejected"))
    if sum(r["chosen"] or r["rejected"] for r in group) < 2:
        return "too_few"
    if not chosen:
        return "none_chosen"
    if not rejected:
        return "none_rejected"
    best, worst = max(chosen, key=rank), min(rejected, key=rank)
    margin = best["reward"] - worst["reward"]
    if margin == 0:
        return "equal_reward"
    low, high = config.margins
    if margin < 0 or not low <= margin <= high:
        return "margin"
    if best["text"] == worst["text"]:
        return "same_text"
    limit = config.max_similarity
    if limit is not None and similarity(best["text"], worst["text"]) > limit:
        return "similar_text"
    below = selected["source_chosen"]["reward"] < best["reward"]
    if config.source_below_target == "drop" and below:
        return "source_below_target"
    return best, worst
