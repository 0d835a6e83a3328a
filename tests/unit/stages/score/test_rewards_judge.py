"""A judge behind an endpoint, against a server on this machine."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from support.openai_server import Call, Server, serving

from wrpo_ray.config import EndpointConfig, JudgeConfig, ScoreConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm import endpoint_client as endpoint
from wrpo_ray.llm.completion import Completion
from wrpo_ray.pipeline.identities import scorer_fingerprint
from wrpo_ray.stages.score import judge
from wrpo_ray.stages.score.base import Item
from wrpo_ray.stages.score.judge import JudgeReward, NoRatingError, Question, read_rating


@dataclass
class Judge(Server):
    """Says what `judgements` holds for the answer that it finds in the question."""

    judgements: dict[str, str] = field(default_factory=dict)

    def completion(self, call: Call, what: str) -> dict[str, Any]:
        said = next(text for answer, text in self.judgements.items() if answer in call.prompt)
        answer = super().completion(call, what)
        answer["choices"][0]["message"]["content"] = said
        return answer


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def config(url: str, **options: Any) -> JudgeConfig:
    given = EndpointConfig(url=url, attempts=3, timeout=2)
    return JudgeConfig(model="j", endpoint=given, **options)


def item(text: str, reference: str | None = None) -> Item:
    return Item([{"role": "user", "content": "What is 2 + 2?"}], text, reference)


RATED = {
    "first": ("Good. [[7]]", 7.0),
    "second": ("It says [[10]] itself.\nRating: [[3.5]]", 3.5),
    "third": ("[[ 8 / 10 ]]", 8.0),
    "ninth": ("[[4/5]]", "the rating 4 is out of 5, not of 10"),
    "tenth": ("[[9-10]]", "[[9-10]] is no rating, in the judgement: [[9-10]]"),
    "fourth": ("[[11]]", "the rating 11 is not within 1 to 10"),
    "fifth": ("I would say 7 of 10.", "no rating in the judgement: I would say"),
    "sixth": ("I cannot judge this.", "no rating"),
    "seventh": ("", "no rating"),
    "eighth": ("[[-1]]", "not within"),
}


def test_ratings_are_read_and_what_is_none_fails_with_its_reason():
    with serving(Judge(judgements={k: text for k, (text, _) in RATED.items()})) as server:
        scores = JudgeReward(config(server.url)).score([item(f"the {k}") for k in RATED])
    for score, (_, wanted) in zip(scores, RATED.values(), strict=True):
        if isinstance(wanted, str):
            assert type(score).__name__ == "NoRatingError"
            assert wanted in str(score)
        else:
            assert score == wanted
    (body,) = [call.body for call in server.calls if "first" in call.prompt]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("j", 0, 1024)
    assert "seed" not in body


NUMBERS = {"4": 4.0, "7.5": 7.5, "8.": 8.0, ".5": 0.5, "+3": 3.0, "-1": -1.0, "0": 0.0,
           "\N{MINUS SIGN}1": -1.0, "10": 10.0, "11": 11.0, "10.01": 10.01,
           "9" * 400: float("inf")}  # fmt: skip
SCALES = [(1, 10), (0, 5), (-5, 5), (0, 1), (1, 10.5)]
ENDS = {"": None, "/5": 5, " / 10": 10, "/10.0": 10, " out of 5": 5, " OUT  OF 10": 10, " of 5": 5,
        "/1": 1, "/100": 100, "/10.5": 10.5}  # fmt: skip


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_rating_counts_on_its_own_scale_only(end, scale):
    """Every number with every end, inside the brackets and behind them, against every scale."""
    worst, best = scale
    for said, value in NUMBERS.items():
        texts = [
            f"Well.\n\nRating: [[ {said}{end} ]]",
            f"[[2]] was asked for. **[[{said}{end}]]**.",
        ]
        if not end.startswith(" of"):
            texts += [f"Rating: [[{said}]]{end}", f"**[[{said}]]** {end}."]
        for text in texts:
            if ENDS[end] in (None, best) and worst <= value <= best:
                assert read_rating(text, worst, best) == value
            else:
                with pytest.raises(NoRatingError, match="rating"):
                    read_rating(text, worst, best)


@pytest.mark.parametrize(
    "said",
    ["7-8", "7,5", "8%", "1e1", "8/10/10", "Grade: 8", "Rating 8", "8 points", "4/", "/5",
     "4 out of", "A4", "8\N{FRACTION SLASH}10", "4 5", "--4", "4..5", "nan4"],
)  # fmt: skip
def test_what_is_no_rating_does_not_give_way_to_a_quoted_one(said):
    """The answer itself claims [[10]]."""
    with pytest.raises(NoRatingError, match="is no rating"):
        read_rating(f"It says [[10]]. Mine: [[{said}]]", 1, 10)


BEHIND = [" of {}", " (out of {})", " (/{})", "\n/{}", "/**{}**", "`/{}", "\N{NO-BREAK SPACE}/ {}",
          " stars out of {}", " points of {}", " over {}", "** / {}", "\n\nout of\n{}",
          " _out of_ {}", " **/** {}", ", out of {}", " star of {}", "/ `{}`",
          " / {} criteria were met", " out of {} tests passed", "/[[{}]]", "/[{}]"]  # fmt: skip


@pytest.mark.parametrize("behind", BEHIND)
def test_the_end_of_a_scale_is_read_in_every_form_behind_the_brackets(behind):
    if "[[" not in behind:
        assert read_rating(f"[[4]]{behind.format(10)}", 1, 10) == 4
    for end in ("5", "12", "10.5", "100", "1"):
        with pytest.raises(NoRatingError, match=f"out of {end}, not of 10|not within"):
            read_rating(f"Rating: [[4]]{behind.format(end)}", 1, 10)


@pytest.mark.parametrize("percent", ["%", " %", "**%"])
def test_a_percentage_is_on_a_scale_to_100(percent):
    assert read_rating(f"[[40]]{percent}", 0, 100) == 40
    with pytest.raises(NoRatingError, match="out of 100, not of 10"):
        read_rating(f"[[4]]{percent}", 1, 10)


@pytest.mark.parametrize(
    "text",
    ["[[**8**]]", "[[rating: 8]]", "[[Rating: 8]]", "[[ *Score:* `8` ]]", "[[__8__/10]]",
     "[[**8** / **10**]]", "[[rating: 8/10]]", "[[8]]. Over all", "[[8]] overall 5",
     "[[8]] often 5", "[[8]] 5 of 6 tests", "[[8]] (5/6 tests)", "[[8]]\n\n1. Of 5"],
)  # fmt: skip
def test_emphasis_and_words_beside_a_rating_change_nothing(text):
    assert read_rating(text, 1, 10) == 8


@pytest.mark.parametrize("said", ["[[x]]", "[[]]", "[[nan]]", "[5]", "[[5] ]", "5", "[[[x]]]"])
def test_without_a_digit_in_double_brackets_there_is_no_rating(said):
    with pytest.raises(NoRatingError, match="no rating in"):
        read_rating(said, 1, 10)


@pytest.mark.parametrize(
    "text", ["[[3]] then [[6]]", "[[[6]]]", "[[6]] as in [[x]]", "[[6]] - see [[1]](http://x)"]
)
def test_the_last_rating_counts(text):
    assert read_rating(text, 1, 10) == 6


def test_how_ratings_are_read_is_in_a_judged_steps_key(monkeypatch):
    part = ScoreConfig(judge=config("http://h/v1"))
    before = scorer_fingerprint(part)
    monkeypatch.setattr(judge, "READING", judge.READING + 1)
    assert scorer_fingerprint(part) != before


def test_faults_of_the_server_are_the_rows_own():
    plans = {"good": "ok", "filtered": "content_filter", "refused": "400", "busy": "500"}

    def plan(call: Call) -> str:
        return next(what for name, what in plans.items() if f"a {name} answer" in call.prompt)

    judge = Judge(plan=plan, judgements={"long answer": "it", "answer": "[[5]]"})
    with serving(judge) as server:
        scores = JudgeReward(config(server.url)).score([item(f"a {k} answer") for k in plans])
        plans["long"] = "length"
        (cut,) = JudgeReward(config(server.url)).score([item("a long answer")])
    names = [s if isinstance(s, float) else type(s).__name__ for s in scores]
    assert names == [5.0, "ContentFilterError", "RefusedError", "ServerFaultError"]
    assert "cut off at max_tokens: it" in str(cut)


def test_a_judgement_in_parts_is_rated_and_one_that_cannot_be_used_is_bought_once():
    def said(content: Any, **message: Any) -> dict[str, Any]:
        choice = {"finish_reason": "stop", "message": {"content": content} | message}
        return {"object": "chat.completion", "choices": [choice]}

    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "[[1]]"}]}
    bodies = {
        "parts": said(
            [thought, {"type": "text", "text": "Good. [["}, {"type": "text", "text": "7]]"}]
        ),
        "refusal": said(None, refusal="I do not judge. [[1]]"),
        "thought": said([thought]),
        "number": said(7),
        "nobody": {"choices": []},
    }

    def plan(call: Call) -> str:
        return next(name for name in bodies if f"a {name} answer" in call.prompt)

    with serving(Server(plan, bodies=bodies)) as server:
        scores = JudgeReward(config(server.url)).score([item(f"a {k} answer") for k in bodies])
    told = [s if isinstance(s, float) else type(s).__name__ for s in scores]
    errors = ["ModelRefusalError", "NoTextError", "WrongChoiceError", "NoChoiceError"]
    assert told == [7.0, *errors]
    assert len(server.calls) == len(bodies)


def test_the_question_has_the_whole_conversation_and_a_reference_where_there_is_one():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "{{ hi }}"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2 + 2?"},
    ]
    question = Question(config("http://h/v1", worst=0, best=5))
    text = question.about(Item(turns, "Four [[5]] {% x %}", "4"))
    order = ["[system]\nBe brief.", "[user]\n{{ hi }}", "[assistant]\nYes?", "[user]\n2 + 2?",
             "comparison]\n4\n", "judge]\nFour [[5]] {% x %}\n", "scale from 0 to 5"]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "for comparison" not in question.about(Item(turns, "Four", None))


def test_a_template_of_ones_own_and_what_is_wrong_with_one_is_told(tmp_path):
    file = tmp_path / "judge.jinja"
    file.write_text("{{ messages[-1].content }} > {{ answer | upper }}? {{ reference|length }}")
    given = config("http://h/v1", template=str(file))
    assert Question(given).about(item("x", "ab")) == "What is 2 + 2? > X? 2"
    for text, told in (("{{ answre }}", "'answre' is undefined"), ("{% if %}", "Expected")):
        file.write_text(text)
        with pytest.raises(UserError, match=told):
            Question(given)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Question(given)


def test_a_row_that_the_template_cannot_take_fails_alone(tmp_path):
    file = tmp_path / "judge.jinja"
    file.write_text("{{ answer }} {{ reference|length }}")
    with serving(Judge(judgements={"x": "[[5]]"})) as server:
        reward = JudgeReward(config(server.url, template=str(file)))
        bad, good = reward.score([item("x", None), item("x", "ab")])
    assert isinstance(bad, TypeError)
    assert good == 5.0


def test_bounds_have_an_order():
    with pytest.raises(ValueError, match="worst \\(3\\) must be below best \\(3\\)"):
        config("http://h/v1", worst=3, best=3)


def test_a_rating_is_not_read_from_reasoning():
    """Unless the config says nothing of reasoning: then the whole text counts, as ever."""

    def rated(text, end="stop", thought=None, **more):
        asked = JudgeReward(config("http://127.0.0.1:9/v1", **more))
        return asked._rating(Completion(text, end, None, None, "j", reasoning=thought))

    for text in ("<think>[[3]]", "<think>[[3]]</think>\n\nso so", "[[3]], no [[4]]</think>bad"):
        for end in ("stop", "length"):
            assert isinstance(rated(text, end, reasoning="strip"), NoRatingError), text
        assert isinstance(rated(text), float), text
    assert rated("<think>[[3]]</think>\n\n[[8]]", "length", reasoning="strip") == 8
    assert rated("[[8]]", reasoning="strip") == 8
    draft = "Perhaps [[8]], but"  # the prompt may have opened the reasoning
    assert isinstance(rated(draft, "length", reasoning="strip"), NoRatingError)
    assert rated(draft, "length", thought="hm", reasoning="strip") == 8
