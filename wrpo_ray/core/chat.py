"""Conversations to token ids: the one path for generation, reference and training.

Token ids, not text, cross the line to an engine, so nothing is tokenized twice and no
second BOS can appear. Not covered: tools, images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wrpo_ray.core.records import Message
from wrpo_ray.errors import UserError


def check_model_folder(folder: Path, what: str, chat_template: str | None = None) -> None:
    """Check without loading that a folder holds a model that can be talked to.

    Raises:
        UserError: the folder, its config or its chat template is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{what}: no such model folder: {folder}; give a Hugging Face model folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{what}: {folder} has no config.json; give a Hugging Face model folder")
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise UserError(f"{what}: no such chat template file: {chat_template}")
    elif not _has_template(folder):
        raise UserError(
            f"{what}: {folder} has no chat template; add chat_template.jinja to it, "
            f"or set `chat_template` to a Jinja file"
        )


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    inline = config.is_file() and json.loads(config.read_text()).get("chat_template")
    return bool(inline) or (folder / "chat_template.jinja").is_file()


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The folder's tokenizer, with its chat template replaced by a file's where one is given."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def end_ids(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Every token id that ends a turn: the tokenizer's eos and those of generation_config."""
    ends = {tokenizer.eos_token_id}
    file = folder / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text()).get("eos_token_id")
        ends |= set(listed) if isinstance(listed, list) else {listed}
    return frozenset(ends - {None})


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of the conversation up to where the assistant's answer begins."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def answer_ids(
    tokenizer: Any, messages: list[Message], text: str, ends: frozenset[int], *, closed: bool = True
) -> list[int]:
    """Token ids of an answer as the template continues the prompt with it.

    The ids end with exactly one end of turn, or with none where `closed` is false (an answer
    that was cut off).

    Raises:
        UserError: the prompt's ids are no prefix of the whole conversation's.
    """
    prompt = prompt_ids(tokenizer, messages)
    conversation = [*messages, {"role": "assistant", "content": text}]
    whole = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
    if whole[: len(prompt)] != prompt:
        raise UserError(
            "chat template: the prompt's tokens are no prefix of the whole conversation's; "
            "use a template that renders a finished answer as it renders the prompt"
        )
    answer = whole[len(prompt) :]
    end = max((i for i, token in enumerate(answer) if token in ends), default=None)
    if end is None:
        raise UserError("chat template: a finished answer does not end with an end-of-turn token")
    return answer[: end + 1] if closed else answer[:end]
