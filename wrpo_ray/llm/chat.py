"""Conversations to token ids: the one path for generation, reference, training and rewards.

Engines get token ids, not text, so nothing is tokenized twice. Guarantees:
- One BOS at the start where the template writes it or the tokenizer would add it; else none.
- An answer's ids follow the prompt's in the whole conversation. Where one token would span the
  boundary, the answer is tokenized on its own: the prompt's ids never change.
- An answer's text is trained on as it is, also its leading and trailing white space, which many
  templates trim.
- An answer ends with the first special token that the template writes after its text.
- A message that the template leaves out, or writes as the assistant's, is rejected.
- Text that spells a special token stays text, in every message; if the tokenizer cannot do so,
  the row is rejected. Only the template writes special tokens (`special_tokens`).
- The date that a template may ask for is fixed: no rendering depends on the day.

Not covered: tools, images.
"""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from wrpo_ray.data.records import Message
from wrpo_ray.errors import TemplateError, UserError
from wrpo_ray.llm.message_checks import check_said, check_written
from wrpo_ray.llm.reasoning import Format
from wrpo_ray.llm.rendering import PROBE, render, without_whitespace
from wrpo_ray.llm.special_tokens import Encode, encoder, escape_special_tokens, special_tokens

REMEDY = "set `chat_template` to a file that"


def end_ids(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Return all end-of-turn ids: the tokenizer's eos, generation_config's, the template's."""
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
    """Return the white space that the template writes between a prompt and its answer's text.

    Templates like Llama 2's do. Their models generate it first, though it is not part of the
    answer's text. Empty where the template writes none, or more than white space.
    """
    asked: list[Message] = [{"role": "user", "content": PROBE}]
    with contextlib.suppress(UserError):
        prompt, (head, _) = (
            render(asked, tokenizer, add_generation_prompt=True),
            _frame(tokenizer, asked),
        )
        between = head.removeprefix(prompt)
        return between if between.isspace() and head.startswith(prompt) else ""
    return ""


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Return the token ids of the conversation up to where the assistant's answer begins.

    Raises:
        TemplateError, TokenizeError, SpelledTokenError: the messages cannot be written.
    """
    check_written(tokenizer, messages)
    messages, encode = escape_special_tokens(tokenizer, messages)
    prompt = render(messages, tokenizer, add_generation_prompt=True)
    check_said(messages, prompt, partial(render, tokenizer=tokenizer, add_generation_prompt=True))
    return _with_one_bos(tokenizer, encode(prompt))


def conversation_ids(tokenizer: Any, messages: list[Message], text: str) -> list[int]:
    """Return the token ids of the conversation with an answer and all that the template adds.

    The answer is as the template writes it, which may trim its white space.

    Raises:
        TemplateError, TokenizeError, SpelledTokenError: the messages cannot be written.
    """
    check_written(tokenizer, [*messages, _answer(PROBE)])
    (*messages, answer), encode = escape_special_tokens(tokenizer, [*messages, _answer(text)])
    _, tail = _frame(tokenizer, messages)
    whole = _conversation(tokenizer, messages, answer["content"], tail)
    check_said([*messages, answer], whole, partial(render, tokenizer=tokenizer))
    return _with_one_bos(tokenizer, encode(whole))


def answer_ids(
    tokenizer: Any,
    messages: list[Message],
    text: str,
    ends: frozenset[int],
    *,
    closed: bool = True,
    format_: Format | None = None,
) -> list[int]:
    """Return the token ids of an answer's text, as it is, that follow the prompt's ids.

    The ids end with exactly one end of turn, or with none where `closed` is false (an answer
    that was cut off). An empty answer is its end of turn alone. With the `format_` of the model's
    reasoning, markers at the start of the text are tokens, and what the prompt opens is closed.

    Raises:
        UserError: the prompt is no prefix, nothing closes the answer, nothing of it is left, or
            the messages or the answer cannot be written as they are.
    """
    check_written(tokenizer, messages)
    if format_:
        asked = render(messages, tokenizer, add_generation_prompt=True)
        text = format_.after(asked).finished(text)
    whole, markers = [*messages, _answer(text)], format_.markers if format_ else None
    (*messages, answer), encode = escape_special_tokens(tokenizer, whole, markers)
    text = answer["content"]
    prompt = render(messages, tokenizer, add_generation_prompt=True)
    check_said(messages, prompt, partial(render, tokenizer=tokenizer, add_generation_prompt=True))
    body, tail = _body_and_tail(tokenizer, messages, prompt, text)
    _check_prefix(prompt, body)
    end = tokenizer.convert_ids_to_tokens(_end(tokenizer, tail, ends))
    closing = tail[: tail.index(end) + len(end)] if closed else ""
    start = _with_one_bos(tokenizer, encode(prompt))
    ids = _with_one_bos(tokenizer, encode(body + closing))
    if _loses_leading_space(encode, body, text, closing):
        before = body[: len(body) - len(text)]
        ids = _with_one_bos(tokenizer, [*encode(before), *encode(text + closing)])
    if ids[: len(start)] != start:
        ids = [*start, *_encode_after(encode, "\n", body[len(prompt) :] + closing)]
    if len(ids) == len(start):
        raise UserError("an answer that was cut off has no text; drop the row")
    return ids[len(start) :]


def check_sampled(ids: list[int], ends: frozenset[int], *, closed: bool) -> None:
    """Check an engine's answer: its only end of turn is its last token, or none if not `closed`."""
    if [i for i, token in enumerate(ids) if token in ends] != [len(ids) - 1] * closed:
        raise UserError(
            "a sampled answer does not end with its only end of turn, or was cut off and has one; "
            "list every end of turn as eos_token_id in generation_config.json, and sample again"
        )


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _end(tokenizer: Any, tail: str, ends: frozenset[int]) -> int:
    """Return the first token of the tail that ends a turn or is special."""
    special = special_tokens(tokenizer).ids | ends
    for token in encoder(tokenizer)(tail):
        if token in special:
            return token
    raise UserError(
        "chat template: no special token closes an answer; set `chat_template` to a file with one"
    )


def _frame(tokenizer: Any, messages: list[Message]) -> tuple[str, str]:
    """Return what the template writes before the text of an answer, and after it."""
    before, found, after = render([*messages, _answer(PROBE)], tokenizer).rpartition(PROBE)
    if not found:
        raise TemplateError(f"chat template: leaves out the answer; {REMEDY} writes it")
    return before, after


def _body_and_tail(
    tokenizer: Any, messages: list[Message], prompt: str, text: str
) -> tuple[str, str]:
    """Return the conversation's text up to the end of the answer, and what the template adds.

    The answer stands unchanged where the template writes it. Only where the prompt opens the
    answer's reasoning with other white space is it taken as the template writes it.
    """
    head, tail = _frame(tokenizer, messages)
    core = text.strip()
    whole = _conversation(tokenizer, messages, core, tail)
    written = whole[: len(whole) - len(tail)]
    before = _text_before(written, core, head, prompt)
    keeps = (before + text).startswith(prompt) or not written.startswith(prompt)
    return (before + text if keeps else written), tail


def _conversation(tokenizer: Any, messages: list[Message], text: str, tail: str) -> str:
    """Return the conversation with an answer, as the template writes it."""
    whole = render([*messages, _answer(text)], tokenizer)
    if not whole.endswith(tail):
        raise UserError(
            f"chat template: this answer is not followed by {tail!r}, as others are; "
            f"{REMEDY} closes every answer alike"
        )
    return whole


def _text_before(written: str, answer: str, head: str, prompt: str) -> str:
    """Return the text before an answer in the conversation that the template has `written`.

    That is `head`, as for any answer, unless the template finds reasoning in this one.
    """
    if without_whitespace(written) == without_whitespace(head + answer):
        return head
    start = _start_of(written, answer)
    if without_whitespace(written[start:]) == without_whitespace(answer):
        return written[:start]
    begun, asked = without_whitespace(head), without_whitespace(prompt)
    if asked.startswith(begun) and (begun + without_whitespace(answer)).startswith(asked):
        return head  # it leaves something out, which an engine would not
    raise UserError(
        f"chat template: does not write this answer as it was given; {REMEDY} keeps its text"
    )


def _start_of(text: str, end: str) -> int:
    """Return the index from which a text has as many non-space characters as `end`."""
    start, left = len(text), len(without_whitespace(end))
    while left and start:
        start -= 1
        left -= not text[start].isspace()
    return start


def _loses_leading_space(encode: Encode, body: str, text: str, closing: str) -> bool:
    """Whether the special token before an answer's text swallows the white space it begins with.

    Raises:
        UserError: the token after it swallows white space at its end.
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


def _encode_after(encode: Encode, before: str, text: str) -> list[int]:
    """Return a text's ids after `before`: some tokenizers put a space before a text on its own."""
    lead, ids = encode(before), encode(before + text)
    return ids[len(lead) :] if ids[: len(lead)] == lead else encode(text)


def _with_one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the ids with exactly one BOS if they have any, or if the tokenizer would add one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    adds_one = tokenizer("x")["input_ids"][:1] == [bos]
    return [bos] * (start > 0 or adds_one) + ids[start:]
