"""From Parquet records to token ids."""

from __future__ import annotations

import pytest
from tiny_models import make_tokenizer, preference_rows, write_preferences, write_selection

from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import UserError
from wrpo_ray.train.rows import Rows, check_some, merge, read_part, tokenize, tokenize_row
from wrpo_ray.train.task import SFT_ANSWERS, WRPO_ANSWERS

END = 1
ENDS = frozenset({END})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def record():
    row = preference_rows(1)[0]
    row["source_chosen"] |= {"text": " w1 w2 ", "token_ids": [7, 7, 7]}
    row["target_chosen"] |= {"text": "w3", "token_ids": [9, END]}
    row["rejected"] |= {"text": "w4", "token_ids": None}
    return row


def test_token_ids_of_answers(tokenizer, record):
    """The source's ids are of another vocabulary; the target's own are used as sampled."""
    row = tokenize_row(tokenizer, ENDS, record, WRPO_ANSWERS, 64)
    source, target, rejected = (answer.tolist() for answer in row.answers)
    w1, w2, w4 = tokenizer.convert_tokens_to_ids(["w1", "w2", "w4"])
    assert source == [w1, tokenizer.convert_tokens_to_ids(" "), w2, END]
    assert target == [9, END]
    assert rejected == [w4, END]
    assert row.prompt.tolist()[-1] == tokenizer.convert_tokens_to_ids("<assistant>")


def test_a_cut_off_answer_is_not_closed(tokenizer, record):
    record["source_chosen"]["finish_reason"] = "length"
    row = tokenize_row(tokenizer, ENDS, record, WRPO_ANSWERS, 64)
    assert END not in row.answers[0].tolist()


def test_a_row_is_dropped_if_one_answer_does_not_fit(tokenizer, record):
    fits = tokenize_row(tokenizer, ENDS, record, WRPO_ANSWERS, 64)
    length = len(fits.prompt) + max(len(answer) for answer in fits.answers)
    arguments = (tokenizer, ENDS, [record], WRPO_ANSWERS)
    exact = tokenize(*arguments, stage="wrpo", max_length=length)
    short = tokenize(*arguments, stage="wrpo", max_length=length - 1)
    assert (len(exact.kept), exact.dropped) == (1, 0)
    assert (len(short.kept), short.dropped) == (0, 1)
    failed = short.failed[0]
    assert (failed["error"], failed["prompt_id"]) == ("TooLong", record["prompt_id"])


def test_a_broken_row_fails_alone(tokenizer, record):
    broken = record | {"prompt_id": "0" * 32, "messages": None}
    rows = tokenize(tokenizer, ENDS, [broken, record], WRPO_ANSWERS, stage="wrpo", max_length=64)
    assert [row.prompt_id for row in rows.kept] == [record["prompt_id"]]
    assert (len(rows.failed), rows.dropped) == (1, 0)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_and_shards_change_nothing(tokenizer, tmp_path, parts):
    records = preference_rows(25)
    for count in (1, 4):
        folder = Folder(str(tmp_path / str(count)))
        write_preferences(folder, records, count)
        read = [
            tokenize(tokenizer, ENDS, read_part(folder, WRPO_ANSWERS, p, parts), WRPO_ANSWERS,
                     stage="wrpo", max_length=64)
            for p in range(parts)
        ]  # fmt: skip
        ids = [row.prompt_id for row in merge(read).kept]
        assert ids == sorted(record["prompt_id"] for record in records)


def test_sft_takes_its_split_alone(tmp_path):
    records = preference_rows(20)
    write_selection(Folder(str(tmp_path)), records)
    got = read_part(Folder(str(tmp_path)), SFT_ANSWERS, 0, 1)
    wanted = {r["prompt_id"] for i, r in enumerate(records) if i % 4 != 3}
    assert {record["prompt_id"] for record in got} == wanted


def test_merge_takes_a_prompt_once_and_puts_faults_first(tokenizer, record):
    arguments = (tokenizer, ENDS, [record, record | {"prompt_id": "f" * 32, "messages": None}])
    short = tokenize(*arguments, WRPO_ANSWERS, stage="wrpo", max_length=2)
    kept = tokenize(tokenizer, ENDS, [record], WRPO_ANSWERS, stage="wrpo", max_length=64)
    merged = merge([short, kept, kept])
    assert len(merged.kept) == 1
    assert [row["error"] != "TooLong" for row in merged.failed] == [True, False]


def test_no_row_is_an_error_with_a_remedy(tokenizer, record):
    folder = Folder("/data/pair")
    with pytest.raises(UserError, match=r"wrpo: /data/pair holds no row .*give more prompts"):
        check_some(Rows(), "wrpo", folder, 64)
    short = tokenize(tokenizer, ENDS, [record], WRPO_ANSWERS, stage="wrpo", max_length=2)
    with pytest.raises(UserError, match=r"1 rows have more than 2 tokens.*raise wrpo.max_length"):
        check_some(short, "wrpo", folder, 2)
