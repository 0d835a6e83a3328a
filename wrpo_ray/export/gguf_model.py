"""The fused model as a GGUF file, for llama.cpp and Ollama; made only where reading it back works.

Covered: Llama without scaled positions and biases, with a byte-level BPE whose rules have a name in
llama.cpp. For the rest there is llama.cpp's own converter, which the error names. As it does, the
rows of queries and keys are put into the order of its rotary embedding, and vectors are in fp32.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wrpo_ray.errors import UserError
from wrpo_ray.llm.chat import end_ids
from wrpo_ray.llm.gguf_file import check_gguf_package, load_gguf_tokenizer, splitter_of
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.tensors import TensorHeader, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]
ARCHITECTURE = "LlamaForCausalLM"
TYPES = {"F32": (0, "ALL_F32"), "F16": (1, "MOSTLY_F16"), "BF16": (30, "MOSTLY_BF16")}
"""{type in safetensors: (type of the tensor in GGUF, name of the file's type)}"""
COMPARED = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_parameters",
    "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias",
)  # fmt: skip
"""Fields of the config that decide what the model computes, beside `rms_norm_eps`."""
TEXTS = (
    "Hello, world! I'll say it's 'fine', they've SAID WE'RE ok.",
    "Steps:\n\n1. Add  25 g\n2. Wait 1,234.5 s\n\n\n   10%  \t\tdone   \r\n\r\n",
    "def f(x):\n    return x**2  # 3 != 33 != 3333\n\n\nclass A:\n\tpass",
    "naïve café, e\u0301, Straße, Москва, 東京で会う, مرحبا ١٢٣, ไทย, \u200bzero\u00a0space",
    "🦙🚀 👩\u200d👩\u200d👧 ½ ² ₂ Ⅷ — “quotes” ... !!! ??? <tag/> {json: [1, 2]} \\alpha_{i+1}",
)
"""Texts that show how a tokenizer splits: spaces, digits, cases, code, scripts, symbols."""


def check_gguf(model: Folder, to: Folder) -> None:
    """Raise UserError if the model has no GGUF form that is covered, or `to` is no local folder."""
    check_gguf_package("export: --gguf")
    if to.is_remote:
        raise UserError("export: --gguf writes to a disk: give --to a folder on this machine")
    config = model.read_json("config.json")
    tokenizer = model.read_json("tokenizer.json") if model.exists("tokenizer.json") else {}
    problem = _config_problem(config)
    if not problem and not splitter_of(tokenizer):
        problem = "its tokenizer splits text by other rules than GPT-2's, SmolLM's and Llama 3's"
    if problem:
        raise _not_covered(problem)


def _config_problem(config: Row) -> str:
    """Return why a config is not covered; empty if it is."""
    kind = (config.get("architectures") or ["no architecture"])[0]
    if kind != ARCHITECTURE:
        return f"{kind} is not covered, only {ARCHITECTURE}"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        return "its rotary positions are scaled"
    if config.get("attention_bias") or config.get("mlp_bias"):
        return "it has biases"
    return "" if config.get("hidden_act", "silu") == "silu" else "its activation is not silu"


def _not_covered(problem: str) -> UserError:
    return UserError(
        f"export: --gguf: {problem}; export without --gguf, then use llama.cpp's converter: "
        "`python convert_hf_to_gguf.py FOLDER --outfile NAME.gguf`"
    )


def write_gguf(model: Path, name: str) -> int:
    """Write the model in a folder as the file `name` in it; return the file's bytes.

    Tensors are read, written and compared one at a time.

    Raises:
        UserError: what is read back from the file is not the model.
    """
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=model) as unfinished:
        file = Path(unfinished) / name
        _write(model, file)
        check_read_back(model, file)
        return file.replace(model / name).stat().st_size


# --- writing -------------------------------------------------------------------------------------


def _write(model: Path, file: Path) -> None:
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    headers = _headers(model, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, "llama")
    try:
        _add_config(writer, config, file.stem, max(TYPES[h.dtype][0] for h in headers.values()))
        _add_tokenizer(writer, model, config.vocab_size)
        for name, header in headers.items():
            new = names.get_name(name, try_suffixes=(".weight",))
            if new is None:
                raise _not_covered(f"llama.cpp has no name for {name}")
            kind = gguf.GGMLQuantizationType(_type(header.shape, header.dtype))
            size = int(np.prod(header.shape)) * (4 if kind.name == "F32" else 2)
            writer.add_tensor_info(new, header.shape, np.dtype(np.uint16), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        tensor_of = _reader(model)
        for name, header in headers.items():
            tensor = _ordered(name, tensor_of(header.file, name), config)
            writer.write_tensor_data(_bytes(tensor, _type(header.shape, header.dtype)))
    finally:
        writer.close()


def _headers(model: Path, config: Any) -> dict[str, TensorHeader]:
    """The tensors to write; tied embeddings once."""
    headers = read_tensors(Folder(str(model))) or {}
    if config.tie_word_embeddings:
        headers.pop("lm_head.weight", None)
    if other := {h.dtype for h in headers.values()} - TYPES.keys():
        raise _not_covered(f"it has weights in {min(other)}")
    if not headers:
        raise _not_covered("its weights are not safetensors")
    return headers


def _type(shape: tuple[int, ...], dtype: str) -> int:
    """The GGUF type of a tensor: fp32 for vectors, which llama.cpp wants so."""
    return 0 if len(shape) == 1 else TYPES[dtype][0]


def _reader(model: Path) -> Callable[[str, str], "Tensor"]:
    """Return a function of (file, tensor's name) that reads a tensor."""
    from safetensors import safe_open

    def read(file: str, name: str) -> "Tensor":
        with safe_open(model / file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    return read


def _ordered(name: str, tensor: "Tensor", config: Any) -> "Tensor":
    """Rows of queries and keys as llama.cpp rotates them: pairs (i, i + half) become neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if f".{part}.weight" in name), None)
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _bytes(tensor: "Tensor", kind: int) -> np.ndarray:
    import torch

    is_float = kind == TYPES["F32"][0]
    bits = tensor.float() if is_float else tensor.contiguous().view(torch.int16)
    found: np.ndarray = bits.contiguous().numpy()
    return found


def _add_config(writer: Any, config: Any, name: str, kind: int) -> None:
    import gguf

    file_type = next(label for number, label in TYPES.values() if number == kind)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, model: Path, size: int) -> None:
    import gguf

    place = Folder(str(model))
    tokenizer, parts = load_tokenizer(model), place.read_json("tokenizer.json")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    known = {i: token for token, i in parts["model"]["vocab"].items()}
    added = {row["id"]: row for row in parts["added_tokens"]}
    if max({**known, **added}) >= size:
        raise _not_covered("its tokenizer has more tokens than the model")
    for i, token in known.items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for i, row in added.items():
        special = gguf.TokenType.CONTROL if row["special"] else gguf.TokenType.USER_DEFINED
        tokens[i], types[i] = row["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter_of(parts))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_space_prefix(False)
    special_tokens = gguf.SpecialVocab(model, load_merges=True, n_vocab=size)
    special_tokens.add_special_token["bos"] = _begins_with_bos(tokenizer)
    special_tokens.add_to_gguf(writer, quiet=True)
    others = sorted(end_ids(tokenizer, model) - {tokenizer.eos_token_id})
    if len(others) > 2:
        raise _not_covered("it has more ends of a turn than a GGUF can name")
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(i)


def _begins_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


# --- reading back --------------------------------------------------------------------------------


def check_read_back(model: Path, file: Path) -> None:
    """Compare what transformers reads from a GGUF file with the model's folder.

    Raises:
        UserError: the config, a tokenizer's ids or chat template, or a tensor differs.
    """
    for compare in (_compare_configs, _compare_tokenizers, _compare_tensors):
        if problem := compare(model, file):
            raise _not_covered(f"reading the file back gives another model ({problem})")


def _compare_configs(model: Path, file: Path) -> str:
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(model)
    read = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    differ = [n for n in COMPARED if getattr(own, n, None) != getattr(read, n, None)]
    if np.float32(own.rms_norm_eps) != np.float32(read.rms_norm_eps):
        differ.append("rms_norm_eps")
    return f"config: {', '.join(differ)}" if differ else ""


def _compare_tokenizers(model: Path, file: Path) -> str:
    own, read = load_tokenizer(model), load_gguf_tokenizer(file)
    said = [{"role": "user", "content": text} for text in TEXTS[:1]]
    texts = [*TEXTS, own.apply_chat_template(said, tokenize=False), *own.all_special_tokens]
    for text in texts:
        if own(text)["input_ids"] != read(text)["input_ids"]:
            return f"token ids of {text[:30]!r}"
    same = own.chat_template == read.chat_template and own.eos_token_id == read.eos_token_id
    return "" if same else "chat template or end token"


def _compare_tensors(model: Path, file: Path) -> str:
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    process = TENSOR_PROCESSORS["llama"](config=config.to_dict())
    names = get_gguf_hf_weights_map(empty, process)
    headers, tensor_of = _headers(model, config), _reader(model)
    missing = set(headers)
    for stored in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(stored.data, stored.tensor_type)
        read = process.process(weights=values, name=stored.name)
        name = str(names.get(stored.name, stored.name))
        own = tensor_of(headers[name].file, name) if name in headers else None
        if own is None or not torch.equal(own.float(), torch.from_numpy(np.array(read.weights))):
            return name
        missing.discard(name)
    return min(missing, default="")
