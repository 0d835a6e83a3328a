"""AlpacaEval's figures: by hand, and equal to the official code on real annotations."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from wrpo_ray.errors import UserError
from wrpo_ray.stages.evaluate.alpaca_eval import (
    ANNOTATION,
    AlpacaEval,
    Reference,
    alpaca_eval,
    preference,
    read_reference,
)

N = 60


def table(preferences: list[float | None], len_1: list[int], len_2: list[int]) -> pa.Table:
    return pa.Table.from_arrays(
        [pa.array(range(len(preferences))), pa.array(preferences, pa.float64()), len_1, len_2],
        schema=ANNOTATION,
    )


def reference(seed: int = 0) -> Reference:
    """Two gamed baselines: the long one wins, the short one loses."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=N)
    long = np.repeat([-1.0, 1.0], N)
    features = np.column_stack([np.tanh(long), np.tile(difficulty, 2), np.zeros(2 * N)])
    return Reference(features, np.where(long < 0, 0.7, 0.3), dict(enumerate(difficulty.tolist())))


def drawn(bias: float, seed: int = 1) -> pa.Table:
    """Verdicts of a judge that likes length by `bias`, on a model with longer answers."""
    rng = np.random.default_rng(seed)
    len_1 = rng.integers(500, 1500, N)
    len_2 = len_1 + rng.integers(-200, 800, N)
    logit = bias * (len_2 - len_1) / 400 + rng.normal(size=N)
    return table((1 + 1 / (1 + np.exp(-logit))).tolist(), len_1.tolist(), len_2.tolist())


# --- by hand -----------------------------------------------------------------------------------


def test_rates_by_hand():
    """1, 2, 1.5, 0 (a tie of old), 1.8: shares 0, 1, .5, .5, .8, mean .56.

    Deviations -.56, .44, -.06, -.06, .24: squares sum to .572, variance .143, error sqrt(.143 / 5).
    Rounded: 0, 1, tie, tie, 1: 3 of 5.
    """
    given = table([1.0, 2.0, 1.5, 0.0, 1.8], [9] * 5, [9] * 5)
    result = alpaca_eval(given, reference())
    assert result.win_rate == pytest.approx(56)
    assert result.standard_error == pytest.approx(100 * math.sqrt(0.143 / 5))
    assert result.discrete_win_rate == pytest.approx(60)
    assert (result.wins, result.losses, result.draws) == (2, 1, 2)
    assert (result.judged, result.failed) == (5, 0)


def test_lengths_that_always_differ_alike_cannot_be_controlled():
    result = alpaca_eval(table([1.0, 2.0], [9, 9], [7, 7]), reference())
    assert math.isnan(result.length_controlled_win_rate)
    assert math.isnan(result.length_controlled_standard_error)


def test_answers_as_long_as_the_baselines_have_the_win_rate():
    """Shares 0, 1, 1: two thirds, and the error of their mean, which is a third."""
    result = alpaca_eval(table([1.0, 2.0, 2.0], [9, 8, 7], [9, 8, 7]), reference())
    assert result.length_controlled_win_rate == pytest.approx(200 / 3)
    assert result.length_controlled_standard_error == pytest.approx(100 / 3)


def test_failed_verdicts_are_counted_and_left_out():
    given = drawn(1.0)
    verdicts = given["preference"].to_pylist()
    verdicts[3:6] = [None, math.nan, 7.0]
    failed = given.set_column(1, "preference", pa.array(verdicts, pa.float64()))
    result = alpaca_eval(failed, reference())
    kept = [v for i, v in enumerate(verdicts) if i not in (3, 4, 5)]
    assert (result.judged, result.failed) == (N - 3, 3)
    assert result.win_rate == pytest.approx(100 * (np.mean(kept) - 1))
    assert 0 < result.length_controlled_win_rate < 100


def test_nothing_judged_is_not_a_number():
    result = alpaca_eval(table([None, None], [1, 2], [3, 5]), reference())
    assert math.isnan(result.win_rate)
    assert (result.judged, result.failed) == (0, 2)


def test_a_judge_that_likes_length_is_corrected():
    """The model is no better; its answers are longer, which the judge likes."""
    result = alpaca_eval(drawn(2.0), reference())
    assert result.win_rate > 65
    assert abs(result.length_controlled_win_rate - 50) < result.win_rate - 50 - 5


def test_the_same_twice():
    assert alpaca_eval(drawn(1.0), reference()) == alpaca_eval(drawn(1.0), reference())


def test_an_unknown_instruction_is_said():
    given = drawn(1.0).set_column(0, "index", pa.array(range(1, N + 1)))
    with pytest.raises(UserError, match="instruction 60 is not in"):
        alpaca_eval(given, reference())


def test_preferences_from_log_probabilities():
    """P(m) = .6, P(M) = .2: the second is better by .25; with the answers swapped by .75."""
    logprobs = {"m": math.log(0.6), "M": math.log(0.2), "x": math.log(0.2)}
    assert preference(logprobs, "m", "M", swapped=False) == pytest.approx(1.25)
    assert preference(logprobs, "m", "M", swapped=True) == pytest.approx(1.75)
    assert preference({"M": -1.0}, "m", "M", swapped=False) == 2.0
    assert math.isnan(preference({"x": -1.0}, "m", "M", swapped=False))


def test_the_reference_is_read_from_a_file(tmp_path):
    path = tmp_path / "df_gamed.csv"
    with pytest.raises(UserError, match="df_gamed"):
        read_reference(path)
    path.write_text(
        "preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n"
        "0.9,0,-1.0,0.5,False,long\n0.8,1,0.0,-0.5,False,long\n0.1,0,1.0,0.5,False,short\n"
    )
    read = read_reference(path)
    assert read.difficulty == {0: 0.5, 1: -0.5}
    assert read.preference.tolist() == [0.9, 0.8, 0.1]
    assert read.features[0].tolist() == [math.tanh(-1.0), 0.5, 0.0]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="df_gamed"):
        read_reference(path)


# --- the official code on real annotations -----------------------------------------------------


def test_equal_to_the_official_code(shared):
    annotations = pq.read_table(shared / "alpacaeval2_annotations.parquet")
    expected = csv.read_csv(shared / "alpacaeval2_expected.csv").to_pylist()
    read = read_reference(shared / "alpacaeval2_df_gamed.csv")
    for row in expected:
        given = annotations.filter(pc.equal(annotations["model"], row["model"]))
        result = alpaca_eval(given, read)
        assert isinstance(result, AlpacaEval)
        assert result.length_controlled_win_rate == pytest.approx(
            row["official_code_lc"], abs=1e-5, rel=0
        ), row["model"]
        assert result.win_rate == pytest.approx(row["board_wr"], abs=1e-9, rel=0)
        assert result.standard_error == pytest.approx(row["board_se"], abs=1e-9, rel=0)
        assert result.judged == given.num_rows
    assert len(expected) == 27
