"""Where reasoning ends and the answer begins: whole texts, texts in pieces, token ids, formats."""

from __future__ import annotations

import ast
import importlib.util
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import make_tokenizer

from wrpo_ray.config import ModelConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm import reasoning
from wrpo_ray.llm.reasoning import (
    OTHER_PARSERS,
    PARSERS,
    THINK,
    Format,
    Markers,
    Splitter,
    format_of,
    ids_from,
    markers_of_parser,
    put_apart,
    put_apart_unseen,
    split,
)

PLAIN = Format(THINK)
OPENED = Format(THINK, "<think>\n")
TABLE: dict[str, tuple[Format, str, tuple[str, str, str, bool]]] = {
    "no reasoning": (PLAIN, "yes", ("", "", "yes", True)),
    "nothing at all": (PLAIN, "", ("", "", "", True)),
    "reasoning and answer": (
        PLAIN,
        "<think>\nhm\n</think>\n\nyes",
        ("<think>\nhm\n</think>\n\n", "\nhm\n", "yes", True),
    ),
    "white space before the marker": (
        PLAIN,
        "\n <think>a</think>yes ",
        ("\n <think>a</think>", "a", "yes ", True),
    ),
    "the answer keeps its indentation": (
        PLAIN,
        "<think></think> \n\n    x = 1",
        ("<think></think> \n\n", "", "    x = 1", True),
    ),
    "a space that begins the answer": (
        PLAIN,
        "<think>a</think> yes",
        ("<think>a</think>", "a", " yes", True),
    ),
    "cut off": (PLAIN, "<think>\n2, so 3", ("<think>\n2, so 3", "\n2, so 3", "", False)),
    "cut off within the closing marker": (
        PLAIN,
        "<think>a</thi",
        ("<think>a</thi", "a</thi", "", False),
    ),
    "cut off within the opening marker": (PLAIN, " <thi", ("", "", " <thi", True)),
    "white space for an answer": (
        PLAIN,
        "<think>a</think>\n\n ",
        ("<think>a</think>\n\n ", "a", "", True),
    ),
    "two closing markers": (
        PLAIN,
        "<think>a</think>b</think>c",
        ("<think>a</think>", "a", "b</think>c", True),
    ),
    "nested": (
        PLAIN,
        "<think>a<think>b</think>c</think>d",
        ("<think>a<think>b</think>", "a<think>b", "c</think>d", True),
    ),
    "reasoning again": (
        PLAIN,
        "<think>a</think>b<think>c</think>d",
        ("<think>a</think>", "a", "b<think>c</think>d", True),
    ),
    "markers in the code of an answer": (
        PLAIN,
        "Use\n```\n<think>x</think>\n```",
        ("", "", "Use\n```\n<think>x</think>\n```", True),
    ),
    "a closing marker in the code of reasoning": (
        PLAIN,
        "<think>`</think>` ends it</think>yes",
        ("<think>`</think>", "`", "` ends it</think>yes", True),
    ),
    "a closing marker alone": (PLAIN, "a</think>b", ("", "", "a</think>b", True)),
    "the prompt opens it": (
        OPENED,
        "hm\n</think>\n\nyes",
        ("<think>\nhm\n</think>\n\n", "hm\n", "yes", True),
    ),
    "the prompt opens it, and the model again": (
        OPENED,
        "<think>a</think>b",
        ("<think>a</think>", "a", "b", True),
    ),
    "the prompt opens it, cut off": (OPENED, "7 or 8", ("<think>\n7 or 8", "7 or 8", "", False)),
    "the prompt opens it, nothing follows": (OPENED, "", ("<think>\n", "", "", False)),
    "the prompt opens it, the marker begins": (OPENED, "<th", ("<think>\n<th", "<th", "", False)),
    "markers of spaces inside are text": (
        PLAIN,
        "< think>a</ think>b",
        ("", "", "< think>a</ think>b", True),
    ),
}
"""{case: (format, text, (before, reasoning, answer, is_finished))}"""


@pytest.mark.parametrize("case", TABLE)
def test_a_text_is_split(case: str) -> None:
    format_, text, parts = TABLE[case]
    found = split(text, format_)
    assert (found.before, found.reasoning, found.answer, found.is_finished) == parts
    assert text.endswith(found.answer)


def test_a_text_in_pieces_is_split_like_the_whole() -> None:
    rng = random.Random(1)
    parts = ["<think>", "</think>", "<", "</", "think>", "\n", " ", "a", "\n\n", "7", "<think", "é"]
    texts = ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(3000)]
    finished = 0
    for text in [*texts, *(text for _, text, _ in TABLE.values())]:
        for format_ in (PLAIN, OPENED):
            cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
            pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
            splitter = Splitter(format_)
            found = [*map(splitter.feed, pieces), splitter.finish()]
            whole = split(text, format_)
            assert "".join(p.reasoning for p in found) == whole.reasoning
            assert "".join(p.answer for p in found) == whole.answer
            assert splitter.is_within is not whole.is_finished
            finished += whole.is_finished
    assert 1000 < finished < 5500


def test_pieces_are_given_as_soon_as_they_are_known() -> None:
    splitter = Splitter(PLAIN)
    pieces = ["<thi", "nk>", "so", " 7</", "b </thi", "nk>", "\n", "\n y", "es</think>"]
    found = [tuple(splitter.feed(piece)) for piece in pieces]
    assert found[:6] == [("", ""), ("", ""), ("so", ""), (" 7", ""), ("</b ", ""), ("", "")]
    assert found[6:] == [("", ""), ("", " y"), ("", "es</think>")]


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("A:<think>\n", "<think>\n"),
        ("A:<think>", "<think>"),
        ("A:<think></think>", ""),
        ("A:<think>\n\n</think>\n\n", ""),
        ("<think>\nA:", ""),  # a user's
        ("</think> <think>\n\n ", "<think>\n\n "),
        ("", ""),
    ],
)
def test_the_end_of_the_prompt_says_whether_it_opens_reasoning(prompt: str, opening: str) -> None:
    for format_ in (PLAIN, OPENED, Format(THINK, "<think>Well")):
        assert format_.after(prompt) == Format(THINK, opening)
    assert Format(THINK, "<think>Well").after("A:<think>Well").opening == "<think>Well"


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("yes", "<think>\n\n</think>\n\nyes"),
        ("<think>\n\nhm</think>yes", "<think>\n\nhm</think>yes"),
        ("<think>hm</think>yes", "<think>\nhm</think>yes"),
        (" \n<think> hm</think>yes", "<think>\n hm</think>yes"),
        ("say <think>", "<think>\n\n</think>\n\nsay <think>"),
        ("", "<think>\n\n</think>\n\n"),
    ],
)
def test_a_text_follows_the_prompt_that_opens_reasoning(text: str, finished: str) -> None:
    assert OPENED.finished(text) == finished
    assert PLAIN.finished(text) == text


# --- records -----------------------------------------------------------------------------------


def row(text: str, ids: list[int] | None = None, reason: str = "stop") -> dict[str, Any]:
    return {"text": text, "token_ids": ids, "finish_reason": reason}


WORDS = ["<think>", "hm", "</think>", "\n\n", "yes", ".", "\n\nno", "<end>", "é"]


def decoded(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids if WORDS[i] != "<end>")


@pytest.mark.parametrize(
    ("ids", "stripped"),
    [
        ([0, 1, 2, 3, 4, 5, 7], [4, 5, 7]),
        ([0, 1, 2, 6, 7], None),  # one token holds the end of the blank line and the answer
        ([0, 8, 2, 3, 8, 7], [8, 7]),
        ([4, 7], [4, 7]),
    ],
)
def test_token_ids_are_those_of_what_is_trained_on(ids: list[int], stripped: Any) -> None:
    given = row(decoded(ids), ids)
    assert put_apart(given, PLAIN, "strip", decoded)["token_ids"] == stripped
    assert put_apart(given, PLAIN, "keep", decoded)["token_ids"] == ids
    unread = ids if ids[0] == 4 else None  # without reasoning they stay
    assert put_apart(given, PLAIN, "strip")["token_ids"] == unread


def test_ids_of_another_text_are_not_used() -> None:
    assert ids_from(2, "xx yes", [1, 4], decoded) is None


def test_a_row_has_its_reasoning_apart() -> None:
    text = "<think>\n7\n</think>\n\n8"
    kept, stripped = (put_apart(row(text), PLAIN, policy) for policy in ("keep", "strip"))
    assert kept == row("8") | {"reasoning": text[:-1], "reasoning_state": "kept"}
    assert stripped == kept | {"reasoning_state": "stripped"}
    assert put_apart(row("8"), PLAIN, "keep") == row("8")
    for policy in ("keep", "strip"):
        cut = put_apart(row("<think>7, 8", [0, 1], "length"), PLAIN, policy, decoded)
        assert (cut["text"], cut["reasoning_state"]) == ("", "unfinished")


def test_a_field_with_the_reasoning_is_written_between_the_markers() -> None:
    keeps = ModelConfig.model_validate(
        {"name": "a", "model": "a", "endpoint": {"url": "http://a/v1"}, "reasoning": "keep"}
    )
    found = put_apart_unseen(row("8", [3]), keeps, " hm\n")
    assert found == row("8") | {
        "reasoning": "<think>\nhm\n</think>\n\n",
        "reasoning_state": "kept",
    }
    cut = put_apart_unseen(row("", reason="length"), keeps, "hm")
    assert cut["reasoning_state"] == "unfinished"
    named = keeps.model_copy(update={"reasoning": "strip", "reasoning_parser": "mistral"})
    found = put_apart_unseen(row("8"), named, "hm")
    assert found["reasoning"] == "[THINK]\nhm\n[/THINK]\n\n"
    assert found["reasoning_state"] == "stripped"


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("<think>\nhm\n</think>\n\n8", "hm"),  # in both places
        ("<think>hm</think>8", "another one"),
        ("hm\n</think>\n\n8", " hm "),
        ("8", "<think>\nhm\n</think>"),  # with its markers
        ("8", "hm"),
    ],
)
def test_reasoning_is_left_out_of_the_text_wherever_a_server_puts_it(
    text: str, reasoning: str
) -> None:
    model = ModelConfig(name="a", model="a", reasoning="keep")
    found = put_apart_unseen(row(text), model, reasoning)
    assert (found["text"], found["reasoning_state"]) == ("8", "kept")
    assert found["reasoning"].count("<think>") + found["reasoning"].count("</think>") <= 2
    assert "hm" in found["reasoning"]


def test_markers_in_an_answer_whose_reasoning_is_apart_are_its_text() -> None:
    model = ModelConfig(name="a", model="a", reasoning="strip")
    text = "Write `<think>` and `</think>`."
    assert put_apart_unseen(row(text), model, "hm")["text"] == text
    assert put_apart_unseen(row(text, reason="length"), model, "hm")["text"] == text


def test_what_was_cut_off_before_any_marker_is_no_answer() -> None:
    """Of a prompt that is not seen and may have opened the reasoning."""
    model = ModelConfig(name="a", model="a", reasoning="strip")
    for text in ("7 or 8", "", "<think>7"):
        found = put_apart_unseen(row(text, reason="length"), model, None)
        assert (found["text"], found["reasoning_state"]) == ("", "unfinished")
    for text, answer in (("7</think>8, as", "8, as"), ("<think>7</think>8, as", "8, as")):
        assert put_apart_unseen(row(text, reason="length"), model, None)["text"] == answer


@pytest.mark.parametrize("reason", ["stop", "length", None])
def test_reasoning_without_an_answer_is_unfinished(reason: Any) -> None:
    """A server that finds no closing marker says so by no text."""
    model = ModelConfig(name="a", model="a", reasoning="keep")
    for text in ("", " \n"):
        found = put_apart_unseen(row(text, reason=reason), model, "hm")
        assert found["reasoning_state"] == "unfinished"


def test_a_servers_text_may_lack_the_opening_marker() -> None:
    model = ModelConfig(name="a", model="a", reasoning="strip")
    for text, answer in (("hm</think>b", "b"), ("<think>hm</think>b", "b"), ("b", "b")):
        assert put_apart_unseen(row(text), model, None)["text"] == answer


# --- formats -----------------------------------------------------------------------------------

ASKS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:"


def tokenizer(template: str, words: tuple[str, ...] = (), special: tuple[str, ...] = ()) -> Any:
    made = make_tokenizer()
    made.add_tokens(list(words))
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.chat_template = template
    return made


def test_the_format_is_that_of_the_template() -> None:
    plain = ASKS + "{% endif %}{# </think> #}"
    assert format_of(tokenizer(plain)) == PLAIN
    opened = ASKS + "<think>\n{{ '' }}{% endif %}{# </think> #}"
    assert format_of(tokenizer(opened)) == OPENED
    closed = ASKS + "<think>\n\n</think>\n\n{{ '' }}{% endif %}"
    assert format_of(tokenizer(closed)) == PLAIN
    special = tokenizer(ASKS + "{% endif %}", special=("[THINK]", "[/THINK]"))
    assert format_of(special) == Format(Markers("[THINK]", "[/THINK]"), is_special=True)
    words = tokenizer(ASKS + "{% endif %}", ("<seed:think>", "</seed:think>"))
    assert format_of(words) == Format(Markers("<seed:think>", "</seed:think>"))
    assert format_of(tokenizer(ASKS + "{% endif %}"), "qwen3") == PLAIN


def test_a_format_that_is_not_known_is_an_error_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"no markers|has markers.*leave `reasoning` out"):
        format_of(tokenizer(ASKS + "{% endif %}"))
    both = tokenizer(ASKS + "{% endif %}{# </think>[/THINK] #}")
    with pytest.raises(UserError, match=r"may be <think></think>, \[THINK\]\[/THINK\]; give `reas"):
        format_of(both)


def test_the_parsers_are_vllms() -> None:
    """All of vLLM's are known, so that a name is either read, refused, or misspelled."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "reasoning" / "__init__.py").read_text())
    names: set[str] = next(
        set(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign) and "REGISTER" in getattr(node.targets[0], "id", "")
    )
    assert names == PARSERS.keys() | OTHER_PARSERS
    assert not PARSERS.keys() & OTHER_PARSERS
    with pytest.raises(UserError, match="the closest is 'qwen3'"):
        markers_of_parser("qwen-3")
    with pytest.raises(UserError, match="granite reads more than a pair of markers; serve"):
        markers_of_parser("granite")
    assert markers_of_parser("mistral").close == "[/THINK]"
    assert reasoning.THINK in PARSERS.values()
