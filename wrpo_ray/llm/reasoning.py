"""Where the reasoning of a thinking model ends and its answer begins; the one place that decides.

A model writes its reasoning between two markers, such as `<think>` and `</think>`, and then its
answer. Rules:
- Reasoning stands at the start: the text begins with the opening marker after white space, or the
  prompt has opened it (`Format.opening`). Markers anywhere else are text, as in code. Templates may
  open it for some prompts only, so each prompt's own end decides (`following`).
- The first closing marker ends it, whatever stands in it: an inner opening marker, code, quotes.
- What follows is the answer, without blank lines at its start. Further markers there are its text.
- Without a closing marker all of it is reasoning, and there is no answer, whether the text was cut
  off or the model ended it.
- Without reasoning the whole text is the answer.
A text in pieces is split like the whole.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from wrpo_ray.config import ModelConfig, RecordedAnswers
from wrpo_ray.data.records import KEPT, STRIPPED, UNFINISHED
from wrpo_ray.errors import UserError
from wrpo_ray.llm.rendering import PROBE, render

Row = dict[str, Any]


class Markers(NamedTuple):
    """The texts around a model's reasoning."""

    open: str
    close: str


THINK = Markers("<think>", "</think>")
PARSERS: dict[str, Markers] = {
    **dict.fromkeys(
        (
            *("deepseek_r1", "deepseek_v3", "deepseek_v4", "poolside_v1", "glm45", "glm47"),
            *("holo2", "kimi_k2", "mimo", "minimax_m2", "nemotron_v3", "olmo3", "qwen3"),
            *("step3", "step3p5"),
        ),
        THINK,
    ),
    "cohere_command3": Markers("<|START_THINKING|>", "<|END_THINKING|>"),
    "cohere_command4": Markers("<|START_THINKING|>", "<|END_THINKING|>"),
    "minimax_m3": Markers("<mm:think>", "</mm:think>"),
    "mistral": Markers("[THINK]", "[/THINK]"),
    "seed_oss": Markers("<seed:think>", "</seed:think>"),
}
"""The markers of vLLM's reasoning parsers that read a pair of them, by the parser's name."""
OTHER_PARSERS = frozenset(
    {
        *("ernie45", "gemma4", "granite", "hunyuan_a13b", "hy_v3", "hy_v4", "inkling", "kimi_k3"),
        *("ling3", "minimax_m2_append_think", "muse_glimmer", "openai_gptoss"),
    }
)
"""vLLM's other reasoning parsers, for formats with more than a pair of markers."""
END = 64
"""Tokens at the end of a prompt that hold its opening marker, if it has one."""


Thinker = ModelConfig | RecordedAnswers
"""A section with a policy of reasoning."""


@dataclass(frozen=True)
class Format:
    """How the answers of a model show their reasoning."""

    markers: Markers
    opening: str = ""
    """The end of the prompt, if it opens the reasoning, as `<think>` and a newline; else empty."""
    is_special: bool = False
    """Whether the markers are special tokens, which engines leave out of texts by default."""

    def finished(self, text: str) -> str:
        """Return an answer's text as it may follow the prompt: reasoning that it opens is closed.

        An answer without reasoning gets an empty one, as templates write it. Another's begins as
        the prompt does, which may have other white space than the model that wrote it.
        """
        if not self.opening or text.startswith(self.opening):
            return text
        if self.begins(text):
            return self.opening + text.partition(self.markers.open)[2]
        return f"{self.opening}\n{self.markers.close}\n\n{text}"

    def begins(self, text: str) -> bool:
        """Whether a text begins with the opening marker."""
        return text.lstrip().startswith(self.markers.open)

    def after(self, prompt: str) -> "Format":
        """Return the format of what follows a prompt, of which at least the end is given.

        Templates may open reasoning or not by what a message says (`/no_think`).
        """
        if self.opening and prompt.endswith(self.opening):
            return self
        _, opening, behind = prompt.rpartition(self.markers.open)
        is_open = bool(opening) and not behind.strip()
        return replace(self, opening=opening + behind if is_open else "")


class Piece(NamedTuple):
    """A piece of reasoning, and a piece of the answer that follows it."""

    reasoning: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Split:
    """A text in its parts."""

    before: str
    """All of the text before the answer, with markers and white space. Begins with the opening."""
    reasoning: str
    """What stands between the markers."""
    answer: str
    is_finished: bool
    """Whether there is an answer: false if the text ends within its reasoning."""


class Splitter:
    """Splits a text that comes in pieces; text that may be part of a marker is held back."""

    def __init__(self, format_: Format):
        self.format = format_
        self._held = ""
        self._state: Literal["start", "reasoning", "blank", "answer"] = "start"

    @property
    def is_within(self) -> bool:
        """Whether the text so far ends within reasoning."""
        return self._state == "reasoning" or (self._state == "start" and bool(self.format.opening))

    def feed(self, text: str) -> Piece:
        """Return what is now known to be reasoning, and what is known to be the answer."""
        self._held += text
        reasoning = ""
        if self._state == "start" and not self._start():
            return Piece()
        if self._state == "reasoning":
            reasoning = self._reasoning()
        if self._state == "blank":
            self._blank()
        return Piece(reasoning, self._taken() if self._state == "answer" else "")

    def finish(self) -> Piece:
        """Return the rest at the end of the text."""
        if self._state == "blank":
            return Piece()
        return Piece(self._taken()) if self.is_within else Piece(answer=self._taken())

    def _taken(self) -> str:
        held, self._held = self._held, ""
        return held

    def _start(self) -> bool:
        """Decide whether the text begins with the opening marker; false if that is still open."""
        begun, opening = self._held.lstrip(), self.format.markers.open
        if begun.startswith(opening):
            self._held = begun[len(opening) :]
            self._state = "reasoning"
        elif opening.startswith(begun):
            return False
        else:
            self._state = "reasoning" if self.format.opening else "answer"
        return True

    def _reasoning(self) -> str:
        """Return the reasoning that is held, without what may begin a closing marker."""
        closing = self.format.markers.close
        found, marker, rest = self._held.partition(closing)
        if marker:
            self._held, self._state = rest, "blank"
            return found
        longest = range(min(len(closing) - 1, len(found)), 0, -1)
        kept = next((n for n in longest if found.endswith(closing[:n])), 0)
        self._held = found[len(found) - kept :]
        return found[: len(found) - kept]

    def _blank(self) -> None:
        """Drop blank lines before the answer; its own indentation stays."""
        space = len(self._held) - len(self._held.lstrip())
        self._held = self._held[self._held.rfind("\n", 0, space) + 1 :]
        if self._held.strip():
            self._state = "answer"


def split(text: str, format_: Format) -> Split:
    """Return the reasoning and the answer of a whole text."""
    splitter = Splitter(format_)
    first = splitter.feed(text)
    last = splitter.finish()
    answer = first.answer + last.answer
    before = text[: len(text) - len(answer)]
    if format_.opening and not format_.begins(before):
        before = format_.opening + before
    return Split(before, first.reasoning + last.reasoning, answer, not splitter.is_within)


# --- a model's format -------------------------------------------------------------------------


def markers_of_parser(name: str) -> Markers:
    """Return the markers that vLLM's reasoning parser of this name reads.

    Raises:
        UserError: there is none, or it reads more than a pair of markers.
    """
    if name in PARSERS:
        return PARSERS[name]
    if name in OTHER_PARSERS:
        raise UserError(
            f"reasoning_parser: {name} reads more than a pair of markers; serve the model by "
            f"`vllm serve --reasoning-parser {name}`, and name it as an `endpoint`"
        )
    close = difflib.get_close_matches(name, PARSERS, n=1, cutoff=0)
    raise UserError(f"reasoning_parser: vLLM has no {name!r}; the closest is {close[0]!r}")


def format_of(tokenizer: Any, parser: str | None = None) -> Format:
    """Return a model's format, from its chat template and vocabulary, or a parser's markers.

    Raises:
        UserError: they show no markers, or those of several formats.
    """
    markers = markers_of_parser(parser) if parser else _markers(tokenizer)
    asked = render([{"role": "user", "content": PROBE}], tokenizer, add_generation_prompt=True)
    start = asked.rfind(markers.open)
    is_open = start > asked.rfind(markers.close) and start > asked.rfind(PROBE)
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return Format(markers, asked[start:] if is_open else "", not special.isdisjoint(markers))


def following(format_: Format, tokenizer: Any, prompt: list[int]) -> Format:
    """Return the format of what follows a prompt, given its token ids."""
    end = prompt[-(END + 4 * len(format_.opening)) :]  # a character has at most four tokens
    return format_.after(
        tokenizer.decode(end, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _markers(tokenizer: Any) -> Markers:
    template, vocabulary = tokenizer.get_chat_template(), tokenizer.get_vocab()
    known = list(dict.fromkeys(PARSERS.values()))
    written = [m for m in known if m.close in template]
    found = written or [m for m in known if m.open in vocabulary and m.close in vocabulary]
    if not found:
        raise UserError(
            "reasoning: neither its chat template nor its vocabulary has markers of reasoning, "
            "such as <think>; leave `reasoning` out, or give `reasoning_parser` (vLLM's name)"
        )
    if len(found) > 1:
        pairs = ", ".join("".join(m) for m in found)
        raise UserError(f"reasoning: its markers may be {pairs}; give `reasoning_parser`")
    return found[0]


def unseen_markers(given: Thinker) -> Markers:
    """Return the markers of answers whose model is not seen.

    Raises:
        UserError: `reasoning_parser` is of no use.
    """
    parser = given.reasoning_parser
    return markers_of_parser(parser) if parser else THINK


def of_text(text: str, markers: Markers = THINK, *, is_cut: bool = False) -> Format:
    """Return the format of a text whose prompt is not seen, and may have opened its reasoning.

    One that was cut off before any marker is taken for reasoning: it may be nothing else.
    """
    plain = Format(markers)
    is_open = not plain.begins(text) and (is_cut or markers.close in text)
    return replace(plain, opening=f"{markers.open}\n") if is_open else plain


# --- records -----------------------------------------------------------------------------------


def put_apart(
    row: Row, format_: Format, policy: str, decode: Callable[[list[int]], str] | None = None
) -> Row:
    """Return a RESPONSE row with the reasoning in its own column and only the answer as text.

    `token_ids` are those of what is trained on: of all of it where it is kept, else of the answer.
    They are null if no token begins where the answer does, or this cannot be told without `decode`,
    which gives the text of token ids.
    """
    parts = split(row["text"], format_)
    if not parts.before:
        return row
    ids = row["token_ids"]
    if ids is not None and policy == "strip" and parts.is_finished:
        start = len(row["text"]) - len(parts.answer)
        ids = ids_from(start, row["text"], ids, decode) if decode else None
    state = UNFINISHED if not parts.is_finished else KEPT if policy == "keep" else STRIPPED
    return row | {
        "text": parts.answer, "reasoning": parts.before, "reasoning_state": state, "token_ids": ids
    }  # fmt: skip


def put_apart_unseen(row: Row, given: Thinker, reasoning: str | None) -> Row:
    """Return a RESPONSE row of a server or a file, with the reasoning in its own column.

    `reasoning` is that of a field of its own, if there is one; the text may have it, too.
    """
    if given.reasoning is None:
        return row
    markers, text = unseen_markers(given), row["text"]
    is_cut = reasoning is None and row["finish_reason"] == "length"
    format_ = of_text(text, markers, is_cut=is_cut)
    if reasoning is None or _repeats(text, format_, reasoning):
        return put_apart(row, format_, given.reasoning)
    return written_apart(row, reasoning, markers, given.reasoning)


def _repeats(text: str, format_: Format, reasoning: str) -> bool:
    """Whether a text begins with reasoning although a field of its own has it."""
    inside = split(text, format_).reasoning.strip()
    return format_.begins(text) or inside == _bare(reasoning, format_.markers)


def _bare(reasoning: str, markers: Markers) -> str:
    """Return the reasoning in a field without the markers and white space around it."""
    inside = reasoning.strip().removeprefix(markers.open)
    return inside.removesuffix(markers.close).strip()


def written_apart(row: Row, reasoning: str, markers: Markers, policy: str) -> Row:
    """Return a RESPONSE row with the reasoning that stands in a field of its own.

    It is written between the markers, so that it can be trained on; no token ids are known of that.
    Without a text behind it, it may have no end.
    """
    state = KEPT if policy == "keep" else STRIPPED
    return row | {
        "reasoning": f"{markers.open}\n{_bare(reasoning, markers)}\n{markers.close}\n\n",
        "reasoning_state": state if row["text"].strip() else UNFINISHED,
        "token_ids": None,
    }


def ids_from(
    start: int, text: str, ids: list[int], decode: Callable[[list[int]], str]
) -> list[int] | None:
    """Return the token ids of `text[start:]`; None if no token begins there, or they do not match.

    The search is for the shortest prefix of the ids whose text reaches `start`.
    """
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if len(decode(ids[:middle])) < start else (low, middle)
    return ids[low:] if decode(ids[:low]) == text[:start] else None
