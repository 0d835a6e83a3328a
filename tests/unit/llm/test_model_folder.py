"""Model folders that cannot be used are refused before any work: every file, every tensor."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from support.tiny_models import TEMPLATE, make_model, make_tokenizer, write_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

from wrpo_ray.config import Config, LoraConfig, ModelConfig, RewardConfig, SftConfig
from wrpo_ray.errors import UserError, WrpoError
from wrpo_ray.llm.architecture import (
    Use,
    balancing_loss_of,
    check_routers,
    check_tensors,
    check_weights,
)
from wrpo_ray.llm.model_folder import _check_architecture, _check_closely, check_model_folder
from wrpo_ray.llm.rendering import Template, load_tokenizer
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.serve.adapters import check_adapter
from wrpo_ray.serve.check import checked
from wrpo_ray.stages.generate.vllm_engine import VllmEngine
from wrpo_ray.stages.score.check import check_reward_folder
from wrpo_ray.stages.score.reward_models import load_classifier
from wrpo_ray.stages.train import deepspeed
from wrpo_ray.stages.train.model import Reference, _with_adapters, load
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.tensors import TensorHeader, read_tensors
from wrpo_ray.zoo.recipes import _load

Weights = dict[str, Any]
REWARD = RewardConfig(model="m")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 129208\n"
SINGLE, HEAD = "model.safetensors", "lm_head.weight"


def write_reward(folder: Path, pad: int = 0) -> Path:
    """A tiny classifier with one label."""
    config = make_model().config
    config.num_labels, config.pad_token_id = 1, pad
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Verdicts of other tests don't count."""
    monkeypatch.setenv("WRPO_CACHE", str(tmp_path_factory.mktemp("cache")))


def check(folder: Path, use: Use = Use.TRAINED, **more: Any) -> None:
    more = {"trust": "pickle"} | more
    if use.is_reward:
        part = REWARD.model_copy(update={"trust": more["trust"]})
        check_reward_folder(Folder(str(folder)), part, "reward")
    else:
        check_model_folder(Folder(str(folder)), "target", use, **more)


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# --- every tensor --------------------------------------------------------------------------------


def _in_turn(weights: Weights) -> Iterator[tuple[str, str, Weights]]:
    """Each tensor dropped, under other names, and of other shapes and types: (what, name, all)."""
    for name, tensor in weights.items():
        changes = {
            "dropped": {},
            "wrapped": {f"_orig_mod.{name}": tensor},
            "longer": {name: torch.cat([tensor, tensor])},
            "of a module": {f"module.{name}": tensor},
            "renamed": {f"{name}_": tensor},
            "moved": {f"other.{name}": tensor},
            "deeper": {name: tensor[None]},
            "integers": {name: tensor.to(torch.int8)},
        }
        others = {n: t for n, t in weights.items() if n != name}
        for what, change in changes.items():
            yield what, name, others | change


MODELS: dict[str, tuple[Callable[[Path], Path], Use]] = {
    "target": (write_model, Use.TRAINED),
    "tied target": (lambda folder: write_model(folder, tied=True), Use.TRAINED),
    "source": (write_model, Use.ANSWERS),
    "reward": (write_reward, Use.REWARD),
}


FEW = ("dropped", "wrapped", "longer")


@pytest.mark.parametrize("kind", MODELS)
def test_each_tensor_that_is_not_the_models_is_told_before_work_and_by_every_load(kind, tmp_path):
    write, use = MODELS[kind]
    folder = write(tmp_path)
    check(folder, use)
    check_weights(folder, use)
    weights, cases = load_file(folder / SINGLE), 0
    for what, name, changed in _in_turn(weights):
        if kind != "target" and what not in FEW:
            continue
        save_file(changed, folder / SINGLE, {"format": "pt"})
        for look in (check, check_weights) if what in FEW else (check_weights,):
            with pytest.raises(UserError) as told:
                look(folder, use)
            assert name in one_line(told.value), (what, name)
            assert str(folder) in str(told.value)
            cases += 1
    tensors = 20 if kind == "tied target" else 21
    assert (len(weights), cases) == (tensors, tensors * (11 if kind == "target" else 6))


SFT = SftConfig(lora=LoraConfig(rank=2))
LOADS: dict[str, Callable[[Path], Any]] = {
    "trainer": lambda folder: load(folder, torch.float32, packing=True),
    "reference": lambda folder: Reference(folder, SftConfig(), on_gpu=False),
    "merge of adapters": lambda folder: _with_adapters(folder, SFT, {}),
    "vLLM": lambda folder: VllmEngine(ModelConfig(name="m", model=str(folder)), folder, 0),
    "zoo": _load,
}


@pytest.mark.parametrize("where", LOADS)
def test_no_load_makes_up_a_tensor(where, tmp_path):
    """Three of the tensors: at the start, in a layer, at the end."""
    folder = write_model(tmp_path)
    weights = load_file(folder / SINGLE)
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
    ):
        others = {n: t for n, t in weights.items() if n != name}
        save_file(others, folder / SINGLE, {"format": "pt"})
        with pytest.raises(UserError, match=f"LlamaForCausalLM: {name} is missing"):
            LOADS[where](folder)


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_loading_makes_up_no_tensor_either(alone, tied, tmp_path, monkeypatch):
    """ZeRO-3 has code of its own to load, which tells less."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = SftConfig(zero_stage=3)
    folder = write_model(tmp_path, tied=tied)
    deepspeed.prepare(config)
    with deepspeed.partitioned_loading(deepspeed.engine_config(config, 1)):
        load(folder, torch.float32, packing=True)
        weights = load_file(folder / SINGLE)
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            others = {n: t for n, t in weights.items() if n != name}
            save_file(others, folder / SINGLE, {"format": "pt"})
            with pytest.raises(UserError, match=f"LlamaForCausalLM: .*{name} is missing"):
                load(folder, torch.float32, packing=True)


def test_old_pickles_have_no_header_and_are_told_when_they_are_loaded(tmp_path):
    for write, loads in (
        (write_model, LOADS["trainer"]),
        (write_reward, lambda folder: load_classifier(REWARD, folder, on_gpu=False)),
    ):
        folder = write(tmp_path / write.__name__)
        weights = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        assert read_tensors(Folder(str(folder))) is None
        loads(folder)
        weights.pop("model.layers.1.mlp.up_proj.weight")
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
            loads(folder)


def test_what_old_versions_wrote_and_a_head_too_many_are_no_harm(tmp_path):
    """Rotary frequencies; the head of a tied model; the language model's head in a classifier."""
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    for name, write, use in (
        ("tied", lambda folder: write_model(folder, tied=True), Use.TRAINED),
        ("reward", write_reward, Use.REWARD),
    ):
        folder = write(tmp_path / name)
        weights = load_file(folder / SINGLE)
        head = {HEAD: weights["model.embed_tokens.weight"].clone()}
        save_file(weights | inverse | head, folder / SINGLE, {"format": "pt"})
        check(folder, use)
    load(tmp_path / "tied", torch.float32, packing=True)
    load_classifier(REWARD, tmp_path / "reward", on_gpu=False)


@pytest.mark.parametrize(
    ("family", "masks"),
    [
        ("gpt2", ("attn.bias", "attn.masked_bias")),
        ("gptj", ("attn.bias", "attn.masked_bias")),
        ("gpt_neo", ("attn.attention.bias", "attn.attention.masked_bias")),
        ("codegen", ("attn.causal_mask", "attn.bias", "attn.masked_bias")),
    ],
)
def test_causal_masks_of_old_versions_are_no_harm(family, masks, tmp_path):
    folder = write_model(tmp_path)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}
    if family == "gpt_neo":
        shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
        shape |= {"attention_types": [[["global", "local"], 1]]}
    config = AutoConfig.for_model(
        family, vocab_size=46, bos_token_id=1, eos_token_id=1, pad_token_id=0, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    weights = load_file(folder / SINGLE)
    old = {f"transformer.h.{i}.{name}": torch.ones(1, 1, 8, 8) for i in (0, 1) for name in masks}
    save_file(weights | old, folder / SINGLE, {"format": "pt"})
    check(folder)
    save_file(weights | {"transformer.h.0.mlp.bias": torch.ones(8)}, folder / SINGLE)
    with pytest.raises(UserError, match=r"transformer.h.0.mlp.bias is unknown"):
        check(folder)


def test_a_head_that_is_tied_and_is_not_is_refused(tmp_path):
    """transformers would take both, vLLM the embeddings alone."""
    folder = write_model(tmp_path, tied=True)
    weights = load_file(folder / SINGLE)
    head = {HEAD: weights["model.embed_tokens.weight"] + 1}
    save_file(weights | head, folder / SINGLE, {"format": "pt"})
    told = "two different tensors, although .* tie_word_embeddings"
    with pytest.raises(UserError, match=told):
        load(folder, torch.float32, packing=True)
    same = weights["model.embed_tokens.weight"].clone()
    last = same.clone()
    last[-1, -1] += 1
    for other in (head[HEAD], last, same):
        save_file(weights | {HEAD: other}, folder / SINGLE, {"format": "pt"})
        for use in (Use.TRAINED, Use.ANSWERS):
            for look in (check, check_weights):
                if other is same:
                    look(folder, use)
                    continue
                with pytest.raises(UserError, match=told):
                    look(folder, use)


def test_a_layer_too_many_or_another_architecture_is_told(tmp_path):
    for number, (change, told) in enumerate(
        [
            ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is unknown"),
            ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
            ({"attention_bias": True}, "q_proj.bias is missing"),
            ({"tie_word_embeddings": True, "vocab_size": 47}, r"has shape \(46, 32\), not \(47"),
            ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "_norm.weight is mis"),
            ({"hidden_size": "wide"}, "config.json cannot be read"),
            ({"num_attention_heads": 0}, "config.json (makes no model|cannot be read)"),
            ({"pad_token_id": 99}, "config.json makes no model"),
            ({"model_type": "unheard"}, "'unheard', which transformers cannot load"),
            ({"model_type": "bert"}, "no language model|config.json cannot|makes no|not those of"),
            ({"architectures": ["LlamaForSequenceClassification"]}, "gives no answers; give a cau"),
            ({"architectures": None}, "names no architecture"),
        ]
    ):
        folder = write_model(tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=told) as error:
            check(folder)
        one_line(error.value)


@pytest.mark.parametrize("use", [Use.ANSWERS, Use.TRAINED, Use.REWARD])
def test_each_value_of_the_config_may_be_of_another_type(use, tmp_path):
    """Refused in one line, or read as transformers reads it; nothing else is raised."""
    folder = (write_reward if use.is_reward else write_model)(tmp_path)
    config, refused = json.loads((folder / "config.json").read_text()), 0
    for name in [*config, "text_config", "quantization_config", "auto_map", "num_labels"]:
        for value in ("x", [1], None):
            (folder / "config.json").write_text(json.dumps(config | {name: value}))
            told = _told(folder, use)
            assert told is None or str(folder) in told
            refused += told is not None
    assert refused > 25


def _told(folder: Path, use: Use) -> str | None:
    try:
        check(folder, use)
    except UserError as error:
        return one_line(error)
    return None


def test_an_architecture_that_only_vllm_knows_is_let_pass_as_a_source(tmp_path):
    folder = write_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    other = {"model_type": "unheard", "architectures": ["UnheardForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | other))
    check(folder, Use.ANSWERS)
    weights = load_file(folder / SINGLE)
    save_file({f"_orig_mod.{n}": t for n, t in weights.items()}, folder / SINGLE)
    with pytest.raises(UserError, match="as a wrapped model's"):
        check(folder, Use.ANSWERS)


FORMATS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
    "fp8": ("weight", "weight_scale_inv"),
    "bitsandbytes": ("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"),
}


def _quantized(weights: Weights, method: str) -> Weights:
    """The layers' projections as a method stores them, with shapes of its own."""
    found: Weights = {}
    for name, tensor in weights.items():
        if "_proj" not in name:
            found[name] = tensor
            continue
        module = name.removesuffix("weight")
        found |= {f"{module}{part}": torch.ones(3, 5, dtype=torch.int8) for part in FORMATS[method]}
    return found


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("use", [Use.ANSWERS, Use.REWARD])
def test_each_module_that_quantized_weights_lack_is_told(use, method, tmp_path):
    """vLLM looks for tensors that it misses only where nothing is quantized."""
    folder = (write_reward if use.is_reward else write_model)(tmp_path)
    settings = {"quantization_config": {"quant_method": method, "bits": 4}}
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    plain = load_file(folder / SINGLE)
    weights, cases = _quantized(plain, method), 0
    tensors = {name: TensorHeader(SINGLE, "I8", tuple(t.shape)) for name, t in weights.items()}
    check_tensors(folder, tensors, use)
    for name in plain:
        module = name.removesuffix("weight")
        others = {n: t for n, t in tensors.items() if not n.startswith(module)}
        with pytest.raises(UserError, match=rf"{name} is missing"):
            check_tensors(folder, others, use)
        cases += 1
    assert cases == len(plain) == 21


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        *(({"quant_method": method}, method) for method in FORMATS),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"bits": 4}, "unknown"),
        ({"quant_method": "fp8", "dequantize": True}, None),
        (None, None),
    ],
)
@pytest.mark.parametrize("is_text", [False, True])
def test_a_quantized_target_is_refused(settings, told, is_text, tmp_path):
    folder = write_model(tmp_path)
    change = {"quantization_config": settings}
    config = json.loads((folder / "config.json").read_text())
    changed = config | ({"text_config": config | change} if is_text else change)
    if told is None:
        _check_architecture(changed, Use.TRAINED)
        return
    _check_architecture(changed, Use.ANSWERS)
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"quantized \({told}\), which cannot be trained; give"):
        check(folder)


@pytest.mark.parametrize("asked", [None, False, True])
def test_a_target_that_asks_for_the_loss_of_a_router_has_one(asked, tmp_path):
    folder = write_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    change = {} if asked is None else {"output_router_logits": asked}
    (folder / "config.json").write_text(json.dumps(config | change))
    if not asked:
        check(folder)
        return
    with pytest.raises(UserError, match=r"output_router_logits: true.*LlamaForCausalLM; set it to"):
        check(folder)


def test_a_router_without_a_loss_is_refused_before_its_weights_are_there(tmp_path):
    """As on a hub."""
    folder = write_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    with pytest.raises(UserError, match="is not known for LlamaForCausalLM"):
        _check_closely(folder, Use.TRAINED, Template(), None, check_tensors)


def test_a_mixture_that_draws_its_experts_is_not_trained(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phimoe"}))
    with pytest.raises(UserError, match="at random in training"):
        check_routers(tmp_path)


def test_the_loss_of_a_router_is_the_architectures_own_in_transformers():
    """JetMoE's has a weight of another name."""
    from transformers import JetMoeConfig, JetMoeForCausalLM, MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = MixtralConfig()
    assert balancing_loss_of(MixtralForCausalLM, config) is None
    config.output_router_logits = True
    assert balancing_loss_of(MixtralForCausalLM, config) is load_balancing_loss_func
    config.router_aux_loss_coef = math.inf
    with pytest.raises(UserError, match="not known for MixtralForCausalLM"):
        balancing_loss_of(MixtralForCausalLM, config)
    other = JetMoeConfig()
    other.output_router_logits = True
    with pytest.raises(UserError, match="not known for JetMoeForCausalLM"):
        balancing_loss_of(JetMoeForCausalLM, other)


# --- every tensor of an adapter ------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Path, Path]:
    """A model, and a LoRA of two of its layers' modules."""
    from peft import LoraConfig as Lora
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    base = write_model(folder / "base")
    lora = Lora(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(make_model(), lora).save_pretrained(folder / "lora")
    return base, folder / "lora"


def test_each_tensor_of_an_adapter_is_told(adapter, tmp_path):
    base, good = Folder(str(adapter[0])), adapter[1]
    folder = Path(shutil.copytree(good, tmp_path / "lora"))
    tensors, cases = read_tensors(base), 0
    check_adapter(Folder(str(folder)), base, tensors)
    weights = load_file(folder / "adapter_model.safetensors")
    for _, name, changed in _in_turn(weights):
        if name in changed and changed[name].dtype == torch.int8:
            continue
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=f"no whole LoRA of this model: .*{name}"):
            check_adapter(Folder(str(folder)), base, tensors)
        cases += 1
    for layer in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        others = {n: t for n, t in weights.items() if layer not in n}
        save_file(others, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=rf"model.{layer}.lora_A.weight is missing"):
            check_adapter(Folder(str(folder)), base, tensors)
    assert (len(weights), cases) == (8, 56)


def test_each_file_of_an_adapter_is_told_and_another_models_adapter(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("WRPO_SERVE_KEYS", f"me {'0' * 64}")
    base, good = adapter
    folder = Path(shutil.copytree(good, tmp_path / "lora"))
    model = {"name": "m", "model": str(base), "adapters": {"tuned": str(folder)}}
    checked(_serve(base, models=[model]))
    cases = 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for state in _spoilt(folder / name, base / "tokenizer.json"):
            with pytest.raises(UserError, match="serve: tuned: ") as told:
                checked(_serve(base, models=[model]))
            assert name in one_line(told.value), state
            cases += 1
    assert cases == 22
    other = write_model(tmp_path / "other", width=64)
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight has shape \(4, 32\)"):
        checked(_serve(base, models=[model | {"model": str(other)}]))


# --- every file ----------------------------------------------------------------------------------


def _pickled(folder: Path) -> None:
    """The weights as torch.save writes them, in one file or several."""
    for file in folder.glob("model*.safetensors"):
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(file), folder / name)
        file.unlink()
    for index in folder.glob("model.safetensors.index.json"):
        text = (
            index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
        )
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def _form(folder: Path, *, sharded: bool, pickled: bool, inline: bool) -> Path:
    write_model(folder)
    if sharded:
        (folder / SINGLE).unlink()
        make_model().save_pretrained(folder, max_shard_size="40KB")
    if pickled:
        _pickled(folder)
    if inline:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": TEMPLATE})
        )
        (folder / "chat_template.jinja").unlink()
    return folder


FORMS = {
    "one file": {"sharded": False, "pickled": False, "inline": False},
    "shards": {"sharded": True, "pickled": False, "inline": True},
    "a pickle": {"sharded": False, "pickled": True, "inline": False},
    "pickled shards": {"sharded": True, "pickled": True, "inline": False},
}
HARMLESS = {("generation_config.json", "gone"), ("generation_config.json", "{}")}
"""transformers makes it from config.json."""


def _spoilt(file: Path, other: Path) -> Iterator[str]:
    """A file in each state in which it is not what it was."""
    good = file.read_bytes()
    states = {
        "empty": b"",
        "a byte short": good[:-2],
        "half": good[: len(good) // 2],
        "its start": good[:20],
        "a pointer": POINTER,
        "[]": b"[]",
        "{}": b"{}",
        "a page": b"<!DOCTYPE html><title>404</title>",
        "another file": other.read_bytes(),
        "bytes": bytes(range(256)) * 4,
    }
    for state, data in states.items():
        file.write_bytes(data)
        yield state
    file.unlink()
    yield "gone"
    file.write_bytes(good)


@pytest.mark.parametrize("form", FORMS)
def test_each_file_that_is_missing_cut_or_another_is_told(form, tmp_path):
    folder = _form(tmp_path, **FORMS[form])
    check(folder)
    files, cases = sorted(folder.iterdir()), 0
    for file, other in zip(files, [*files[1:], files[0]], strict=True):
        for state in _spoilt(file, other):
            if (file.name, state) in HARMLESS:
                check(folder)
            else:
                with pytest.raises(UserError) as told:
                    check(folder)
                assert one_line(told.value).startswith(f"target: {folder}: "), (file.name, state)
                cases += 1
    check(folder)
    weights = len(list(folder.glob("*model*.*")))  # with the index
    assert cases == 11 * (weights + 5 - FORMS[form]["inline"]) - len(HARMLESS)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"cache_implementation": "other"}, "cache_implementation"),
        ({"early_stopping": 5}, "early_stopping"),
        ({"watermarking_config": {"other": 1}}, "other"),
        ({"compile_config": {}}, "compile_config"),
        ({"temperature": 0.5}, "temperature"),
        ({"temperature": 0.5, "do_sample": True}, None),
        ({"top_k": 20, "top_p": 0.9, "do_sample": True, "num_return_sequences": 2}, None),
    ],
)
def test_a_generation_config_that_cannot_be_loaded_or_saved_is_told(settings, told, tmp_path):
    """Saving is stricter where an end of turn is added, as here."""
    folder = write_model(tmp_path)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 2} | settings))
    if told is None:
        check(folder)
        return
    with pytest.raises(UserError, match=f": generation_config.json: .*{told}.*; mend it") as error:
        check(folder)
    one_line(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_each_json_file_is_utf_8_without_a_byte_order_mark(encoding, tmp_path):
    folder = _form(tmp_path, **FORMS["shards"])
    for file in sorted(folder.glob("*.json")):
        good = file.read_bytes()
        tree = {"other": "\xe9"} | json.loads(good)
        file.write_bytes(json.dumps(tree, ensure_ascii=False).encode(encoding, "replace"))
        with pytest.raises(UserError, match=f": {file.name}: no JSON in UTF-8 without a byte-or"):
            check(folder)
        file.write_bytes(good)
    check(folder)


def test_shards_in_each_others_place_and_two_forms_at_once_are_told(tmp_path):
    folder = _form(tmp_path, **FORMS["shards"])
    one, two, *_ = sorted(folder.glob("*-of-*"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second), two.write_bytes(first)
    with pytest.raises(UserError, match=f"{one.name}: has no .* its index says is there"):
        check(folder)
    one.write_bytes(first), two.write_bytes(second)
    save_file({"x": torch.ones(1)}, folder / SINGLE)
    with pytest.raises(UserError, match=r"both model.safetensors and model.safetensors.index.json"):
        check(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        UserError, match=f"{one.name} lies beside model.safetensors, and vLLM reads"
    ):
        check(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index"):
        check(folder)


def test_an_adapter_within_the_folder_is_refused(tmp_path):
    folder = write_model(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="which transformers would load too"):
        check(folder)


def test_a_state_dict_as_a_model_gives_it_is_read(tmp_path):
    """With its metadata, in several types, and tied tensors that share their bytes."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        folder = write_model(tmp_path / str(dtype), tied=True)
        (folder / SINGLE).unlink()
        torch.save(make_model(tied=True).to(dtype).state_dict(), folder / "pytorch_model.bin")
        check(folder)
    others = {"none": {}, "nested": {"model": make_model().state_dict()}, "number": {"x": 1}}
    for name, state in others.items():
        folder = write_model(tmp_path / name)
        (folder / SINGLE).unlink()
        torch.save(state, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pytorch_model.bin: (cut off|holds no tensors)"):
            check(folder)


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = write_model(tmp_path / "model")
    (folder / SINGLE).unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors"):
        check(folder)
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickled weights"):
        check(folder, trust=None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_are_for_those_who_ask_for_them(sharded, tmp_path):
    folder = _form(tmp_path, sharded=sharded, pickled=True, inline=False)
    for use in (Use.TRAINED, Use.ANSWERS):
        with pytest.raises(UserError, match=r"pytorch_model.*: pickled .* set `trust: pickle`"):
            check(folder, use, trust=None)
        check(folder, use, trust="pickle")
    reward = write_reward(tmp_path / "reward")
    _pickled(reward)
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickled weights"):
        check(reward, Use.REWARD, trust=None)
    check(reward, Use.REWARD, trust="pickle")


CODE = """
from pathlib import Path
Path({ran!r}).touch()
from transformers import {base}, LlamaConfig, PreTrainedTokenizerFast
class Own({base}):
    model_type = "llama"
"""


@pytest.mark.parametrize("kind", ["llama", "own_kind"])
def test_code_in_a_folder_never_runs(kind, tmp_path, monkeypatch):
    """Nobody is asked at the terminal whether it may, either."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, ran = write_model(tmp_path / "model"), tmp_path / "ran"
    parts = {
        "AutoConfig": "LlamaConfig",
        "AutoModelForCausalLM": "LlamaForCausalLM",
        "AutoTokenizer": "PreTrainedTokenizerFast",
    }
    for part, base in parts.items():
        (folder / f"{part.lower()}.py").write_text(CODE.format(ran=str(ran), base=base))
    own = {part: f"{part.lower()}.Own" for part in parts}
    for name, auto in (
        ("config.json", own),
        ("tokenizer_config.json", {"AutoTokenizer": [None, own["AutoTokenizer"]]}),
    ):
        tree = json.loads((folder / name).read_text())
        tree |= {"auto_map": auto} | ({"model_type": kind} if name == "config.json" else {})
        (folder / name).write_text(json.dumps(tree))
    for use in (Use.TRAINED, Use.ANSWERS, Use.REWARD):
        with contextlib.suppress(UserError):
            check(folder, use)
    from vllm.engine.arg_utils import EngineArgs

    loaders = {name: loads for name, loads in LOADS.items() if name not in ("vLLM", "zoo")}
    loaders |= {"vLLM": lambda folder: EngineArgs(model=str(folder)).create_model_config()}
    loaders |= {"tokenizer": load_tokenizer}
    for loads in loaders.values():
        with contextlib.suppress(WrpoError, ValueError):
            loads(folder)
    assert not ran.exists()


def test_a_config_cannot_ask_for_code_of_a_folder():
    with pytest.raises(ValidationError, match="code in a model's folder never runs"):
        ModelConfig(name="a", model="m", engine={"trust_remote_code": True})


def test_in_an_object_store_files_are_checked_too(bucket, tmp_path):
    _form(tmp_path, **FORMS["shards"])
    folder = Folder(bucket) / "shards"
    folder.upload(tmp_path)
    check_model_folder(folder, "target", Use.TRAINED)
    for name in ("model-00002-of-00004.safetensors", "tokenizer.json", "config.json"):
        good = folder.read(name)
        folder.write(name, good[:-9])
        with pytest.raises(UserError, match=f"{folder}: {name}: (cut off|no JSON)"):
            check_model_folder(folder, "target", Use.TRAINED)
        folder.delete(name)
        with pytest.raises(UserError, match="missing|tokenizer cannot be loaded|no config.json"):
            check_model_folder(folder, "target", Use.TRAINED)
        folder.write(name, good)
    check_model_folder(folder, "target", Use.TRAINED)


def test_of_large_weights_the_header_is_read(tmp_path):
    """40 GB that a file says it has, and has as a hole."""
    entry = {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}
    header = json.dumps({"x": entry}).encode()
    file = tmp_path / SINGLE
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + 4 * 10**10)
    before = _bytes_read()
    assert read_tensors(Folder(str(tmp_path)))["x"].shape == (10**10,)
    assert _bytes_read() - before < 100_000


def _bytes_read() -> int:
    """What this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


# --- templates and tokenizers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}", "fails on two turns"),
        ("{{ messages[0].content }", "fails on two turns"),
        ("{{ nothing.at.all }}", "fails on two turns"),
        ("", "leaves out the user's text 'ALPHA'"),
        (TEMPLATE.replace("{{ m['content'] }}", "x"), "leaves out the user's text 'ALPHA'"),
        (TEMPLATE.replace("in messages", "in messages[-1:]"), "leaves out the user's text 'ALPHA'"),
        (TEMPLATE.replace("in messages", "in messages if m.role == 'user'"), "assistant's text"),
        ("{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}", "one turn"),
        (TEMPLATE.replace("<end>", ""), "no special token closes an answer"),
        (f"{TEMPLATE}{{{{ messages | length }}}}", "the prompt has"),
        (b"\xff\xfe\x00", "save it as UTF-8"),
        (POINTER, "a git-lfs pointer"),
        (None, "no such chat template file"),
    ],
)
def test_each_template_is_tried_on_two_turns(template, told, tmp_path):
    """The folder's own, and a file that replaces it."""
    folder, file = write_model(tmp_path / "model"), tmp_path / "other.jinja"
    data = template.encode() if isinstance(template, str) else template
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(UserError, match=told) as error:
        check(folder, template=Template(str(file)))
    one_line(error.value)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_bytes(data)
        with pytest.raises(UserError, match=told if template else "has no chat template|ALPHA"):
            check(folder)


def _more_tokens(folder: Path, count: int, *, special: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(count)], special_tokens=special)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("use", [Use.ANSWERS, Use.TRAINED, Use.REWARD])
def test_ids_beyond_the_embedding_are_told(use, tmp_path):
    """Special tokens that no text and no template writes are let be, as Gemma 3 has one."""
    folder = (write_reward if use.is_reward else write_model)(tmp_path)
    _more_tokens(folder, 2, special=True)
    check(folder, use)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<user>", "more1<user>"))
    with pytest.raises(UserError, match="ids up to 47, its embedding only 46 rows"):
        check(folder, use)
    _more_tokens(folder, 1, special=False)
    with pytest.raises(UserError, match="ids up to 46, its embedding only 46 rows"):
        check(folder, use)


@pytest.mark.parametrize("end", ["<end>", 1.5, [1, "<end>"], [46], -1])
def test_ends_of_turns_are_ids_of_the_embedding(end, tmp_path):
    folder = write_model(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(UserError, match="eos_token_id|ids up to 46"):
        check(folder)


# --- every section -------------------------------------------------------------------------------


def _config(tmp_path: Path, **changes: Any) -> Config:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1"}\n')
    good = str(tmp_path / "good")
    return Config.model_validate(
        {
            "output": str(tmp_path / "out"),
            "prompts": {"path": str(prompts)},
            "sources": [{"name": "a", "model": good}],
            "target": {"name": "t", "model": good},
            "reward": {"model": str(tmp_path / "reward")},
        }
        | changes
    )


def _serve(tmp_path: Path, **changes: Any) -> Any:
    from wrpo_ray.config import ServeConfig

    good = str(tmp_path / "good")
    return ServeConfig.model_validate({"models": [{"name": "m", "model": good}]} | changes)


def test_each_section_that_names_a_model_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("WRPO_SERVE_KEYS", f"me {'0' * 64}")
    write_model(tmp_path / "good")
    write_reward(tmp_path / "reward")
    write_reward(tmp_path / "bad reward")
    write_model(tmp_path / "bad")
    for name in ("bad", "bad reward"):
        weights = load_file(tmp_path / name / SINGLE)
        weights.pop("model.norm.weight")
        save_file(weights, tmp_path / name / SINGLE)
    bad, bad_reward = str(tmp_path / "bad"), str(tmp_path / "bad reward")
    part = {"model": bad_reward, "weight": 1.0}
    asked = {"prompts": {"path": str(tmp_path / "prompts.jsonl")}}
    sections = {
        "sources.b": {"sources": [{"name": "b", "model": bad}]},
        "target": {"target": {"name": "t", "model": bad}},
        "reward": {"reward": {"model": bad_reward}},
        "reward.mixture.0": {"reward": {"mixture": [part]}},
        "evaluate.models.c": {"evaluate": asked | {"models": [{"name": "c", "model": bad}]}},
        "evaluate.judge": {"evaluate": asked | {"judge": {"name": "j", "model": bad}}},
    }
    preflight(_config(tmp_path))
    for key, change in sections.items():
        with pytest.raises(UserError, match=rf"{key}: .*: model.norm.weight is missing"):
            preflight(_config(tmp_path, **change))
    served = {
        "serve: m": {"models": [{"name": "m", "model": bad}]},
        "serve: reward": {"reward": {"model": bad_reward}},
    }
    checked(_serve(tmp_path))
    for key, change in served.items():
        with pytest.raises(UserError, match=rf"{key}: .*: model.norm.weight is missing"):
            checked(_serve(tmp_path, **change))


def test_the_marker_of_a_checked_folder_depends_on_our_code(tmp_path, monkeypatch):
    from wrpo_ray.llm import model_folder

    copy = tmp_path / "wrpo_ray"
    shutil.copytree(Path(model_folder.__file__).parents[1], copy)
    monkeypatch.setattr(model_folder, "__file__", str(copy / "llm" / "model_folder.py"))
    digests = {model_folder._own_code.__wrapped__()}
    for file in ("llm/chat.py", "stages/score/reward_models.py"):
        (copy / file).write_text((copy / file).read_text() + "\n# changed\n")
        digests.add(model_folder._own_code.__wrapped__())
    assert len(digests) == 3


def test_what_passed_passes_at_once_until_a_file_changes(tmp_path, monkeypatch):
    """Without importing anything that takes seconds."""
    from wrpo_ray.llm import model_folder

    folder = write_model(tmp_path / "model")
    tries: list[Path] = []
    closely = model_folder._check_closely
    monkeypatch.setattr(
        model_folder, "_check_closely", lambda *a: (tries.append(a[0]), closely(*a))
    )
    for use, count in [(Use.ANSWERS, 1), (Use.ANSWERS, 1), (Use.TRAINED, 2), (Use.TRAINED, 2)]:
        check(folder, use)
        assert len(tries) == count
    shutil.copytree(folder, tmp_path / "copy")
    check(tmp_path / "copy")
    assert len(tries) == 2
    for number, file in enumerate(["config.json", "tokenizer.json", "chat_template.jinja"]):
        change = "{# #}" if file.endswith("jinja") else " "
        (folder / file).write_text((folder / file).read_text() + change)
        check(folder)
        assert len(tries) == 3 + number
