"""The fused model as a folder: transformers loads it, its card has licences and results."""

import json
import time
from pathlib import Path

import pytest
import yaml
from tiny_models import make_model, make_tokenizer

from wrpo_ray.cli import main
from wrpo_ray.config import Config
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import UserError
from wrpo_ray.export.card import Facts, Model
from wrpo_ray.export.model import licence_notes, write
from wrpo_ray.pipeline import Chain
from wrpo_ray.results import export_model

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
    assert "`gemma` (a) counts models trained on its answers" in text
    assert "`unknown` (b) says nothing" in text
    assert "| fused | 0.75 | 0.70 to 0.80 | 400 |" in text
    assert "convert_hf_to_gguf.py" in text
    assert "vllm serve" in text
    assert str(tmp_path) not in text  # no path of this machine


def test_no_warning_where_all_have_one_licence():
    models = [Model(role, role, "m", "", "apache-2.0") for role in ("source", "target")]
    assert (
        list(licence_notes(Facts([*models, Model("reward", "r", "m", "", None)], {}, [], [], {})))
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
        write(Folder(str(model)), Folder(str(to)), "")
        assert AutoTokenizer.from_pretrained(to).chat_template == named
        assert {p.name for p in to.rglob("*")} == {p.name for p in model.rglob("*")} | {"README.md"}
    (model / "additional_chat_templates" / "rag.jinja").unlink()
    with pytest.raises(UserError, match="holds other chat templates, such as .*rag.jinja; give a"):
        write(Folder(str(model)), Folder(str(to)), "")


def test_what_lacks_is_told(config, weights, tmp_path):
    with pytest.raises(UserError, match="the fused model is not there yet; run `wrpo train` first"):
        export_model(config, str(tmp_path / "to"))
    bare = tmp_path / "bare"
    make_model().save_pretrained(bare)
    with pytest.raises(UserError, match="lacks a tokenizer, a chat template"):
        write(Folder(str(bare)), Folder(str(tmp_path / "to")), "")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="holds other weights, such as model-00001"):
        write(Folder(str(weights)), Folder(str(tmp_path / "to")), "")
