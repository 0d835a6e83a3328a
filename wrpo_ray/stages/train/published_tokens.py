"""Tokenizes as the method's published script does, for replication (`compat: published`).

Read in scripts/run_wrpo.py and scripts/wrpo_trainer.py of github.com/SLIT-AI/WRPO (commit e6f2867);
no code is taken from there. The prompt is the conversation without a generation prompt, after an
empty system message if the template supports one. An answer is the template's text of a lone
assistant turn, so its tokens begin with the assistant's header and end with the turn's end, and
one more end token follows. Text that spells a special token becomes it.

Two things differ from the script: the date that a template may ask for is fixed (`llm.chat`), and
a tokenizer without a BOS, with which the script crashes, works.
"""

from functools import partial
from typing import Any

from wrpo_ray.config import TrainConfig
from wrpo_ray.data.records import Message
from wrpo_ray.errors import UserError
from wrpo_ray.llm.message_checks import check_said, check_written
from wrpo_ray.llm.rendering import render

Ids = list[int]


def tokenize(tokenizer: Any, messages: list[Message], texts: list[str]) -> tuple[Ids, list[Ids]]:
    """Token ids of the prompt, and of each answer with its header and both ends.

    Raises:
        TemplateError: the template refuses the messages, or an assistant's turn on its own, or
            leaves out one of them.
        UserError: the last token of the prompt depends on the answer behind it.
    """
    check_written(tokenizer, messages)
    messages = _with_system(tokenizer, messages)
    text = render(messages, tokenizer)
    check_said(messages, text, partial(render, tokenizer=tokenizer))
    alone = _ids(tokenizer, text)
    wholes = [_ids(tokenizer, text + _answer(tokenizer, answer)) for answer in texts]
    # a last token that merges with the answer behind it is the answer's
    ends = [len(alone) - (ids[: len(alone)] != alone) for ids in wholes]
    prompts = [ids[:end] for ids, end in zip(wholes, ends, strict=True)]
    if any(prompt != prompts[0] for prompt in prompts):
        raise UserError("the prompt's tokens depend on the answer behind it; drop the row")
    answers = [ids[end:] for ids, end in zip(wholes, ends, strict=True)]
    return prompts[0], [[*ids, tokenizer.eos_token_id] for ids in answers]


def fit(prompt: Ids, answers: list[Ids], config: TrainConfig) -> tuple[Ids, list[Ids], int]:
    """Prompt and answers within `max_length`, and how many answers were cut.

    Where the longest answer does not fit, the prompt keeps its last `max_prompt_length` tokens;
    where it still does not, all answers keep their first `max_length - max_prompt_length`.
    """
    assert config.max_prompt_length is not None
    longest = max(map(len, answers))
    if len(prompt) + longest <= config.max_length:
        return prompt, answers, 0
    prompt = prompt[-config.max_prompt_length :]
    if len(prompt) + longest <= config.max_length:
        return prompt, answers, 0
    room = config.max_length - config.max_prompt_length
    return prompt, [ids[:room] for ids in answers], sum(len(ids) > room for ids in answers)


def _with_system(tokenizer: Any, messages: list[Message]) -> list[Message]:
    template = tokenizer.get_chat_template()
    knows_one = "system" in template or "<|im_start|>" in template
    if not messages or messages[0]["role"] == "system" or not knows_one:
        return messages
    return [{"role": "system", "content": ""}, *messages]


def _answer(tokenizer: Any, text: str) -> str:
    """The template's text of a lone assistant turn, without a BOS."""
    turn: list[Message] = [{"role": "assistant", "content": text}]
    rendered = render(turn, tokenizer)
    check_said(turn, rendered, partial(render, tokenizer=tokenizer))
    return rendered.removeprefix(tokenizer.bos_token or "")


def _ids(tokenizer: Any, text: str) -> Ids:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
