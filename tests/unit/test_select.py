"""Selection and pairing against hand-made candidates, and the published form."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray.core.published import from_published, messages_of, to_published
from wrpo_ray.core.records import prompt_id
from wrpo_ray.pair.select import pair, select

MESSAGES = [{"role": "user", "content": "Which?"}]
KEY = prompt_id(MESSAGES)
PROMPT = {"prompt_id": KEY, "messages": MESSAGES, "split": "preference"}


def candidate(source: str, sample: int, reward: float, text: str | None = None, key: str = KEY):
    return {
        "prompt_id": key,
        "source": source,
        "sample": sample,
        "reward": reward,
        "text": text or f"{source}{sample}",
        "token_ids": [1, 2],
        "finish_reason": "stop",
    }


def test_the_best_over_all_sources_is_chosen_and_every_score_is_kept():
    rows = [candidate("a", 0, 0.1), candidate("b", 0, 0.7), candidate("b", 1, 0.9)]
    selection = select(PROMPT, rows)
    assert selection["source_chosen"]["source"] == "b"
    assert selection["source_chosen"]["sample"] == 1
    assert selection["candidates"] == [
        {"source": "a", "sample": 0, "reward": 0.1},
        {"source": "b", "sample": 0, "reward": 0.7},
        {"source": "b", "sample": 1, "reward": 0.9},
    ]


def test_ties_are_spread_over_sources():
    """4,000 ties of four sources: each wins 1000 +- 27.4 (binomial), so 850 to 1150 is 5 sigma."""
    wins = collections.Counter()
    for number in range(4000):
        prompt = PROMPT | {"prompt_id": prompt_id([{"role": "user", "content": str(number)}])}
        rows = [candidate(s, 0, 1.0, key=prompt["prompt_id"]) for s in "abcd"]
        wins[select(prompt, rows)["source_chosen"]["source"]] += 1
    assert all(850 < wins[s] < 1150 for s in "abcd")


@given(st.permutations([candidate(s, i, r) for s in "ab" for i in range(3) for r in [i // 2]]))
def test_the_order_of_candidates_changes_nothing(rows):
    expected = select(PROMPT, sorted(rows, key=lambda r: (r["source"], r["sample"])))
    assert select(PROMPT, rows) == expected


def own(*rewards: float) -> list[dict]:
    return [candidate("t", i, r) for i, r in enumerate(rewards)]


def test_a_pair_is_the_targets_best_and_worst():
    selection = select(PROMPT, [candidate("a", 0, 2.0)])
    row = pair(selection, own(0.5, 1.5, 1.0), "keep")
    assert row["target_chosen"]["sample"] == 1
    assert row["rejected"]["sample"] == 0
    assert (row["source_margin"], row["target_margin"]) == (0.5, 1.0)
    assert len(row["candidates"]) == 4


@pytest.mark.parametrize(
    ("answers", "policy", "reason"),
    [
        ([], "keep", "too_few"),
        (own(1.0), "keep", "too_few"),
        (own(1.0, 1.0), "keep", "equal_reward"),
        ([candidate("t", 0, 1.0, "x"), candidate("t", 1, 0.0, "x")], "keep", "same_text"),
        (own(3.0, 1.0), "drop", "source_below_target"),
    ],
)
def test_rows_that_say_nothing_are_dropped_with_the_reason(answers, policy, reason):
    assert pair(select(PROMPT, [candidate("a", 0, 2.0)]), answers, policy) == reason


def test_a_source_below_the_target_is_kept_by_default():
    row = pair(select(PROMPT, [candidate("a", 0, 2.0)]), own(3.0, 1.0), "keep")
    assert row["source_margin"] == -1.0


PUBLISHED = {
    "prompt_id": KEY,
    "prompt": {"role": "user", "content": "Which?"},
    "chosen": [{"content": "ws", "role": "assistant"}, {"content": "wt", "role": "assistant"}],
    "rejected": [{"content": "l", "role": "assistant"}],
}


def test_published_rows_survive_the_round_trip():
    row = from_published(PUBLISHED)
    assert [row[n]["text"] for n in ("source_chosen", "target_chosen", "rejected")] == [
        "ws",
        "wt",
        "l",
    ]
    assert to_published(row) == PUBLISHED


@pytest.mark.parametrize(
    "broken",
    [
        {"chosen": PUBLISHED["chosen"][:1]},
        {"rejected": []},
        {"prompt": None},
        {"chosen": [{"content": None}, {"content": "x"}]},
    ],
)
def test_malformed_published_rows_are_refused(broken):
    with pytest.raises(ValueError, match="has to be|needs|is a text"):
        from_published(PUBLISHED | broken)


@pytest.mark.parametrize(
    "prompt", ["", "  ", [], {}, {"role": "user"}, [{"role": "user", "content": 3}], 5, None]
)
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="prompt|message"):
        messages_of(prompt)
