"""How each benchmark prompts its judge and parses the judgment; pure functions.

The official templates come with the benchmarks' files (see `benchmarks`). Only the prompt for
pairwise comparisons is written here.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict

import pyarrow as pa
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from wrpo_ray.config import SamplingConfig
from wrpo_ray.data.records import ITEM, PROMPT, Message
from wrpo_ray.errors import UserError
from wrpo_ray.stages.evaluate.alpaca_eval import preference
from wrpo_ray.stages.evaluate.arena_hard import VERDICTS, is_unfinished, parse_verdict
from wrpo_ray.stages.evaluate.mt_bench import parse_rating
from wrpo_ray.storage.fingerprints import unit_interval


class Item(TypedDict):
    """A prompt to judge: an ITEM record, or a PROMPT record without the keys of benchmarks."""

    prompt_id: str
    messages: list[Message]
    split: str
    reference: str | None
    group: str | None
    index: NotRequired[int]
    turns: NotRequired[list[str]]
    references: NotRequired[list[str]]
    baseline: NotRequired[str | None]


class TokenLogprob(TypedDict):
    """One of the likeliest first tokens of a judgment."""

    token: str
    logprob: float


class Judgment(TypedDict):
    """The columns of a RESPONSE record that a judgment is parsed from."""

    text: str
    finish_reason: str | None
    logprobs: list[TokenLogprob] | None


class NoVerdictError(ValueError):
    """The judgment holds no valid verdict."""


@dataclass(frozen=True)
class Verdict:
    """The parsed judgment: a number, and the label it was parsed from."""

    value: float
    label: str | None = None


class Judging(Protocol):
    """The protocol of a benchmark: prompts for the judge, and the parser of its judgments."""

    @property
    def name(self) -> str:
        """The benchmark's name."""

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of its prompts."""

    @property
    def positions(self) -> tuple[int, ...]:
        """Numbers of the games or turns of a prompt, from 1."""

    @property
    def sampling(self) -> SamplingConfig:
        """How the judge's text is sampled."""

    @property
    def asks_again(self) -> bool:
        """Whether a judge that gave no verdict is asked once to continue."""

    @property
    def identity(self) -> Any:
        """Everything that determines the judge's prompts, for step keys."""

    @property
    def parser_version(self) -> int:
        """The version of the parser, for step keys."""

    def question(self, item: Item, texts: list[str], position: int) -> list[Message]:
        """Return the judge's prompt; `texts` are the models' answers."""

    def verdict(self, item: Item, position: int, judgment: Judgment) -> Verdict:
        """Parse a judgment (text, finish_reason, logprobs).

        Raises:
            NoVerdictError: it holds no valid verdict.
        """


def judging_sampling(max_tokens: int, **more: Any) -> SamplingConfig:
    """Sampling options of a judge: one greedy judgment, unless `more` differs."""
    given = {"samples": 1, "temperature": 0.0, "top_p": 1.0, "max_tokens": max_tokens}
    return SamplingConfig(**given | more)


def filled(template: str, values: dict[str, str]) -> str:
    """Replace `{name}` in the template where the name is known; braces in values stay."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def no_verdict(judgment: Judgment) -> NoVerdictError:
    """The reason, with the judgment's end."""
    cut = ", which was cut off at max_tokens" * (judgment.get("finish_reason") == "length")
    text = " ".join(judgment["text"].split())
    return NoVerdictError(f"no verdict in the judgment{cut}: {text[-200:]}")


@dataclass(frozen=True)
class AlpacaEvalJudging:
    """One game, in an order drawn by a hash; the verdict is the probability of the first token."""

    template: tuple[tuple[str, str], ...]
    """(role, text) of each message."""

    name = "alpaca_eval"
    parser_version = 1
    schema = ITEM
    positions = (1,)
    asks_again = False
    sampling = judging_sampling(1, temperature=1.0, logprobs=5)
    first, second = "m", "M"

    @property
    def identity(self) -> Any:
        """The template."""
        return self.template

    def question(self, item: Item, texts: list[str], position: int) -> list[Message]:
        """Show the instruction with the baseline's and the model's answer."""
        shown = [item["baseline"] or "", texts[0]]
        if self.swapped(item):
            shown.reverse()
        values = {"instruction": item["turns"][0], "output_1": shown[0], "output_2": shown[1]}
        return [{"role": role, "content": filled(text, values)} for role, text in self.template]

    def swapped(self, item: Item) -> bool:
        """Whether the model's answer is shown first."""
        return unit_interval("swap", item["prompt_id"]) < 0.5

    def verdict(self, item: Item, position: int, judgment: Judgment) -> Verdict:
        """Return the preference, from 1 (baseline) to 2 (model)."""
        logprobs = {p["token"]: p["logprob"] for p in judgment["logprobs"] or ()}
        value = preference(logprobs, self.first, self.second, self.swapped(item))
        if math.isnan(value):
            found = ", ".join(map(repr, logprobs)) or "none"
            raise NoVerdictError(
                f"neither {self.first!r} nor {self.second!r} is among the judge's likeliest first "
                f"tokens: {found}"
            )
        return Verdict(value)


@dataclass(frozen=True)
class ArenaHardJudging:
    """Two games: the baseline is A in the first, the model in the second."""

    system: str
    template: str

    name = "arena_hard"
    parser_version = 1
    schema = ITEM
    positions = (1, 2)
    asks_again = True
    sampling = judging_sampling(4096)

    @property
    def identity(self) -> Any:
        """Both texts."""
        return [self.system, self.template]

    def question(self, item: Item, texts: list[str], position: int) -> list[Message]:
        """Show the question with both answers."""
        shown = [item["baseline"] or "", texts[0]]
        if position == 2:
            shown.reverse()
        values = {"question_1": item["turns"][0], "answer_1": shown[0], "answer_2": shown[1]}
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": filled(self.template, values)},
        ]

    def verdict(self, item: Item, position: int, judgment: Judgment) -> Verdict:
        """Return the label, with the model's share of the win as value."""
        label = parse_verdict(judgment["text"])
        if label is None:
            if is_unfinished(judgment["text"]):
                raise no_verdict(judgment)
            raise NoVerdictError("the judgment has labels that contradict, or that do not exist")
        share = VERDICTS[label][1]
        return Verdict(1 - share if position == 1 else share, label)


@dataclass(frozen=True)
class MTBenchJudging:
    """A rating of each turn; the judge sees the reference answer if there is one."""

    templates: tuple[tuple[str, str, str], ...]
    """(name, system, template): single-v1, single-math-v1, and both with -multi-turn."""

    name = "mt_bench"
    parser_version = 2
    schema = ITEM
    positions = (1, 2)
    asks_again = False
    sampling = judging_sampling(2048)

    @property
    def identity(self) -> Any:
        """The templates."""
        return self.templates

    def question(self, item: Item, texts: list[str], position: int) -> list[Message]:
        """Show the conversation up to the turn."""
        kind = "single-math-v1" if item["references"] else "single-v1"
        name = kind + "-multi-turn" * (position == 2)
        system, template = next((s, t) for n, s, t in self.templates if n == name)
        values = {"question": item["turns"][0], "answer": texts[0]}
        for kind, given in (
            ("question", item["turns"]),
            ("answer", texts),
            ("ref_answer", item["references"]),
        ):
            values |= {f"{kind}_{i}": text for i, text in enumerate(given, start=1)}
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": filled(template, values)},
        ]

    def verdict(self, item: Item, position: int, judgment: Judgment) -> Verdict:
        """Return the rating."""
        rating = parse_rating(judgment["text"])
        if rating is None:
            raise no_verdict(judgment)
        return Verdict(rating)


PAIR = """\
Compare how well two AI assistants answer. Consider whether each answer does what the user asks
for, and whether it is helpful, relevant, correct, deep and detailed. Neither length nor order
counts, and what an answer says about its own quality is no evidence.

{% for message in messages -%}
[{{ message["role"] }}]
{{ message["content"] }}

{% endfor -%}
[Answer A]
{{ first }}

[Answer B]
{{ second }}

[End]
Explain in a few sentences which answer is better. Then end with [[A]] if it is answer A, [[B]] if
it is answer B, or [[C]] if they are equally good.
"""
BRACKETS = re.compile(r"\[\[([^\[\]]*)\]\]")
SHARES = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass(frozen=True)
class PairJudging:
    """Two models on the run's prompts, in two games; the value is the first model's share."""

    template: str = PAIR
    max_tokens: int = 1024

    name = "pairwise"
    parser_version = 2
    schema = PROMPT
    positions = (1, 2)
    asks_again = False

    def __post_init__(self) -> None:
        try:
            self._rendered([{"role": "user", "content": "?"}], "a", "b")
        except TemplateError as error:
            raise UserError(
                f"evaluate.pairwise.template: {error}; it knows `messages`, `first` and `second`"
            ) from None

    @property
    def sampling(self) -> SamplingConfig:
        """Greedy sampling."""
        return judging_sampling(self.max_tokens)

    @property
    def identity(self) -> Any:
        """The template."""
        return self.template

    def question(self, item: Item, texts: list[str], position: int) -> list[Message]:
        """Show both answers; in the first game the first model's answer is A."""
        shown = texts if position == 1 else texts[::-1]
        return [{"role": "user", "content": self._rendered(item["messages"], *shown)}]

    def _rendered(self, messages: list[Message], first: str, second: str) -> str:
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        template = environment.from_string(self.template)
        return template.render(messages=messages, first=first, second=second)

    def verdict(self, item: Item, position: int, judgment: Judgment) -> Verdict:
        """Parse the last double brackets; earlier ones may be quoted from the answers."""
        found = BRACKETS.findall(judgment["text"])
        label = found[-1].strip(" *") if found else None
        if label not in SHARES:
            raise no_verdict(judgment)
        return Verdict(SHARES[label] if position == 1 else 1 - SHARES[label], label)
