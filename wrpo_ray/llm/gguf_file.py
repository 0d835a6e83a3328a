"""GGUF files, llama.cpp's format of models: how their tokenizers split text, and reading one.

transformers (5.23) reads a GGUF's weights, vocabulary and merges, but of `tokenizer.ggml.pre`, the
name of the rules that split a text before its merges, it knows some and takes GPT-2's rules for
the rest. `load_gguf_tokenizer` adds those of `SPLITTERS`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from wrpo_ray.errors import UserError

Row = dict[str, Any]
_BYTES: Row = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT2: Row = _BYTES | {"use_regex": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS: dict[str, tuple[Row, bool]] = {
    "gpt-2": (_GPT2, False),
    "smollm": (
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2],
        },
        False,
    ),
    "llama-bpe": (
        {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _LLAMA3},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _BYTES | {"use_regex": False},
            ],
        },
        True,
    ),
}
"""{`tokenizer.ggml.pre`: (pre_tokenizer, ignore_merges) of tokenizer.json}

As llama.cpp implements them (`llama-vocab.cpp`): GPT-2's; each digit alone, then GPT-2's; those of
Llama 3, where a word of the vocabulary is one token whatever the merges are.
"""


def splitter_of(tokenizer: Row) -> str | None:
    """Return the name in `SPLITTERS` of a tokenizer.json's rules; None if it is none of them."""
    model = tokenizer.get("model") or {}
    found = _plain(tokenizer.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or tokenizer.get("normalizer"):
        return None
    return next((n for n, (r, merges) in SPLITTERS.items() if (_plain(r), merges) == found), None)


def _plain(rules: Any) -> Any:
    """Rules without `trim_offsets`, which changes no token, and without nesting of one element."""
    if not isinstance(rules, dict):
        return rules
    steps = rules.get("pretokenizers")
    if rules.get("type") == "Sequence" and isinstance(steps, list):
        return _plain(steps[0]) if len(steps) == 1 else [_plain(step) for step in steps]
    return {name: value for name, value in rules.items() if name != "trim_offsets"}


def check_gguf_package(what: str) -> None:
    """Raise UserError if the package `gguf` is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"{what}: needs the package gguf: pip install gguf") from None


def load_gguf_tokenizer(file: Path) -> Any:
    """Return the tokenizer in a GGUF file, with its chat template.

    Raises:
        UserError: it splits texts by rules that neither transformers nor `SPLITTERS` has.
    """
    import gguf
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    with tempfile.TemporaryDirectory() as alone:  # else it reads what lies beside the file, too
        (Path(alone) / file.name).symlink_to(file.absolute())
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.pre")
    name = field.contents() if field else "gpt-2"
    if name in SPLITTERS:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        parts["pre_tokenizer"], parts["model"]["ignore_merges"] = SPLITTERS[name]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    elif name not in GGUF_PRE_TOKENIZER_SPLITS:
        raise UserError(f"{file}: splits text by the rules {name!r}, which are not known here")
    return tokenizer


def load_gguf_model(file: Path) -> Any:
    """Return the model in a GGUF file in fp32, as a plain model of transformers that can be saved.

    The numbers are those that llama.cpp computes from the file's blocks.
    """
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = type(read.config)(**_saveable(read.config.to_dict()))
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval()


def _saveable(config: Row) -> Row:
    """A config without what names the GGUF file."""
    left_out = (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
        "unk_token_id",
    )
    return {name: value for name, value in config.items() if name not in left_out}
