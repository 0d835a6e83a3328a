"""A language model behind an endpoint that rates answers, as in MT-Bench (arXiv 2306.05685)."""

from __future__ import annotations

import re

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from wrpo_ray.config import JudgeConfig
from wrpo_ray.core.endpoint import Body, Completion, Endpoint
from wrpo_ray.errors import UserError
from wrpo_ray.score.base import Item, Outcome
from wrpo_ray.text_files import read_text

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

RATING = re.compile(r"\[\[\s*(-?\d{1,9}(?:\.\d{1,9})?)\s*(?:/\s*\d+\s*)?\]\]")


class NoRatingError(ValueError):
    """The judge gives no rating, or one that is out of bounds."""


def template_text(config: JudgeConfig) -> str:
    """The template's source.

    Raises:
        UserError: the file cannot be read.
    """
    return TEMPLATE if config.template is None else read_text(config.template, "judge.template")


class Question:
    """What the judge is asked about an answer."""

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
        """The question about one answer."""
        return self.template.render(
            messages=item.messages,
            answer=item.text,
            reference=item.reference,
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
        """One call an item, as many at a time as the endpoint's limits let."""
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
        """The last rating of a judgement: others may be quoted from the answer before it."""
        found = RATING.findall(judgement.text)
        if not found:
            cut = ", which was cut off at max_tokens" * (judgement.finish_reason == "length")
            text = " ".join(judgement.text.split())
            return NoRatingError(f"no rating in the judgement{cut}: {text[-200:]}")
        rating = float(found[-1])
        if not self.config.worst <= rating <= self.config.best:
            return NoRatingError(
                f"the rating {rating:g} is not within {self.config.worst:g} to {self.config.best:g}"
            )
        return rating
