"""Conversations to token ids, with small tokenizers built like those of the model families.

Byte-level tokenizers (Llama 3, Qwen) write a space as `Ġ` and a newline as `Ċ`; those in the
manner of SentencePiece (Llama 2, Mistral, Gemma, Phi-3) write `▁` and `<0x0A>`. A few words are
whole tokens, everything else is spelled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from wrpo_ray.config import ModelConfig
from wrpo_ray.errors import SpelledTokenError, TemplateError, TokenizeError, UserError
from wrpo_ray.llm.chat import answer_ids, check_sampled, conversation_ids, end_ids, prompt_ids
from wrpo_ray.llm.reasoning import THINK, Format, following, format_of, split
from wrpo_ray.llm.rendering import Template, load_tokenizer, render
from wrpo_ray.llm.special_tokens import MARKS
from wrpo_ray.zoo.tokenizers import char_tokenizer

WORDS = ["user", "assistant", "system", "model", "think", "hi", "yes", "no", "kind"]


def _bpe(characters: list[str], pairs: list[tuple[str, str]], marker: str) -> models.BPE:
    """Characters, the words with and without the marker of a space before them, and pairs."""
    grown = [(word[:i], word[i]) for word in WORDS for i in range(1, len(word))]
    merges = list(dict.fromkeys([*pairs, *grown, *((marker, word) for word in WORDS)]))
    vocabulary = list(dict.fromkeys([*characters, *(a + b for a, b in merges)]))
    return models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, byte_fallback=True)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(_bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), [("Ċ", "Ċ")], "Ġ"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(*, prefix_space: bool) -> Tokenizer:
    """The space before the first word of each piece of text is the tokenizer's own."""
    characters = [*(chr(i) for i in range(33, 127)), "▁", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(_bpe(characters, [("▁", "▁"), ("#", "#")], "▁"))
    steps = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return tokenizer


@dataclass(frozen=True)
class Style:
    """A family's tokenizer and template."""

    build: Callable[[], Tokenizer]
    template: str
    end: str
    """What ends an assistant's turn."""
    eos: str
    bos: str | None = None
    others: tuple[str, ...] = ()
    """Further special tokens."""
    listed: tuple[str, ...] = ()
    """eos_token_id in generation_config.json."""
    has_system: bool = True
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""
    strips: bool = False
    """The special tokens swallow white space after them."""


ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set head = '<<SYS>>\\n' + messages[0].content "
    "+ '\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}{% else %}{% set head = '' %}"
    "{% endif %}" + ALTERNATES + "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ((head if loop.first else '') + m.content).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}" + ALTERNATES + "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
HEADER = "'<|start_header_id|>' + {role} + '<|end_header_id|>\\n\\n'"
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ "
    + HEADER.format(role="m.role")
    + " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ " + HEADER.format(role="'assistant'") + " }}{% endif %}"
)
LLAMA31 = (
    "{{- bos_token }}{% if strftime_now is defined %}"
    "{% set date = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ " + HEADER.format(role="'system'") + " + 'Today: ' + date + '\\n\\n' + system "
    "+ '<|eot_id|>' }}" + LLAMA3.replace("{% if loop.first %}{{ bos_token }}{% endif %}", "")
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN2 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nkind<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}" + NO_SYSTEM + ALTERNATES + "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' "
    "+ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")


def _spaced() -> Tokenizer:
    return _sentence_piece(prefix_space=True)


def _unspaced() -> Tokenizer:
    return _sentence_piece(prefix_space=False)


def _llama3(template: str) -> Style:
    end, eos = "<|eot_id|>", "<|end_of_text|>"
    return Style(_byte_level, template, end, eos, "<|begin_of_text|>", (*HEADERS, end), (eos, end))


def _qwen(template: str, **options: Any) -> Style:
    end, pad = "<|im_end|>", "<|endoftext|>"
    others = ("<|im_start|>", pad)
    return Style(_byte_level, template, end, end, None, others, (end, pad), **options)


STYLES = {
    "llama2": Style(_spaced, LLAMA2, "</s>", "</s>", "<s>"),
    "mistral": Style(
        _spaced, MISTRAL, "</s>", "</s>", "<s>", ("[INST]", "[/INST]"), has_system=False
    ),
    "llama3": _llama3(LLAMA3),
    "llama3.1": _llama3(LLAMA31),
    "qwen2": _qwen(QWEN2),
    "qwen3": _qwen(QWEN3, plain=("<think>", "</think>")),
    "gemma": Style(
        _unspaced, GEMMA, "<end_of_turn>", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>"),
        ("<eos>", "<end_of_turn>"), has_system=False,
    ),
    "phi3": Style(
        _spaced, PHI3, "<|end|>", "<|endoftext|>", None,
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        ("<|endoftext|>", "<|assistant|>", "<|end|>"), strips=True,
    ),
}  # fmt: skip


@cache
def make(name: str) -> PreTrainedTokenizerFast:
    """The style's tokenizer; one with a BOS adds it to every text, as the family's do."""
    return build(STYLES[name])


def build(style: Style) -> PreTrainedTokenizerFast:
    inner = style.build()
    named = [token for token in (style.bos, style.eos) if token]
    inner.add_special_tokens(named)
    inner.add_special_tokens([AddedToken(t, rstrip=style.strips) for t in style.others])
    inner.add_tokens([AddedToken(t, special=False) for t in style.plain])
    if style.bos:
        special = [(style.bos, inner.token_to_id(style.bos))]
        inner.post_processor = TemplateProcessing(f"{style.bos} $A", special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=style.bos, eos_token=style.eos)
    fast.chat_template = style.template
    return fast


def variant(name: str, template: str) -> PreTrainedTokenizerFast:
    """The style's tokenizer with another template."""
    tokenizer = deepcopy(make(name))
    tokenizer.chat_template = template
    return tokenizer


def ends(name: str) -> frozenset[int]:
    """As `end_ids` finds them."""
    style = STYLES[name]
    return frozenset(map(make(name).convert_tokens_to_ids, {style.eos, style.end, *style.listed}))


def said(*turns: str) -> list[dict[str, str]]:
    """A conversation: user, assistant, user ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


def told(system: str, *turns: str) -> list[dict[str, str]]:
    """The same after a system message."""
    return [{"role": "system", "content": system}, *said(*turns)]


def shown(tokenizer: Any, ids: list[int]) -> str:
    """The tokens, with spaces between them."""
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


HI = said("hi")
every_style = pytest.mark.parametrize("name", STYLES)

EXPECTED = {
    "llama2": ("<s> ▁ [ I N S T ] ▁hi ▁ [ / I N S T ]", "▁yes ▁ </s>"),
    "mistral": ("<s> [INST] ▁▁ hi [/INST]", "▁▁ yes </s>"),
    "llama3": (
        "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ hi <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ",
        "yes <|eot_id|>",
    ),
    "llama3.1": (
        "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ "
        "T o d a y : Ġ 2 6 Ġ J u l Ġ 2 0 2 4 ĊĊ <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> ĊĊ hi <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ",
        "yes <|eot_id|>",
    ),
    "qwen2": (
        "<|im_start|> system Ċ kind <|im_end|> Ċ <|im_start|> user Ċ hi <|im_end|> Ċ "
        "<|im_start|> assistant Ċ",
        "yes <|im_end|>",
    ),
    "qwen3": (
        "<|im_start|> user Ċ hi <|im_end|> Ċ <|im_start|> assistant Ċ",
        "<think> ĊĊ </think> ĊĊ yes <|im_end|>",
    ),
    "gemma": (
        "<bos> <start_of_turn> user <0x0A> hi <end_of_turn> <0x0A> <start_of_turn> model <0x0A>",
        "yes <end_of_turn>",
    ),
    "phi3": ("<|user|> ▁hi <|end|> <|assistant|>", "▁yes <|end|>"),
}
"""Prompt and answer of (hi, yes), worked out by hand."""


@every_style
def test_prompt_and_answer_by_hand(name):
    """Phi-3's special tokens swallow the newline after them; Llama 2 writes a space before `</s>`.

    Mistral's two spaces: its tokenizer's own, and the one that the template writes.
    """
    tokenizer = make(name)
    prompt, answer = EXPECTED[name]
    assert shown(tokenizer, prompt_ids(tokenizer, HI)) == prompt
    assert shown(tokenizer, answer_ids(tokenizer, HI, "yes", ends(name))) == answer


CONVERSATIONS = [
    HI,
    said("hi", "no", "hi hi"),
    said(" hi\n", "no", "no", "yes", "no\n\nno"),
    told("kind", "hi"),
    told("kind", "hi", "no", "hi"),
]
CASES = [(name, i) for name in STYLES for i in range(5 if STYLES[name].has_system else 3)]


@pytest.mark.parametrize("text", ["yes", "no no\nyes", "", " ", " \n yes ", "no\n"])
@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_what_holds_for_every_style(name, conversation, text):
    """Prompt + answer is what the template renders, up to the first end of turn after it.

    An answer keeps white space around it, which the template may trim.
    """
    tokenizer, style, messages = make(name), STYLES[name], CONVERSATIONS[conversation]
    prompt = prompt_ids(tokenizer, messages)
    answer = answer_ids(tokenizer, messages, text, ends(name))
    assert answer[-1] == tokenizer.convert_tokens_to_ids(style.end)
    assert not ends(name) & set(answer[:-1])
    whole = conversation_ids(tokenizer, messages, text)
    trimmed = {text, text.strip(), text.lstrip()}
    answers = (answer_ids(tokenizer, messages, t, ends(name)) for t in trimmed)
    answer = next(a for a in answers if whole[: len(prompt + a)] == prompt + a)
    rest = tokenizer.decode(whole[len(prompt + answer) :])
    assert rest.strip() in ("", style.eos)
    bos = tokenizer.bos_token_id
    if bos is not None:
        assert prompt[0] == bos
        turns = sum(m["role"] == "user" for m in messages)
        assert whole.count(bos) == (turns if name == "llama2" else 1)  # one a turn there


@every_style
@pytest.mark.parametrize("text", ["yes", "no no\nyes"])
def test_nothing_closes_an_answer_that_was_cut_off(name, text):
    tokenizer = make(name)
    closed = answer_ids(tokenizer, HI, text, ends(name))
    cut = answer_ids(tokenizer, HI, text, ends(name), closed=False)
    extra = 2 if name == "llama2" else 1  # the template's own space
    assert cut == closed[:-extra]
    assert tokenizer.decode(cut).endswith(text)


def test_nothing_is_left_of_an_empty_answer_that_was_cut_off():
    with pytest.raises(UserError, match="cut off has no text"):
        answer_ids(make("llama3"), HI, "", ends("llama3"), closed=False)


@pytest.mark.parametrize("name", [name for name in STYLES if name != "llama3.1"])  # has a date
def test_it_is_what_transformers_renders(name):
    tokenizer = make(name)
    theirs = tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, HI) == theirs
    theirs = tokenizer.apply_chat_template([*HI, *said("", "yes")[1:]], return_dict=False)
    assert conversation_ids(tokenizer, HI, "yes") == theirs


# --- BOS --------------------------------------------------------------------------------------


def test_the_system_block_appears_once():
    own = shown(make("qwen2"), conversation_ids(make("qwen2"), said("hi", "no", "hi"), "yes"))
    assert own.count("system") == own.count("kind") == 1
    given = shown(make("qwen2"), prompt_ids(make("qwen2"), told("no", "hi")))
    assert (given.count("system"), given.count("kind")) == (1, 0)


@pytest.mark.parametrize("written", ["", "{{ bos_token }}", "{{ bos_token + bos_token }}"])
def test_one_bos_whatever_the_template_writes(written):
    """Llama 3's tokenizer adds a BOS to a text, so one belongs before a conversation as well."""
    tokenizer = variant("llama3", written + LLAMA3.replace("{{ bos_token }}", ""))
    prompt, answer = EXPECTED["llama3"]
    assert shown(tokenizer, prompt_ids(tokenizer, HI)) == prompt
    assert shown(tokenizer, answer_ids(tokenizer, HI, "yes", ends("llama3"))) == answer
    assert shown(tokenizer, conversation_ids(tokenizer, HI, "yes")) == f"{prompt} {answer}"


def test_a_bos_that_the_tokenizer_does_not_add_is_not_added():
    tokenizer = variant("qwen2", CHATML)
    tokenizer.bos_token = "<|endoftext|>"
    assert tokenizer.bos_token_id not in prompt_ids(tokenizer, HI)
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2 has it
    assert prompt_ids(tokenizer, HI).count(tokenizer.bos_token_id) == 2


# --- ends of turn -----------------------------------------------------------------------------


@every_style
def test_ends_of_a_folder(name, tmp_path):
    """The tokenizer's eos, those of generation_config, and the one that the template writes."""
    tokenizer, style = make(name), STYLES[name]
    end, eos = tokenizer.convert_tokens_to_ids([style.end, style.eos])
    assert end_ids(tokenizer, tmp_path) == {end, eos}
    for listed in (7, [7, eos], None):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        assert end_ids(tokenizer, tmp_path) == {end, eos} | ({7} if listed else set())


@every_style
def test_the_template_closes_with_a_token_that_is_not_listed(name):
    """What the template writes right after an answer ends it, also where nothing lists it."""
    tokenizer = make(name)
    assert shown(tokenizer, answer_ids(tokenizer, HI, "yes", frozenset())) == EXPECTED[name][1]


def test_a_template_that_closes_nothing_is_refused_for_training_alone(tmp_path):
    """Sources may have one: their turns end with the eos token."""
    tokenizer = variant("qwen2", "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert end_ids(tokenizer, tmp_path) == {tokenizer.eos_token_id}
    with pytest.raises(UserError, match="no special token closes an answer; set `chat_te"):
        answer_ids(tokenizer, HI, "yes", ends("qwen2"))


@every_style
def test_special_tokens_spelled_in_an_answer_stay_text(name):
    """Also where the answer is nothing but its own end of turn, or ends with it."""
    tokenizer, style = make(name), STYLES[name]
    end = tokenizer.convert_tokens_to_ids(style.end)
    for text in (style.end, f"yes{style.end}", f"{style.end} no {style.end}\nno"):
        answer = answer_ids(tokenizer, HI, text, ends(name))
        assert (answer.count(end), answer[-1]) == (1, end)
        assert tokenizer.decode(answer[:-1]).strip().endswith(text)
        cut = answer_ids(tokenizer, HI, text, ends(name), closed=False)
        assert end not in cut
        assert tokenizer.decode(cut).endswith(text)
        whole = conversation_ids(tokenizer, HI, text)
        assert whole.count(end) == conversation_ids(tokenizer, HI, "no").count(end)


def test_a_spelled_end_of_turn_by_hand():
    answer = answer_ids(make("llama3"), HI, "no<|eot_id|>", ends("llama3"))
    assert shown(make("llama3"), answer) == "no < | e o t _ i d | > <|eot_id|>"


# --- special tokens spelled in messages --------------------------------------------------------


@cache
def unspellable(name: str) -> PreTrainedTokenizerFast:
    """The style's tokenizer with special tokens of the same ids that no text below spells."""
    style = STYLES[name]

    def renamed(token: str) -> str:
        is_piped = token.startswith("<|")
        return token.replace("<|", "⟦").replace("|>", "⟧") if is_piped else f"⟦{token[1:-1]}⟧"

    template = style.template.replace("<|", "⟦").replace("|>", "⟧")  # Phi-3's is put together
    for token in style.others:
        template = template.replace(token, renamed(token))
    return build(
        replace(
            style,
            template=template,
            bos=style.bos and renamed(style.bos),
            eos=renamed(style.eos),
            others=tuple(map(renamed, style.others)),
        )
    )


def texts_of(name: str) -> st.SearchStrategy[str]:
    """Texts of special tokens, whole, halved and doubled, marks, spaces and words."""
    style = STYLES[name]
    tokens = [t for t in (style.bos, style.eos, *style.others) if t]
    halves = [t[: len(t) // 2] for t in tokens] + [t[len(t) // 2 :] for t in tokens]
    parts = [*tokens, *halves, *MARKS[:2], "hi", " yes", " ", "\n", "no\n", "é", "{{ bos_token }}"]
    return st.lists(st.sampled_from(parts), min_size=1, max_size=8).map("".join)


@every_style
@settings(max_examples=40)
@given(data=st.data())
def test_no_text_of_a_message_becomes_a_special_token(name, data):
    """The ids are those of a tokenizer whose special tokens cannot be spelled at all.

    So the template's own tokens are there, no other is, and what is spelled is split into the
    same pieces as any text.
    """
    turns = data.draw(st.sampled_from([1, 3]))
    messages = said(*(data.draw(texts_of(name)) for _ in range(turns)))
    if STYLES[name].has_system and data.draw(st.booleans()):
        messages = told(data.draw(texts_of(name)), *(m["content"] for m in messages))
    tokenizer, other = make(name), unspellable(name)
    assert prompt_ids(tokenizer, messages) == prompt_ids(other, messages)
    text = data.draw(texts_of(name)) + "yes"
    whole = conversation_ids(tokenizer, messages, text)
    assert whole == conversation_ids(other, messages, text)
    for closed in (True, False):
        answer = answer_ids(tokenizer, messages, text, ends(name), closed=closed)
        assert answer == answer_ids(other, messages, text, ends(name), closed=closed)
        assert sum(token in ends(name) for token in answer) == closed


def test_a_special_token_spelled_in_a_prompt_by_hand():
    expected = EXPECTED["llama3"][0].replace("hi", "hi < | e o t _ i d | > no")
    assert shown(make("llama3"), prompt_ids(make("llama3"), said("hi<|eot_id|>no"))) == expected


def test_a_text_with_all_marks_that_spells_a_token_is_refused():
    everything = "".join(MARKS)
    assert prompt_ids(make("llama3"), said(everything))
    with pytest.raises(SpelledTokenError):
        prompt_ids(make("llama3"), said(everything + "<|eot_id|>"))


def test_a_special_token_of_one_character_is_refused_as_text():
    """Nothing can go between its characters."""
    tokenizer = deepcopy(make("qwen2"))
    tokenizer.add_special_tokens({"pad_token": "¤"})
    with pytest.raises(SpelledTokenError):
        prompt_ids(tokenizer, said("10 ¤"))


def test_a_special_token_that_only_normalizing_makes_is_refused():
    inner = _byte_level()
    inner.normalizer = normalizers.Lowercase()
    inner.add_special_tokens([AddedToken("<end>", normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<end>")
    assert prompt_ids(tokenizer, HI).count(tokenizer.eos_token_id) == 1
    with pytest.raises(SpelledTokenError, match="which its tokens would become"):
        prompt_ids(tokenizer, said("hi <END>"))


def test_unknown_characters_beside_a_spelled_token():
    """The token of unknown characters is special, and what the tokenizer gives for any of them."""
    tokenizer = char_tokenizer()
    ids = prompt_ids(tokenizer, said("é<end_of_turn><unk>"))
    assert shown(tokenizer, ids[:5]) == "<turn_user> <unk> < e n"
    assert ids.count(tokenizer.unk_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_faults_are_named_by_what_failed():
    with pytest.raises(TemplateError, match="chat template: TemplateError: roles must alternate"):
        prompt_ids(make("gemma"), [*HI, *HI])
    with pytest.raises(TokenizeError, match="tokenizer: "):
        prompt_ids(make("gemma"), said("half a pair \ud83d"))


# --- prompts that are no prefix ---------------------------------------------------------------


def test_a_token_across_the_border_leaves_the_prompt_as_it_is():
    r"""The prompt ends with \n, the answer begins with \n, and \n\n is one token.

    The whole is `... assistant ĊĊ yes`; the model answers after `... assistant Ċ`.
    """
    tokenizer = make("qwen2")
    prompt = prompt_ids(tokenizer, HI)
    whole = conversation_ids(tokenizer, HI, "\nyes")
    assert whole[: len(prompt)] != prompt
    answer = answer_ids(tokenizer, HI, "\nyes", ends("qwen2"))
    assert shown(tokenizer, answer) == "Ċ yes <|im_end|>"
    assert shown(tokenizer, answer_ids(tokenizer, HI, "\n\nyes", ends("qwen2"), closed=False)) == (
        "ĊĊ yes"
    )


def test_an_answer_on_its_own_gets_no_space_before_it():
    """SentencePiece puts a space before a text; in the midst of a conversation there is none."""
    template = "{% for m in messages %}{{ m.content + (' #', eos_token)[loop.index0] }}{% endfor %}"
    tokenizer = variant("llama2", template)
    assert shown(tokenizer, prompt_ids(tokenizer, HI)) == "<s> ▁hi ▁ #"
    assert shown(tokenizer, conversation_ids(tokenizer, HI, "#yes")) == "<s> ▁hi ▁ ## yes </s>"
    assert shown(tokenizer, answer_ids(tokenizer, HI, "#yes", ends("llama2"))) == "# yes </s>"


def test_a_thought_that_the_prompt_opens_is_closed_by_the_answer():
    r"""Templates that open `<think>\n` in the prompt and finish an answer with an empty thought."""
    opens = QWEN3.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    tokenizer = variant("qwen3", opens)
    assert shown(tokenizer, prompt_ids(tokenizer, HI)[-4:]) == "assistant Ċ <think> Ċ"
    answer = answer_ids(tokenizer, HI, "yes", ends("qwen3"))
    assert shown(tokenizer, answer) == "Ċ </think> ĊĊ yes <|im_end|>"
    answer = answer_ids(tokenizer, HI, "<think>\nhi\n</think>\n\nyes", ends("qwen3"))
    assert shown(tokenizer, answer) == "hi Ċ </think> ĊĊ yes <|im_end|>"


def test_thoughts_of_earlier_turns_are_gone_from_both():
    thought = "<think>\nhi\n</think>\n\nyes"
    messages = said("hi", thought, "hi")
    tokenizer = make("qwen3")
    assert "<think>" not in shown(tokenizer, prompt_ids(tokenizer, messages))
    answer = answer_ids(tokenizer, messages, thought, ends("qwen3"))
    assert shown(tokenizer, answer) == "<think> Ċ hi Ċ </think> ĊĊ yes <|im_end|>"


THOUGHT = "<think>\nhi\n</think>\n\nyes"
DROPS = CHATML.replace(
    "m.role + '\\n' + m.content",
    "m.role + '\\n' + (m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' "
    "else m.content)",
)
"""Leaves the reasoning out of every finished turn, as DeepSeek-R1's template does."""
BLOCK = "assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"


def opens_in_prompt(template):
    return template.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (QWEN3, THOUGHT, "<think> Ċ hi Ċ </think> ĊĊ yes <|im_end|>"),
        (QWEN3, "yes", "<think> ĊĊ </think> ĊĊ yes <|im_end|>"),
        (opens_in_prompt(QWEN3), THOUGHT, "hi Ċ </think> ĊĊ yes <|im_end|>"),
        (opens_in_prompt(QWEN3), "yes", "Ċ </think> ĊĊ yes <|im_end|>"),
        (opens_in_prompt(CHATML), THOUGHT, "hi Ċ </think> ĊĊ yes <|im_end|>"),
        (opens_in_prompt(CHATML), "yes", "Ċ </think> ĊĊ yes <|im_end|>"),
        (opens_in_prompt(DROPS), THOUGHT, "hi Ċ </think> ĊĊ yes <|im_end|>"),
        (opens_in_prompt(DROPS), "yes", "Ċ </think> ĊĊ yes <|im_end|>"),
        (DROPS, THOUGHT, "<think> Ċ hi Ċ </think> ĊĊ yes <|im_end|>"),
        (DROPS, "yes", "yes <|im_end|>"),
        (QWEN3.replace("assistant\\n' }}{% endif %}", BLOCK), "yes", "yes <|im_end|>"),
    ],
)
def test_reasoning_is_trained_on_as_the_model_writes_it_after_the_prompt(template, text, expected):
    """The prompt's ids are those at inference, and prompt and answer are the model's whole text."""
    tokenizer = variant("qwen3", template)
    for messages in (HI, said("hi", THOUGHT, "hi")):
        written = format_of(tokenizer).finished(text)
        answer = answer_ids(tokenizer, messages, written, ends("qwen3"))
        assert shown(tokenizer, answer) == expected
        prompt = prompt_ids(tokenizer, messages)
        asked = render(messages, tokenizer, add_generation_prompt=True)
        assert tokenizer.decode(prompt) == asked
        whole = tokenizer.decode([*prompt, *answer])
        assert whole.startswith(asked)
        assert whole.endswith(f"{text}<|im_end|>")


MAY_OPEN = (
    "{% set asks = '/no' not in messages[0].content %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and not asks %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' + ('<think>\\n' if asks else '<think></think>') }}{% endif %}"
)
"""Opens the reasoning, unless a message asks for none: then it is empty, as in Nemotron's."""


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        ("hi", THOUGHT, "hi Ċ </think> ĊĊ yes <|im_end|>"),
        ("hi", "yes", "Ċ </think> ĊĊ yes <|im_end|>"),
        ("hi /no", "yes", "yes <|im_end|>"),
    ],
)
def test_each_prompt_says_whether_it_opens_reasoning(words, text, expected):
    tokenizer = variant("qwen3", MAY_OPEN)
    format_, asked = format_of(tokenizer), said(words)
    answer = answer_ids(tokenizer, asked, text, ends("qwen3"), format_=format_)
    assert shown(tokenizer, answer) == expected
    opening, answer = ("", "hi") if "/no" in words else ("<think>\n", "")
    after = following(format_, tokenizer, prompt_ids(tokenizer, asked))
    assert (after.opening, split("hi", after).answer) == (opening, answer)
    closed = following(Format(THINK), tokenizer, prompt_ids(tokenizer, asked))  # of another probe
    assert closed.opening == opening


@pytest.mark.parametrize("thought", ["<think>hi\n</think>\n\nyes", "\n<think>hi\n</think>\n\nyes"])
def test_reasoning_of_another_model_begins_as_the_prompt_opens_it(thought):
    """Its white space around the opening marker may be another one."""
    tokenizer = variant("qwen3", opens_in_prompt(CHATML))
    answer = answer_ids(tokenizer, HI, thought, ends("qwen3"), format_=format_of(tokenizer))
    assert shown(tokenizer, answer) == "hi Ċ </think> ĊĊ yes <|im_end|>"


def test_markers_that_are_special_tokens_are_tokens_where_reasoning_stands():
    """And text anywhere else: in the prompt, in the reasoning, and in the answer."""
    style = replace(STYLES["qwen3"], plain=(), template=CHATML)
    special = replace(style, others=(*style.others, "<think>", "</think>"))
    tokenizer, plain = build(special), build(style)
    format_ = format_of(tokenizer, "qwen3")
    assert format_ == Format(THINK, is_special=True)
    marks = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    def ids(text):
        return answer_ids(tokenizer, HI, text, ends("qwen3"), format_=format_)

    assert shown(tokenizer, ids(THOUGHT)) == "<think> Ċ hi Ċ </think> ĊĊ yes <|im_end|>"
    found = ids("<think>hi <think> hi</think>yes </think> no")
    assert [token for token in found if token in marks] == marks
    assert found[0] == marks[0]
    assert tokenizer.decode(found) == "<think>hi <think> hi</think>yes </think> no<|im_end|>"
    for text in ("yes", "yes <think> no </think>"):
        assert ids(text) == answer_ids(plain, HI, text, ends("qwen3"))
    assert ids("<think>hi") == [marks[0], *answer_ids(plain, HI, "hi", ends("qwen3"))]
    asked = prompt_ids(tokenizer, said("hi <think> hi"))
    assert not set(asked) & set(marks)


def test_a_thought_that_a_finished_answer_lacks_is_refused():
    opens = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    tokenizer = variant("qwen3", opens)
    with pytest.raises(UserError) as caught:
        answer_ids(tokenizer, HI, "yes", ends("qwen3"))
    assert str(caught.value) == (
        r"chat template: the prompt has '<think>\n' where the finished conversation has "
        "'yes'; set `chat_template` to a file in which they agree"
    )


# --- templates that refuse, and that look at the clock ------------------------------------------


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("mistral", told("kind", "hi"), "roles must alternate"),
        ("gemma", told("kind", "hi"), "no system role"),
        ("llama2", [*HI, *HI], "roles must alternate"),
        ("mistral", [*HI, *HI], "roles must alternate"),
        ("gemma", [*HI, *HI], "roles must alternate"),
    ],
)
def test_what_a_template_refuses_is_the_error(name, messages, message):
    with pytest.raises(Exception, match=message):
        prompt_ids(make(name), messages)
    with pytest.raises(Exception, match=message):
        answer_ids(make(name), messages, "yes", ends(name))


def test_a_rendering_does_not_depend_on_the_day():
    """The rest of a template that asks for the date is rendered as it would be without."""
    dated = variant("qwen2", "\n{{ strftime_now('%A %B %d %Y-%m-%d %H:%M') }}\n" + CHATML)
    text = dated.decode(prompt_ids(dated, HI))
    assert text.startswith("\nFriday July 26 2024-07-26 00:00\n<|im_start|>user\nhi<|im_end|>\n")


# --- a folder -----------------------------------------------------------------------------------


@every_style
def test_a_saved_tokenizer_gives_the_same_ids(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    messages = said("hi", "no", "hi")
    assert prompt_ids(loaded, messages) == prompt_ids(make(name), messages)
    again = answer_ids(loaded, messages, "no yes", ends(name))
    assert again == answer_ids(make(name), messages, "no yes", ends(name))


def test_another_template_from_a_file(tmp_path):
    make("qwen2").save_pretrained(tmp_path)
    (tmp_path / "mine.jinja").write_text(CHATML)
    loaded = load_tokenizer(tmp_path, Template(str(tmp_path / "mine.jinja")))
    assert "system" not in shown(loaded, prompt_ids(loaded, HI))


def test_a_folder_that_also_holds_mistrals_own_format(tmp_path):
    """The Jinja template is what is rendered."""
    make("mistral").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tekken.json").write_text("{}")
    loaded = load_tokenizer(tmp_path)
    assert shown(loaded, prompt_ids(loaded, HI)) == EXPECTED["mistral"][0]


# --- an engine's answers ------------------------------------------------------------------------


def sampled(tokens: str) -> tuple[list[int], frozenset[int]]:
    """Token ids, and those that end a turn."""
    return make("llama3").convert_tokens_to_ids(tokens.split()), ends("llama3")


@pytest.mark.parametrize(
    ("tokens", "closed"),
    [("yes <|eot_id|>", True), ("<|eot_id|>", True), ("no <|end_of_text|>", True), ("no", False)],
)
def test_sampled_answers(tokens, closed):
    """With the end of turn that the engine stopped at, or with none."""
    check_sampled(*sampled(tokens), closed=closed)


@pytest.mark.parametrize(
    ("tokens", "closed"),
    [("yes", True), ("yes <|eot_id|> no", True), ("yes <|eot_id|> <|end_of_text|>", True),
     ("yes <|eot_id|> no", False), ("yes <|eot_id|>", False)],
)  # fmt: skip
def test_sampled_answers_that_do_not_end_as_they_say(tokens, closed):
    """As from an engine that does not know the template's end of turn, and goes on behind it."""
    with pytest.raises(UserError, match="list every end of turn as eos_token_id in generation_co"):
        check_sampled(*sampled(tokens), closed=closed)


def test_variables_of_a_template_have_the_values_of_the_config(tmp_path):
    """Every kind of value, in the tokenizer's own template and in a file's."""
    tokenizer = make("qwen2")
    plain = tokenizer.get_chat_template()
    asks = "{{ '' if think is undefined else think ~ name ~ (level is none) }}"
    tokenizer.chat_template = plain + asks
    tokenizer.save_pretrained(tmp_path)
    values = {"think": False, "name": 'it\'s "5"\n', "level": None}
    model = ModelConfig(name="m", model=str(tmp_path), chat_template_args=values)
    own, given = load_tokenizer(tmp_path), load_tokenizer(tmp_path, Template.of(model))
    bare, filled = (t.apply_chat_template(HI, tokenize=False) for t in (own, given))
    assert filled == bare + "False" + 'it\'s "5"\n' + "True"
    file = tmp_path / "file.jinja"
    file.write_text("\n" + plain)
    model = model.model_copy(update={"chat_template": str(file)})
    replaced = load_tokenizer(tmp_path, Template.of(model))
    assert replaced.apply_chat_template(HI, tokenize=False) == "\n" + bare


def test_render_writes_a_conversation_by_the_tokenizers_template_or_another():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = [{"role": "user", "content": "hi"}]
    assert render(asked, tokenizer) == "<user>hi"
    assert render(asked, tokenizer, add_generation_prompt=True) == "<user>hi<assistant>"
    assert render(asked, tokenizer, template="{{ messages[0].content }}!") == "hi!"
    dated = render(asked, tokenizer, template="{{ strftime_now('%d %b %Y') }}")
    assert dated == "26 Jul 2024"
    with pytest.raises(TemplateError, match="chat template: "):
        render(asked, tokenizer, template="{{ raise_exception('no') }}")
