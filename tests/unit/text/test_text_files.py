"""Text files that a user names: each is read alike, whatever wrote it."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_models import TEMPLATE, write_model

from wrpo_ray import config
from wrpo_ray.config import Columns, JudgeConfig, ModelConfig, PromptsConfig
from wrpo_ray.errors import UserError
from wrpo_ray.kubernetes import manifests, schema
from wrpo_ray.llm.rendering import Template
from wrpo_ray.pipeline.evaluation import _template
from wrpo_ray.runtime.submission import RUNTIME_ENV, _runtime_env
from wrpo_ray.serve.check import checked
from wrpo_ray.serve.keys import Keys, new_key
from wrpo_ray.stages.evaluate.benchmarks import _jsonl
from wrpo_ray.stages.ingest.input_checks import check_columns
from wrpo_ray.stages.ingest.readers import read_rows
from wrpo_ray.stages.score.judge import template_text
from wrpo_ray.storage.fingerprints import model_fingerprint
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.files import decode, read_text

TEXT = "Zoë 日本\n\n😀 end"
WRITTEN = {
    "plain": TEXT.encode(),
    "marked": codecs.BOM_UTF8 + TEXT.encode(),
    "windows": codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode(),
    "old mac": TEXT.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("data", WRITTEN.values(), ids=WRITTEN)
def test_a_text_is_the_same_whatever_wrote_it(data, tmp_path):
    (tmp_path / "f").write_bytes(data)
    assert read_text(tmp_path / "f", "key") == decode(data, "key") == TEXT


OTHERS = {
    "utf-16": "it is UTF-16; save it as UTF-8",
    "utf-16-le": "it is UTF-16; save it as UTF-8",
    "utf-16-be": "it is UTF-16; save it as UTF-8",
    "latin-1": "it is no UTF-8 at byte 6; save it as UTF-8",
    "cp1252": "it is no UTF-8 at byte 6; save it as UTF-8",
}


@pytest.mark.parametrize(("encoding", "reason"), OTHERS.items())
def test_another_encoding_is_told_with_the_files_name(encoding, reason, tmp_path):
    file = tmp_path / "f.txt"
    file.write_bytes("text: ë".encode(encoding))
    with pytest.raises(UserError) as caught:
        read_text(file, "key")
    assert str(caught.value) == f"key: {file}: cannot be read: {reason}"
    with pytest.raises(UserError, match="no such|No such"):
        read_text(tmp_path / "no", "key")


# --- every place where such a file is read -----------------------------------------------------


def _config(file: Path) -> Any:
    return config.read_serving(file)


def _keys(file: Path) -> Any:
    keys = Keys(None, str(file))
    if keys.problems:
        raise UserError(keys.problems[0])
    return [keys.owner(KEY)]


def _environment_keys(file: Path) -> Any:
    return [Keys(file.read_bytes().decode("utf-8")).owner(KEY)]


def _judge(file: Path) -> Any:
    return template_text(
        JudgeConfig(model="m", endpoint={"url": "http://h/v1"}, template=str(file))
    )


def _chat(file: Path) -> Any:
    return Template.of(ModelConfig(name="m", model="m", chat_template=str(file))).apply("own")


def _served(file: Path) -> Any:
    model = write_model(file.parent / "model")
    found = {"models": [{"name": "m", "model": str(model), "chat_template": str(file)}]}
    keys = file.parent / "keys"
    keys.write_text(LINE)
    return checked(config.serving(found | {"keys": str(keys)})).models[0].name


def _manifest(file: Path) -> Any:
    return [m.body for m in manifests.read([str(file)])[0]]


def _crds(file: Path) -> Any:
    return list(schema.Schemas(str(file.parent))._schemas)


def _benchmark(file: Path) -> Any:
    return _jsonl(Folder(str(file.parent)), file.name)


def _rows(file: Path) -> Any:
    given = PromptsConfig(path=str(file), columns=Columns())
    check_columns(str(file), given.needed, "prompts")
    return [row for _, row in read_rows(str(file), given.needed)]


def _environment(file: Path) -> Any:
    return _runtime_env()


KEY, LINE = new_key("zoe")
CRD = {
    "kind": "CustomResourceDefinition",
    "spec": {"group": "g", "names": {"kind": "K"}, "versions": [
        {"name": "v1", "schema": {"openAPIV3Schema": {"type": "object"}}}]},
}  # fmt: skip
PLACES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "config": ("c.yaml", "max_tokens: 3\nkeys: ë", _config),
    "keys": ("keys", f"{LINE}  # ë", _keys),
    "judge": ("j.jinja", "{{ answer }} ë", _judge),
    "pairwise": ("p.jinja", "{{ first }} ë", lambda file: _template(str(file))),
    "chat template": ("t.jinja", "{{ messages }} ë", _chat),
    "served template": ("t.jinja", TEMPLATE + "ë", _served),
    "manifest": ("m.yaml", "kind: ë\napiVersion: v1", _manifest),
    "crds": ("crd.yaml", yaml.safe_dump(CRD) + "# ë", _crds),
    "benchmark": ("question.jsonl", '{"a": "ë"}\n{"a": 2}\n', _benchmark),
    "prompts": ("p.jsonl", '{"prompt": "ë"}\n{"prompt": "b"}\n', _rows),
    "runtime environment": (RUNTIME_ENV, "env_vars: {A: ë}", _environment),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_mark_changes_nothing_of_what_is_read(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, text, read = PLACES[place]
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    plain = read(file)
    assert "ufeff" not in json.dumps(plain, default=str)
    file.write_text(text, encoding="utf-8-sig")
    assert read(file) == plain


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("place", list(PLACES))
def test_a_file_in_another_encoding_is_refused_in_one_line(place, encoding, tmp_path, monkeypatch):
    """Prompts in Latin-1 are told row by row: a failed row has its reason."""
    monkeypatch.chdir(tmp_path)
    name, text, read = PLACES[place]
    (tmp_path / "jobs").mkdir()
    (tmp_path / name).write_text(text, encoding=encoding)
    if place == "prompts" and encoding == "latin-1":
        assert [type(row) for row in read(tmp_path / name)] == [UnicodeDecodeError, dict]
        return
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "save it as UTF-8" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_of_the_environment_may_have_a_mark(tmp_path):
    """As of a variable that a file was read into."""
    (tmp_path / "keys").write_text(LINE, encoding="utf-8-sig")
    assert _environment_keys(tmp_path / "keys") == ["zoe"]


# --- what was made with a mark is not used again -----------------------------------------------


def _model(folder: Path, encoding: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding=encoding)
    return folder


def test_a_mark_in_a_models_template_makes_another_key(tmp_path):
    """By more than its bytes, which an earlier version wrote into every prompt."""
    from wrpo_ray.storage.fingerprints import digest

    plain = _model(tmp_path / "plain", "utf-8")
    marked = _model(tmp_path / "marked", "utf-8-sig")
    keys = [model_fingerprint(Folder(str(f))) for f in (plain, marked)]
    assert keys[0] != keys[1]
    from wrpo_ray.storage.fingerprints import _digest, _samples

    def earlier(folder: Path) -> str:
        names = Folder(str(folder)).files()
        return digest([[n, _digest(Folder(str(folder)) / n, _samples)] for n in names], 16)

    assert keys[0] == earlier(plain), "it stays where results do"
    assert keys[1] != earlier(marked)


@pytest.mark.parametrize(
    ("value", "stays"), [("Zoë", True), ("日本", True), (3, True), ("😀", False)]
)
def test_only_values_that_were_misread_make_another_key(value, stays):
    template = Template.of(ModelConfig(name="m", model="m", chat_template_args={"v": value}))
    assert (template.revision == ()) == stays
