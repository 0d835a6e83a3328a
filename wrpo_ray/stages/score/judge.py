"""A language model behind an endpoint that rates answers, as in MT-Bench (arXiv 2306.05685)."""

import re

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from wrpo_ray.config import JudgeConfig
from wrpo_ray.data.references import show_reference
from wrpo_ray.errors import UserError
from wrpo_ray.llm.completion import Completion
from wrpo_ray.llm.endpoint_client import Body, Endpoint
from wrpo_ray.llm.reasoning import of_text, split
from wrpo_ray.stages.score.base import Item, Outcome
from wrpo_ray.text.files import read_text

TEMPLATE = """\
Judge how well an AI assistant answers. Consider whether the answer does what the user asks for, and
whether it is helpful, relevant, correct, deep and detailed. Its length does not count by itself,
and what it says about its own quality is no evidence.

{% for message in messages -%}
[{{ message["role"] }}]
{{ message["content"] }}

{% endfor -%}
{% if reference is not none -%}
[A right answer, for comparison]
{{ reference }}

{% endif -%}
[The assistant's answer that you judge]
{{ answer }}

[End]
Explain in a few sentences what is good and what is not. Then end with your rating on a scale from \
{{ worst }} to {{ best }} in double square brackets, such as [[{{ worst }}]].
"""

_NUMBER = r"[-+\N{MINUS SIGN}]?(?:\d+(?:\.\d*)?|\.\d+)"
_MARKS = r"[\s*_`(\[,]*"
_OUT_OF = r"(?:/|(?:out\s+of|of|over)(?![^\W_]))"
BRACKETS = re.compile(
    r"\[\[([^\[\]]*)\]\](?!\()"
    rf"(?:{_MARKS}(?:(?:stars?|points?){_MARKS})?{_OUT_OF}{_MARKS}({_NUMBER})|[*_`]*\s?(%))?",
    re.IGNORECASE,
)
"""1: what stands in double brackets; 2: the end of the scale, if the judge says it behind them;
3: a percent sign there, of a scale to 100. A link ([[1]](address)) is none."""
RATING = re.compile(
    rf"[\s*_`]*(?:(?:rating|score)[\s*_`]*:[\s*_`]*)?({_NUMBER})[\s*_`]*"
    rf"(?:(?:/|(?:out\s+)?of\b)[\s*_`]*({_NUMBER})[\s*_`]*)?",
    re.IGNORECASE,
)
"""1: a rating, plain or with emphasis; 2: the end of the scale, if the judge says it."""
READING = 2
"""Version of the parser of ratings: part of a judged step's key."""


class NoRatingError(ValueError):
    """The judge gives no rating, or one that is out of bounds."""


def template_text(config: JudgeConfig) -> str:
    """Return the template's source.

    Raises:
        UserError: the file cannot be read.
    """
    return TEMPLATE if config.template is None else read_text(config.template, "judge.template")


class Question:
    """The question to the judge about an answer, from a Jinja template."""

    def __init__(self, config: JudgeConfig):
        self.config = config
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            self.template = environment.from_string(template_text(config))
            self.about(Item([{"role": "user", "content": "?"}], "!", "!"))
        except TemplateError as error:
            raise UserError(
                f"judge.template: {config.template}: {error}; it knows `messages`, `answer`, "
                f"`reference` (or none), `worst` and `best`"
            ) from None

    def about(self, item: Item) -> str:
        """Return the question about one answer."""
        return self.template.render(
            messages=item.messages,
            answer=item.text,
            reference=show_reference(item.right),
            worst=f"{self.config.worst:g}",
            best=f"{self.config.best:g}",
        )


class JudgeReward:
    """The ratings of a judge, at temperature 0."""

    def __init__(self, config: JudgeConfig):
        self.config = config
        self.question = Question(config)
        self.endpoint = Endpoint(config.endpoint, config.model)

    def score(self, items: list[Item]) -> list[Outcome]:
        """Call the judge once for each item, concurrently within the endpoint's limits."""
        scores: dict[int, Outcome] = {}
        bodies: dict[int, Body] = {}
        for i, item in enumerate(items):
            try:
                bodies[i] = self._body(item)
            except Exception as error:  # a template can raise anything; the row keeps it
                scores[i] = error
        asked = list(bodies)
        for n, answer in self.endpoint.complete_all(bodies.values()):
            scores[asked[n]] = self._rating(answer) if isinstance(answer, Completion) else answer
        return [scores[i] for i in range(len(items))]

    def _body(self, item: Item) -> Body:
        return {
            "messages": [{"role": "user", "content": self.question.about(item)}],
            "max_tokens": self.config.max_tokens,
            "temperature": 0,
        }

    def _rating(self, judgement: Completion) -> Outcome:
        """Return the judgement's rating, or a NoRatingError."""
        try:
            text = judgement.text
            if self.config.reasoning == "strip":
                is_cut = judgement.finish_reason == "length" and judgement.reasoning is None
                text = split(text, of_text(text, is_cut=is_cut)).answer
            return read_rating(text, self.config.worst, self.config.best)
        except NoRatingError as error:
            cut = ", which was cut off at max_tokens" * (judgement.finish_reason == "length")
            text = " ".join(judgement.text.split())
            return NoRatingError(f"{error}{cut}: {text[-200:]}")


def read_rating(judgement: str, worst: float, best: float) -> float:
    """Return the last rating of a judgement: earlier ones may be quotes from the answer.

    A rating is a number in double brackets, alone or out of `best` (`[[8]]`, `[[8/10]]`,
    `[[rating: 8 out of 10]]`, `[[8]] (of 10)`). The last double brackets
    that hold a digit decide: where they hold anything else, such as a rating out of another
    scale's end, there is none.

    Raises:
        NoRatingError: there is none, or it is out of bounds.
    """
    found = [match for match in BRACKETS.finditer(judgement) if re.search(r"\d", match[1])]
    if not found:
        raise NoRatingError("no rating in the judgement")
    inside, behind, percent = found[-1].groups()
    rating = RATING.fullmatch(inside)
    if rating is None:
        raise NoRatingError(f"[[{inside[:40]}]] is no rating, in the judgement")
    value = _float(rating[1])
    ends = [_float(end) for end in (rating[2], behind, percent and "100") if end]
    if any(end != best for end in ends):
        raise NoRatingError(
            f"the rating {value:g} is out of {ends[-1]:g}, not of {best:g}, in the judgement"
        )
    if not worst <= value <= best:
        raise NoRatingError(
            f"the rating {value:g} is not within {worst:g} to {best:g}, in the judgement"
        )
    return value


def _float(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))
