"""Statistics of what says little: all ties, all wins, one row, none. A figure or null, no NaN."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from wrpo_ray.report.benchmark_table import comparison_text
from wrpo_ray.report.text import study_text
from wrpo_ray.stages.evaluate.alpaca_eval import ANNOTATION, AlpacaEval, Reference, alpaca_eval
from wrpo_ray.stages.evaluate.arena_hard import ArenaHard, Games, Style, arena_hard
from wrpo_ray.stages.evaluate.comparison import Compare, RewardPair, _without_nan
from wrpo_ray.stages.evaluate.mt_bench import Rating, mt_bench
from wrpo_ray.stages.evaluate.pairwise import Comparison, Pairwise, pairwise, shortfall
from wrpo_ray.stages.evaluate.statistics import (
    Crossed,
    Estimate,
    Sums,
    crossed_interval,
    normal_interval,
    plain,
    wilson_interval,
)
from wrpo_ray.stages.evaluate.variants import VariantTable, tabulate
from wrpo_ray.storage.steps import Step

N = 40
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(100, 900, N).tolist()
OTHERS = RNG.integers(100, 900, N).tolist()
VERDICTS = {"ties": 0.5, "wins": 1.0, "losses": 0.0}
"""The model's share of each game."""


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Such as numpy's of a mean of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def reference() -> Reference:
    """Two gamed baselines, as AlpacaEval has them."""
    difficulty = np.random.default_rng(1).normal(size=N)
    long = np.repeat([-1.0, 1.0], N)
    features = np.column_stack([np.tanh(long), np.tile(difficulty, 2), np.zeros(2 * N)])
    return Reference(features, np.where(long < 0, 0.7, 0.3), dict(enumerate(difficulty.tolist())))


def alpaca(shares: list[float | None], ours: list[int], theirs: list[int]) -> AlpacaEval:
    preferences = [None if share is None else 1 + share for share in shares]
    columns = [range(len(shares)), preferences, theirs, ours]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, ANNOTATION, strict=True)]
    return alpaca_eval(pa.Table.from_arrays(arrays, schema=ANNOTATION), reference())


def pairs(shares: list[float | None], ours: list[int], theirs: list[int]) -> Pairwise:
    rows = zip(shares, ours, theirs, strict=True)
    return pairwise([Comparison(share, (one, other)) for share, one, other in rows])


def arena(shares: list[float], *, styles: bool) -> ArenaHard:
    said = {0.5: ("A=B", "A=B"), 1.0: ("B>>A", "A>B"), 0.0: ("A>B", "B>>A")}
    both = (Style(9, 1, 2, 3), Style(5, 0, 0, 1)) if styles else ()
    board = {"m": [Games(*said[share], *both) for share in shares]}
    return arena_hard(board, style_control=styles)["m"]


@pytest.mark.parametrize("same", [True, False])
def test_a_model_against_itself_is_at_a_half(same):
    """Whatever the lengths: of all ties, none can have been won by length."""
    theirs, shares = (LENGTHS if same else OTHERS), [0.5] * N
    found = alpaca(shares, LENGTHS, theirs)
    assert (found.win_rate, found.standard_error) == (50, 0)
    assert found.length_controlled_win_rate == found.discrete_win_rate == 50
    assert found.length_controlled_standard_error == 0
    both = pairs(shares, LENGTHS, theirs)
    assert both.win_rate == both.length_controlled == Estimate(0.5, 0.5, 0.5, N)
    assert (both.win.mean, both.tie.mean, both.loss.mean) == (0, 1, 0)
    for styles in (False, True):
        won = arena(shares, styles=styles)
        assert [won.win_rate, won.low, won.high] == pytest.approx([50] * 3)


def test_a_judge_that_prefers_a_place_leaves_a_model_near_a_half_of_itself():
    """The same answers, so the same lengths: what varies is which was shown first."""
    shares = [0.4, 0.6] * (N // 2)
    found = alpaca(shares, LENGTHS, LENGTHS)
    assert found.length_controlled_win_rate == found.win_rate == pytest.approx(50)
    assert found.length_controlled_standard_error == found.standard_error > 0
    both = pairs(shares, LENGTHS, LENGTHS)
    assert both.length_controlled == both.win_rate
    assert both.win_rate.low < 0.5 < both.win_rate.high


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("kind", ["wins", "losses"])
def test_all_wins_and_all_losses(kind, same):
    share, theirs = VERDICTS[kind], LENGTHS if same else OTHERS
    found = alpaca([share] * N, LENGTHS, theirs)
    assert (found.win_rate, found.standard_error) == (100 * share, 0)
    assert found.length_controlled_win_rate == pytest.approx(100 * share, abs=0.1)
    both = pairs([share] * N, LENGTHS, theirs)
    assert both.win_rate == Estimate(share, share, share, N)
    assert both.length_controlled.mean == pytest.approx(share, abs=0.02)
    won = arena([share] * N, styles=False)
    assert [won.win_rate, won.low, won.high] == pytest.approx([100 * share] * 3, abs=0.01)
    assert abs(arena([share] * N, styles=True).win_rate - 100 * share) < 5  # it is regularized


def test_failed_verdicts_of_other_lengths_leave_ties_at_a_half():
    shares: list[float | None] = [0.5] * (N - 3)
    found = alpaca([*shares, None, None, None], LENGTHS, OTHERS)
    assert (found.length_controlled_win_rate, found.judged, found.failed) == (50, N - 3, 3)
    assert pairs([*shares, None, None, None], LENGTHS, OTHERS).length_controlled.mean == 0.5


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("kind", [*VERDICTS, "failures"])
@pytest.mark.parametrize("shift", [0, 7])
def test_figures_of_few_rows_are_numbers_or_null(count, kind, shift):
    """Null where they are not known: of none; an interval of one; length that never varies."""
    shares = [VERDICTS.get(kind)] * count
    theirs = [length + shift for length in LENGTHS[:count]]
    judged = count if kind in VERDICTS else 0
    one, two = alpaca(shares, LENGTHS[:count], theirs), pairs(shares, LENGTHS[:count], theirs)
    if judged:
        share = VERDICTS[kind]
        assert (one.win_rate, two.win_rate.mean) == (100 * share, share)
        is_known = shift == 0 or kind == "ties"
        assert math.isnan(one.length_controlled_win_rate) != is_known
        assert math.isnan(two.length_controlled.mean) != is_known
    else:
        assert math.isnan(one.win_rate)
        assert math.isnan(two.win_rate.mean)
    _is_json(one, two)
    told = comparison_text(_table(one, two))
    assert "nan" not in told.lower()


def _is_json(*figures: Any) -> None:
    json.dumps(_without_nan([asdict(f) for f in figures]), allow_nan=False)


def _table(one: AlpacaEval, two: Pairwise) -> dict[str, Any]:
    arena = asdict(arena_hard({"m": []})["m"])
    figures = {"alpaca_eval": asdict(one), "arena_hard": arena, "mt_bench": asdict(mt_bench([]))}
    benchmarks = {name: {"m": f | {"tokens": math.nan}} for name, f in figures.items()}
    pair = {"a": "m", "b": "n", "by": "judge"} | asdict(two)
    return _without_nan({"judge": "j", "benchmarks": benchmarks, "pairs": [pair]})


@pytest.mark.parametrize("styles", [False, True])
def test_arena_hard_of_one_question_and_of_none(styles):
    for kind, share in VERDICTS.items():
        found = arena([share], styles=styles)
        assert found.low <= found.win_rate <= found.high, kind
        assert not math.isnan(found.win_rate)
    board = arena_hard({"m": [], "n": [Games(None, "nonsense")]}, style_control=styles)
    assert [(f.judged, f.failed) for f in board.values()] == [(0, 0), (0, 2)]
    assert all(math.isnan(f.win_rate) for f in board.values())
    _is_json(*board.values())


@pytest.mark.parametrize("scores", [[], [None], [-1], [7.0], [7.0] * 9, [None, 7.0], [0.0, 10.0]])
def test_mt_bench_of_few_ratings(scores):
    found = mt_bench([Rating(i, 1, "math", score) for i, score in enumerate(scores)])
    known = [score for score in scores if score not in (None, -1)]
    assert (found.overall.judged, found.overall.failed) == (len(known), len(scores) - len(known))
    if known:
        assert found.overall.mean == sum(known) / len(known)
    _is_json(found)


@pytest.mark.parametrize("count", [0, 1, 2, 50])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1.0])
def test_intervals_of_equal_numbers(count, value):
    sums = Sums.of([value] * count)
    for interval in (wilson_interval, normal_interval):
        found = interval(sums)
        assert found.n == count
        assert set(plain(found)) == {"mean", "low", "high", "n"}
        json.dumps(plain(found), allow_nan=False)
        if count:
            assert found.mean == pytest.approx(value)
        if count > 1:
            assert found.low <= value + 1e-6
            assert found.high >= value - 1e-6


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("prompts", [0, 1, 2, 9])
def test_intervals_over_seeds_of_equal_numbers(seeds, prompts):
    found = crossed_interval(Crossed.of(np.full((seeds, prompts), 0.1)))
    if prompts:
        assert found.mean == pytest.approx(0.1)
    if prompts > 1:
        assert (found.low, found.high) == pytest.approx((0.1, 0.1), abs=1e-6)
    names = ("a", "b")
    made = tuple(SimpleNamespace(variant=n, seed=s) for n in names for s in range(seeds))
    sums = Crossed.of(np.full((seeds, prompts), 0.1))
    keys = [("accuracy", name) for name in (*names, "a - b")]
    table = tabulate(VariantTable(made, (names,)), dict.fromkeys(keys, sums))
    json.dumps(table, allow_nan=False)
    assert "nan" not in study_text({"cases": {"c": table}})


def test_a_gate_says_that_nothing_was_judged():
    told = shortfall("win rate of a against b", pairs([None], [1], [2]).win_rate, 0.5)
    assert told == (
        "win rate of a against b is not known, as none of its prompts was judged, and has to be 0.5"
    )


@pytest.mark.parametrize("name", ["alpaca_eval", "pairwise", "reward", "arena_hard", "mt_bench"])
def test_only_tables_with_length_controlled_figures_are_made_again(name):
    judged = SimpleNamespace(step=Step("verdicts"), judging=SimpleNamespace(name=name))
    rewards = RewardPair("a", "b", ((), ()), None, 0.0)  # its prompts are not in the key
    if name == "reward":
        job = Compare((), (rewards,), None, None)
    else:
        job = Compare((judged,), (), None, None)
    controlled = name in ("alpaca_eval", "pairwise", "reward")
    pairs_ = [["a", "b", 0.0]] if name == "reward" else []
    before = Step("comparison", {"reward_pairs": pairs_}, () if pairs_ else (judged.step,))
    assert (job.step.key != before.key) == controlled
