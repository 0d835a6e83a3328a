"""Conversations to token ids: the one path for generation, reference, training and rewards.

Token ids, not text, cross the line to an engine, so nothing is tokenized twice. What holds:
- One BOS at the start where the template writes it or the tokenizer would add it; else none.
- An answer's ids follow the prompt's in the whole conversation. Where one token would span the
  border, the answer is tokenized apart: the prompt's ids never change.
- An answer's text is trained on as it is, also its leading and trailing white space, which many
  templates trim.
- An answer ends with the first special token that the template writes after its text.
- A message that the template leaves out, or writes as the assistant's, is refused.
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
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from wrpo_ray.config import ModelConfig
from wrpo_ray.data.records import Message
from wrpo_ray.errors import (
    SpelledTokenError,
    TemplateError,
    TokenizeError,
    UserError,
)
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.files import BOM, read_text

Encode = Callable[[str], list[int]]

PROBE = "PROBE"
"""An answer that no template alters."""
SPEAKERS = ("user", "assistant")
"""The roles that every template knows."""
REMEDY = "set `chat_template` to a file that"
UNWRITTEN = "give the model a chat template that writes it, or drop the message"
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

    @property
    def revision(self) -> tuple[int, ...]:
        """Part of a key: what was made with values that Jinja once misread is not used again."""
        texts = (value for _, value in self.values if isinstance(value, str))
        return (2,) if any(max(text, default="") > "\uffff" for text in texts) else ()

    def apply(self, own: str | dict[str, str] | None) -> str | dict[str, str] | None:
        """What is used in place of the tokenizer's own: a template, or several by name.

        A file replaces the main one; those beside it, such as `tool_use`, stay.
        """
        named = dict(own) if isinstance(own, dict) else {MAIN: own} if own else {}
        if self.file is not None:
            named[MAIN] = read_text(self.file, "chat_template")
        found = {name: self._given + text.removeprefix(BOM) for name, text in named.items()}
        return found if isinstance(own, dict) else found.get(MAIN)

    @property
    def _given(self) -> str:
        """Jinja that sets the variables; the newline goes with the block before it."""
        literals = ((n, "none" if v is None else _literal(v)) for n, v in self.values)
        given = "".join(f"{{% set {name} = {text} %}}" for name, text in literals)
        return given and f"{given}\n"


def _literal(value: str | float | bool) -> str:
    """A value as Jinja reads it, which takes no surrogate pairs for one character."""
    return json.dumps(value, ensure_ascii=False)


OWN = Template()
"""A tokenizer's own."""
MAIN = "default"
"""The name of the main one among several templates."""


def load_tokenizer(folder: Path, template: Template = OWN) -> Any:
    """The folder's tokenizer, with its chat template as `template` says."""
    from transformers import AutoTokenizer

    # Mistral's own format has no Jinja template, and reads no special tokens in text
    tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False)
    tokenizer.chat_template = template.apply(tokenizer.chat_template)
    return tokenizer


def end_ids(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Every token id that ends a turn: the tokenizer's eos, generation_config's, the template's."""
    file = folder / "generation_config.json"
    listed = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else None
    listed = listed if isinstance(listed, list) else [listed]
    ends = frozenset({tokenizer.eos_token_id, *listed} - {None})
    asked = {"role": "user", "content": PROBE}
    for messages in ([asked], [{"role": "system", "content": PROBE}, asked]):
        with contextlib.suppress(UserError):
            return ends | {_end(tokenizer, _frame(tokenizer, messages)[1], ends)}
    return ends


def separator(tokenizer: Any) -> str:
    """White space that the template writes between a prompt and the text of its answer.

    Templates in the manner of Llama 2 do. A model of such a template says it first, though it is
    no part of its answer's text. Empty where the template writes none, or more than white space.
    """
    asked: list[Message] = [{"role": "user", "content": PROBE}]
    with contextlib.suppress(UserError):
        prompt, (head, _) = render(tokenizer, asked, prompt=True), _frame(tokenizer, asked)
        between = head.removeprefix(prompt)
        return between if between.isspace() and head.startswith(prompt) else ""
    return ""


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of the conversation up to where the assistant's answer begins.

    Raises:
        TemplateError, TokenizeError, SpelledTokenError: the messages cannot be written.
    """
    check_written(tokenizer, messages)
    messages, encode = _disarmed(tokenizer, messages)
    prompt = render(tokenizer, messages, prompt=True)
    check_said(messages, prompt, partial(render, tokenizer, prompt=True))
    return _one_bos(tokenizer, encode(prompt))


def conversation_ids(tokenizer: Any, messages: list[Message], text: str) -> list[int]:
    """Token ids of the conversation with an answer, and all that the template writes after it.

    The answer is as the template writes it, which may trim its white space.

    Raises:
        TemplateError, TokenizeError, SpelledTokenError: the messages cannot be written.
    """
    check_written(tokenizer, [*messages, _answer(PROBE)])
    (*messages, answer), encode = _disarmed(tokenizer, [*messages, _answer(text)])
    _, tail = _frame(tokenizer, messages)
    whole = _closed(tokenizer, messages, answer["content"], tail)
    check_said([*messages, answer], whole, partial(render, tokenizer))
    return _one_bos(tokenizer, encode(whole))


def answer_ids(
    tokenizer: Any, messages: list[Message], text: str, ends: frozenset[int], *, closed: bool = True
) -> list[int]:
    """Token ids of an answer's text, as it is, where the template continues the prompt with it.

    The ids end with exactly one end of turn, or with none where `closed` is false (an answer
    that was cut off). An empty answer is its end of turn alone.

    Raises:
        UserError: the prompt is no prefix, nothing closes the answer, nothing of it is left, or
            the messages or the answer cannot be written as they are.
    """
    check_written(tokenizer, messages)
    (*messages, answer), encode = _disarmed(tokenizer, [*messages, _answer(text)])
    text = answer["content"]
    prompt = render(tokenizer, messages, prompt=True)
    check_said(messages, prompt, partial(render, tokenizer, prompt=True))
    body, tail = _body_and_tail(tokenizer, messages, prompt, text)
    _check_prefix(prompt, body)
    end = tokenizer.convert_ids_to_tokens(_end(tokenizer, tail, ends))
    closing = tail[: tail.index(end) + len(end)] if closed else ""
    start = _one_bos(tokenizer, encode(prompt))
    ids = _one_bos(tokenizer, encode(body + closing))
    if _swallows(encode, body, text, closing):
        before = body[: len(body) - len(text)]
        ids = _one_bos(tokenizer, [*encode(before), *encode(text + closing)])
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


def render(
    tokenizer: Any, messages: Any, *, prompt: bool = False, tools: list[Any] | None = None
) -> str:
    """The conversation's text as the template writes it; with `prompt`, an answer's beginning too.

    Raises:
        TemplateError: the template refuses it, or fails on it.
    """
    try:
        template = tokenizer.get_chat_template(tools=tools)
        template = CLOCK * ("strftime_now" in template) + template
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
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


def _frame(tokenizer: Any, messages: list[Message]) -> tuple[str, str]:
    """What the template writes before the text of an answer, and after it."""
    before, found, after = render(tokenizer, [*messages, _answer(PROBE)]).rpartition(PROBE)
    if not found:
        raise TemplateError(f"chat template: leaves out the answer; {REMEDY} writes it")
    return before, after


def _body_and_tail(
    tokenizer: Any, messages: list[Message], prompt: str, text: str
) -> tuple[str, str]:
    """The conversation's text up to the end of the answer's, and what the template writes then.

    The answer is put, as it is, where the template writes it, or a text in its place. Only where
    the prompt opens the answer's thought in other white space is it as the template writes it.
    """
    head, tail = _frame(tokenizer, messages)
    core = text.strip()
    whole = _closed(tokenizer, messages, core, tail)
    written = whole[: len(whole) - len(tail)]
    before = _before(written, core, head, prompt)
    keeps = (before + text).startswith(prompt) or not written.startswith(prompt)
    return (before + text if keeps else written), tail


def _closed(tokenizer: Any, messages: list[Message], text: str, tail: str) -> str:
    """The conversation with an answer, as the template writes it."""
    whole = render(tokenizer, [*messages, _answer(text)])
    if not whole.endswith(tail):
        raise UserError(
            f"chat template: this answer is not followed by {tail!r}, as others are; "
            f"{REMEDY} closes every answer alike"
        )
    return whole


def _before(written: str, answer: str, head: str, prompt: str) -> str:
    """What stands before an answer in the conversation that the template has `written`.

    That is `head`, as for any answer, unless the template finds a thought in this one.
    """
    if _dense(written) == _dense(head + answer):
        return head
    start = _start(written, answer)
    if _dense(written[start:]) == _dense(answer):
        return written[:start]
    if _dense(head) == _dense(prompt):  # it leaves something out, which an engine would not
        return head
    raise UserError(
        f"chat template: does not write this answer as it was given; {REMEDY} keeps its text"
    )


def _dense(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def _start(text: str, end: str) -> int:
    """Where in a text as many characters, white space apart, are left as `end` has."""
    start, left = len(text), len(_dense(end))
    while left and start:
        start -= 1
        left -= not text[start].isspace()
    return start


def _swallows(encode: Encode, body: str, text: str, closing: str) -> bool:
    """Whether the special token before an answer's text swallows the white space it begins with.

    Raises:
        UserError: one behind it swallows that at its end.
    """
    if not body.endswith(text) or text == text.strip():
        return False
    space = text[len(text.rstrip()) :]
    if space and encode(PROBE + space + closing) == encode(PROBE + closing):
        raise UserError(
            "tokenizer: the end of turn swallows the white space that this answer ends with; drop "
            "the row"
        )
    before, ids = body[: len(body) - len(text)], encode(body + closing)
    return text != text.lstrip() and ids == encode(before + text.lstrip() + closing)


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


# --- messages that a template leaves out --------------------------------------------------------


def check_written(tokenizer: Any, messages: list[Message]) -> None:
    """Check that the template writes every message, each as its role's.

    Raises:
        TemplateError: it does not; a template that refuses the roles tells so itself.
    """
    template = tokenizer.chat_template
    text = json.dumps(template) if isinstance(template, dict) else template
    for index, fault in _unwritten(tokenizer, text, tuple(m["role"] for m in messages)):
        if messages[index]["content"].strip():
            role = messages[index]["role"]
            raise TemplateError(f"chat template: {fault.format(role=role)}; {UNWRITTEN}")


def check_said(messages: list[Message], written: str, write: Callable[[Any], str]) -> None:
    """Check that something of every text is in the conversation, `written` as `write` does.

    A template may leave out a part of a message, such as a thought, but not all of it.

    Raises:
        TemplateError: of a text that is not empty nothing is written.
    """
    if _in_order(messages, written):
        return
    for index, message in enumerate(messages):
        if not message["content"].strip():
            continue
        for empty in ("", " "):  # some templates leave out the header of an empty message
            without = [*messages[:index], message | {"content": empty}, *messages[index + 1 :]]
            if _dense(write(without)) == _dense(written):
                raise TemplateError(
                    f"chat template: writes nothing of what a message of role {message['role']!r} "
                    f"says; {UNWRITTEN}"
                )


def _in_order(messages: list[Message], written: str) -> bool:
    """Whether all texts stand one behind another in a conversation, white space around apart."""
    place = 0
    for message in messages:
        text = message["content"].strip()
        place = written.find(text, place)
        if place < 0:
            return False
        place += len(text)
    return True


@lru_cache(maxsize=1024)
def _unwritten(tokenizer: Any, _: str, roles: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """(index, fault) of each message of a conversation of these roles that is not written.

    Found out by messages of known texts, once for each template and sequence of roles.
    """
    whole = _written(tokenizer, roles)
    if whole is None:
        return ()
    lost = [i for i in range(len(roles)) if _numbered(i).casefold() not in whole.casefold()]
    taken = [i for i, role in enumerate(roles) if role not in SPEAKERS and i not in lost]
    if taken and _tells_roles(tokenizer):
        taken = [i for i in taken if _written(tokenizer, _replaced(roles, i)) == whole]
    else:
        taken = []
    leaves, takes = "leaves out a message of role {role!r}", "writes a message of role {role!r} as "
    faults = [(i, leaves) for i in lost] + [(i, takes + "the assistant's") for i in taken]
    return tuple(sorted(faults))


def _numbered(index: int) -> str:
    return f"{PROBE}{index}."


def _replaced(roles: tuple[str, ...], index: int) -> tuple[str, ...]:
    return (*roles[:index], "assistant", *roles[index + 1 :])


def _written(tokenizer: Any, roles: tuple[str, ...]) -> str | None:
    """A conversation of these roles; None where the template refuses it."""
    messages = [{"role": role, "content": _numbered(i)} for i, role in enumerate(roles)]
    with contextlib.suppress(TemplateError):
        return render(tokenizer, messages, prompt=roles[-1:] != ("assistant",))
    return None


def _tells_roles(tokenizer: Any) -> bool:
    """Whether a user's message and an assistant's are written in different ways."""
    asked = [{"role": role, "content": PROBE} for role in SPEAKERS]
    with contextlib.suppress(TemplateError):
        return render(tokenizer, asked[:1]) != render(tokenizer, asked[1:])
    return True


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
