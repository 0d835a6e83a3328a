"""What the built-in verifiers find right: tables worked by hand."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray.config import CodeConfig
from wrpo_ray.stages.score.base import Item, MissingReferenceError
from wrpo_ray.stages.score.verifiers import (
    BadReferenceError,
    has_same_number,
    is_same,
    last_number,
    last_program,
    load_verifier,
)


def item(text: str, reference: str | None) -> Item:
    return Item([{"role": "user", "content": "q"}], text, reference)


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("Paris", "paris", True),
        ("  Paris.\n", "PARIS", True),
        ("New  York\nCity", "new york city", True),
        ("Straße", "STRASSE", True),
        ("ﬁne", "fine", True),  # a ligature
        ("cafe\u0301", "caf\u00e9", True),
        ("Paris, France", "Paris", False),
        ("", "Paris", False),
        ("1.0", "1", False),
    ],
)
def test_exact(text, reference, same):
    assert is_same(text, reference) is same


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("first 1, then 2, then 3", 3),
        ("She pays $1,234.50 in all.", Fraction("1234.5")),
        ("1,234,567 people", 1234567),
        ("1,2345", 2345),  # no grouping: two numbers
        ("-7", -7),
        ("\N{MINUS SIGN}7 degrees", -7),
        ("it is -$5", -5),
        ("it is $-5", -5),
        ("it is - $ 5.25", Fraction("-5.25")),
        ("+3", 3),
        ("10 - 7 = 3", 3),
        ("10-7", 7),
        ("(4)-2", 2),
        ("- 5 apples", 5),  # an item of a list
        ("between 5-10", 10),
        (".5", Fraction(1, 2)),
        ("0.50", Fraction(1, 2)),
        ("50%", 50),
        ("25 cm2", 25),
        ("x1 = 9 m", 9),
        ("v2", None),
        ("version 1.2.3", Fraction("1.2")),
        ("3/4", Fraction(3, 4)),
        ("3 / 4 of it", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("1/0", None),
        ("60 km/h", 60),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{ 3 }{ 4 }", Fraction(-3, 4)),
        (r"\frac34", Fraction(3, 4)),
        ("1e3", 1000),
        ("2.5E-2", Fraction(1, 40)),
        ("1e999999999", 1),  # no such exponent
        (r"so $\boxed{42}$, as 7 shows", 42),
        (r"\boxed{\frac{1}{2}} or 3", Fraction(1, 2)),
        (r"\boxed{1} and \boxed{x = 2\text{ m}} 9", 2),
        (r"\boxed{10{,}000}", 10000),
        (r"\boxed{\$1\,000}", 1000),
        (r"\boxed{5", 5),
        ("He has 5 * 2 = <<5*2=10>>10 left.\n#### 10", 10),
        ("#### 1,080\nThat took 3 steps", 1080),
        ("#### -4", -4),
        ("#### none\nso 6", 6),
        ("#### 3\n#### 4", 4),
        (r"\boxed{3}" "\n#### 4", 4),
        ("no number", None),
        ("", None),
        ("٤٢", 42),
        ("10²", 10),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_numbers_are_equal_by_value_and_a_reference_has_to_have_one():
    assert has_same_number("It costs $72.00.", "Natalia sold 48+24 = 72.\n#### 72")
    assert not has_same_number("It costs $72.50.", "#### 72")
    assert not has_same_number("I do not know", "#### 72")
    with pytest.raises(BadReferenceError, match="no number"):
        has_same_number("72", "seventy-two")


@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-1e12, max_value=1e12)
)
def test_any_decimal_is_read_as_it_is_written(value):
    for text in (f"{value}", f"{value:,}", f"it is {value:,} kg", f"#### {value}"):
        assert last_number(text) == Fraction(value)


@given(st.text(alphabet=r"0123456789,.-+$/eE#\boxed{}frac ", max_size=60))
def test_any_text_has_a_number_or_none(text):
    assert last_number(text) is None or isinstance(last_number(text), Fraction)


@pytest.mark.parametrize(
    "text", ["1,111" * 4000, "9" * 20000, "-" * 20000, "1e9" * 7000, "\\boxed{" * 3000]
)
def test_a_long_text_takes_no_long_time(text):
    started = time.monotonic()
    last_number(text)
    assert time.monotonic() - started < 5


def test_real_answers_of_nine_models_are_read_as_their_publishers_read_them(shared):
    """GSM8K, with outcomes by another reader: to it 2:00 pm is 2, and a calculation no number."""
    import pyarrow.parquet as pq

    columns = ["response", "gold_answer", "reward"]
    table = pq.read_table(shared / "gsm8k_real_responses.parquet", columns=columns)
    rows = table.to_pylist()[::5]
    same = [has_same_number(r["response"], r["gold_answer"]) == r["reward"] for r in rows]
    assert sum(same) / len(rows) > 0.99


FENCE = "```"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (f"So:\n{FENCE}python\nx = 1\n{FENCE}\nDone.", "x = 1\n"),
        (f"{FENCE}py\nx = 1\n{FENCE}\n{FENCE}Python3\nx = 2\n{FENCE}", "x = 2\n"),
        (f"{FENCE}python\nx = 1\n{FENCE}\nprints\n{FENCE}\n1\n{FENCE}", "x = 1\n"),
        (f"{FENCE}\nx = 1\n{FENCE}", "x = 1\n"),
        (f"{FENCE}bash\nls\n{FENCE}", None),
        (f"{FENCE}python\nx = 1", "x = 1\n"[:-1]),  # the model stopped there
        (f"1. so\n   {FENCE}python\n   x = 1\n   {FENCE}", "x = 1\n"),
        (f"~~~python\ns = '{FENCE}'\n~~~", f"s = '{FENCE}'\n"),
        (f"````python\ns = '''\n{FENCE}\n'''\n````", f"s = '''\n{FENCE}\n'''\n"),
        (f"{FENCE}python title=a\nx = 1\n{FENCE}", "x = 1\n"),
        (f"{FENCE}x = 1{FENCE}\n", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_the_last_program(text, program):
    assert last_program(text) == program


def test_scores_are_one_or_zero_and_only_the_references_faults_are_errors():
    reward = load_verifier("number", CodeConfig())
    scores = reward.score(
        [item("5", "5"), item("6", "5"), item("5", None), item("5", " "), item("5", "five")]
    )
    assert scores[:2] == [1.0, 0.0]
    assert [type(e) for e in scores[2:]] == [
        MissingReferenceError,
        MissingReferenceError,
        BadReferenceError,
    ]
    assert load_verifier("exact", CodeConfig()).score([item("A ", "a")]) == [1.0]
    assert reward.score([]) == []
