"""Preference rows from scored answers: pure functions of Arrow tables.

The stages call `source_selection` and `preference_rows` for one bucket at a time. `select_pairs`
calls both for a table in memory, such as in a notebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.config import AnswersConfig, PairConfig
from wrpo_ray.data.group_counts import WINS, Number, sums_by_group
from wrpo_ray.data.records import ADDED, ANSWER, MESSAGES, PREFERENCE, SCORED, SELECTION
from wrpo_ray.data.shards import in_one, take_rows
from wrpo_ray.errors import UserError
from wrpo_ray.stages.pair.candidates import Candidates, Verdicts, candidates_of
from wrpo_ray.stages.pair.eligibility import Eligible, eligible_answers
from wrpo_ray.stages.pair.overlap import similarity
from wrpo_ray.stages.pair.select import (
    FOUND,
    NONE,
    REASONS,
    Bools,
    Floats,
    Ints,
    Outcomes,
    at,
    best_and_worst,
    best_of,
    is_tied,
)

if TYPE_CHECKING:
    import pandas as pd

Counts = dict[str, Number]
REQUIRED = ("prompt_id", "source", "text", "reward")
OPTIONAL = (*ANSWER.names, *sorted(ADDED))
COLUMNS = {name: SCORED.field(name).type for name in (*REQUIRED, *OPTIONAL)} | {
    "messages": MESSAGES,
    "correct": pa.bool_(),
}
"""Columns of the answers that `select_pairs` takes, with their types."""


def select_pairs(
    answers: pa.Table | pd.DataFrame,
    *,
    target: str = "target",
    pair: PairConfig | None = None,
    answers_config: AnswersConfig | None = None,
) -> pa.Table:
    """Choose y_ws, y_wt and y_l of each prompt, as a run with the same config does.

    y_ws is the best answer of all sources, y_wt and y_l are the best and the worst of the target's
    own (WRPO, arXiv 2412.03187). Ties are broken by a hash of the answer's key.

    Args:
        answers: a row for each answer: `prompt_id`, `source` (the model), `text`, `reward` (higher
            is better; null and NaN: not used). Optional: `sample` (its number, by default
            by row), `finish_reason` ("length": cut off), `token_ids`, `messages` (the prompt),
            `correct` (then only right answers are chosen, only wrong ones rejected; null: any).
        target: the name in `source` of the model to train; the others are sources.
        pair: policy and margins, the config's section `pair`.
        answers_config: which answers may be used, the config's section `answers`.

    Returns:
        PREFERENCE records (`wrpo_ray.data.records`), sorted by `prompt_id`: `source_chosen` (y_ws),
        `target_chosen` (y_wt), `rejected` (y_l), `source_margin` r(y_ws) - r(y_wt), `target_margin`
        r(y_wt) - r(y_l), and `candidates`, the reward of every answer.

    Raises:
        UserError: the answers lack a column, a value or the target, or have a key twice; `pair`
            asks for a verifier or for dropping contaminated prompts.

    Example:
        >>> answers = {"prompt_id": ["p"] * 4, "source": ["gemma", "qwen", "target", "target"],
        ...     "text": ["Paris.", "In France.", "It is Paris", "London"],
        ...     "reward": [0.9, 0.4, 0.7, 0.1]}
        >>> (row,) = select_pairs(pa.table(answers)).to_pylist()
        >>> [row[name]["text"] for name in ("source_chosen", "target_chosen", "rejected")]
        ['Paris.', 'It is Paris', 'London']
    """
    table = answers if isinstance(answers, pa.Table) else pa.Table.from_pandas(answers)
    return _pairs_of(table, target, pair or PairConfig(), answers_config or AnswersConfig())


def _pairs_of(answers: pa.Table, target: str, pair: PairConfig, config: AnswersConfig) -> pa.Table:
    _check_options(pair)
    table = _checked(answers)
    is_target = pc.equal(table["source"], target)
    if pair.policy == "wrpo" and len(table) and not pc.any(is_target).as_py():
        raise UserError(f"select_pairs: no answer has the source {target!r}; set `target`")
    sources, own = table.filter(pc.invert(is_target)), table.filter(is_target)
    prompts = _prompts(table)
    selection, _ = source_selection(prompts, *_eligible(sources, prompts, config))
    pool = own if pair.policy == "wrpo" else sources
    return preference_rows(selection, *_eligible(pool, selection, config), pair)[0]


def _check_options(pair: PairConfig) -> None:
    if pair.verifier is not None:
        raise UserError("select_pairs: calls no verifier; give a column `correct` instead")
    if pair.contamination.action == "drop":
        raise UserError("select_pairs: knows no evaluation prompts; drop contaminated rows before")


def _checked(table: pa.Table) -> pa.Table:
    """The answers with all columns in their types; an optional one that is missing is null."""
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise UserError(f"select_pairs: the answers have no column {', '.join(missing)}")
    columns = {}
    for name, type_ in COLUMNS.items():
        given = table[name] if name in table.column_names else pa.nulls(len(table), type_)
        try:
            columns[name] = given.cast(type_)
        except pa.ArrowException as error:
            raise UserError(f"select_pairs: the column {name} is no {type_}: {error}") from None
        if name in REQUIRED and name != "reward" and columns[name].null_count:
            raise UserError(f"select_pairs: the column {name} has a null")
    if "sample" not in table.column_names:
        columns["sample"] = _numbered(columns["prompt_id"], columns["source"])
    checked = pa.table(columns)
    keys = checked.group_by(["prompt_id", "source", "sample"]).aggregate([])
    if len(keys) < len(checked):
        raise UserError("select_pairs: two answers have the same prompt_id, source and sample")
    return checked


def _numbered(prompt_ids: pa.ChunkedArray, sources: pa.ChunkedArray) -> pa.Array:
    """The number of each row among those of its prompt and source, from 0, (N,)."""
    seen: dict[tuple[str, str], int] = {}
    samples = []
    for key in zip(prompt_ids.to_pylist(), sources.to_pylist(), strict=True):
        samples.append(seen.get(key, 0))
        seen[key] = samples[-1] + 1
    return pa.array(samples, pa.int32())


def _prompts(table: pa.Table) -> pa.Table:
    """Each prompt once, sorted, with the messages of its first answer."""
    found = table.group_by("prompt_id", use_threads=False).aggregate([([], "count_all")])
    first = pc.index_in(found["prompt_id"], value_set=in_one(table["prompt_id"]))
    prompts = table.select(["prompt_id", "messages"]).take(first)
    split = pa.array(["preference"] * len(prompts), pa.string())
    return prompts.append_column("split", split).sort_by("prompt_id")


def _eligible(
    table: pa.Table, prompts: pa.Table, config: AnswersConfig
) -> tuple[Candidates, Eligible]:
    ids = in_one(prompts["prompt_id"])
    candidates = candidates_of((), table, np.arange(len(table)), ids)
    correct, known = table["correct"], pc.is_valid(table["correct"])
    right = candidates.mask(correct) | ~candidates.mask(known)
    wrong = ~candidates.mask(correct)
    return candidates, eligible_answers(candidates, config, Verdicts(right, wrong))


# --- y_ws --------------------------------------------------------------------------------------


def source_selection(
    prompts: pa.Table, candidates: Candidates, eligible: Eligible
) -> tuple[pa.Table, Counts]:
    """Choose y_ws of each prompt: the best of all sources' answers.

    Args:
        prompts: P prompts (prompt_id, messages, split), sorted by `prompt_id`.
        candidates: the sources' N answers to them.
        eligible: which of the answers may be chosen.

    Returns:
        SELECTION records of the prompts that have a y_ws, and counts: `wins.<source>`, rows, ties.
    """
    rewards, groups, count = candidates.rewards, candidates.prompts, len(prompts)
    best = best_of(rewards, eligible.chosen, groups, count, candidates.ties)
    found = np.flatnonzero(best != NONE)
    kept = take_rows(prompts, found)
    columns = {name: kept[name] for name in ("prompt_id", "messages", "split")} | {
        "source_chosen": candidates.answers(best[found]),
        "candidates": candidates.scores(found),
    }
    splits = pc.value_counts(kept["split"]).to_pylist()
    return pa.table(columns, schema=SELECTION), {
        **eligible.counts,
        **{f"wins.{name}": won for name, won in candidates.by_source(best[found]).items()},
        **{f"{split['values']}_rows": split["counts"] for split in splits},
        "rows": len(found),
        "candidates": len(candidates),
        "ties": int(is_tied(rewards, eligible.chosen, groups, best).sum()),
        "without_answer": count - len(found),
    }


def selected_by_group(prompts: pa.Table, selection: pa.Table, named: Sequence[str]) -> Counts:
    """Count a bucket's prompts, those with a y_ws, its source and its reward, by group.

    Args:
        prompts: P prompts (prompt_id, group).
        selection: SELECTION records of some of them.
        named: the groups that are counted by name.
    """
    best = in_one(selection["source_chosen"])
    columns = {"rows": np.ones(len(best), int), "reward": best.field("reward").to_numpy()}
    sources = best.field("source")
    for source in pc.unique(sources).to_pylist():
        columns[WINS + source] = pc.equal(sources, source).to_numpy(zero_copy_only=False)
    of_rows = sums_by_group(groups_of(selection, prompts), named, columns)
    return sums_by_group(prompts["group"], named, {"prompts": np.ones(len(prompts), int)}) | of_rows


def paired_by_group(
    prompts: pa.Table, selection: pa.Table, rows: pa.Table, named: Sequence[str]
) -> Counts:
    """Count a bucket's prompts with a y_ws, its preference rows and their rewards, by group.

    Args:
        prompts: P prompts (prompt_id, group).
        selection: SELECTION records of some of them.
        rows: PREFERENCE records of some of these.
        named: the groups that are counted by name.
    """
    count = {"prompts": np.ones(len(selection), int)}
    columns = {"rows": np.ones(len(rows), int)} | {
        role: in_one(rows[role]).field("reward").to_numpy()
        for role in ("source_chosen", "target_chosen", "rejected")
    }
    of_rows = sums_by_group(groups_of(rows, prompts), named, columns)
    return sums_by_group(groups_of(selection, prompts), named, count) | of_rows


def groups_of(rows: pa.Table, prompts: pa.Table) -> pa.ChunkedArray:
    """The group of each row's prompt, (N,)."""
    places = pc.index_in(rows["prompt_id"], value_set=in_one(prompts["prompt_id"]))
    return prompts["group"].take(places)


# --- y_wt and y_l ------------------------------------------------------------------------------


def preference_rows(
    selection: pa.Table,
    candidates: Candidates,
    eligible: Eligible,
    config: PairConfig,
    groups: pa.ChunkedArray | None = None,
) -> tuple[pa.Table, Counts]:
    """Choose y_wt and y_l of each prompt that has a y_ws.

    Args:
        selection: SELECTION records of P prompts, sorted by `prompt_id`.
        candidates: the N answers to choose from: the target's own, or for `fusechat3` the
            sources'.
        eligible: which of them may be chosen and which rejected.
        config: margins and policy.
        groups: the group (P,) of each prompt, for margins by group.

    Returns:
        PREFERENCE records, and counts: rows, and `dropped.<reason>` of the other prompts.
    """
    prompts, count = candidates.group_prompts, len(selection)
    best, worst, outcomes = best_and_worst(
        candidates.rewards, eligible.chosen, eligible.rejected, candidates.groups,
        len(prompts), candidates.ties, _margins(config, groups, prompts),
    )  # fmt: skip
    _check_texts(outcomes, candidates, best, worst, config.max_similarity)
    rewards = at(candidates.rewards, best)  # (G,)
    if config.source_below_target == "drop":
        source = in_one(selection["source_chosen"]).field("reward").to_numpy()
        outcomes.fail("source_below_target", source[prompts] < rewards)
    winners = best_of(
        rewards, outcomes.found, prompts, count, lambda found: candidates.ties(best[found])
    )
    found = np.flatnonzero(winners != NONE)
    best, worst = best[winners[found]], worst[winners[found]]
    table = _rows(selection, candidates, found, best, worst, is_wrpo=config.policy == "wrpo")
    below = int((table["source_margin"].to_numpy() < 0).sum())
    numbers = {"prompts": count, "rows": len(found), "source_below_target": below}
    return table, {**eligible.counts, **_dropped(outcomes, prompts, count), **numbers}


def _margins(
    config: PairConfig, groups: pa.ChunkedArray | None, prompts: Ints
) -> tuple[float | Floats, float | Floats]:
    """The least and the greatest margin, of all prompts or (G,) of these."""
    if not config.by_group or groups is None:
        return config.margins
    places = pc.index_in(groups, value_set=pa.array(list(config.by_group), pa.string()))
    known = np.array([config.margins, *map(config.margins_of, config.by_group)])
    low, high = known[places.fill_null(-1).to_numpy()[prompts] + 1].T
    return low, high


def _check_texts(
    outcomes: Outcomes, candidates: Candidates, best: Ints, worst: Ints, limit: float | None
) -> None:
    """Fail pairs of equal texts, and those whose similarity is above the limit."""
    found = np.flatnonzero(outcomes.found)
    chosen, rejected = candidates.texts(best[found]), candidates.texts(worst[found])
    failing: Bools = np.zeros(len(best), bool)
    failing[found] = pc.equal(chosen, rejected).to_numpy()
    outcomes.fail("same_text", failing)
    if limit is not None:
        pairs = zip(chosen.to_pylist(), rejected.to_pylist(), strict=True)
        failing[found] = [similarity(*texts) > limit for texts in pairs]
        outcomes.fail("similar_text", failing)


def _rows(
    selection: pa.Table,
    candidates: Candidates,
    found: Ints,
    best: Ints,
    worst: Ints,
    *,
    is_wrpo: bool,
) -> pa.Table:
    """PREFERENCE records of the prompts `found`, with these chosen and rejected answers."""
    kept, answers = take_rows(selection, found), candidates.answers(np.append(best, worst))
    chosen, rejected = answers[: len(best)], answers[len(best) :]
    source = in_one(kept["source_chosen"]) if is_wrpo else chosen
    scores = in_one(kept["candidates"])
    own = candidates.scores(found)
    rewards: Floats = candidates.rewards
    columns = {
        "prompt_id": kept["prompt_id"],
        "messages": kept["messages"],
        "source_chosen": source,
        "target_chosen": chosen,
        "rejected": rejected,
        "source_margin": source.field("reward").to_numpy() - rewards[best],
        "target_margin": rewards[best] - rewards[worst],
        "candidates": _joined(scores, own) if is_wrpo else scores,
    }
    return pa.table(columns, schema=PREFERENCE)


def _joined(first: pa.ListArray, second: pa.ListArray) -> pa.ListArray:
    """Each list of the first, followed by the same list of the second."""
    lengths = np.stack([pc.list_value_length(x).to_numpy() for x in (first, second)], axis=1)
    values = pa.concat_arrays([first.flatten(), second.flatten()])
    starts = (np.cumsum(lengths.T) - lengths.T.ravel()).reshape(2, -1).T.ravel()
    counts = lengths.ravel()
    shifts = starts - (np.cumsum(counts) - counts)
    order = np.arange(len(values)) + np.repeat(shifts, counts)
    offsets = np.append(0, np.cumsum(lengths.sum(axis=1))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values.take(pa.array(order)), type=first.type)


def _dropped(outcomes: Outcomes, prompts: Ints, count: int) -> dict[str, int]:
    """How many of `count` prompts have no pair, by the last check that one of its groups failed."""
    codes = np.full(count, REASONS.index("too_few"))
    np.maximum.at(codes, prompts, outcomes.codes)
    numbers = np.bincount(codes, minlength=FOUND)
    return {f"dropped.{r}": int(n) for r, n in zip(REASONS, numbers, strict=False) if n}
