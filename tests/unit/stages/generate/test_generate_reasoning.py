"""The reasoning of an engine's answers, of each request by its own prompt."""

from __future__ import annotations

from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any

from support.tiny_models import make_tokenizer

from wrpo_ray.config import SamplingConfig
from wrpo_ray.llm.reasoning import format_of
from wrpo_ray.stages.generate.vllm_engine import Request, SamplingIdentity, VllmEngine

TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<assistant>' }}{{ m.content }}"
    "<end>{% endfor %}{% if add_generation_prompt %}<assistant><think>"
    "{% if 'w0' in messages[-1].content %}</think>{% endif %}{% endif %}"
)
"""Opens the reasoning, and closes it where the message asks for none."""


def engine() -> Any:
    """One without a model: the test is in its place."""
    made = VllmEngine.__new__(VllmEngine)
    made.tokenizer = make_tokenizer()
    made.tokenizer.add_tokens(["<think>", "</think>"])
    made.tokenizer.chat_template = TEMPLATE
    made.identity = SamplingIdentity("m", 0)
    made.format, made.policy = format_of(made.tokenizer), "strip"
    made.context, made.separator, made.version = 100, "", "none"
    made._inbox = SimpleQueue()
    return made


def answered(model: Any, prompt: str, text: str) -> dict[str, Any]:
    """The row of an answer with this text."""

    def answer() -> None:
        asked = model._inbox.get()
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        said = SimpleNamespace(text=text, token_ids=ids, finish_reason="stop", logprobs=None)
        asked.out.put((model._rows(asked, SimpleNamespace(outputs=[said])), []))

    Thread(target=answer, daemon=True).start()
    request = Request("p", [{"role": "user", "content": prompt}], 0, 1)
    ((rows, _),) = model.answers([request], SamplingConfig(samples=1))
    (row,) = rows
    return dict(row)


def test_each_prompt_says_whether_it_opens_reasoning() -> None:
    model = engine()
    for prompt, text, expected in (
        ("w1", "w2</think>w3", ("w3", "<think>w2</think>", "stripped")),
        ("w1", "w2", ("", "<think>w2", "unfinished")),
        ("w0", "w2", ("w2", None, None)),
        ("w0", "w2</think>w3", ("w2</think>w3", None, None)),
        ("w1 <think>", "w3", ("", "<think>w3", "unfinished")),
    ):
        row = answered(model, prompt, text)
        found = (row["text"], row.get("reasoning"), row.get("reasoning_state"))
        assert found == expected, (prompt, text)


def test_without_a_policy_all_is_the_answer() -> None:
    model = engine()
    model.format = None
    assert answered(model, "w1", "w2</think>w3")["text"] == "w2</think>w3"
