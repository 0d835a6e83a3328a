"""From Parquet records to token ids within the limits of length, to Arrow files and back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import TEMPLATE, make_tokenizer, preference_rows

from wrpo_ray.config import TrainConfig
from wrpo_ray.llm.reasoning import THINK, Format
from wrpo_ray.stages.train.rows import (
    SUFFIX,
    PreparedRows,
    Row,
    RowTooLongError,
    Tokenizing,
    fit,
    read_counts,
    write_rows,
)
from wrpo_ray.stages.train.task import SFT_ANSWERS, WRPO_ANSWERS
from wrpo_ray.storage.fingerprints import unit_interval
from wrpo_ray.storage.folder import Folder

END = 1
ENDS = frozenset({END})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def tokenizing(tokenizer):
    """How WRPO's records become rows, with settings of a TrainConfig."""

    def make(
        names: tuple[str, ...] = WRPO_ANSWERS, own: str | None = "target-sft", **settings
    ) -> Tokenizing:
        config = TrainConfig(**({"max_length": 64} | settings))
        return Tokenizing(tokenizer, ENDS, names, config, own)

    return make


@pytest.fixture
def record():
    """Prompt and answers of known words; the rejected answer has no token ids."""
    row = preference_rows(1)[0]
    row["messages"] = [{"role": "user", "content": "w0 w0"}]
    row["source_chosen"] |= {"text": " w1 w2 ", "token_ids": [7, 7, 7]}
    row["target_chosen"] |= {"text": "w3", "token_ids": [9, END]}
    row["rejected"] |= {"text": "w4", "token_ids": None}
    return row


# --- token ids --------------------------------------------------------------------------------


def test_token_ids_of_answers(tokenizing, tokenizer, record):
    """The source's ids are of another vocabulary; the target's own are used as sampled.

    White space around an answer is part of it.
    """
    row, cut = tokenizing().row(record)
    w0, w1, w2, w4, space, user, assistant = tokenizer.convert_tokens_to_ids(
        ["w0", "w1", "w2", "w4", " ", "<user>", "<assistant>"]
    )
    assert row.prompt.tolist() == [user, w0, space, w0, END, assistant]
    assert [answer.tolist() for answer in row.answers] == [
        [space, w1, space, w2, space, END],
        [9, END],
        [w4, END],
    ]
    assert {ids.dtype for ids in (row.prompt, *row.answers)} == {np.dtype(np.int32)}
    assert (row.prompt_id, row.reference, cut) == (record["prompt_id"], (), 0)


@pytest.mark.parametrize("own", ["target-sft", "other", "third", None])
@pytest.mark.parametrize("source", ["target-sft", "other", "third", None])
@pytest.mark.parametrize("name", WRPO_ANSWERS)
def test_only_the_own_models_token_ids_are_used(tokenizing, tokenizer, record, own, source, name):
    """Whatever part of a row an answer has; ids 8 and 9 are not those of its text."""
    for other in WRPO_ANSWERS:
        record[other]["token_ids"] = None
    record[name] |= {"text": "w1", "token_ids": [8, 9, END], "source": source}
    answers = dict(zip(WRPO_ANSWERS, tokenizing(own=own).row(record)[0].answers, strict=True))
    is_own = own is not None and own == source
    of_text = [*tokenizer.convert_tokens_to_ids(["w1"]), END]
    assert answers[name].tolist() == ([8, 9, END] if is_own else of_text)


@pytest.mark.parametrize(
    ("text", "prompt", "uses_ids"),
    [
        ("<think>w2</think>w3", "w0", True),
        ("w3", "w0", False),  # its empty reasoning has no ids
        ("w3", "w1", True),
    ],
)
def test_own_ids_follow_only_a_prompt_that_they_can_follow(record, text, prompt, uses_ids):
    """The template opens reasoning after prompts of `w0`."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    opens = "<assistant>{% if messages[0].content == 'w0' %}<think>{% endif %}{% endif %}"
    tokenizer.chat_template = TEMPLATE.replace("<assistant>{% endif %}", opens)
    config, format_ = TrainConfig(max_length=64), Format(THINK, "<think>")
    given = Tokenizing(tokenizer, ENDS, WRPO_ANSWERS, config, "target-sft", format_)
    record["messages"] = [{"role": "user", "content": prompt}]
    record["target_chosen"] |= {"text": text, "token_ids": [8, 9, END]}
    answer = given.row(record)[0].answers[1].tolist()
    assert (answer == [8, 9, END]) is uses_ids
    if not uses_ids:
        assert tokenizer.convert_tokens_to_ids("</think>") in answer


def test_sft_takes_the_sources_answer_alone(tokenizing, record):
    row, _ = tokenizing(SFT_ANSWERS).row(record)
    assert [len(answer) for answer in row.answers] == [6]


@pytest.mark.parametrize("name", WRPO_ANSWERS)
def test_a_cut_off_answer_is_not_closed(tokenizing, record, name):
    record[name] |= {"finish_reason": "length"}
    if name == "target_chosen":
        record[name]["token_ids"] = [9, 9]
    answers = dict(zip(WRPO_ANSWERS, tokenizing().row(record)[0].answers, strict=True))
    assert END not in answers.pop(name).tolist()
    assert all(answer.tolist().count(END) == 1 for answer in answers.values())


def test_an_imported_answer_is_closed(tokenizing, record):
    """It has neither token ids nor a finish reason."""
    for name in WRPO_ANSWERS:
        record[name] |= {"token_ids": None, "finish_reason": None}
    assert all(answer[-1] == END for answer in tokenizing().row(record)[0].answers)


def test_a_sampled_answer_with_two_ends_is_a_fault(tokenizing, record):
    record["target_chosen"]["token_ids"] = [9, END, END]
    rows = tokenizing().rows([record], "wrpo")
    assert [row["error"] for row in rows.failed] == ["UserError"]


# --- limits of length -------------------------------------------------------------------------


def ids(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def test_what_fits_stays():
    prompt, answers = ids(4), [ids(6), ids(1)]
    for overflow in ("drop", "cut"):
        got = fit(prompt, answers, TrainConfig(max_length=10, overflow=overflow))
        assert got == (prompt, answers, 0)


def test_one_token_too_many_drops_the_row():
    with pytest.raises(RowTooLongError, match="longest answer have 11 tokens, max_length 10"):
        fit(ids(4), [ids(6), ids(7)], TrainConfig(max_length=10))


def test_only_the_too_long_answers_are_cut_by_their_own_excess():
    """Prompt 4 of 10: an answer keeps its first 6 tokens; shorter ones stay as they are."""
    answers = [ids(9), ids(3), ids(6), ids(7)]
    prompt, cut, count = fit(ids(4), answers, TrainConfig(max_length=10, overflow="cut"))
    assert (prompt, cut, count) == (ids(4), [ids(6), ids(3), ids(6), ids(6)], 2)


@pytest.mark.parametrize("overflow", ["drop", "cut"])
def test_a_long_prompt_drops_the_row(overflow):
    config = TrainConfig(max_length=10, max_prompt_length=5, overflow=overflow)
    assert fit(ids(5), [ids(5)], config)[2] == 0
    with pytest.raises(RowTooLongError, match="prompt has 6 tokens, of which 5 are allowed"):
        fit(ids(6), [ids(1)], config)


@pytest.mark.parametrize("overflow", ["drop", "cut"])
def test_a_prompt_without_room_for_an_answer_drops_the_row(overflow):
    config = TrainConfig(max_length=10, overflow=overflow)
    assert fit(ids(9), [ids(1)], config)[2] == 0
    with pytest.raises(RowTooLongError, match="prompt has 10 tokens, of which 9 are allowed"):
        fit(ids(10), [ids(1)], config)


@given(
    st.integers(1, 20),
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(8, 20),
    st.sampled_from(["drop", "cut"]),
)
def test_no_row_exceeds_the_limit(prompt, lengths, most, overflow):
    config = TrainConfig(max_length=most, overflow=overflow)
    answers = [ids(length, first=100) for length in lengths]
    try:
        kept_prompt, kept, cut = fit(ids(prompt), answers, config)
    except RowTooLongError:
        assert prompt >= most if overflow == "cut" else prompt + max(lengths) > most
        return
    assert kept_prompt == ids(prompt)
    pairs = list(zip(kept, answers, strict=True))
    assert all(prompt + len(k) <= most and k == a[: len(k)] for k, a in pairs)
    assert all(len(k) == len(a) or prompt + len(k) == most for k, a in pairs)
    assert cut == sum(len(k) < len(a) for k, a in pairs)


def test_counts_and_failures(tokenizing, record):
    """Prompt 6, answers 4, 2 and 2: one token less than 10 drops the row, or cuts one answer."""
    record["source_chosen"]["text"] = "w1 w2"
    assert len(tokenizing(max_length=10).rows([record], "wrpo").kept) == 1
    dropped = tokenizing(max_length=9).rows([record], "wrpo")
    assert (dropped.kept, dropped.faults, dropped.cut) == ([], [], 0)
    (failed,) = dropped.too_long
    assert (failed["stage"], failed["error"]) == ("wrpo", "TooLong")
    assert failed["prompt_id"] == record["prompt_id"]
    cut = tokenizing(max_length=9, overflow="cut").rows([record], "wrpo")
    assert (cut.cut, cut.failed) == (1, [])
    assert [len(answer) for answer in cut.kept[0].answers] == [3, 2, 2]


def test_a_broken_row_fails_alone(tokenizing, record):
    broken = record | {"prompt_id": "0" * 32, "messages": None}
    rows = tokenizing().rows([broken, record], "wrpo")
    assert [row.prompt_id for row in rows.kept] == [record["prompt_id"]]
    assert [row["prompt_id"] for row in rows.faults] == ["0" * 32]
    assert rows.too_long == []


# --- prepared rows ----------------------------------------------------------------------------


def some_rows(count: int, seed: int = 0, reference: bool = True) -> list[Row]:
    """Rows with float64 log-probs that no shorter float can hold; some prompts come twice."""
    rng = random.Random(seed)

    def some_ids() -> np.ndarray:
        return np.array([rng.randrange(128000) for _ in range(rng.randint(1, 9))], np.int32)

    return [
        Row(
            f"{rng.randrange(count):032x}",
            some_ids(),
            (some_ids(), some_ids(), some_ids()),
            tuple(-100 * rng.random() for _ in range(3)) if reference else (),
        )
        for _ in range(count)
    ]


def write(folder: Path, rows: list[Row], buckets: int) -> PreparedRows:
    """The rows in so many files, each in the order of its rows."""
    for bucket in range(buckets):
        part = [row for row in rows if int(row.prompt_id, 16) % buckets == bucket]
        name = f"{bucket:05d}-of-{buckets:05d}{SUFFIX}"
        write_rows(Folder(str(folder)), name, part, {"rows": len(part), "cut": 3})
    return PreparedRows(folder)


def same(got: Row, want: Row) -> bool:
    pairs = zip((got.prompt, *got.answers), (want.prompt, *want.answers), strict=True)
    return (got.prompt_id, got.reference) == (want.prompt_id, want.reference) and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs
    )


@pytest.mark.parametrize("buckets", [1, 4, 64])  # of 64 some are empty
@pytest.mark.parametrize("reference", [True, False])
def test_rows_come_back_by_prompt_whatever_the_buckets(tmp_path, buckets, reference):
    """Rows of the same prompt are all there, in the order in which they were written."""
    rows = some_rows(50, reference=reference)
    read = write(tmp_path, rows, buckets)
    expected = sorted(rows, key=lambda row: row.prompt_id)
    assert len({row.prompt_id for row in rows}) < len(rows) == len(read)
    assert all(same(read[i], row) for i, row in enumerate(expected))
    lengths = [[len(row.prompt), *map(len, row.answers)] for row in expected]
    assert read.lengths.tolist() == lengths
    assert [read.prompt_id(i) for i in range(50)] == [row.prompt_id for row in expected]


def test_rows_are_mapped_and_not_copied(tmp_path):
    """A row's arrays are views, read-only, of a file that Arrow has allocated no memory for."""
    long = np.arange(10**6, dtype=np.int32)
    write(tmp_path, [Row("a" * 32, long, (long[:5],), (-1.0,))], 1)
    before = pa.total_allocated_bytes()
    read = PreparedRows(tmp_path)
    first, second = read[0].prompt, read[0].prompt
    assert pa.total_allocated_bytes() - before < 10**5
    assert not first.flags.owndata
    assert not first.flags.writeable
    assert np.shares_memory(first, second)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if SUFFIX in line]
    spans = [tuple(int(n, 16) for n in line.split()[0].split("-")) for line in mapped]
    assert any(start <= first.ctypes.data < end for start, end in spans)


@pytest.mark.parametrize("buckets", [0, 3])
def test_no_rows(tmp_path, buckets):
    """An empty folder, and files without a row."""
    read = write(tmp_path, [], buckets)
    assert len(read) == 0
    assert len(read.lengths) == 0
    assert read.held_out(0.5).tolist() == []


def test_counts_lie_with_the_rows(tmp_path):
    folder = Folder(str(tmp_path))
    write(tmp_path, some_rows(3), 1)
    assert read_counts(folder, f"00000-of-00001{SUFFIX}") == {"rows": 3, "cut": 3}
    assert read_counts(folder, f"00000-of-00002{SUFFIX}") is None


def test_rows_are_held_out_by_the_hash_of_their_prompts(tmp_path):
    rows = some_rows(400)
    read = write(tmp_path, rows, 4)
    held = read.held_out(0.25)
    assert held.shape == (400,)
    assert held.dtype == bool
    assert 60 < held.sum() < 140
    for index in range(400):
        assert held[index] == (unit_interval("holdout", read.prompt_id(index)) < 0.25)
    assert not read.held_out(0.0).any()
    assert (held <= read.held_out(0.5)).all()  # a greater share keeps what was held out
