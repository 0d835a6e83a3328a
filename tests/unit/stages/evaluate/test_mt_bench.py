"""MT-Bench: ratings in texts and their means, by hand and on real judgments."""

import math

import pyarrow.parquet as pq
import pytest

from wrpo_ray.stages.evaluate.mt_bench import Mean, Rating, mt_bench, parse_rating

OTHERS = ("8/10", "4/5", "-1", "11", "10.5", "4 out of 5", "7-8", "7,5", "Score: 8", "9" * 400)
"""What is no rating, in double brackets."""
MORE = ("", " as in [3]", " or [[8/10]], see [1]")


@pytest.mark.parametrize(
    ("judgment", "rating"),
    [
        ("Good.\n\nRating: [[8]]", 8.0),
        ("Rating: [[7.5]]", 7.5),
        ("as in [3], but Rating: [[9]]", 9.0),  # double brackets come first wherever they stand
        ("[[4]], then [[6]]", 4.0),
        ("Rating: [6]", 6.0),
        ("[[08]]", 8.0),
        ("[[10.]]", 10.0),
        ("Rating: 8", None),
        ("[[-1]]", None),
        *((f"[[{said}]]{more}", None) for said in OTHERS for more in MORE),
        ("[[8/10]], that is [[8]]", 8.0),
        ("[[x]], so [6]", 6.0),
        ("[[ 8 ]]", None),
        ("[[0]]", 0.0),
        ("see [2024]", None),
        ("$ERROR$", None),
        ("", None),
    ],
)
def test_ratings(judgment, rating):
    assert parse_rating(judgment) == rating


def test_means_by_hand():
    """Turn 1: 8, 6 and a failure; turn 2: 1 and the official code's failure, -1."""
    result = mt_bench(
        [
            Rating(1, 1, "math", 8.0),
            Rating(2, 1, "math", 6.0),
            Rating(3, 1, "stem", None),
            Rating(1, 2, "math", 1.0),
            Rating(3, 2, "stem", -1),
        ]
    )
    assert result.overall == Mean(5.0, 3, 2)
    assert result.turns == {1: Mean(7.0, 2, 1), 2: Mean(1.0, 1, 1)}
    assert result.categories["math"] == Mean(5.0, 3, 0)
    assert math.isnan(result.categories["stem"].mean)
    assert (result.categories["stem"].judged, result.categories["stem"].failed) == (0, 2)


def test_nothing_judged_is_not_a_number():
    result = mt_bench([])
    assert math.isnan(result.overall.mean)
    assert result.turns == {}


def test_equal_to_the_official_code(shared):
    rows = pq.read_table(shared / "mt_bench_judgments.parquet").to_pylist()
    parsed = [parse_rating(row["judgment"]) for row in rows]
    assert parsed == [row["score"] for row in rows]
    # Ten questions a category, from number 81 on.
    result = mt_bench(
        [
            Rating(row["question_id"], row["turn"], str((row["question_id"] - 81) // 10), score)
            for row, score in zip(rows, parsed, strict=True)
        ]
    )
    assert result.turns == {1: Mean(6.7125, 80, 0), 2: Mean(6.125, 80, 0)}
    assert result.overall == Mean(6.41875, 160, 0)
    assert [m.judged for m in result.categories.values()] == [20] * 8
