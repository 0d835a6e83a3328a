"""What is said in a conversation comes out of it: every message, its white space, and its end."""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_chat import (
    CHATML,
    HI,
    LLAMA3,
    QWEN3,
    STYLES,
    ends,
    every_style,
    make,
    said,
    told,
    variant,
)
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
)

from wrpo_ray.config import LoraConfig, ModelConfig, SftConfig, TrainConfig
from wrpo_ray.errors import TemplateError, UserError
from wrpo_ray.llm.chat import answer_ids, conversation_ids, end_ids, prompt_ids, separator
from wrpo_ray.llm.rendering import Template, load_tokenizer
from wrpo_ray.stages.train.model import Policy, save
from wrpo_ray.stages.train.rows import Tokenizing
from wrpo_ray.stages.train.task import WRPO_ANSWERS
from wrpo_ray.storage.folder import Folder

# --- white space around answers ----------------------------------------------------------------

AROUND = ["", " ", "    ", "\n", "\n\n  ", "\t", " \n "]
KEPT = [(before, after) for before in AROUND for after in AROUND]
TRIMS = [name for name, style in STYLES.items() if "trim" in style.template]


def answer_text(tokenizer: Any, ids: list[int], closed: bool) -> str:
    """The text of an answer's tokens, read behind a newline, as in a conversation."""
    lead = tokenizer("\n", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode([*lead, *ids[: len(ids) - closed]], skip_special_tokens=False)
    return text.partition("\n")[2]


@every_style
@pytest.mark.parametrize("closed", [True, False])
def test_white_space_around_an_answer_is_trained_on(name, closed):
    """Also by templates that trim it, and where a special token swallows white space behind it.

    What a template writes itself around an answer comes on top: a space in Llama 2's and Mistral's,
    an empty thought in Qwen3's.
    """
    tokenizer = make(name)
    plain = answer_text(
        tokenizer, answer_ids(tokenizer, HI, "yes", ends(name), closed=closed), closed
    )
    lead, tail = plain.split("yes")
    for before, after in KEPT:
        text = f"{before}yes  no{after}"
        ids = answer_ids(tokenizer, HI, text, ends(name), closed=closed)
        assert answer_text(tokenizer, ids, closed) == lead + text + tail, (before, after)


@pytest.mark.parametrize("name", TRIMS)
def test_the_code_of_a_trimming_template_is_that_of_one_that_does_not(name):
    style = STYLES[name]
    plain = variant(name, style.template.replace(" | trim", ""))
    for before, after in KEPT:
        text = f"{before}yes{after}"
        ids = answer_ids(make(name), HI, text, ends(name))
        assert ids == answer_ids(plain, HI, text, ends(name))
        assert (
            prompt_ids(make(name), HI) + ids
            == conversation_ids(plain, HI, text)[: len(prompt_ids(plain, HI)) + len(ids)]
        )


def test_a_reward_model_reads_an_answer_as_its_template_writes_it():
    tokenizer = make("llama3")
    assert conversation_ids(tokenizer, HI, "  yes ") == conversation_ids(tokenizer, HI, "yes")


DROPS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
THOUGHTS = [
    "<think>\nhi\n</think>\n\nyes",
    "<think>hi</think>yes",
    "\n<think> hi </think>\n  yes\n",
]


@pytest.mark.parametrize("text", THOUGHTS)
@pytest.mark.parametrize("template", [QWEN3, DROPS, CHATML], ids=["qwen3", "drops", "plain"])
def test_a_thought_is_trained_on_as_it_was_said(template, text):
    """Whether the template writes thoughts anew, leaves them out, or knows none."""
    tokenizer = variant("qwen3", template)
    ids = answer_ids(tokenizer, HI, text, ends("qwen3"))
    assert answer_text(tokenizer, ids, True) == text


def test_an_answer_that_a_template_changes_is_refused():
    censored = CHATML.replace(
        "m.content", "('! ' + m.content | replace('no', 'yes') if m.role != 'user' else m.content)"
    )
    tokenizer = variant("qwen2", censored)
    assert answer_ids(tokenizer, HI, "hi", ends("qwen2"))
    with pytest.raises(UserError, match="does not write this answer as it was given"):
        answer_ids(tokenizer, HI, "hi no", ends("qwen2"))


def test_an_end_of_turn_that_swallows_white_space_is_told():
    from tokenizers import AddedToken

    tokenizer = deepcopy(make("qwen2"))
    inner = tokenizer.backend_tokenizer
    inner.add_special_tokens([AddedToken("<swallow>", lstrip=True)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<swallow>")
    assert answer_ids(tokenizer, HI, "yes", ends("qwen2"))
    with pytest.raises(UserError, match="end of turn swallows the white space"):
        answer_ids(tokenizer, HI, "yes  ", ends("qwen2"))


@pytest.mark.parametrize("text", ["   ", " ", "\n", " \n\n", "yes ", " yes\n"])
@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_white_space_that_an_end_of_turn_swallows_is_told(name, text):
    """Also of an answer that is nothing else, however the header before it ends."""
    from tokenizers import AddedToken

    tokenizer = deepcopy(make(name))
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<swallow>", lstrip=True)])
    assert answer_text(tokenizer, answer_ids(tokenizer, HI, text, ends(name)), True) == text
    template = STYLES[name].template
    for header in (template, template.replace("\\n", "")):
        tokenizer.chat_template = header.replace(STYLES[name].end, "<swallow>")
        assert answer_ids(tokenizer, HI, "yes", ends(name))
        assert answer_ids(tokenizer, HI, "", ends(name))
        with pytest.raises(UserError, match="end of turn swallows the white space"):
            answer_ids(tokenizer, HI, text, ends(name))


@pytest.mark.parametrize("text", [" ", "   ", "\n"])
@every_style
def test_an_answer_of_white_space_is_trained_on(name, text):
    """Also where the special token before it swallows white space."""
    tokenizer = make(name)
    plain = answer_text(tokenizer, answer_ids(tokenizer, HI, "yes", ends(name)), True)
    lead, tail = plain.split("yes")
    ids = answer_ids(tokenizer, HI, text, ends(name))
    assert answer_text(tokenizer, ids, True) == lead + text + tail


@every_style
def test_what_a_template_writes_before_an_answer_is_no_part_of_it(name):
    assert separator(make(name)) == (" " if name in ("llama2", "mistral") else "")


# --- messages that a template leaves out -------------------------------------------------------

KNOWN = "{% for m in messages %}{% if m.role in ROLES %}" + (
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OTHERS = ("system", "developer", "tool")


def knowing(*roles: str) -> Any:
    """A tokenizer whose template passes over messages of other roles."""
    return variant("qwen2", KNOWN.replace("ROLES", repr(list(roles))))


def conversations() -> list[list[str]]:
    """Sequences of roles that end with what is asked."""
    roles = (*OTHERS, "user", "assistant")
    middles = [list(m) for n in range(3) for m in product(roles, repeat=n)]
    return [[*m, last] for m in middles for last in ("user", "tool")]


def texts(roles: list[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": f" hi {i}\n"} for i, role in enumerate(roles)]


@pytest.mark.parametrize("left_out", [(), *((role,) for role in OTHERS), OTHERS])
def test_every_message_comes_out_or_its_role_is_told(left_out):
    """In the prompt, in an answer's row, and before a reward model."""
    tokenizer = knowing(*({*OTHERS, "user", "assistant"} - set(left_out)))
    for roles in conversations():
        messages = texts(roles)
        lost = [role for role in roles if role in left_out]
        calls = [
            lambda: prompt_ids(tokenizer, messages),  # noqa: B023
            lambda: conversation_ids(tokenizer, messages, "yes"),  # noqa: B023
            lambda: answer_ids(tokenizer, messages, "yes", ends("qwen2")),  # noqa: B023
        ]
        for call in calls:
            if lost:
                with pytest.raises(
                    TemplateError, match=f"leaves out a message of role '{lost[0]}'"
                ):
                    call()
            else:
                assert call()
        if not lost:
            text = tokenizer.decode(prompt_ids(tokenizer, messages))
            assert all(message["content"] in text for message in messages)


@pytest.mark.parametrize("role", OTHERS)
def test_a_message_that_is_written_as_the_assistants_is_told(role):
    """As by templates that know the user and take everyone else for the assistant."""
    template = CHATML.replace("m.role + ", "('user' if m.role == 'user' else 'assistant') + ")
    tokenizer = variant("qwen2", template)
    assert prompt_ids(tokenizer, said("hi", "no", "hi"))
    with pytest.raises(
        TemplateError, match=f"writes a message of role '{role}' as the assistant's"
    ):
        prompt_ids(tokenizer, [{"role": role, "content": "hi"}, *HI])
    assert prompt_ids(tokenizer, [{"role": role, "content": " "}, *HI]), "nothing is said in it"


def test_an_answer_that_is_left_out_is_told():
    tokenizer = knowing("user", "system")
    assert prompt_ids(tokenizer, told("kind", "hi"))
    with pytest.raises(TemplateError, match="leaves out a message of role 'assistant'"):
        conversation_ids(tokenizer, HI, "yes")
    with pytest.raises(TemplateError, match="leaves out the answer"):
        answer_ids(tokenizer, HI, "yes", ends("qwen2"))


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3, QWEN3, DROPS], ids=["chatml", "llama3", "qwen3", "drops"]
)
def test_what_templates_rightly_leave_out_is_no_fault(template):
    """White space around messages, and thoughts of earlier turns."""
    name = "llama3" if template is LLAMA3 else "qwen3"
    messages = said("  hi\n", "<think>\nno\n</think>\n\nyes", "\nhi ")
    assert prompt_ids(variant(name, template), messages)


GONE = ["<think>all of it</think>", "<think>\n no\n</think>\n\n ", "hi</think>"]
IF_ANY = DROPS.replace("%}{{", "%}{% if m.content %}{{", 1).replace(
    "{% endfor", "{% endif %}{% endfor"
)


@pytest.mark.parametrize("text", GONE)
@pytest.mark.parametrize("template", [QWEN3, DROPS, IF_ANY], ids=["qwen3", "drops", "if any"])
def test_a_message_of_which_nothing_is_written_is_told(template, text):
    """Also where its text stands in another message; an answer that is trained on is kept."""
    tokenizer = variant("qwen3", template)
    tokenizing = Tokenizing(
        tokenizer, ends("qwen3"), WRPO_ANSWERS,
        TrainConfig(compat="published", max_length=999, max_prompt_length=500),
    )  # fmt: skip

    def row(messages: Any, *texts: str) -> Any:
        answers = {name: {"text": t} for name, t in zip(WRPO_ANSWERS, texts, strict=True)}
        return tokenizing.row({"prompt_id": "p", "messages": messages, **answers})

    for asked in ("more", f"is {text} right?"):
        messages = said("hi", text, asked)
        for call in (
            lambda: prompt_ids(tokenizer, messages),  # noqa: B023
            lambda: conversation_ids(tokenizer, messages, "yes"),  # noqa: B023
            lambda: answer_ids(tokenizer, messages, "yes", ends("qwen3")),  # noqa: B023
            lambda: row(messages, "a", "b", "c"),  # noqa: B023
        ):
            if template is not QWEN3 and asked != "more":
                continue  # these templates cut messages of the user too
            with pytest.raises(TemplateError, match="writes nothing of .* role 'assistant' says"):
                call()
    ids = answer_ids(tokenizer, HI, text, ends("qwen3"))
    assert answer_text(tokenizer, ids, True).endswith(text)
    assert row(HI, "<think>x</think> a", "b", "c")
    if template is QWEN3:  # it writes the thought of an answer
        assert conversation_ids(tokenizer, HI, text)
        return
    with pytest.raises(TemplateError, match="writes nothing of .* role 'assistant' says"):
        conversation_ids(tokenizer, HI, text)
    with pytest.raises(TemplateError, match="writes nothing of .* role 'assistant' says"):
        row(HI, "a", text, "c")


def test_a_template_without_roles_is_taken_as_it_is():
    tokenizer = variant("qwen2", "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert prompt_ids(tokenizer, told("kind", "hi"))


def test_the_template_is_tried_once_for_each_sequence_of_roles(monkeypatch):
    tokenizer, rendered = variant("qwen2", CHATML), []
    plain = type(tokenizer).apply_chat_template

    def counted(self: Any, *given: Any, **options: Any) -> Any:
        rendered.append(given)
        return plain(self, *given, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    for i in range(20):
        prompt_ids(tokenizer, said(f"hi {i}"))
    assert len(rendered) == 20 + 1


# --- ends of turn in what is saved -------------------------------------------------------------


def untrained(tokenizer: Any) -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "vocab_size": len(tokenizer)}
    eos = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaForCausalLM(LlamaConfig(**shape, **eos))


class Says(LogitsProcessor):
    """Makes a model say some tokens, one after another."""

    def __init__(self, tokens: list[int]):
        self.tokens = list(tokens)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens.pop(0)] = 0
        return forced


def unlisted(name: str) -> Any:
    """The style's tokenizer with another eos than its template's end of turn."""
    tokenizer = deepcopy(make(name))
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    tokenizer.chat_template = STYLES[name].template.replace("eos_token", repr(STYLES[name].end))
    return tokenizer


@pytest.mark.parametrize("listed", [None, 7, [7, 8]])
@every_style
def test_a_saved_model_ends_where_its_template_ends_a_turn(name, listed, tmp_path):
    """Whatever the base lists: transformers stops at each end of turn of the saved model."""
    tokenizer, style = unlisted(name), STYLES[name]
    base, to = tmp_path / "base", tmp_path / "saved"
    model = untrained(tokenizer)
    model.generation_config.eos_token_id = listed
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    end = tokenizer.convert_tokens_to_ids(style.end)
    assert end != tokenizer.eos_token_id
    config = SftConfig(lora=LoraConfig()) if listed == 7 else SftConfig()
    trained = AutoModelForCausalLM.from_pretrained(base)
    if config.lora:
        from wrpo_ray.stages.train.model import with_lora

        trained = with_lora(trained, config.lora)
    save(Policy(trained), base, config, tokenizer, Folder(str(to)), write=True)

    stops = GenerationConfig.from_pretrained(to).eos_token_id
    assert {end, tokenizer.eos_token_id} <= set(stops)
    assert set(listed if isinstance(listed, list) else [listed]) - {None} <= set(stops)
    assert end_ids(load_tokenizer(to), to) == set(stops)
    loaded = AutoModelForCausalLM.from_pretrained(to)
    prompt = torch.tensor([prompt_ids(tokenizer, HI)])
    for stop in stops:
        said_then = [Says([5, 5, stop, 5, 5, 5])]
        out = loaded.generate(prompt, max_new_tokens=6, logits_processor=said_then, do_sample=False)
        assert out[0, prompt.shape[1] :].tolist() == [5, 5, stop]


def test_a_template_that_wants_a_system_message_has_its_end_too(tmp_path):
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = variant("qwen2", wants + CHATML)
    tokenizer.eos_token = "<|endoftext|>"
    assert end_ids(tokenizer, tmp_path) == ends("qwen2")


# --- several templates, and files with a byte-order mark ---------------------------------------


def several(folder: Path, mark: str = "") -> Path:
    """A folder of a tokenizer with a template beside the main one."""
    tokenizer = deepcopy(make("qwen2"))
    named = {"default": CHATML, "tool_use": CHATML + "{{ tools }}"}
    tokenizer.chat_template = {name: mark + text for name, text in named.items()}
    tokenizer.save_pretrained(folder)
    return folder


def settings(folder: Path, **given: Any) -> Template:
    return Template.of(ModelConfig(name="m", model=str(folder), **given))


def test_templates_beside_the_main_one_stay(tmp_path):
    """With values, which all have, and with a file, which replaces the main one."""
    folder = several(tmp_path / "m")
    own = load_tokenizer(folder).chat_template
    assert own == {"default": CHATML, "tool_use": CHATML + "{{ tools }}"}
    (tmp_path / "mine.jinja").write_text("mine")
    replaced = load_tokenizer(folder, settings(folder, chat_template=str(tmp_path / "mine.jinja")))
    assert replaced.chat_template == own | {"default": "mine"}
    valued = load_tokenizer(folder, settings(folder, chat_template_args={"x": 1})).chat_template
    assert valued == {name: "{% set x = 1 %}\n" + text for name, text in own.items()}
    replaced.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_template == replaced.chat_template


@pytest.mark.parametrize("place", ["file", "folder", "beside"])
def test_a_byte_order_mark_is_no_part_of_a_template(place, tmp_path):
    plain = variant("qwen2", CHATML)
    if place == "beside":
        loaded = load_tokenizer(several(tmp_path / "m", "\ufeff"))
        assert "\ufeff" not in json.dumps(loaded.chat_template, ensure_ascii=False)
    else:
        variant("qwen2", ("\ufeff" if place == "folder" else "x") + CHATML).save_pretrained(
            tmp_path
        )
        file = tmp_path / "mine.jinja"
        file.write_text(CHATML, encoding="utf-8-sig")
        given = {"chat_template": str(file)} if place == "file" else {}
        loaded = load_tokenizer(tmp_path, settings(tmp_path, **given))
    assert prompt_ids(loaded, HI) == prompt_ids(plain, HI)


SCRIPTS = [
    *(
        "Zoë",
        "Привет",
        "日本語",
        "שלום",
        "नमस्ते",
        "😀👩\u200d👧",
        "𝔘𝔫𝔦",
        "a\u2028b",
        "\ufeff",
        "é" * 1000,
    ),
    *("{% x %} {{ y }} #}", "\\ud83d", 'it\'s "5"\\n\t', "\x00\x7f"),
]


@pytest.mark.parametrize("value", SCRIPTS)
def test_a_value_of_a_template_comes_out_as_it_was_written(value, tmp_path):
    variant("qwen2", "{{ given }}").save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, settings(tmp_path, chat_template_args={"given": value}))
    assert loaded.apply_chat_template(HI, tokenize=False) == value
