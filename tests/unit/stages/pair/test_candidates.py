"""Candidates as columns: the order of ties, empty answers, and scores of some prompts."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray.config import AnswersConfig
from wrpo_ray.data.records import SCORED
from wrpo_ray.stages.pair.candidates import STORED, Candidates, candidates_of
from wrpo_ray.stages.pair.eligibility import eligible_answers
from wrpo_ray.stages.pair.pairs import select_pairs
from wrpo_ray.storage.fingerprints import unit_interval

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def candidates(keys: list[tuple[str, str, int | None]], texts: list[str] | None = None):
    """Candidates as plain columns and as the codes of files; all of their prompts."""
    names = ("prompt_id", "source", "sample")
    rows = [dict(zip(names, key, strict=True)) | {"reward": 0.0, "text": "x"} for key in keys]
    for row, text in zip(rows, texts or [], strict=False):
        row["text"] = text
    plain = pa.Table.from_pylist(rows, schema=SCORED)
    ids = pa.array(sorted({key[0] for key in keys}), pa.string())
    tables = plain, plain.cast(STORED)
    return [candidates_of((), table, np.arange(len(rows)), ids) for table in tables]


@given(st.lists(st.tuples(NAMES, NAMES, st.integers(0, 2**31 - 1)), unique=True, max_size=8))
def test_ties_are_ordered_by_the_hash_of_the_answers_key(keys):
    """The same hash as of the key in Python: outputs of earlier versions hold such choices."""
    for given_ in candidates(keys):
        ordered = sorted(keys)
        expected = [unit_interval("tie", *key) for key in ordered]
        assert given_.ties(np.arange(len(keys))).tolist() == expected


def test_every_answer_of_nothing_but_white_space_is_empty():
    """White space as Python has it, of all of Unicode; a visible character makes an answer."""
    spaces = [chr(c) for c in range(0x110000) if chr(c).isspace()]
    texts = ["", *spaces, "".join(spaces), *(f"{space}a{space}" for space in spaces)]
    keys = [("p", "m", sample) for sample in range(len(texts))]
    for given_ in candidates(keys, texts):
        eligible = eligible_answers(given_, AnswersConfig())
        assert eligible.chosen.tolist() == [bool(text.strip()) for text in texts]
        assert eligible.counts["answers.empty.m"] == len(spaces) + 2


def test_scores_of_some_prompts_are_those_of_all_their_answers():
    keys = [("p", "b", 0), ("q", "a", 1), ("q", "a", 0), ("r", "b", 2), ("p", "a", 0)]
    of_prompts = [["a0", "b0"], ["a0", "a1"], ["b2"]]
    for given_ in candidates(keys):
        for wanted in ([0, 1, 2], [0, 2], [1], []):
            assert scores(given_, wanted) == [of_prompts[prompt] for prompt in wanted]


def test_an_answer_without_a_number_comes_last():
    rows = {"prompt_id": ["p"] * 4, "source": ["a", "a", "target", "target"]}
    rows |= {"sample": [None, 3, 0, None], "text": list("wxyz"), "reward": [0.5, 0.5, 0.9, 0.1]}
    (row,) = select_pairs(pa.table(rows)).to_pylist()
    expected = [("a", 3), ("a", None), ("target", 0), ("target", None)]
    assert [(score["source"], score["sample"]) for score in row["candidates"]] == expected
    tied = {text: unit_interval("tie", "p", "a", n) for text, n in (("w", None), ("x", 3))}
    assert row["source_chosen"]["text"] == max(tied, key=tied.__getitem__)


def scores(of: Candidates, prompts: list[int]) -> list[list[str]]:
    found = of.scores(np.array(prompts, int)).to_pylist()
    return [[f"{score['source']}{score['sample']}" for score in one] for one in found]
