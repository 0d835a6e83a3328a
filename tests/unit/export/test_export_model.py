"""The fused model as a folder: transformers loads it, its card has licences and results."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.tiny_models import make_model, make_tokenizer

from wrpo_ray.cli.entry import main
from wrpo_ray.config import Config, LoraConfig
from wrpo_ray.errors import UserError
from wrpo_ray.export.card_parts import CardFacts, CardModel
from wrpo_ray.export.fused_model import export_model
from wrpo_ray.export.model_card import licence_notes
from wrpo_ray.export.model_files import copy
from wrpo_ray.export.weights import Weights
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.stages.train import model as train_model
from wrpo_ray.storage.folder import Folder

CHAT = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A trained model as the trainer writes it."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path) -> Config:
    """Two sources and a target under three licences, as folders that nothing loads."""
    models = [{"name": name, "model": str(tmp_path / name)} for name in ("a", "b", "t")]
    models[0]["license"], models[2]["license"] = "gemma", "llama3.1"
    for model in models:
        (tmp_path / model["name"]).mkdir()
        (tmp_path / model["name"] / "config.json").write_text('{"x": 1}')
    for name in ("p", "e"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}))
    return Config(
        output=str(tmp_path / "out"),
        prompts={"path": str(tmp_path / "p.jsonl")},
        sources=models[:2],
        target=models[2],
        reward={"function": "wrpo_ray.zoo.skills:verify"},
        evaluate={"prompts": {"path": str(tmp_path / "e.jsonl")}},
    )


def finish(config: Config, weights: Path) -> None:
    """As if all were done, with `weights` as the result."""
    chain = Chain(config)
    for step in (step for stage in chain.build() for step in stage.steps):
        step.finish(chain.root, {"rows": 1234}, time.time())
        if step.name == "wrpo":
            (chain.root / step.folder / "model").upload(weights)
        if step.name == "evaluate":
            estimate = {"mean": 0.75, "low": 0.7, "high": 0.8, "n": 400}
            table = {"models": {"fused": {"all": estimate}}, "contrasts": {"fused - t": estimate}}
            (chain.root / step.folder).write_json("table.json", {"groups": [], "reward": table})


def test_what_is_exported_is_loaded_and_chats(config, weights, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    finish(config, weights)
    to = tmp_path / "up" / "my-fusion"
    assert export_model(config, str(to)) == (weights / "model.safetensors").stat().st_size
    tokenizer = AutoTokenizer.from_pretrained(to)
    said = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(to)
    assert GenerationConfig.from_pretrained(to).eos_token_id == 1
    assert model(model.dummy_inputs["input_ids"] % 40).logits.shape[-1] == len(tokenizer)
    assert said == "<user>w1 w2<end><assistant>"
    assert str(tmp_path) not in (to / "config.json").read_text()
    assert export_model(config, str(to)) > 0  # again into the same folder


def test_the_card(config, weights, tmp_path):
    finish(config, weights)
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(config.model_dump(mode="json", by_alias=True, exclude_unset=True))
    )
    to = tmp_path / "my-fusion"
    assert main(["export", str(path), "--to", str(to), "--format", "model"]) == 0
    text = (to / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "other"
    assert front["pipeline_tag"] == "text-generation"
    result = front["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 0.75
    assert "| source | a | a |" in text
    assert "| gemma |" in text
    assert "**Warning: these licences differ.**" in text
    assert "Licence gemma (a) counts models trained on its answers" in text
    assert "Licence unknown (b) says nothing" in text
    assert "| fused | 0.75 | 0.70 to 0.80 | 400 |" in text
    assert "convert_hf_to_gguf.py" in text
    assert "vllm serve" in text
    assert str(tmp_path) not in text  # no path of this machine


def test_no_warning_where_all_have_one_licence():
    models = [CardModel(role, role, "m", "", "apache-2.0") for role in ("source", "target")]
    assert (
        list(
            licence_notes(
                CardFacts([*models, CardModel("reward", "r", "m", "", None)], {}, [], [], {})
            )
        )
        == []
    )


def test_templates_beside_the_main_one_are_exported(tmp_path):
    """As a tokenizer with several has them; what another model left there is none of them."""
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    named = {"default": tokenizer.chat_template, "tool_use": "tools", "rag": "documents"}
    tokenizer.chat_template = named
    model, to = tmp_path / "model", tmp_path / "to"
    make_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    for _ in range(2):  # again into the same folder
        copy(Folder(str(model)), Folder(str(to)), Weights())
        assert AutoTokenizer.from_pretrained(to).chat_template == named
        assert {p.name for p in to.rglob("*")} == {p.name for p in model.rglob("*")}
    (model / "additional_chat_templates" / "rag.jinja").unlink()
    with pytest.raises(UserError, match="holds other chat templates, such as .*rag.jinja; give a"):
        copy(Folder(str(model)), Folder(str(to)), Weights())


def test_what_lacks_is_told(config, weights, tmp_path):
    with pytest.raises(UserError, match="the fused model is not there yet; run `wrpo train` first"):
        export_model(config, str(tmp_path / "to"))
    bare = tmp_path / "bare"
    make_model().save_pretrained(bare)
    with pytest.raises(UserError, match="lacks a tokenizer, a chat template"):
        copy(Folder(str(bare)), Folder(str(tmp_path / "to")), Weights())
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="holds other weights, such as model-00001"):
        copy(Folder(str(weights)), Folder(str(tmp_path / "to")), Weights())


# --- precision and adapters -----------------------------------------------------------------------


def put_target(config: Config, dtype: str) -> Any:
    """A real target in the config's folder; returns it, as the model that training began with."""
    network = make_model(seed=3)
    network.to(getattr(torch, dtype)).save_pretrained(config.target.model)
    make_tokenizer().save_pretrained(config.target.model)
    return network


def train_a_little(network: Any, size: float) -> Any:
    """The network in fp32 with every weight changed by up to `size` of itself."""
    network = network.float()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + size * (2 * torch.rand_like(parameter) - 1))
    return network


def put_trained(config: Config, network: Any, tmp_path: Path, **shards: Any) -> Path:
    """A finished run with that network as its result."""
    folder = tmp_path / "trained"
    network.save_pretrained(folder, **shards)
    make_tokenizer().save_pretrained(folder)
    finish(config, folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one", "sharded"])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
@pytest.mark.parametrize("own", ["float32", "bfloat16"])
def test_the_precision_is_the_targets_or_what_is_asked_for(
    config, tmp_path, capsys, own, target, asked, shards
):
    from transformers import AutoModelForCausalLM

    start = put_target(config, target)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    network = train_a_little(start, 1e-2).to(getattr(torch, own))
    folder = put_trained(config, network, tmp_path, **shards)
    to, wanted = tmp_path / "to", target if asked == "auto" else asked
    size = export_model(config, str(to), asked)
    found = stored(to)
    for name, value in stored(folder).items():
        assert torch.equal(found[name], value.to(getattr(torch, wanted))), name
    assert size == sum((to / f).stat().st_size for f in to.glob("*.safetensors"))
    assert json.loads((to / "config.json").read_text())["dtype"] == wanted
    assert AutoModelForCausalLM.from_pretrained(to).dtype == getattr(torch, wanted)
    if (index := to / "model.safetensors.index.json").exists():
        total = json.loads(index.read_text())["metadata"]["total_size"]
        assert total == sum(tensor.nbytes for tensor in found.values())
    card, out = (to / "README.md").read_text(), capsys.readouterr()
    assert f"The weights are in {wanted}." in card
    assert any((value != before[name]).any() for name, value in network.state_dict().items())
    is_rounded = wanted not in (own, "float32")
    assert ("of the weights that changed" in card) == is_rounded
    assert ("of the weights that changed" in out.out + out.err) == is_rounded
    assert "not known" not in card


@pytest.mark.parametrize(("size", "low", "high"), [(1e-5, 0.99, 1), (5e-3, 0.4, 0.9), (1, 0, 0.1)])
def test_the_share_that_is_rounded_away_is_told(config, tmp_path, size, low, high):
    """Counted here on its own."""
    start = put_target(config, "bfloat16")
    before = {name: value.clone() for name, value in start.state_dict().items()}
    network = train_a_little(start, size)
    put_trained(config, network, tmp_path)
    changed = lost = 0
    for name, value in network.state_dict().items():
        is_changed = value != before[name].float()
        changed += int(is_changed.sum())
        lost += int((is_changed & (value.bfloat16() == before[name])).sum())
    assert low <= lost / changed <= high
    export_model(config, str(tmp_path / "to"))
    card = (tmp_path / "to" / "README.md").read_text()
    assert f"Of the training, {lost / changed:.1%} of the weights that changed" in card


def test_a_tensor_that_the_target_has_in_fp32_stays_so(config, tmp_path):
    start = put_target(config, "bfloat16")
    name = "model.norm.weight"
    path = Path(config.target.model) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].float()}, path, metadata={"format": "pt"})
    put_trained(config, train_a_little(start, 1e-3), tmp_path)
    export_model(config, str(tmp_path / "to"))
    found = {n: t.dtype for n, t in stored(tmp_path / "to").items()}
    assert {n for n, dtype in found.items() if dtype == torch.float32} == {name}
    export_model(config, str(tmp_path / "all"), "bfloat16")
    assert {t.dtype for t in stored(tmp_path / "all").values()} == {torch.bfloat16}


@pytest.mark.parametrize("stated", [{}, {"torch_dtype": "bfloat16"}, {"dtype": "strange"}])
def test_the_targets_precision_is_found_however_its_config_states_it(config, tmp_path, stated):
    """As older versions of transformers do, or not at all: then it is that of its weights."""
    network = train_a_little(put_target(config, "bfloat16"), 1e-3)
    file = Path(config.target.model) / "config.json"
    settings = json.loads(file.read_text())
    del settings["dtype"]
    file.write_text(json.dumps(settings | stated))
    put_trained(config, network, tmp_path)
    export_model(config, str(tmp_path / "to"))
    assert {t.dtype for t in stored(tmp_path / "to").values()} == {torch.bfloat16}


def test_of_what_did_not_change_nothing_is_lost(config, tmp_path):
    put_trained(config, put_target(config, "bfloat16").float(), tmp_path)
    export_model(config, str(tmp_path / "to"))
    assert "Of the training" not in (tmp_path / "to" / "README.md").read_text()


def test_an_unknown_loss_is_told_as_that(config, tmp_path, capsys):
    put_trained(config, train_a_little(make_model(), 1e-3), tmp_path)
    export_model(config, str(tmp_path / "to"), "bfloat16")
    assert "the share lost by rounding is unknown" in (tmp_path / "to" / "README.md").read_text()


def test_a_weight_too_large_for_float16_is_refused(config, tmp_path):
    network = make_model()
    network.model.norm.weight.data[0] = 1e6
    put_trained(config, network, tmp_path)
    with pytest.raises(UserError, match="float16: a weight of model.norm.weight is too large"):
        export_model(config, str(tmp_path / "to"), "float16")


def put_lora(config: Config, tmp_path: Path) -> tuple[Config, Any, Any]:
    """A run whose WRPO trained adapters, by the trainer's own saving; its policy and its base."""
    lora = LoraConfig(rank=2, alpha=8)
    config = config.model_copy(
        update={
            "sft": None,
            "evaluate": None,
            "wrpo": config.wrpo.model_copy(update={"lora": lora}),
        }
    )
    start = put_target(config, "bfloat16")
    base, training = Path(config.target.model), config.wrpo
    policy = train_model.load_policy(base, training, torch.device("cpu"))
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-5)
    chain = Chain(config)
    for step in (step for stage in chain.build() for step in stage.steps):
        step.finish(chain.root, {"rows": 5}, time.time())
        if step.name == "wrpo":
            to = chain.root / step.folder
            train_model.save(
                policy, base, training, make_tokenizer(), to / "model", write=True,
                adapters=to / "adapters",
            )  # fmt: skip
    return config, policy, start


def weights_of(policy: Any, start: Any) -> dict[str, torch.Tensor]:
    """base + alpha / rank * B A of each layer, in float64."""
    found = {name: value.double() for name, value in start.state_dict().items()}
    adapters = dict(policy.model.named_parameters())
    for name, a in adapters.items():
        if "lora_A" in name:
            b = adapters[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("base_model.model.").partition(".lora_A")[0] + ".weight"
            found[layer] = found[layer] + 4 * b.double() @ a.double()
    return found


@pytest.mark.parametrize("form", ["merged", "adapters", "both"])
def test_what_lora_learnt_is_exported(config, tmp_path, form):
    """Merged in fp32 by default, whatever the target's precision, and beside their base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, policy, start = put_lora(config, tmp_path)
    to, want = tmp_path / "to", weights_of(policy, start)
    export_model(config, str(to), form=form)
    assert (to / "model.safetensors").exists() == (form != "adapters")
    assert (to / "adapters").exists() == (to / "base").exists() == (form != "merged")
    card = (to / "README.md").read_text()
    assert ("--enable-lora" in card) == (form != "merged")
    if form != "adapters":
        for name, value in stored(to).items():
            torch.testing.assert_close(value.double(), want[name], rtol=1e-6, atol=1e-9)
        assert {t.dtype for t in stored(to).values()} == {torch.float32}
        assert "The weights are in float32." in card
    if form != "merged":
        base = AutoModelForCausalLM.from_pretrained(to / "base")
        assert base.dtype == torch.bfloat16
        for name, value in start.state_dict().items():
            assert torch.equal(base.state_dict()[name], value)
        both = PeftModel.from_pretrained(base.float(), to / "adapters").merge_and_unload()
        for name, value in both.state_dict().items():
            torch.testing.assert_close(value.double(), want[name], rtol=1e-6, atol=1e-9)
        assert AutoTokenizer.from_pretrained(to / "base").chat_template
    for path in to.rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_lora_in_bf16_is_exported_if_asked_for_and_the_loss_told(config, tmp_path, capsys):
    config, *_ = put_lora(config, tmp_path)
    export_model(config, str(tmp_path / "to"), "bfloat16")
    card = (tmp_path / "to" / "README.md").read_text()
    share = float(re.search(r"Of the training, ([\d.]+)% of the weights that changed", card)[1])
    assert 90 < share < 100


def test_forms_that_do_not_go_together_are_refused(config, weights, tmp_path, capsys):
    finish(config, weights)
    for form in ("adapters", "both"):
        with pytest.raises(UserError, match="the fused model was trained without lora"):
            export_model(config, str(tmp_path / "to"), form=form)
    path = tmp_path / "config.yaml"
    tree = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    path.write_text(yaml.safe_dump(tree))
    command = ["export", str(path), "--to", str(tmp_path / "to")]
    for option in (["--dtype", "float32"], ["--weights", "both"]):
        assert main([*command, *option]) == 2
        assert "belong to --format model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--format", "model", "--dtype", "int8"])
    assert "give auto, float32, bfloat16, float16" in capsys.readouterr().err
    assert main([*command, "--format", "model", "--dtype", "bf16"]) == 0
    assert {t.dtype for t in stored(tmp_path / "to").values()} == {torch.bfloat16}
