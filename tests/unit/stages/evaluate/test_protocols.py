"""What judges are asked and what is taken from what they say, on small benchmarks of our own."""

import hashlib
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import benchmark_files

from wrpo_ray.errors import UserError
from wrpo_ray.report.benchmark_table import html, markdown
from wrpo_ray.stages.evaluate import fetch as fetching
from wrpo_ray.stages.evaluate.benchmarks import read_items, read_judging
from wrpo_ray.stages.evaluate.protocols import (
    AlpacaEvalJudging,
    ArenaHardJudging,
    MTBenchJudging,
    NoVerdictError,
    PairJudging,
    filled,
)
from wrpo_ray.stages.evaluate.verdicts import Game, Verdicts
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

NAMES = ("alpaca_eval", "arena_hard", "mt_bench")


@pytest.fixture
def files(tmp_path) -> dict[str, Folder]:
    made = {name: getattr(benchmark_files, name)(tmp_path / name) for name in NAMES}
    return {name: Folder(str(folder)) for name, folder in made.items()}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"text": text, "finish_reason": "stop", "logprobs": None} | more


def both(name: str, files: dict[str, Folder]) -> tuple[Any, list[dict[str, Any]]]:
    return read_judging(name, files[name]), read_items(name, files[name])


@given(st.text(), st.text())
def test_braces_in_answers_are_no_places(a, b):
    assert filled("{x}|{y}|{z}", {"x": a, "y": b}) == f"{a}|{b}|{{z}}"


def test_questions_keep_their_order_and_are_told_apart(files):
    for name, count in zip(NAMES, (40, 12, 8), strict=True):
        items = read_items(name, files[name])
        assert [item["index"] for item in items] == list(range(count))
        assert len({item["prompt_id"] for item in items}) == count
    assert [(i["group"], i["split"], i["references"]) for i in items[:4]] == [
        ("writing", "t0.7", []), ("math", "t0", ["R1", "R2"]),
        ("stem", "t0.1", []), ("coding", "t0", ["R1", "R2"]),
    ]  # fmt: skip


def test_alpaca_eval_reads_the_same_preference_whichever_answer_is_first(files):
    judging, items = (
        read("alpaca_eval", files["alpaca_eval"]) for read in (read_judging, read_items)
    )
    swapped = {judging.swapped(item) for item in items}
    assert swapped == {True, False}
    for item in items:
        asked = judging.question(item, ["mine {output_2}"], 1)
        assert [m["role"] for m in asked] == ["system", "user"]
        assert "{instruction} " in asked[1]["content"]  # the instruction's own braces
        place = asked[1]["content"].index("mine {output_2}") < asked[1]["content"].index("even")
        assert place == judging.swapped(item)
        mine, other = ("m", "M") if place else ("M", "m")
        top = [
            {"token": mine, "logprob": math.log(0.6)},
            {"token": other, "logprob": math.log(0.2)},
        ]
        assert judging.verdict(item, 1, said("m", logprobs=top)).value == pytest.approx(1.75)
    with pytest.raises(NoVerdictError, match="'I'"):
        judging.verdict(item, 1, said("I", logprobs=[{"token": "I", "logprob": 0.0}]))
    with pytest.raises(NoVerdictError, match="none"):
        judging.verdict(item, 1, said("m"))


def test_arena_hard_swaps_and_counts_for_the_model(files):
    judging, (item, *_) = (
        read("arena_hard", files["arena_hard"]) for read in (read_judging, read_items)
    )
    first, second = (judging.question(item, ["mine"], p)[1]["content"] for p in (1, 2))
    assert "<A>even</A>\n<B>mine</B>" in first
    assert "<A>mine</A>\n<B>even</B>" in second
    shares = [judging.verdict(item, p, said("[[A>>B]]")).value for p in (1, 2)]
    assert shares == [0.0, 1.0]
    for text in ("", "[[A>B]] no, [[B>A]]", "[[AB]]"):
        with pytest.raises(NoVerdictError):
            judging.verdict(item, 1, said(text))


def test_mt_bench_shows_right_answers_where_there_are_some(files):
    judging, items = both("mt_bench", files)
    plain, maths = items[:2]
    assert judging.question(plain, ["a"], 1)[1]["content"] == "rate <1>a</1>"
    assert judging.question(maths, ["a"], 1)[1]["content"] == "rate R1 <1>a</1>"
    second = judging.question(maths, ["a", "b"], 2)[1]["content"]
    assert second == "rate R2 <1>a</1><2>b</2>"
    assert judging.verdict(plain, 1, said("Rating: [[7]]")).value == 7


@given(st.sampled_from("ABC"))
def test_a_judge_that_does_not_care_for_positions_gives_both_games_the_same_share(label):
    mirrored = {"A": "B", "B": "A", "C": "C"}[label]
    games = [PairJudging().verdict({}, p, said(f"[[{x}]]")) for p, x in ((1, label), (2, mirrored))]
    assert games[0].value == games[1].value


@pytest.mark.parametrize("before", ["", "quoted [[A]], then ", "[[C]] [[Tie]]\n\n", "[[7]] "])
@pytest.mark.parametrize(
    ("said_last", "share"),
    [("[[A]]", 1), ("[[B]]", 0), ("[[C]]", 0.5), ("[[ B ]]", 0), ("[[**B**]]", 0), ("[[[B]]]", 0),
     ("[[Tie]]", None), ("[[A/B]]", None), ("[[A>B]]", None), ("[[D]]", None), ("[[a]]", None),
     ("[[8/10]]", None), ("[[AB]]", None), ("[[]]", None)],
)  # fmt: skip
def test_the_last_double_brackets_are_a_pairs_verdict(before, said_last, share):
    """What is no verdict does not give way to one that was quoted before it."""
    judgment = said(f"{before}Verdict: {said_last}.")
    if share is None:
        with pytest.raises(NoVerdictError):
            PairJudging().verdict({}, 1, judgment)
    else:
        assert PairJudging().verdict({}, 1, judgment).value == share
        assert PairJudging().verdict({}, 2, judgment).value == 1 - share


@pytest.mark.parametrize("kind", [PairJudging, MTBenchJudging, ArenaHardJudging, AlpacaEvalJudging])
def test_how_judgments_are_read_is_in_the_verdicts_key(kind):
    """Those that are read as they always were keep theirs; the judge is asked nothing again."""
    asked = SimpleNamespace(step=Step("prompts"), splits=("eval",), answers=())
    game = Game(asked, SimpleNamespace(step=Step("judgments")))
    judging = SimpleNamespace(name=kind.name, identity=1, parser_version=kind.parser_version)
    first = SimpleNamespace(name=kind.name, identity=1, parser_version=1)
    keys = [Verdicts(j, "m", None, "j", (game,)).step.key for j in (judging, first)]
    assert (keys[0] == keys[1]) == (kind in (ArenaHardJudging, AlpacaEvalJudging))


def test_a_pairs_template_of_ones_own_is_checked():
    asked = PairJudging("{{ first }}/{{ second }}/{{ messages[0].content }}")
    question = asked.question({"messages": [{"role": "user", "content": "q"}]}, ["a", "{{ b }}"], 2)
    assert question[0]["content"] == "{{ b }}/a/q"
    with pytest.raises(UserError, match="'frist' is undefined"):
        PairJudging("{{ frist }}")


def test_a_folder_without_the_files_is_told_with_the_remedy(tmp_path, files):
    with pytest.raises(UserError, match="wrpo fetch arena_hard"):
        read_items("arena_hard", Folder(str(tmp_path)))
    (tmp_path / "alpaca_eval" / "alpaca_eval_clf.txt").write_text("{output_1}")
    with pytest.raises(UserError, match="no <|im_start|> messages"):
        read_judging("alpaca_eval", files["alpaca_eval"])


# --- fetch -----------------------------------------------------------------------------------


def test_files_are_checked_by_what_is_known_given_or_was_there_before(tmp_path, monkeypatch):
    server, to = tmp_path / "server", tmp_path / "to"
    server.mkdir()
    (server / "a.txt").write_text("one")
    address = (server / "a.txt").as_uri()
    monkeypatch.setattr(fetching, "FILES", {"b": {"a.txt": address}})
    right = hashlib.sha256(b"one").hexdigest()
    with pytest.raises(UserError, match=f"has SHA-256 {right}, and not 00"):
        fetching.fetch("b", to, {"a.txt": "00"})
    assert not list(to.iterdir())
    assert fetching.fetch("b", to, {"a.txt": right}) == {"a.txt": right}
    assert fetching.read_sums(to) == {"a.txt": right}
    (to / "a.txt").unlink()
    (server / "a.txt").write_text("two")  # the address gives something else now
    with pytest.raises(UserError, match="delete the file"):
        fetching.fetch("b", to)
    (server / "a.txt").unlink()
    with pytest.raises(UserError, match="cannot be fetched"):
        fetching.fetch("b", to)
    with pytest.raises(UserError, match="has no file c"):
        fetching.fetch("b", to, {"c": "00"})


# --- the table -------------------------------------------------------------------------------


def test_the_table_is_safe_and_says_how_many_were_judged():
    estimate = {"mean": 0.5, "low": 0.4, "high": None, "n": 3}
    names = ("win", "tie", "loss", "win_rate", "length_controlled")
    pair = {"a": "<b>|x", "b": "y", "by": "judge", "failed": 2} | dict.fromkeys(names, estimate)
    comparison = {"judge": "<j>", "benchmarks": {}, "pairs": [pair]}
    page, text = html(comparison), markdown(comparison)
    assert "&lt;b&gt;|x - y" in page
    assert "<b>" not in page
    assert "<j>" not in page
    assert "&lt;b&gt;\\|x - y" in text
    assert "50.0 [40.0, -]" in text
    assert "3 of 5 judged" in text
    assert json.dumps(comparison)
