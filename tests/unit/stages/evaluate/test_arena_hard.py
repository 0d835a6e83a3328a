"""Arena-Hard v0.1: by hand, and the figures of the official code on real judgments."""

import json
import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from wrpo_ray.errors import UserError
from wrpo_ray.stages.evaluate.arena_hard import (
    VERDICTS,
    ArenaHard,
    Games,
    Style,
    arena_hard,
    is_unfinished,
    length_of,
    parse_verdict,
    style_of,
)

verdicts = st.sampled_from([*VERDICTS, None])
boards = st.lists(st.tuples(verdicts, verdicts), min_size=4, max_size=12)


# --- verdicts and styles -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judgment", "verdict", "unfinished"),
    [
        ("My final verdict is tie: [[A=B]]", "A=B", False),
        ("[[A>>B]] and again [[A>>B]].", "A>>B", False),
        ("[[A>B]], no: [[B>A]]", None, False),
        ("Assistant A is better. [A>B]", None, True),
        ("[[A<B]]", None, False),  # not one of the five: the official code drops it
        ("", None, True),
    ],
)
def test_verdicts(judgment, verdict, unfinished):
    assert parse_verdict(judgment) == verdict
    assert is_unfinished(judgment) == unfinished


def test_length_counts_words_and_signs():
    assert length_of("It's **two** words.\n") == 3 + 5 + 2  # It ' s | ** two ** | words .


def test_styles_by_hand():
    answer = (
        "# Title\n## Part\n- one\n* two\n 3. three\n**bold** and __this__ but ** not **\n"
        "```python\n# no header\n- no item\n**no**\n```\n#no header"
    )
    assert style_of(answer, 9) == Style(tokens=9, headers=2, lists=3, bolds=3)


# --- win rates ---------------------------------------------------------------------------------


def test_win_rate_by_hand():
    """The model wins 3 + 1 battles, loses 3, and one tie: (4 + 1/2) of 8."""
    games = [Games("B>>A", "B>>A"), Games("A=B", "A>B"), Games(None, "[[?]]")]
    result = arena_hard({"m": games})["m"]
    assert result.win_rate == pytest.approx(56.25, abs=1e-4)
    assert result.low <= result.win_rate <= result.high
    assert (result.judged, result.failed) == (4, 2)


def test_another_model_on_the_board_leaves_a_win_rate_alone():
    games = [Games("B>A", "B>A"), Games("A>>B", "A>B")]
    alone = arena_hard({"m": games})["m"]
    board = {"other": [Games("B>>A", "A=B")], "m": games}
    assert arena_hard(board)["m"].win_rate == pytest.approx(alone.win_rate, abs=1e-4)


@settings(max_examples=20)
@given(boards)
def test_win_rates_are_shares_of_battles(pairs):
    """Bradley-Terry of two is the share of battles won; two bootstrap rounds, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wrpo_ray.stages.evaluate.arena_hard.ROUNDS", 2)
        result = arena_hard({"m": [Games(*pair) for pair in pairs]})["m"]
    battles = [
        (count, 1 - share if first else share)
        for pair in pairs
        for first, verdict in zip((True, False), pair, strict=True)
        if verdict
        for count, share in [VERDICTS[verdict]]
    ]
    if not battles:
        assert math.isnan(result.win_rate)
        return
    share = 100 * sum(c * s for c, s in battles) / sum(c for c, _ in battles)
    assert result.win_rate == pytest.approx(share, abs=0.05)


def test_a_model_that_always_wins():
    result = arena_hard({"m": [Games("B>A", "A>B")] * 4})["m"]
    assert result.win_rate == pytest.approx(100, abs=0.1)
    assert result.low == pytest.approx(100, abs=0.1)


def test_nothing_judged_is_not_a_number():
    board = arena_hard({"none": [Games(None, None)], "m": [Games("B>A", "B>A")]})
    assert math.isnan(board["none"].win_rate)
    assert (board["none"].judged, board["none"].failed) == (0, 2)
    assert board["m"].win_rate == pytest.approx(50, abs=1e-4)
    assert math.isnan(arena_hard({"none": [Games(None, None)]})["none"].high)
    assert arena_hard({}) == {}


# --- style control -----------------------------------------------------------------------------


def styled(longer_of_four: int) -> list[Games]:
    """60 questions to a judge that prefers the longer answer nine times of ten."""
    games = []
    for i in range(60):
        longer = i % 4 < longer_of_four
        verdict = ("B>A", "A>B") if longer != (i % 10 == 0) else ("A>B", "B>A")
        short, long = Style(100 + i, 1, 2, 3), Style(400 + 2 * i, 1, 5, 4)
        games.append(Games(*verdict, *((short, long) if longer else (long, short))))
    return games


def test_style_control_takes_away_what_length_wins():
    """Two models as good as each other; one answers at length, which the judge likes."""
    board = {"wordy": styled(3), "terse": styled(1)}
    plain, controlled = (arena_hard(board, style_control=c) for c in (False, True))
    assert plain["wordy"].win_rate - plain["terse"].win_rate > 30
    assert abs(controlled["wordy"].win_rate - controlled["terse"].win_rate) < 15
    assert controlled["wordy"].low < controlled["wordy"].win_rate < controlled["wordy"].high


def test_style_control_is_a_penalized_likelihood():
    """Its optimum, written down: each battle counts twice, and half the squared norm is added."""
    board = {"wordy": styled(3), "terse": styled(1)}
    rows = []
    for model, questions in enumerate(board.values()):
        for games in questions:
            a, b = (np.array(astuple(s), float) for s in (games.baseline, games.model))
            for verdict, is_a in ((games.first, True), (games.second, False)):
                share = VERDICTS[verdict][1]
                rows.append((model, share if is_a else 1 - share, (a - b) / (a + b + 1)))
    model, share, style = (np.array(column) for column in zip(*rows, strict=True))
    varies = style.std(axis=0) > 0
    style = (style - style.mean(axis=0))[:, varies] / style.std(axis=0)[varies]

    def loss(theta: np.ndarray) -> float:
        logit = np.log(10) * (theta[0] - theta[1 + model]) + style @ theta[3:]
        likelihood = share * np.logaddexp(0, -logit) + (1 - share) * np.logaddexp(0, logit)
        return 2 * likelihood.sum() + theta @ theta / 2

    theta = minimize(loss, np.zeros(3 + style.shape[1])).x
    found = arena_hard(board, style_control=True)
    for rating, name in zip(theta[1:3] - theta[0], board, strict=True):
        assert found[name].win_rate == pytest.approx(100 / (1 + 10**-rating), abs=0.05)


def test_style_control_of_equal_styles_regularizes_only():
    """The same style everywhere: L2 alone pulls 75 of 100 battles a little towards a half."""
    style = Style(10, 1, 1, 1)
    games = [Games("B>A", "A>B", style, style)] * 75 + [Games("A>B", "B>A", style, style)] * 25
    result = arena_hard({"m": games}, style_control=True)["m"]
    assert 74 < result.win_rate < 75


def test_style_control_needs_styles():
    with pytest.raises(UserError, match="m lacks one"):
        arena_hard({"m": [Games("A>B", "B>A")]}, style_control=True)


# --- the official code on real judgments -------------------------------------------------------


def rounded(result: ArenaHard) -> tuple[float, float, float]:
    return round(result.win_rate, 2), round(result.low, 2), round(result.high, 2)


def test_equal_to_the_official_code(shared):
    """30.00 [22.19, 39.07] and 5.56 [3.63, 7.73].

    They were made on a board with a third model, of 24 battles, between these two, which the file
    leaves out. Its verdicts change nothing for the others, but its battles are drawn among theirs:
    any 24 give the official intervals.
    """
    board: dict[str, list[Games]] = {"gpt-3.5-turbo-0125": [], "third": []}
    for row in json.loads((shared / "arena_hard_games.json").read_text()):
        board.setdefault(row["model"], []).append(Games(row["g1"], row["g2"]))
    gpt, third, qwen = board
    for pair in (("B>>A", "B>>A"), ("A>>B", "B>>A")):
        result = arena_hard(board | {third: [Games(*pair)] * 4})
        assert rounded(result[gpt]) == (30.00, 22.19, 39.07)
        assert rounded(result[qwen]) == (5.56, 3.63, 7.73)
        assert (result[gpt].judged, result[gpt].failed) == (64, 0)
        assert (result[qwen].judged, result[qwen].failed) == (200, 0)
