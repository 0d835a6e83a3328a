"""Conversations to token ids: the one path for generation, reference, training and rewards.

Token ids, not text, cross the line to an engine, so nothing is tokenized twice. What holds:
- One BOS at the start where the template writes it or the tokenizer would add it; else none.
- An answer's ids follow the prompt's in the whole conversation. Where one token would span the
  border, the answer is tokenized apart: the prompt's ids never change.
- An answer ends with the first special token that the template writes after its text.
- Text that spells a special token stays text in an answer; in a prompt it becomes the token.
- The date that a template may ask for is fixed: no rendering depends on the day.

Not covered: tools, images.
"""

from __future__ import annotations

import contextlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from wrpo_ray.core.records import Message
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import UserError

PROBE = "PROBE"
"""An answer that no template alters."""
DATE = datetime(2024, 7, 26)
"""The date that Llama 3.1's template takes where it is given none."""
_REPLACED = "".join(f" | replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "YymBbdjAaHMS")
CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}\n"
"""Jinja that hides the clock from the template behind it."""


def check_model_folder(
    folder: Folder, what: str, chat_template: str | None = None, name: str = ""
) -> None:
    """Check without loading that a folder holds a model that can be talked to.

    `name` is what the user knows it by, if not the folder's address.

    Raises:
        UserError: the folder, its config or its chat template is missing.
    """
    name = name or str(folder)
    if not folder.exists("config.json"):
        lack = "has no config.json" if folder.exists() else "no such model folder"
        raise UserError(f"{what}: {name}: {lack}; give a Hugging Face model folder or hub id")
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise UserError(f"{what}: no such chat template file: {chat_template}")
        return
    config = "tokenizer_config.json"
    inline = folder.exists(config) and folder.read_json(config).get("chat_template")
    if not inline and not folder.exists("chat_template.jinja"):
        raise UserError(
            f"{what}: {name} has no chat template; add chat_template.jinja to it, "
            f"or set `chat_template` to a Jinja file"
        )


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The folder's tokenizer, with its chat template replaced by a file's where one is given."""
    from transformers import AutoTokenizer

    # Mistral's own format has no Jinja template, and reads no special tokens in text
    tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
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
    """Token ids of the conversation up to where the assistant's answer begins."""
    return _one_bos(tokenizer, _encode(tokenizer, _render(tokenizer, messages, prompt=True)))


def conversation_ids(tokenizer: Any, messages: list[Message], text: str) -> list[int]:
    """Token ids of the conversation with an answer, and all that the template writes after it."""
    body, tail = _body_and_tail(tokenizer, messages, text)
    return _one_bos(tokenizer, _encode_answer(tokenizer, body, tail, text))


def answer_ids(
    tokenizer: Any, messages: list[Message], text: str, ends: frozenset[int], *, closed: bool = True
) -> list[int]:
    """Token ids of an answer as the template continues the prompt with it.

    The ids end with exactly one end of turn, or with none where `closed` is false (an answer
    that was cut off). An empty answer is its end of turn alone.

    Raises:
        UserError: the prompt is no prefix, nothing closes the answer, or nothing of it is left.
    """
    prompt = _render(tokenizer, messages, prompt=True)
    body, tail = _body_and_tail(tokenizer, messages, text)
    _check_prefix(prompt, body)
    end = tokenizer.convert_ids_to_tokens(_end(tokenizer, tail, ends))
    closing = tail[: tail.index(end) + len(end)] if closed else ""
    start = _one_bos(tokenizer, _encode(tokenizer, prompt))
    ids = _one_bos(tokenizer, _encode_answer(tokenizer, body, closing, text))
    if ids[: len(start)] != start:
        ids = [*start, *_encode_answer(tokenizer, body[len(prompt) :], closing, text, "\n")]
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
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )


def _end(tokenizer: Any, tail: str, ends: frozenset[int]) -> int:
    """The first token of the tail that ends a turn or is special."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | ends
    for token in _encode(tokenizer, tail):
        if token in special:
            return token
    raise UserError(
        "chat template: no special token closes an answer; set `chat_template` to a file with one"
    )


def _body_and_tail(tokenizer: Any, messages: list[Message], text: str) -> tuple[str, str]:
    """The conversation's text up to the end of the answer's, and what the template writes then."""
    turns = [{"role": "assistant", "content": content} for content in (text, PROBE)]
    whole, probe = (_render(tokenizer, [*messages, turn]) for turn in turns)
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


def _encode(tokenizer: Any, text: str, before: str = "", *, plain: bool = False) -> list[int]:
    """Token ids of a text after `before`: some tokenizers put a space before a text on its own.

    Special tokens that a `plain` text spells stay text.
    """
    options = {"add_special_tokens": False, "split_special_tokens": plain}
    lead = tokenizer(before, **options)["input_ids"]
    ids = tokenizer(before + text, **options)["input_ids"]
    if ids[: len(lead)] != lead:
        ids, lead = tokenizer(text, **options)["input_ids"], []
    return ids[len(lead) :]


def _encode_answer(tokenizer: Any, body: str, after: str, text: str, before: str = "") -> list[int]:
    """Token ids of body + after; special tokens spelled by `text`, the body's end, stay text."""
    known = tokenizer.added_tokens_decoder.values()
    if not any(token.special and token.content in text for token in known):
        return _encode(tokenizer, body + after, before)
    start, content, rest = body.rpartition(text.strip())
    if not content:
        raise UserError("the answer spells a special token and the template alters it; drop it")
    ids = _encode(tokenizer, content, "\n", plain=True)
    return [*_encode(tokenizer, start, before), *ids, *_encode(tokenizer, rest + after, "\n")]


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids with one BOS in front if there is any, or if the tokenizer itself would add one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    adds_one = tokenizer("x")["input_ids"][:1] == [bos]
    return [bos] * (start > 0 or adds_one) + ids[start:]
