"""Chat templates of strangers: none takes time, memory or a secret of the process that asks."""

from __future__ import annotations

import re
import resource
import threading
from typing import Any

import pytest
from support.tiny_models import TEMPLATE, make_tokenizer, write_model

from wrpo_ray.errors import TemplateError, UserError
from wrpo_ray.llm import template_process
from wrpo_ray.llm.architecture import Use
from wrpo_ray.llm.model_folder import check_model_folder
from wrpo_ray.llm.rendering import load_tokenizer, render
from wrpo_ray.storage.folder import Folder

HI = [{"role": "user", "content": "hi"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = (
    "{% set n = namespace(x='x' * 9999) %}"
    "{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
)
HOSTILE = {
    "a loop": LOOP,
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(64) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a text that doubles": DOUBLE,
    "a product": "{{ 'x' * 10 ** 12 }}",
    "a wide number": "{{ '%0999999999999d' % 1 }}",
    "a wide text": "{{ 'x' | center(10 ** 12) }}",
    "a list": "{{ [0] * 10 ** 11 }}",
    "a long answer": "{{ 'x' * 10 ** 8 }}",
    "an endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a deep text": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
}
ESCAPES = [
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.environ }}",
    "{{ self._TemplateReference__context }}", "{{ messages.append(1) }}",
    "{{ lipsum.__globals__ }}", "{{ ''['__class__'] }}", "{{ ''|attr('__class__') }}",
    "{{ ('%s' ~ '{0.__class__}').format(1) }}", "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}", "{{ namespace(__init__=1) }}",
]  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Any) -> Any:
    make_tokenizer().save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_ends_at_its_limits(kind, tokenizer, monkeypatch):
    """An error, and the next conversation is rendered; this process spends no time on it."""
    monkeypatch.setattr(template_process, "SECONDS", 1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(TemplateError) as caught:
        render(HI, tokenizer, template=HOSTILE[kind])
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert after.ru_maxrss - before.ru_maxrss < 200_000  # KiB
    assert len(str(caught.value)) < 1000
    assert render(HI, tokenizer) == "<user>hi<end>"


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_stays_in_its_sandbox(template, tokenizer):
    try:
        shown = render(HI, tokenizer, template=template)
    except TemplateError:
        return
    assert not re.search("class|object|root:|HOME", shown)


def test_the_process_has_no_environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "Xyzzy0Plugh")
    process = template_process._start()
    try:
        with open(f"/proc/{process.pid}/environ") as file:
            assert "Xyzzy0Plugh" not in file.read()
    finally:
        process.kill()
        process.communicate()


def test_it_renders_what_transformers_renders(tokenizer):
    """In the process and without it: kinds of values, tools, half a surrogate pair, all Unicode."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts = ["", " x ", "ä🙂", "\u2028\n\r", "\ud83d", "{{ 7 * 7 }}", "x" * 100_000, '"\\']
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None]}}}]
    templates = [
        TEMPLATE, "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ eos_token }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m }}{% endfor %}",
    ]  # fmt: skip
    for template in templates:
        for text in texts:
            given: dict[str, Any] = {
                "conversations": [[{"role": "user", "content": text}], HI],
                "tools": tools, "chat_template": template, "add_generation_prompt": True,
                "eos_token": "<end>",
            }  # fmt: skip
            assert template_process.render_apart(**given)[0] == render_jinja_template(**given)[0]


def test_an_error_of_a_template_keeps_its_name_and_text(tokenizer):
    for template, told in {
        "{{ raise_exception('no system') }}": "chat template: TemplateError: no system",
        "{% if %}": "chat template: TemplateSyntaxError: ",
        "{{ messages[7].content.x }}": "chat template: UndefinedError: ",
        "{{ 1 / 0 }}": "chat template: ZeroDivisionError: division by zero",
    }.items():
        with pytest.raises(TemplateError) as caught:
            render(HI, tokenizer, template=template)
        assert str(caught.value).startswith(told)


def test_threads_share_the_process(tokenizer):
    shown: dict[int, str] = {}

    def ask(i: int) -> None:
        for _ in range(20):
            shown[i] = render([{"role": "user", "content": f"{i}"}], tokenizer)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shown == {i: f"<user>{i}<end>" for i in range(8)}


def test_an_interrupted_conversation_is_not_the_next_ones(tokenizer, monkeypatch):
    exchange = template_process._exchange

    def interrupted(process: Any, request: bytes) -> bytes:
        process.stdin.write(request + b"\n")
        process.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(template_process, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render([{"role": "user", "content": "secret"}], tokenizer)
    monkeypatch.setattr(template_process, "_exchange", exchange)
    assert render(HI, tokenizer) == "<user>hi<end>"


def test_a_model_with_an_endless_template_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("WRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(template_process, "SECONDS", 1)
    folder = write_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(LOOP + TEMPLATE)
    with pytest.raises(UserError, match="chat template fails on two turns .*TemplateLimitError"):
        check_model_folder(Folder(str(folder)), "target", Use.TRAINED)
