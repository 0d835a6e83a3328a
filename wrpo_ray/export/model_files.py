"""The files of an exported model, complete for transformers and vLLM, and without local paths."""

import json
from typing import Any

import pyarrow.fs as pafs

from wrpo_ray.errors import UserError
from wrpo_ray.export import weights as weights_format
from wrpo_ray.export.weights import Weights
from wrpo_ray.llm.architecture import Use
from wrpo_ray.llm.model_folder import check_model_folder
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.publish import TEMPORARY_PREFIX
from wrpo_ray.storage.weight_files import TEMPLATES, weight_files

PATHS = ("_name_or_path", "name_or_path")
"""Keys of a config that hold a local path."""
GENERATION = "generation_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
Row = dict[str, Any]


def copy(model: Folder, to: Folder, how: Weights) -> int:
    """Copy a model's files, with its weights in the requested precision; return their bytes.

    Raises:
        UserError: a file that engines need is missing, or `to` holds parts of another model.
    """
    files = [name for name in model.files() if not name.startswith(".")]
    weights = weight_files(files)
    _check_files(model, files, weights)
    beside = [TEMPLATES + name for name in model.files(TEMPLATES)]
    _check_place(to, weights, beside)
    to.filesystem.create_dir(to.path, recursive=True)
    is_cast = how.dtype not in ("", weights_format.dtype_of(model.read_json("config.json")))
    if is_cast:
        weights_format.write(model, to, weights, how)
    for name in files:
        if is_cast and name in (*weights, weights_format.INDEX):
            continue
        if is_cast and name == "config.json":
            config = weights_format.converted(model.read_json(name), how.dtype)
            to.write(name, _without_paths(json.dumps(config, indent=2).encode()))
        elif name.endswith(".json"):
            to.write(name, _without_paths(model.read(name)))
        else:
            pafs.copy_files(
                f"{model.path}/{name}", f"{to.path}/{name}",
                source_filesystem=model.filesystem, destination_filesystem=to.filesystem,
            )  # fmt: skip
    for name in beside:
        to.write(name, model.read(name))
    if GENERATION not in files:
        to.write_json(GENERATION, _generation(model.read_json("config.json")))
    infos = to.filesystem.get_file_info([f"{to.path}/{name}" for name in weights])
    return sum(info.size for info in infos)


def _check_place(to: Folder, weights: list[str], templates: list[str]) -> None:
    """Raise UserError if the folder holds files that loaders would take for the model's."""
    others = set(weight_files(to.files())) - set(weights)
    others |= {TEMPLATES + name for name in to.files(TEMPLATES)} - set(templates)
    if others:
        kind = "chat templates" if min(others).startswith(TEMPLATES) else "weights"
        raise UserError(
            f"export: {to} holds other {kind}, such as {min(others)}; give a new folder"
        )


def _check_files(model: Folder, files: list[str], weights: list[str]) -> None:
    """Raise UserError if a file that vLLM or transformers needs is missing."""
    lacking = [] if weights else ["weights"]
    lacking += [] if "config.json" in files else ["config.json"]
    lacking += [] if any(name in files for name in TOKENIZER) else ["a tokenizer"]
    settings = model.read("tokenizer_config.json") if "tokenizer_config.json" in files else b""
    if "chat_template.jinja" not in files and b'"chat_template"' not in settings:
        lacking.append("a chat template")
    if lacking:
        raise UserError(f"export: {model} lacks {', '.join(lacking)}")
    check_model_folder(model, "export", Use.TRAINED)


def _without_paths(data: bytes) -> bytes:
    value = json.loads(data)
    if not isinstance(value, dict) or not set(PATHS) & set(value):
        return data
    kept = {name: part for name, part in value.items() if name not in PATHS}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _generation(config: Row) -> Row:
    """The generation config that transformers would derive from a model's config."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def check_place(to: Folder) -> None:
    """Raise UserError if the address is a file's."""
    if str(to).endswith((".jsonl", ".parquet", TEMPORARY_PREFIX)):
        raise UserError(f"export: --to {to}: a model goes into a folder")
