"""Conversations to token ids: the one path for generation, reference, training and rewards.

Token ids, not text, cross the line to an engine, so nothing is tokenized twice. What holds:
- One BOS at the start where the template writes it or the tokenizer would add it; else none.
- An answer's ids follow the prompt's in the whole conversation. Where one token would span the
  border, the answer is tokenized apart: the prompt's ids never change.
- An answer ends with the first special token that the template writes after its text.
- Text that spells a special token stays text, in every message; a row where the tokenizer cannot
  do so is refused. Only the template writes special tokens.
- The date that a template may ask for is fixed: no rendering depends on the day.

Not covered: tools, images.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from wrpo_ray.config import ModelConfig
from wrpo_ray.core.records import Message
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import SpelledTokenError, TemplateError, TokenizeError, UserError

Encode = Callable[[str], list[int]]

PROBE = "PROBE"
"""An answer that no template alters."""
DATE = datetime(2024, 7, 26)
"""The date that Llama 3.1's template takes where it is given none."""
_REPLACED = "".join(f" | replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "YymBbdjAaHMS")
CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}\n"
"""Jinja that hides the clock from the template behind it."""
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters, which no text has that is meant for others."""


@dataclass(frozen=True)
class Template:
    """What replaces a tokenizer's own chat template, and values of its variables."""

    file: str | None = None
    """A Jinja file; null leaves the tokenizer's own."""
    values: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, model: ModelConfig) -> Template:
        """A model's, with an absolute path."""
        file = None if model.chat_template is None else Folder(model.chat_template).path
        return cls(file, tuple(sorted(model.chat_template_args.items())))

    def apply(self, own: str) -> str:
        """The template that is used in place of the tokenizer's own."""
        text = own if self.file is None else Path(self.file).read_text(encoding="utf-8")
        literals = ((n, "none" if v is None else json.dumps(v)) for n, v in self.values)
        given = "".join(f"{{% set {name} = {literal} %}}" for name, literal in literals)
        return f"{given}\n{text}" if given else text  # the newline goes with the block before it


OWN = Template()
"""A tokenizer's own."""


def load_tokenizer(folder: Path, template: Template = OWN) -> Any:
    """The folder's tokenizer, with its chat template as `template` says."""
    from transformers import AutoTokenizer

    # Mistral's own format has no Jinja template, and reads no special tokens in text
    tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False)
    if template != OWN:
        own = tokenizer.get_chat_template() if template.file is None else ""
        tokenizer.chat_template = template.apply(own)
    return tokenizer


def end_ids(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Every token id that ends a turn: the tokenizer's eos, generation_config's, the template's."""
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    listed = listed if isinstance(listed, list) else [listed]
    ends = frozenset({tokenizer.eos_token_id, *listed} - {None})
    _, tail = _body_and_tail(tokenizer, [{"role": "user", "content": PROBE}], PROBE)
    with contextlib.suppress(UserError):
        ends |= {_end(tokenizer, tail, ends)}
    return ends


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of the conversation up to where the assistant's answer begins.

    Raises:
        TemplateError, TokenizeError, SpelledTokenError: the messages cannot be written.
    """
    messages, encode = _disarmed(tokenizer, messages)
    return _one_bos(tokenizer, encode(_render(tokenizer, messages, prompt=True)))


def conversation_ids(tokenizer: Any, messages: list[Message], text: str) -> list[int]:
    """Token ids of the conversation with an answer, and all that the template writes after it.

    Raises:
        TemplateError, TokenizeError, SpelledTokenError: the messages cannot be written.
    """
    (*messages, answer), encode = _disarmed(tokenizer, [*messages, _answer(text)])
    body, tail = _body_and_tail(tokenizer, messages, answer["content"])
    return _one_bos(tokenizer, encode(body + tail))


def answer_ids(
    tokenizer: Any, messages: list[Message], text: str, ends: frozenset[int], *, closed: bool = True
) -> list[int]:
    """Token ids of an answer as the template continues the prompt with it.

    The ids end with exactly one end of turn, or with none where `closed` is false (an answer
    that was cut off). An empty answer is its end of turn alone.

    Raises:
        UserError: the prompt is no prefix, nothing closes the answer, nothing of it is left, or
            the messages cannot be written.
    """
    (*messages, answer), encode = _disarmed(tokenizer, [*messages, _answer(text)])
    prompt = _render(tokenizer, messages, prompt=True)
    body, tail = _body_and_tail(tokenizer, messages, answer["content"])
    _check_prefix(prompt, body)
    end = tokenizer.convert_ids_to_tokens(_end(tokenizer, tail, ends))
    closing = tail[: tail.index(end) + len(end)] if closed else ""
    start = _one_bos(tokenizer, encode(prompt))
    ids = _one_bos(tokenizer, encode(body + closing))
    if ids[: len(start)] != start:
        ids = [*start, *_encode_after(encode, "\n", body[len(prompt) :] + closing)]
    if len(ids) == len(start):
        raise UserError("an answer that was cut off has no text; drop the row")
    return ids[len(start) :]


def check_sampled(ids: list[int], ends: frozenset[int], *, closed: bool) -> None:
    """Check an engine's answer: its only end of turn is its last token, or it has none if open."""
    if [i for i, token in enumerate(ids) if token in ends] != [len(ids) - 1] * closed:
        raise UserError(
            "a sampled answer does not end with its only end of turn, or was cut off and has one; "
            "list every end of turn as eos_token_id in generation_config.json, and sample again"
        )


def _render(tokenizer: Any, messages: list[Message], *, prompt: bool = False) -> str:
    template = tokenizer.get_chat_template()
    template = CLOCK * ("strftime_now" in template) + template
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # a template can raise anything
        raise TemplateError(f"chat template: {type(error).__name__}: {error}") from error


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _end(tokenizer: Any, tail: str, ends: frozenset[int]) -> int:
    """The first token of the tail that ends a turn or is special."""
    special = _specials(tokenizer).ids | ends
    for token in _encoder(tokenizer)(tail):
        if token in special:
            return token
    raise UserError(
        "chat template: no special token closes an answer; set `chat_template` to a file with one"
    )


def _body_and_tail(tokenizer: Any, messages: list[Message], text: str) -> tuple[str, str]:
    """The conversation's text up to the end of the answer's, and what the template writes then."""
    whole, probe = (_render(tokenizer, [*messages, _answer(t)]) for t in (text, PROBE))
    tail = probe.rpartition(PROBE)[2] if PROBE in probe else ""
    if not whole.endswith(tail):
        raise UserError(
            f"chat template: this answer is not followed by {tail!r}, as others are; "
            "set `chat_template` to a file that closes every answer alike"
        )
    return whole[: len(whole) - len(tail)], tail


def _check_prefix(prompt: str, whole: str) -> None:
    if not whole.startswith(prompt):
        pairs = zip(prompt, whole, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(whole))
        raise UserError(
            f"chat template: the prompt has {prompt[same:][:40]!r} where the finished conversation "
            f"has {whole[same:][:40]!r}; set `chat_template` to a file in which they agree"
        )


def _encoder(tokenizer: Any) -> Encode:
    def encode(text: str) -> list[int]:
        try:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # such as a TypeError for text that is no Unicode
            raise TokenizeError(f"tokenizer: {type(error).__name__}: {error}") from error

    return encode


def _encode_after(encode: Encode, before: str, text: str) -> list[int]:
    """Token ids of a text after `before`: some tokenizers put a space before a text on its own."""
    lead, ids = encode(before), encode(before + text)
    return ids[len(lead) :] if ids[: len(lead)] == lead else encode(text)


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids with one BOS in front if there is any, or if the tokenizer itself would add one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    adds_one = tokenizer("x")["input_ids"][:1] == [bos]
    return [bos] * (start > 0 or adds_one) + ids[start:]


# --- texts that spell special tokens -----------------------------------------------------------


@dataclass(frozen=True)
class _Specials:
    """A tokenizer's special tokens, but for the one of unknown characters, which any may become."""

    ids: frozenset[int]
    spelled: re.Pattern[str]
    """Any of them, as text."""
    starts: re.Pattern[str]
    """The first character of any of them, also of those that overlap."""
    normalizer: Any
    """What a text goes through before they are looked for in it; None where nothing."""

    def are_in(self, text: str) -> bool:
        """Whether a text spells one."""
        if self.normalizer is not None and self.spelled.search(self.normalizer.normalize_str(text)):
            return True
        return self.spelled.search(text) is not None

    def within(self, ids: list[int]) -> list[int]:
        """Those among token ids."""
        return [token for token in ids if token in self.ids]


@lru_cache(maxsize=8)
def _specials(tokenizer: Any) -> _Specials:
    tokens = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    words = "|".join(re.escape(t.content) for t in tokens.values()) or r"(?!)"
    is_normalized = tokenizer.is_fast and any(t.normalized for t in tokens.values())
    return _Specials(
        ids=frozenset(tokens) - {tokenizer.unk_token_id},
        spelled=re.compile(words),
        starts=re.compile(f"(?={words})(.)", re.DOTALL),
        normalizer=tokenizer.backend_tokenizer.normalizer if is_normalized else None,
    )


def _disarmed(tokenizer: Any, messages: list[Message]) -> tuple[list[Message], Encode]:
    """Messages that spell no special token, and what encodes their rendering as if they did.

    A mark goes behind the first character of each spelled token, so that neither template nor
    tokenizer takes it for the token. The encoder finds the tokens of the template, drops the
    marks, and goes on as the tokenizer does: pieces of text are cut at special tokens only. So
    the ids are those of a tokenizer that has the template's tokens and knows no spelling of them.
    Where no text spells one, nothing is changed.

    Raises:
        SpelledTokenError: the tokenizer has no form that can be changed so.
    """
    texts = [message["content"] for message in messages]
    special = _specials(tokenizer)
    if not any(map(special.are_in, texts)):
        return messages, _encoder(tokenizer)
    mark = next((mark for mark in MARKS if not any(mark in text for text in texts)), None)
    hidden = [special.starts.sub(rf"\g<1>{mark}", text) for text in texts]
    if mark is None or any(map(special.spelled.search, hidden)) or not tokenizer.is_fast:
        raise SpelledTokenError("a text spells a special token and cannot be kept apart from it")
    pairs = zip(messages, hidden, strict=True)
    return [m | {"content": text} for m, text in pairs], _unmarking_encoder(tokenizer, mark)


def _unmarking_encoder(tokenizer: Any, mark: str) -> Encode:
    plain, special = _encoder(tokenizer), _specials(tokenizer)
    unmarking = _unmarking(tokenizer, mark)

    def encode(text: str) -> list[int]:
        ids = unmarking.encode(text, add_special_tokens=False).ids
        if special.within(ids) != special.within(plain(text)):
            raise SpelledTokenError("a text spells a special token, which its tokens would become")
        return ids

    return encode


@lru_cache(maxsize=2)
def _unmarking(tokenizer: Any, mark: str) -> Any:
    """The tokenizer, but its normalizer, which works behind the search for tokens, drops marks."""
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Replace, Sequence

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in tree["added_tokens"]:
        token["normalized"] &= not token["special"]
    copy = Tokenizer.from_str(json.dumps(tree | {"truncation": None, "padding": None}))
    own = [copy.normalizer] if copy.normalizer is not None else []
    copy.normalizer = Sequence([Replace(mark, ""), *own])
    return copy
