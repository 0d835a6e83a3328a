"""`compat: published` against the published script's tokenization, written here on its own.

Tokenizers of three families over many rows, below, at and above the limits of length.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.tiny_models import make_tokenizer, preference_rows

from wrpo_ray.config import TrainConfig, load
from wrpo_ray.errors import UserError
from wrpo_ray.stages.train.rows import Tokenizing, fit
from wrpo_ray.stages.train.task import WRPO_ANSWERS

LLAMA3 = (
    "{% for m in messages %}{% set content = '<|head|>' + m['role'] + '<|/head|>\n\n' + "
    "m['content'] | trim + '<|end|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + "
    "content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
"""As Llama 3's: four tokens of header and line ends, a BOS in front of whatever comes first."""
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|head|>system\nhelp<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|head|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}"
)
"""As Qwen's: a system block of its own, also in front of a lone assistant turn."""
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
"""A template whose header is no special token."""
KINDS = {"llama3": LLAMA3, "chatml": CHATML, "plain": PLAIN}
MOST, MOST_OF_PROMPT = 160, 100


def make(template: str) -> Any:
    """Bytes as tokens, merged in pairs as BPE does, and special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|end|>", "<|eos|>", "<|head|>", "<|/head|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the cat sat on the mat assistant user system\n\n: "] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|bos|>", eos_token="<|eos|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def records(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of very different lengths, some with special tokens in the text, some cut off."""
    rng, found = random.Random(seed), preference_rows(count, seed)
    words = ["the", "cat", "sat", "on", "mat", "\n", "  ", "Zoë", "x1", "<|end|>", "<|eos|>"]

    def text(most: int) -> str:
        ends = rng.choice(["", " ", "\n"]), rng.choice(["", " ", "\n"])
        middle = " ".join(rng.choices(words, k=rng.randint(1, most)))
        return ends[0] + middle + ends[1]

    for row in found:
        most = rng.choice([5, 30, 60])
        row["messages"][0]["content"] = text(most)
        for name in WRPO_ANSWERS:
            reason = rng.choice(["stop", "length", None])
            row[name] |= {"text": text(rng.choice([5, 30, 60])), "finish_reason": reason}
    return found


def published(tokenizer: Any, row: dict[str, Any], most: int, most_of_prompt: int):
    """{input ids, labels} of each answer as the script has them; a label of -100 is no answer's."""

    def rendered(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    messages = [dict(row["messages"][0])]
    if "system" in tokenizer.chat_template or "<|im_start|>" in tokenizer.chat_template:
        messages.insert(0, {"role": "system", "content": ""})
    prompt = rendered(messages)
    pairs = []
    for name in WRPO_ANSWERS:
        turn = rendered([{"role": "assistant", "content": row[name]["text"]}])
        if turn.startswith(tokenizer.bos_token):
            turn = turn[len(tokenizer.bos_token) :]
        whole, border = encode(prompt + turn), len(encode(prompt))
        if encode(prompt) != whole[:border]:
            border -= 1
        pairs.append((whole[:border], [*whole[border:], tokenizer.eos_token_id]))
    longest = max(len(answer) for _, answer in pairs)
    found = []
    for start, answer in pairs:
        if len(start) + longest > most:
            start = start[-most_of_prompt:]
        if len(start) + longest > most:
            answer = answer[: most - most_of_prompt]
        labels = [-100] * len(start) + answer
        found.append((start + answer, labels))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_the_published_one(kind):
    """400 rows; ids and which of them are answer, whole and cut."""
    tokenizer = make(KINDS[kind])
    config = TrainConfig(
        compat="published", max_length=MOST, max_prompt_length=MOST_OF_PROMPT, overflow="drop"
    )
    tokenizing = Tokenizing(tokenizer, frozenset({1}), WRPO_ANSWERS, config)
    whole = cut_prompts = cut_answers = 0
    for record in records(400, seed=len(kind)):
        row, cut = tokenizing.row(record)
        want = published(tokenizer, record, MOST, MOST_OF_PROMPT)
        prompt = row.prompt.tolist()
        got = [
            (prompt + answer.tolist(), [-100] * len(prompt) + answer.tolist())
            for answer in row.answers
        ]
        assert got == want
        untouched = published(tokenizer, record, 10**9, 10**9)
        cuts = sum(len(u) - u.count(-100) > len(w) - w.count(-100)
                   for (_, u), (_, w) in zip(untouched, want, strict=True))  # fmt: skip
        assert cut == cuts
        whole += got == untouched
        cut_prompts += len(prompt) == MOST_OF_PROMPT
        cut_answers += cut > 0
    assert min(whole, cut_prompts, cut_answers) > 10


def test_answers_begin_with_the_header_and_end_twice():
    """By hand: <user>w0<end>, then <assistant>w1<end> and the script's second end token."""
    tokenizer = make_tokenizer()
    (record,) = preference_rows(1)
    record["messages"][0]["content"] = "w0"
    for number, name in enumerate(WRPO_ANSWERS, start=1):
        record[name] |= {"text": f"w{number}", "finish_reason": "length"}
    config = TrainConfig(compat="published", max_length=64, max_prompt_length=32)
    row, cut = Tokenizing(tokenizer, frozenset({1}), WRPO_ANSWERS, config).row(record)
    user, assistant, w0, w1, w2, w3 = tokenizer.convert_tokens_to_ids(
        ["<user>", "<assistant>", "w0", "w1", "w2", "w3"]
    )
    assert row.prompt.tolist() == [user, w0, 1]
    assert [a.tolist() for a in row.answers] == [[assistant, w, 1, 1] for w in (w1, w2, w3)]
    assert cut == 0


def test_a_prompt_whose_tokens_depend_on_the_answer_is_a_kept_failure():
    """Without anything between prompt and answer, `th` and `e cat` merge, `th` and `x` do not."""
    tokenizer = make("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (record,) = preference_rows(1)
    record["messages"][0]["content"] = "sat th"
    for name, text in zip(WRPO_ANSWERS, ("e cat", "x", "x"), strict=True):
        record[name]["text"] = text
    config = TrainConfig(compat="published", max_length=64, max_prompt_length=32)
    rows = Tokenizing(tokenizer, frozenset({1}), WRPO_ANSWERS, config).rows([record], "wrpo")
    assert [row["message"] for row in rows.faults] == [
        "the prompt's tokens depend on the answer behind it; drop the row"
    ]


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_message_that_the_template_leaves_out_is_a_kept_failure(role):
    known = "".join(f"{{% if m['role'] == '{r}' %}}" + PLAIN[22:-12] + "{% endif %}"
                    for r in ("user", "assistant"))  # fmt: skip
    tokenizer = make("{% for m in messages %}" + known + "{% endfor %}")
    (record,) = preference_rows(1)
    config = TrainConfig(compat="published", max_length=900, max_prompt_length=400)
    tokenizing = Tokenizing(tokenizer, frozenset({1}), WRPO_ANSWERS, config)
    assert not tokenizing.rows([record], "wrpo").failed
    record["messages"] = [{"role": role, "content": "the cat"}, *record["messages"]]
    (fault,) = tokenizing.rows([record], "wrpo").faults
    assert fault["error"] == "TemplateError"
    assert f"leaves out a message of role '{role}'" in fault["message"]


def test_the_published_sft_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "output: o\nimport: {path: p, format: preferences}\n"
        "sft: {compat: published, max_prompt_length: 9}\n"
    )
    with pytest.raises(UserError, match="compat: published is for wrpo; the published SFT packs"):
        load(tmp_path / "c.yaml")


def ids(count: int) -> list[int]:
    return list(range(count))


@pytest.mark.parametrize(
    ("prompt", "answers", "kept_prompt", "kept"),
    [
        (1748, (300, 100), 1748, (300, 100)),  # 2048 in all: fits
        (1748, (301, 100), 1748, (248, 100)),  # 2049: cut to 2048 - 1800 = 248
        (100, (2000, 300), 100, (248, 248)),  # all alike, though the second had room
        (1900, (148, 10), 1900, (148, 10)),  # fits, so that even a prompt over 1800 stays
        (1900, (200, 10), 1800, (200, 10)),  # with the prompt's last 1800 tokens it fits
        (1900, (300, 248), 1800, (248, 248)),
        (2500, (300, 249), 1800, (248, 248)),
    ],
)
def test_compat_published_worked_numbers(prompt, answers, kept_prompt, kept):
    """The paper's max_length 2048 and max_prompt_length 1800."""
    config = TrainConfig(compat="published", max_length=2048, max_prompt_length=1800)
    got_prompt, got, cut = fit(ids(prompt), [ids(n) for n in answers], config)
    assert got_prompt == ids(prompt)[-kept_prompt:]
    assert got == [ids(n) for n in kept]
    assert cut == sum(a > k for a, k in zip(answers, kept, strict=True))
