"""Four tokenizers of different kinds, each with its own special tokens and chat template.

All are fast tokenizers that `AutoTokenizer.from_pretrained` loads. None adds a BOS token or has
a post-processor. A template closes each assistant turn, and nothing else, with the eos token.
"""

import string
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from wrpo_ray.zoo.skills import PHRASE_WORDS, SKILLS

LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
CONTEXT = 256
"""Tokens that a model of the zoo is made for."""


@dataclass(frozen=True, slots=True)
class Marks:
    """The special tokens of a family, and the text its template puts around a turn."""

    pad: str
    end: str
    user: str
    assistant: str
    unknown: str | None = None
    before: str = ""
    """Before each message."""
    after: str = ""
    """After each message of the user."""

    def tokens(self) -> list[str]:
        """All special tokens, padding first, so that its id is 0."""
        marks = [self.pad, self.end, self.user, self.assistant]
        return marks + ([self.unknown] if self.unknown else [])

    def template(self) -> str:
        """The Jinja chat template; every role but the assistant's takes the user's mark."""
        before, after = repr(self.before), repr(self.after)
        return (
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'assistant' -%}"
            f"{{{{- '{self.assistant}' + {before} + message['content'] + '{self.end}' -}}}}"
            "{%- else -%}"
            f"{{{{- '{self.user}' + {before} + message['content'] + {after} -}}}}"
            "{%- endif -%}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{- '{self.assistant}' + {before} -}}}}"
            "{%- endif -%}"
        )


BYTES = Marks("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
BPE = Marks("<|endoftext|>", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", before="\n")
CHARS = Marks("<pad>", "<end_of_turn>", "<turn_user>", "<turn_model>", "<unk>", after="\n")
WORDS = Marks("[PAD]", "[END]", "[ASK]", "[ANSWER]", "[UNK]")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes: byte-level BPE without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*BYTES.tokens(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, BYTES)


def bpe_tokenizer(size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `size` tokens, trained on the phrasings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=BPE.tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [p.format(w="", n="") for skill in SKILLS.values() for p in skill.phrasings]
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(tokenizer, BPE)


def char_tokenizer() -> PreTrainedTokenizerFast:
    """Printable ASCII characters."""
    return _fast(_word_level([*CHARS.tokens(), *LETTERS], r"[\s\S]", CHARS), CHARS)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of the phrasings, with the space before them if there is one.

    Anything else, made-up words above all, as letters.
    """
    words = [w for w in PHRASE_WORDS if len(w) > 1]
    pattern = rf" ?\b(?:{'|'.join(words)})\b|[\s\S]"
    vocabulary = [*WORDS.tokens(), *LETTERS, *words, *(f" {word}" for word in words)]
    return _fast(_word_level(vocabulary, pattern, WORDS), WORDS)


def _word_level(vocabulary: list[str], pattern: str, marks: Marks) -> Tokenizer:
    """A tokenizer whose tokens are the matches of the pattern, looked up in the vocabulary."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=marks.unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _fast(tokenizer: Tokenizer, marks: Marks) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(marks.tokens())
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=marks.pad,
        eos_token=marks.end,
        unk_token=marks.unknown,
        additional_special_tokens=[marks.user, marks.assistant],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = marks.template()
    return fast
