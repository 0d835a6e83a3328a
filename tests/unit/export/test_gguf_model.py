"""The fused model as a GGUF file: transformers reads the same model, or there is no file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import make_model, make_tokenizer
from unit.export import test_export_model
from unit.export.test_export_model import finish

from wrpo_ray.cli.entry import main
from wrpo_ray.config import Config
from wrpo_ray.errors import UserError
from wrpo_ray.export import gguf_model
from wrpo_ray.export.gguf_model import TEXTS, check_gguf, write_gguf
from wrpo_ray.llm.gguf_file import SPLITTERS, load_gguf_model, load_gguf_tokenizer, splitter_of
from wrpo_ray.storage.folder import Folder

config = test_export_model.config
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<assistant>' }}"
    "{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(splitter: str, *, bos: bool = False, end: str = "<end>") -> Any:
    """A byte-level BPE trained on `TEXTS`, which splits by the rules of that name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "<user>", "<assistant>", "<bos>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*TEXTS, *TEXTS], trainer)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 4)]
        )
    parts = json.loads(inner.to_str())
    parts["pre_tokenizer"], parts["model"]["ignore_merges"] = SPLITTERS[splitter]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        pad_token="<pad>", eos_token=end, bos_token="<bos>" if bos else None,
        additional_special_tokens=special[1:4],
    )  # fmt: skip
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_llama(
    folder: Path, tokenizer: Any, dtype: str = "float32", *, tied: bool = False, **changes: Any
) -> Path:
    """A Llama of four heads with two pairs of keys, and 20 rows more than there are tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer) + 20, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 96, "initializer_range": 0.3, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": tied,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape | changes))
    with torch.no_grad():  # norms of new models are all ones
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.tensor([ids])).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_reads_the_same_model(tmp_path, dtype, tied):
    """By its own reading of GGUF, without ours; from bf16 and fp16 nothing is rounded."""
    from transformers import AutoModelForCausalLM

    folder = write_llama(tmp_path / "m", byte_tokenizer("gpt-2"), dtype, tied=tied)
    size = write_gguf(folder, "m.gguf")
    assert size == (folder / "m.gguf").stat().st_size
    ids = list(range(0, 440, 7))
    own = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
    assert torch.equal(own, logits(read, ids))
    assert torch.equal(own, logits(load_gguf_model(folder / "m.gguf"), ids))
    assert not torch.equal(own, own[:, :1].expand_as(own))
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "m.gguf").tensors}
    matrices = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {k for n, k in stored.items() if "norm" in n} == {"F32"}
    assert {k for n, k in stored.items() if "norm" not in n} == {matrices}
    assert sorted(p.name for p in folder.glob(".*")) == []  # nothing unfinished


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("splitter", SPLITTERS)
def test_the_tokenizer_is_the_same(tmp_path, splitter, bos):
    from transformers import AutoTokenizer

    folder = write_llama(tmp_path / "m", byte_tokenizer(splitter, bos=bos))
    write_gguf(folder, "m.gguf")
    own, read = AutoTokenizer.from_pretrained(folder), load_gguf_tokenizer(folder / "m.gguf")
    said = [{"role": "user", "content": "Add  25\n\n1."}, {"role": "assistant", "content": "ok"}]
    assert own.apply_chat_template(said) == read.apply_chat_template(said)
    assert (own.eos_token_id, own.bos_token_id) == (read.eos_token_id, read.bos_token_id)
    assert own("a<think>b<end>")["input_ids"] == read("a<think>b<end>")["input_ids"]

    @settings(max_examples=200)
    @given(st.text(max_size=40) | st.text("a1 \n'sé.", max_size=30))
    def same(text: str) -> None:
        assert own(text)["input_ids"] == read(text)["input_ids"]

    same()


def test_each_rule_splits_by_hand():
    """GPT-2 gives the last of several spaces to the word; SmolLM takes digits apart before."""
    text, cut = "\n\n12  34 a1", {}
    for name in SPLITTERS:
        rules = byte_tokenizer(name).backend_tokenizer.pre_tokenizer
        cut[name] = [
            part.replace("Ġ", " ").replace("Ċ", "\n") for part, _ in rules.pre_tokenize_str(text)
        ]
    assert cut["gpt-2"] == ["\n", "\n", "12", " ", " 34", " a", "1"]
    assert cut["smollm"] == ["\n\n", "1", "2", "  ", "3", "4", " a", "1"]
    assert cut["llama-bpe"] == ["\n\n", "12", " ", " ", "34", " a", "1"]


def test_a_tokenizer_without_a_name_is_none_of_them(tmp_path):
    parts = json.loads(byte_tokenizer("smollm").backend_tokenizer.to_str())
    assert splitter_of(parts) == "smollm"
    swapped = parts["pre_tokenizer"] | {
        "pretokenizers": parts["pre_tokenizer"]["pretokenizers"][::-1]
    }
    for change in (
        {"pre_tokenizer": swapped},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFC"}},
        {"model": parts["model"] | {"ignore_merges": True}},
        {"model": parts["model"] | {"byte_fallback": True}},
        {"model": parts["model"] | {"type": "WordLevel"}},
    ):
        assert splitter_of(parts | change) is None, change


REFUSED = {
    "biases": ({"attention_bias": True}, "it has biases"),
    "mlp": ({"mlp_bias": True}, "it has biases"),
    "scaled": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
        "its rotary positions are scaled",
    ),
    "activation": ({"hidden_act": "gelu"}, "its activation is not silu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_not_covered_is_refused_with_the_converters_command(tmp_path, case):
    changes, problem = REFUSED[case]
    folder = write_llama(tmp_path / "m", byte_tokenizer("gpt-2"), **changes)
    with pytest.raises(UserError, match=problem) as caught:
        check_gguf(Folder(str(folder)), Folder(str(folder)))
    assert "`python convert_hf_to_gguf.py FOLDER --outfile NAME.gguf`" in str(caught.value)


def test_other_architectures_tokenizers_and_places_are_refused(zoo, tmp_path):
    for model, problem in (
        (zoo / "sources" / "qwen3-bpe", "Qwen3ForCausalLM is not covered, only LlamaForCausalLM"),
        (zoo / "target", "its tokenizer splits text by other rules"),
    ):
        with pytest.raises(UserError, match=problem):
            check_gguf(Folder(str(model)), Folder(str(tmp_path)))
    folder = Folder(str(write_llama(tmp_path / "m", byte_tokenizer("gpt-2"))))
    check_gguf(folder, folder)
    with pytest.raises(UserError, match="give --to a folder on this machine"):
        check_gguf(folder, Folder("s3://bucket/place"))


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="--gguf: needs the package gguf: pip install gguf"):
        check_gguf(Folder(str(tmp_path)), Folder(str(tmp_path)))


def unordered(name: str, tensor: torch.Tensor, _: Any) -> torch.Tensor:
    return tensor


def with_other_merges(writer: Any, model: Path, size: int) -> None:
    copy = shutil.copytree(model, model.parent / "copy", dirs_exist_ok=True)
    parts = json.loads((copy / "tokenizer.json").read_text())
    parts["model"]["merges"] = parts["model"]["merges"][::-1]
    (copy / "tokenizer.json").write_text(json.dumps(parts))
    ADD_TOKENIZER(writer, copy, size)


def with_other_theta(writer: Any, config: Any, *rest: Any) -> None:
    config.rope_parameters["rope_theta"] = 10000.0
    ADD_CONFIG(writer, config, *rest)


ADD_TOKENIZER, ADD_CONFIG = gguf_model._add_tokenizer, gguf_model._add_config


@pytest.mark.parametrize(
    ("part", "broken", "problem"),
    [
        ("_ordered", unordered, r"model\.layers\.\d\.self_attn\.[qk]_proj\.weight"),
        ("_add_tokenizer", with_other_merges, "token ids of"),
        ("_add_config", with_other_theta, "config: rope_parameters"),
    ],
)
def test_a_file_that_reads_back_otherwise_is_not_kept(tmp_path, monkeypatch, part, broken, problem):
    """Each part of the writer in turn writes another model."""
    folder = write_llama(tmp_path / "m", byte_tokenizer("gpt-2"))
    monkeypatch.setattr(gguf_model, part, broken)
    with pytest.raises(UserError, match=problem):
        write_gguf(folder, "m.gguf")
    assert not list(folder.rglob("*.gguf"))
    assert not list(folder.glob(".gguf-*"))


def test_every_end_of_a_turn_is_in_the_file(tmp_path):
    """The template's end beside the tokenizer's own, as in Llama 3."""
    folder = write_llama(tmp_path / "m", byte_tokenizer("llama-bpe", end="<pad>"))
    write_gguf(folder, "m.gguf")
    reader = gguf.GGUFReader(folder / "m.gguf")
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 0
    assert reader.get_field("tokenizer.ggml.eot_token_id").contents() == 1
    generation = {"eos_token_id": [0, 1, 2, 3]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(UserError, match="more ends of a turn than a GGUF can name"):
        write_gguf(folder, "m.gguf")


def command(config: Config, to: Path, *more: str) -> list[str]:
    path = to.parent / "config.yaml"
    tree = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    path.write_text(yaml.safe_dump(tree))
    return ["export", str(path), "--to", str(to), *more]


def test_the_command_writes_it_beside_the_model(config, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    finish(config, write_llama(tmp_path / "trained", byte_tokenizer("smollm")))
    to = tmp_path / "my fusion"
    wanted = command(config, to, "--format", "model", "--gguf", "--dtype", "bfloat16")
    for _ in range(2):  # again into the same folder
        assert main(wanted) == 0
    file = to / "my-fusion.gguf"
    folder = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)
    assert torch.equal(logits(folder, [7, 8, 9]), logits(load_gguf_model(file), [7, 8, 9]))
    card = (to / "README.md").read_text()
    assert "`my-fusion.gguf` has the same weights and tokenizer" in card
    assert 'echo "FROM ./my-fusion.gguf" > Modelfile' in card
    assert "convert_hf_to_gguf" not in card
    capsys.readouterr()
    assert main(command(config, to, "--format", "model")) == 2  # it would be of other weights
    assert "my-fusion.gguf: delete it, or export with --gguf again" in capsys.readouterr().err


def test_the_command_refuses_before_any_work(config, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "trained")
    make_tokenizer().save_pretrained(tmp_path / "trained")
    finish(config, tmp_path / "trained")
    to = tmp_path / "to"
    capsys.readouterr()
    assert main(command(config, to, "--format", "model", "--gguf")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(command(config, to, "--gguf")) == 2
    assert "--gguf belongs to --format model" in capsys.readouterr().err
    assert not to.exists()
