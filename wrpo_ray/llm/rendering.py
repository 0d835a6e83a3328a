"""Chat templates: which one a model has, and the text that it writes of a conversation.

The date that a template may ask for is fixed, so that no rendering depends on the day.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from wrpo_ray.config import ModelConfig
from wrpo_ray.errors import TemplateError
from wrpo_ray.llm.template_process import render_all_apart
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.files import BOM, read_text

PROBE = "PROBE"
"""A text that no template alters."""
DATE = datetime(2024, 7, 26)
"""The date that Llama 3.1's template writes by default."""
_REPLACED = "".join(f" | replace('%{c}', '{DATE.strftime('%' + c)}')" for c in "YymBbdjAaHMS")
CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}\n"
"""Jinja that hides the clock from the template that follows it."""
MAIN = "default"
"""The name of the main template where a tokenizer has several."""


@dataclass(frozen=True)
class Template:
    """A replacement for a tokenizer's own chat template, and values of its variables."""

    file: str | None = None
    """A Jinja file; None keeps the tokenizer's own template."""
    values: tuple[tuple[str, Any], ...] = ()
    reasoning: bool = False
    """Whether the model's answers are read for reasoning."""
    parser: str | None = None
    """vLLM's name of its format; None finds its markers."""

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """Return the template of a model's config, with an absolute path."""
        file = None if model.chat_template is None else Folder(model.chat_template).path
        values = tuple(sorted(model.chat_template_args.items()))
        return cls(file, values, model.reasoning is not None, model.reasoning_parser)

    @property
    def revision(self) -> tuple[int, ...]:
        """Part of a step's key, so that outputs of values that Jinja once misread are made anew."""
        texts = (value for _, value in self.values if isinstance(value, str))
        return (2,) if any(max(text, default="") > "\uffff" for text in texts) else ()

    def apply(self, own: str | dict[str, str] | None) -> str | dict[str, str] | None:
        """Return the templates to use, given the tokenizer's own: one, or several by name.

        A file replaces the main one; others, such as `tool_use`, are kept.
        """
        named = dict(own) if isinstance(own, dict) else {MAIN: own} if own else {}
        if self.file is not None:
            named[MAIN] = read_text(self.file, "chat_template")
        found = {name: self._assignments + text.removeprefix(BOM) for name, text in named.items()}
        return found if isinstance(own, dict) else found.get(MAIN)

    @property
    def _assignments(self) -> str:
        """Jinja that sets the variables; Jinja drops the newline after a block."""
        literals = ((n, "none" if v is None else _literal(v)) for n, v in self.values)
        given = "".join(f"{{% set {name} = {text} %}}" for name, text in literals)
        return given and f"{given}\n"


def _literal(value: str | float | bool) -> str:
    """Return the value as a Jinja literal, unescaped: Jinja does not decode surrogate pairs."""
    return json.dumps(value, ensure_ascii=False)


OWN = Template()
"""The tokenizer's own template."""


def load_tokenizer(folder: Path, template: Template = OWN) -> Any:
    """Return the tokenizer in a folder, with the chat template that `template` describes."""
    from transformers import AutoTokenizer

    render_all_apart()
    # Mistral's own format has no Jinja template, and reads no special tokens in text
    tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False, trust_remote_code=False)
    tokenizer.chat_template = template.apply(tokenizer.chat_template)
    return tokenizer


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    template: str | None = None,
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """Return the text of a conversation as a chat template writes it.

    Args:
        messages: one {"role": ..., "content": ...} a turn, the last of them an answer or not.
        tokenizer: a Hugging Face tokenizer, for example from `load_tokenizer`.
        template: Jinja source to use in place of the tokenizer's own chat template.
        add_generation_prompt: whether the beginning of the assistant's next turn is added.
        tools: JSON schemas of functions, for templates that offer tools.

    Example:
        >>> tokenizer = load_tokenizer(Path("/models/Qwen3-0.6B"))  # doctest: +SKIP
        >>> messages = [{"role": "user", "content": "Hi"}]
        >>> print(render(messages, tokenizer, add_generation_prompt=True))  # doctest: +SKIP
        <|im_start|>user
        Hi<|im_end|>
        <|im_start|>assistant

    Training and generation work on token ids, where a text that spells a special token stays text:
    see `chat.prompt_ids`, `chat.answer_ids` and `chat.conversation_ids`.

    Raises:
        TemplateError: the template rejects the conversation, or fails on it.
    """
    try:
        source = tokenizer.get_chat_template(template, tools=tools)
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=CLOCK * ("strftime_now" in source) + source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template can raise anything
        raise TemplateError(f"chat template: {type(error).__name__}: {error}") from error
    return text


def without_whitespace(text: str) -> str:
    """Return the text without its white space."""
    return "".join(text.split())
