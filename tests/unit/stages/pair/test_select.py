"""Selection and pairing of stores on disk, against hand-worked rows and a plain reference."""

from __future__ import annotations

import collections
import doctest
import math
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plain_pairing import pair as plain_pair
from support.plain_pairing import select as plain_select
from support.published import to_published

from wrpo_ray.config import AnswersConfig, PairConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, read_bucket, write_shard
from wrpo_ray.data.published import from_published, parse_messages
from wrpo_ray.data.records import prompt_id
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.pair import pairs as pairs_module
from wrpo_ray.stages.pair.eligibility import check_patterns
from wrpo_ray.stages.pair.overlap import ngrams, similarity
from wrpo_ray.stages.pair.pairs import select_pairs
from wrpo_ray.stages.pair.stage import Answers, Contamination, EvalNgrams, Pair, Select
from wrpo_ray.storage.fingerprints import unit_interval
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]
ALL = Bucket(0, 1)
MESSAGES = [{"role": "user", "content": "Which?"}]
KEY = prompt_id(MESSAGES)
DEFAULTS, WRPO = AnswersConfig(), PairConfig()
KEEP = AnswersConfig(cut_off="keep", empty="keep")


def prompt(text: str = "Which?", split: str = "preference", reference: str | None = None) -> Row:
    messages = [{"role": "user", "content": text}]
    named = {"prompt_id": prompt_id(messages), "messages": messages}
    return named | {"split": split, "reference": reference, "group": None}


def candidate(source: str, sample: int, reward: float, text: str | None = None, **other: Any):
    return {
        "prompt_id": KEY,
        "source": source,
        "sample": sample,
        "reward": reward,
        "text": f"{source}{sample}" if text is None else text,
        "token_ids": [1, sample],
        "finish_reason": "stop",
    } | other


def own(*rewards: float) -> list[Row]:
    return [candidate("t", i, r) for i, r in enumerate(rewards)]


@dataclass
class Store:
    """An output folder with prompts and scored answers; `right` of an answer is its verdict."""

    prompts: list[Row]
    sources: list[Row]
    own: list[Row] = field(default_factory=list)
    policies: AnswersConfig = DEFAULTS
    config: PairConfig = WRPO
    evaluation: list[Row] | None = None

    def __post_init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="wrpo-pair-")
        self.run = Run(Folder(self.folder.name), 1)
        self.prompt_step = Step("prompts")
        self._write(self.prompt_step, records.PROMPT, self.prompts)
        sources = tuple(
            self._answers(f"score-{name}", [r for r in self.sources if r["source"] == name])
            for name in sorted({r["source"] for r in self.sources})
        )
        self.select = Select(
            Prompts(self.prompt_step, ("sft", "preference")),
            self._joined(sources or (self._answers("score-none", []),)),
            self._contamination() if self.evaluation is not None else None,
        )
        pool = self._joined((self._answers("score-own", self.own),))
        if self.config.policy == "fusechat3":
            pool = self.select.sources
        self.pair = Pair(self.select, pool, self.config)

    def _write(self, step: Step, schema: Any, rows: list[Row]) -> None:
        for part in (rows[::2], rows[1::2]):  # two shards, whose rows are mixed
            filled = [
                dict.fromkeys(schema.names) | {n: r.get(n) for n in schema.names} for r in part
            ]
            write_shard(self.run.root / step.folder, ALL, schema, filled, filled)

    def _answers(self, name: str, rows: list[Row]) -> tuple[Samples, Samples]:
        """The scores and the verdicts."""
        prompts = Prompts(self.prompt_step, ("sft", "preference"))
        self._write(Step(name), records.SCORED, rows)
        verdicts = [r | {"reward": float(r["right"])} for r in rows if r.get("right") is not None]
        if verdicts:
            self._write(Step(f"verified-{name}"), records.SCORED, verdicts)
        return Samples(Step(name), prompts, None), Samples(Step(f"verified-{name}"), prompts, None)

    def _joined(self, parts: tuple[tuple[Samples, Samples], ...]) -> Answers:
        is_verified = any("right" in r for r in [*self.sources, *self.own])
        verdicts = tuple(v for _, v in parts) if is_verified else ()
        return Answers(tuple(s for s, _ in parts), self.policies, verdicts)

    def _contamination(self) -> Contamination:
        self._write(Step("eval-prompts"), records.PROMPT, self.evaluation)
        ngrams = EvalNgrams(Prompts(Step("eval-prompts"), ("eval",)), 13)
        job = Contamination(Prompts(self.prompt_step, ("sft", "preference")), ngrams)
        ngrams.fill(self.run, ALL)
        self.overlap_counts = job.fill(self.run, ALL)
        return job

    def selected(self) -> tuple[list[Row], dict[str, int]]:
        counts = self.select.fill(self.run, ALL)
        return self._read(self.select.step, records.SELECTION), counts

    def paired(self) -> tuple[list[Row], dict[str, int]]:
        self.selected()
        counts = self.pair.fill(self.run, ALL)
        return self._read(self.pair.step, records.PREFERENCE), counts

    def _read(self, step: Step, schema: Any) -> list[Row]:
        return read_bucket(self.run.root / step.folder, ALL, schema).to_pylist()


def select(sources: list[Row], policies: AnswersConfig = KEEP) -> tuple[list[Row], dict[str, int]]:
    return Store([prompt()], sources, policies=policies).selected()


def pair(own: list[Row], **config: Any) -> tuple[list[Row], dict[str, int]]:
    sources = [candidate("a", 0, 2.0)]
    return Store([prompt()], sources, own, KEEP, PairConfig(**config)).paired()


def reasons(counts: dict[str, int]) -> dict[str, int]:
    return {k.partition(".")[2]: v for k, v in counts.items() if k.startswith("dropped.")}


# --- y_ws --------------------------------------------------------------------------------------


def test_the_best_over_all_sources_is_chosen_and_every_score_is_kept():
    rows = [candidate("b", 1, 0.9), candidate("a", 0, 0.1), candidate("b", 0, 0.7)]
    (row,), counts = select(rows)
    best = row["source_chosen"]
    assert (best["source"], best["sample"], best["token_ids"]) == ("b", 1, [1, 1])
    assert row["candidates"] == [
        {"source": "a", "sample": 0, "reward": 0.1},
        {"source": "b", "sample": 0, "reward": 0.7},
        {"source": "b", "sample": 1, "reward": 0.9},
    ]
    assert counts == {
        "wins.b": 1, "preference_rows": 1, "rows": 1, "candidates": 3, "ties": 0,
        "without_answer": 0,
    }  # fmt: skip


def test_ties_are_spread_over_sources():
    """1,000 ties of four sources: each wins 250 +- 13.7 (binomial), so 180 to 320 is 5 sigma."""
    prompts = [prompt(str(i)) for i in range(1000)]
    rows = [candidate(s, 0, 1.0, prompt_id=p["prompt_id"]) for p in prompts for s in "abcd"]
    _, counts = Store(prompts, rows).selected()
    assert counts["ties"] == 1000
    assert all(180 < counts[f"wins.{s}"] < 320 for s in "abcd")


def test_margins_and_counts_are_by_group():
    """Margins of 1 for all; 2 is the most for group x, and 3 the least for y."""
    groups = ("x", "y", None, "z")
    prompts = [
        prompt(f"{g}{i}") | {"group": g} for g in groups for i in range(4)
    ]  # a margin of i + 0.5
    keys = [p["prompt_id"] for p in prompts]
    own = [
        candidate("t", k, r, prompt_id=key)
        for place, key in enumerate(keys)
        for k, r in enumerate((place % 4 + 0.5, 0.0))
    ]
    sources = [candidate("ab"[i % 2], 0, 9.0, prompt_id=key) for i, key in enumerate(keys)]
    limits = {"x": {"max_margin": 2}, "y": {"min_margin": 3}}
    store = Store(prompts, sources, own, KEEP, PairConfig(min_margin=1, by_group=limits))
    store.select = replace(store.select, groups=("x", "y"))
    store.pair = replace(store.pair, select=store.select)
    found, counts = store.paired()
    places = sorted(keys.index(row["prompt_id"]) for row in found)
    assert places == [1, 4 + 3, 8 + 1, 8 + 2, 8 + 3, 12 + 1, 12 + 2, 12 + 3]
    rows = {name: counts[f"group/rows/{name}"] for name in ("x", "y", "")}
    assert rows == {"x": 1, "y": 1, "": 6}
    assert counts["group/target_chosen/y"] == 3.5
    assert counts["group/target_chosen/"] == 2 * (1.5 + 2.5 + 3.5)
    selected = store.selected()[1]
    assert (selected["group/prompts/x"], selected["group/prompts/"]) == (4, 8)
    assert (selected["group/wins/a/x"], selected["group/wins/b/"]) == (2, 4)
    assert selected["group/reward/y"] == 36


def test_of_equally_good_and_bad_answers_the_greatest_place_is_y_wt_and_the_least_y_l():
    """100 prompts with three best and three worst answers each; by the hash of each answer."""
    prompts = [prompt(str(i)) for i in range(100)]
    keys = [p["prompt_id"] for p in prompts]
    rows = [candidate("t", i, float(i < 3), prompt_id=key) for key in keys for i in range(6)]
    sources = [candidate("a", 0, 2.0, prompt_id=key) for key in keys]
    found, _ = Store(prompts, sources, rows, KEEP).paired()
    assert len(found) == 100
    for row in found:
        places = [unit_interval("tie", row["prompt_id"], "t", i) for i in range(6)]
        assert row["target_chosen"]["sample"] == max(range(3), key=places.__getitem__)
        assert row["rejected"]["sample"] == min(range(3, 6), key=places.__getitem__)


def test_no_candidate_at_all_leaves_no_row():
    rows, counts = select([])
    assert rows == []
    assert counts["without_answer"] == 1
    assert Store([], []).paired()[0] == []


# --- y_wt and y_l ------------------------------------------------------------------------------


def test_a_pair_is_the_targets_best_and_worst():
    (row,), _ = pair(own(0.5, 1.5, 1.0))
    assert row["source_chosen"]["source"] == "a"
    assert (row["target_chosen"]["sample"], row["rejected"]["sample"]) == (1, 0)
    assert (row["source_margin"], row["target_margin"]) == (0.5, 1.0)
    assert [c["source"] for c in row["candidates"]] == ["a", "t", "t", "t"]


@pytest.mark.parametrize(
    ("answers", "config", "reason"),
    [
        ([], {}, "too_few"),
        (own(1.0), {}, "too_few"),
        (own(1.0, 1.0), {}, "equal_reward"),
        (own(1.0, 0.5), {"min_margin": 0.6}, "margin"),
        (own(1.0, 0.5), {"max_margin": 0.4}, "margin"),
        ([candidate("t", 0, 1.0, "x"), candidate("t", 1, 0.0, "x")], {}, "same_text"),
        (
            [candidate("t", 0, 1.0, "Two words"), candidate("t", 1, 0.0, "two  words")],
            {"max_similarity": 0.9},
            "similar_text",
        ),
        (own(3.0, 1.0), {"source_below_target": "drop"}, "source_below_target"),
    ],
)
def test_rows_that_say_nothing_are_dropped_with_the_reason(answers, config, reason):
    rows, counts = pair(answers, **config)
    assert rows == []
    assert reasons(counts) == {reason: 1}


def test_a_source_below_the_target_is_kept_by_default():
    (row,), counts = pair(own(3.0, 1.0))
    assert row["source_margin"] == -1.0
    assert counts["source_below_target"] == 1


def test_fusechat3_pairs_the_answers_of_one_source():
    """a's gap of 0.5 is too great; of b (0.8, 0.75) and c (0.7, 0.65) b's best is better."""
    rewards = {"a": (0.9, 0.4), "b": (0.8, 0.75), "c": (0.7, 0.65)}
    rows = [candidate(s, i, r) for s, both in rewards.items() for i, r in enumerate(both)]
    config = PairConfig(policy="fusechat3")
    (row,), _ = Store([prompt()], rows, config=config).paired()
    assert row["source_chosen"] == row["target_chosen"]
    assert [(row[n]["source"], row[n]["sample"]) for n in ("target_chosen", "rejected")] == [
        ("b", 0),
        ("b", 1),
    ]
    assert row["source_margin"] == 0
    assert row["target_margin"] == pytest.approx(0.05)
    assert len(row["candidates"]) == 6


def test_for_prompts_with_a_reference_the_chosen_is_right_and_the_rejected_wrong():
    """By rewards alone sample 0 would be chosen and sample 3 rejected."""
    rights = [False, True, False, True]
    rows = [candidate("a", i, 0.8 - i / 200, right=right) for i, right in enumerate(rights)]
    config = PairConfig(policy="fusechat3")

    def chosen(reference: str | None) -> list[tuple[int, int]]:
        found, _ = Store([prompt(reference=reference)], rows, config=config).paired()
        return [(r["target_chosen"]["sample"], r["rejected"]["sample"]) for r in found]

    assert chosen("4") == []  # 0.795 (right) and 0.79 (wrong) are too close
    assert chosen(None) == [(0, 3)]
    rows[2]["reward"] = 0.75
    assert chosen("4") == [(1, 2)]


# --- answers -----------------------------------------------------------------------------------


def test_what_was_cut_off_may_be_rejected_but_not_chosen():
    answers = [*own(0.5, 0.4), candidate("t", 2, 0.9, finish_reason="length")]
    answers.append(candidate("t", 3, 0.1, finish_reason="length"))
    store = Store([prompt()], [candidate("a", 0, 2.0)], answers)
    (row,), counts = store.paired()
    assert (row["target_chosen"]["sample"], row["rejected"]["sample"]) == (0, 3)
    assert counts["answers.cut_off.t"] == 2
    assert len(row["candidates"]) == 5


@pytest.mark.parametrize(
    ("texts", "config", "chosen", "counts"),
    [
        (["", " \n\t", "x"], {}, 2, {"answers.empty.a": 2}),
        (["", "x"], {"empty": "keep"}, 0, {}),
        (["x", "y", "x", "x"], {"duplicates": "drop"}, 0, {"answers.duplicate.a": 2}),
        (["x", "x"], {}, 0, {}),
        (["I’m sorry, but I can't help.", "x"], {"refusals": "drop"}, 1, {"answers.refusal.a": 1}),
        (["I'm sorry, but I can't help.", "x"], {}, 0, {}),
        (
            ["No.", "x"],
            {"refusals": "drop", "refusal_patterns": ["^no"]},
            1,
            {"answers.refusal.a": 1},
        ),
    ],
)
def test_answers_are_dropped_by_policy(texts, config, chosen, counts):
    """The earlier an answer the greater its reward, so the first that is left is y_ws."""
    rows = [candidate("a", i, 1.0 - i / 8, text) for i, text in enumerate(texts)]
    (row,), told = select(rows, AnswersConfig(**config))
    assert row["source_chosen"]["sample"] == chosen
    assert len(row["candidates"]) == len(texts)
    assert {k: n for k, n in told.items() if k.startswith("answers.")} == counts


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I cannot assist with that.",
        "Sorry, I can't help.",
        "I apologize, but I'm not able to discuss this.",
        "Unfortunately, I can’t provide it.",
        "I am unable to provide medical advice.",
        "As an AI language model, I do not have opinions.",
    ],
)
def test_the_refusal_patterns_find_refusals(text):
    rows = [candidate("a", 0, 1.0, text), candidate("a", 1, 0.5, "yes")]
    (row,), _ = select(rows, AnswersConfig(refusals="drop"))
    assert row["source_chosen"]["text"] == "yes"


@pytest.mark.parametrize(
    "text",
    ["I can help with that.", "The word sorry has five letters.", "I will not be home.", "Sorry!"],
)
def test_the_refusal_patterns_pass_over_answers(text):
    (row,), _ = select([candidate("a", 0, 1.0, text)], AnswersConfig(refusals="drop"))
    assert row["source_chosen"]["text"] == text


def test_a_broken_pattern_is_told():
    check_patterns(AnswersConfig().refusal_patterns)
    with pytest.raises(UserError, match="refusal_patterns"):
        check_patterns(("(",))


# --- against the plain reference -----------------------------------------------------------------

PROMPTS = st.lists(st.sampled_from("pqrs"), unique=True, max_size=4)
REWARDS = st.sampled_from([0.0, 0.04, 0.05, 0.1, 0.5, 1.0, None])
TEXTS = st.sampled_from(["", " ", "x", "X", "y", "a longer text", "I'm sorry, I can't"])
ANSWERS = st.builds(
    AnswersConfig,
    cut_off=st.sampled_from(["keep", "reject_only", "drop"]),
    empty=st.sampled_from(["keep", "drop"]),
    refusals=st.sampled_from(["keep", "drop"]),
    duplicates=st.sampled_from(["keep", "drop"]),
)
PAIRS = st.one_of(
    st.builds(
        PairConfig,
        source_below_target=st.sampled_from(["keep", "drop"]),
        min_margin=st.sampled_from([None, 0.05]),
        max_margin=st.sampled_from([None, 0.5]),
        max_similarity=st.sampled_from([None, 0.5]),
    ),
    st.just(PairConfig(policy="fusechat3")),
    st.just(PairConfig(policy="fusechat3", max_margin=2.0)),
)


@dataclass
class Given:
    """Prompts and scored answers, as `Store` and the plain reference take them."""

    prompts: list[Row]
    sources: list[Row]
    own: list[Row]
    policies: AnswersConfig
    config: PairConfig

    def expected(self) -> tuple[list[Row], list[Row], collections.Counter[str]]:
        """The plain reference's SELECTION and PREFERENCE rows, and reasons of dropped prompts."""
        selection = plain_select(self.prompts, self.sources, self.policies)
        rows = self.sources if self.config.policy == "fusechat3" else self.own
        return selection, *plain_pair(self.prompts, selection, rows, self.policies, self.config)


@st.composite
def given_answers(draw: Any) -> Given:
    """Answers to few prompts with many ties, equal texts, nulls and gaps."""
    prompts = [
        prompt(t, draw(st.sampled_from(["sft", "preference"])), draw(st.sampled_from([None, "4"])))
        for t in draw(PROMPTS)
    ]
    verified = draw(st.booleans())

    def answers(source: str) -> list[Row]:
        rows = []
        for asked in [*prompts, prompt("not asked")]:
            for sample in draw(st.lists(st.integers(0, 5), unique=True, max_size=4)):
                row = candidate(source, sample, draw(REWARDS), draw(TEXTS))
                row |= {"prompt_id": asked["prompt_id"]}
                row |= {"finish_reason": draw(st.sampled_from([None, "stop", "length"]))}
                row |= {"token_ids": draw(st.sampled_from([None, [], [sample, 7]]))}
                row |= {"right": draw(st.sampled_from([None, True, False]))} if verified else {}
                rows.append(row)
        return rows

    sources = [row for source in draw(st.sets(st.sampled_from("abc"))) for row in answers(source)]
    return Given(prompts, sources, answers("t"), draw(ANSWERS), draw(PAIRS))


@settings(max_examples=25)
@given(given_answers())
def test_columns_and_rows_give_the_same(answers):
    store = Store(answers.prompts, answers.sources, answers.own, answers.policies, answers.config)
    selection, pairs, dropped = answers.expected()
    assert store.selected()[0] == selection
    found, counts = store.paired()
    assert found == pairs
    assert collections.Counter(reasons(counts)) == dropped


# --- a table in memory -------------------------------------------------------------------------


def answers_of(given: Given) -> pa.Table:
    """The answers as a table for `select_pairs`, in reverse order."""
    by_id = {p["prompt_id"]: p for p in given.prompts}
    rows = []
    for row in [*given.sources, *given.own]:
        if asked := by_id.get(row["prompt_id"]):
            correct = row.get("right") if asked["reference"] is not None else None
            rows.append(row | {"messages": asked["messages"], "correct": correct})
    names = [*records.SCORED.names, "messages", "correct"]
    types = {"messages": records.MESSAGES, "correct": pa.bool_()}
    schema = pa.schema([(n, types.get(n) or records.SCORED.field(n).type) for n in names])
    return pa.Table.from_pylist(rows[::-1], schema=schema)


def all_verdicts_known(given: Given) -> bool:
    """Whether no prompt with a reference has an answer that the verifier failed on."""
    asked = {p["prompt_id"] for p in given.prompts if p["reference"] is not None}
    rows = [r for r in [*given.sources, *given.own] if r["prompt_id"] in asked]
    return all(r.get("right", True) is not None for r in rows)


@settings(max_examples=100)
@given(given_answers().filter(all_verdicts_known))
def test_select_pairs_gives_the_rows_of_a_run(answers):
    table = answers_of(answers)
    options = {"pair": answers.config, "answers_config": answers.policies}
    expected = answers.expected()[1]
    is_missing = len(table) > 0 and "t" not in table["source"].to_pylist()
    if answers.config.policy == "wrpo" and is_missing:
        with pytest.raises(UserError, match="no answer has the source 't'"):
            select_pairs(table, target="t", **options)
    else:
        assert select_pairs(table, target="t", **options).to_pylist() == expected


def test_select_pairs_takes_a_pandas_frame_and_numbers_the_samples():
    rewards = {"a": (2.0, math.nan), "t": (0.5, None, 1.5)}
    rows = [candidate(s, i, r) for s, given in rewards.items() for i, r in enumerate(given)]
    frame = pa.Table.from_pylist(rows).drop_columns(["sample", "token_ids"]).to_pandas()
    (row,) = select_pairs(frame, target="t").to_pylist()
    (stored,), _ = Store([prompt()], rows[:2], rows[2:]).paired()
    names = ("source_chosen", "target_chosen", "rejected")
    assert [(row[n]["source"], row[n]["sample"]) for n in names] == [("a", 0), ("t", 2), ("t", 0)]
    for name in names:
        assert row[name] == stored[name] | {"token_ids": None}
    assert (row["source_margin"], row["target_margin"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("rows", "options", "error"),
    [
        (own(1.0, 0.0), {}, "no answer has the source 'target'"),
        ([{"prompt_id": "p", "source": "t", "text": "x"}], {}, "no column reward"),
        ([candidate("t", 0, 1.0) | {"text": None}], {}, "text has a null"),
        (own(1.0) * 2, {}, "same prompt_id, source and sample"),
        ([candidate("t", 0, 1.0) | {"text": ["x"]}], {}, "the column text"),
        (own(1.0), {"pair": PairConfig(verifier="a:b")}, "calls no verifier"),
        (own(1.0), {"pair": PairConfig(contamination={"action": "drop"})}, "contaminated"),
    ],
)
def test_select_pairs_names_the_problem(rows, options, error):
    with pytest.raises(UserError, match=error):
        select_pairs(pa.Table.from_pylist(rows), **options)


def test_the_example_of_select_pairs():
    result = doctest.testmod(pairs_module)
    assert result.attempted
    assert not result.failed


# --- overlap ---------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(40)]


def test_prompts_that_share_13_words_with_an_evaluation_prompt_are_left_out():
    """Of 20 words the last 13 are the evaluation prompt's: 1 of 8 13-grams."""
    shared = " ".join(WORDS[7:20])
    prompts = [
        prompt(" ".join(WORDS[:20])),
        prompt(" ".join(WORDS[8:20])),  # 12 of them
        prompt("A short one"),
        prompt("another, short ONE."),
    ]
    evaluation = [prompt(f"{shared.upper()}!", "eval"), prompt("a: short (one)", "eval")]
    sources = [candidate("a", 0, 1.0, prompt_id=p["prompt_id"]) for p in prompts]
    store = Store(prompts, sources, evaluation=evaluation)
    assert store.overlap_counts == {"rows": 4, "contaminated": 2}
    step = store.select.contamination.step
    shares = {r["prompt_id"]: r["overlap"] for r in store._read(step, records.OVERLAP)}
    assert [shares[p["prompt_id"]] for p in prompts] == [1 / 8, 0, 1, 0]
    rows, counts = store.selected()
    assert {r["prompt_id"] for r in rows} == {prompts[1]["prompt_id"], prompts[3]["prompt_id"]}
    assert counts["contaminated"] == 2


@given(st.lists(st.lists(st.sampled_from(["a", "B", "é", "7", "--"]), max_size=8)))
def test_ngrams_are_those_of_the_words(texts):
    """Equal hashes exactly where the words, without case and punctuation, are equal."""
    expected = []
    for owner, text in enumerate(texts):
        words = [w.lower() for w in text if w != "--"]
        starts = range(max(len(words) - 2, 1) if words else 0)
        expected += [(owner, tuple(words[i : i + 3])) for i in starts]
    hashes, owners = ngrams(pa.array([" ".join(t) for t in texts], pa.string()), 3)
    assert owners.tolist() == [owner for owner, _ in expected]
    of_hash = dict(zip(hashes.tolist(), [gram for _, gram in expected], strict=True))
    assert [of_hash[h] for h in hashes.tolist()] == [gram for _, gram in expected]
    assert len(of_hash) == len({gram for _, gram in expected})


def test_similarity_is_the_share_of_common_5_grams():
    """abcdef has abcde and bcdef, abcdeg has abcde and bcdeg: 1 of 3."""
    assert similarity("abcdef", "ABCDEG") == pytest.approx(1 / 3)
    assert similarity("Same  text\n", "same text") == 1
    assert similarity("a", "b") == 0


# --- the published form --------------------------------------------------------------------------

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
        parse_messages(prompt)
