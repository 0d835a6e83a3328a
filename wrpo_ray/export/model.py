"""The fused model as a folder ready to upload: its files, and the model card.

Not covered: what licences allow. The card names them, warns where they differ or are not known,
and quotes no law.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from wrpo_ray.errors import UserError
from wrpo_ray.export import weights as weights_format
from wrpo_ray.export.card import (
    Facts,
    Model,
    counted,
    fenced_settings,
    models_table,
    table,
)
from wrpo_ray.export.weights import Weights
from wrpo_ray.llm.architecture import Use
from wrpo_ray.llm.model_folder import check_model_folder
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.publish import TEMPORARY_PREFIX
from wrpo_ray.storage.weight_files import TEMPLATES, weight_files

CARD = "README.md"
PATHS = ("_name_or_path", "name_or_path")
"""What tells where weights lay on this machine."""
GENERATION = "generation_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
TERMS = (
    (r"llama3$", "does not allow answers to improve other models than Llama 3 itself"),
    (r"llama3\.\d|llama4", "asks models made with its answers to be named after it"),
    (r"gemma", "counts models trained on its answers as derivatives under the same terms"),
    (r"qwen|tongyi", "asks models made with its answers to say so"),
    (r"cc-by-nc|non-?commercial|research", "does not allow commercial use"),
    (r"other|unknown", "says nothing: find the terms"),
)
"""What the licences of known families are known for; the first that fits."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """What a model's card tells beside the facts of its data."""

    name: str
    base: Model
    hub_id: str | None
    """The base on the hub, where it is from there."""
    training: Row
    """Settings of the training."""
    evaluation: Row | None
    """The table of the held-out comparison."""
    weights: tuple[str, ...] = ()
    """What is to be known of the weights' precision and form, a line each."""


def write(model: Folder, to: Folder, card: str, how: Weights | None = None) -> int:
    """Copy a model's files and write its card; returns the bytes of its weights.

    Raises:
        UserError: the model lacks what engines need, or `to` holds parts of another.
    """
    size = copy(model, to, how or Weights())
    to.write(CARD, card.encode())
    return size


def copy(model: Folder, to: Folder, how: Weights) -> int:
    """Copy a model's files, its weights in the precision that is asked for; returns their bytes."""
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
    """Raise UserError where the folder holds what would become part of the model."""
    others = set(weight_files(to.files())) - set(weights)
    others |= {TEMPLATES + name for name in to.files(TEMPLATES)} - set(templates)
    if others:
        kind = "chat templates" if min(others).startswith(TEMPLATES) else "weights"
        raise UserError(
            f"export: {to} holds other {kind}, such as {min(others)}; give a new folder"
        )


def _check_files(model: Folder, files: list[str], weights: list[str]) -> None:
    """Raise UserError where vLLM or transformers would miss something."""
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
    """What transformers would derive from a model's own config."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


# --- the card --------------------------------------------------------------------------------


def card(made: Made, facts: Facts) -> str:
    """README.md as the Hugging Face hub reads it."""
    sections = {
        "Use": _use(made),
        "Weights": list(made.weights),
        "Models and licences": [*models_table(facts), *licence_notes(facts)],
        "How it was made": [*_method(made), *fenced_settings({"training": made.training})],
        "Data": [*fenced_settings(facts.settings), "", *counted(facts)],
        "Results": _results(made),
        "Versions": table(("package", "version"), facts.versions.items()),
    }
    parts = [_front_matter(made, facts), f"# {made.name}\n\n{_introduction(made, facts)}"]
    for title, lines in sections.items():
        body = "\n".join(lines)
        parts += [f"## {title}\n\n{body}"] if body else []
    return "\n\n".join(parts) + "\n"


def _front_matter(made: Made, facts: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    found = {name: _of_fused(made, name) for name in ("accuracy", "reward")}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out prompts of the run",
            metric_type=measure,
            metric_value=round(value["mean"], 4),
        )
        for measure, value in found.items()
        if value and value["mean"] is not None
    ]
    data = ModelCardData(
        license=_license(facts),
        base_model=made.hub_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["wrpo", "model-fusion", "preference"],
        model_name=made.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _license(facts: Facts) -> str:
    """The one of all models that the weights or answers come from; `other` where they differ."""
    found = {m.license for m in facts.models if m.role != "reward"}
    return (next(iter(found)) if len(found) == 1 else None) or "other"


def licence_notes(facts: Facts) -> Iterator[str]:
    """A warning where the models' licences differ, are unknown, or ask for something."""
    models = [m for m in facts.models if m.role != "reward"]
    named = {m.license or "unknown" for m in models}
    if len(named) > 1:
        yield "\n> **Warning: these licences differ.** The weights come from the target and were"
        yield "> trained on answers of the sources: each of these licences may bind this model."
    for licence in sorted(named):
        told = next((what for form, what in TERMS if re.search(form, licence, re.IGNORECASE)), "")
        if told:
            who = ", ".join(m.name for m in models if (m.license or "unknown") == licence)
            yield f"\n> Licence `{licence}` ({who}) {told}. Read it before you publish."


def _introduction(made: Made, facts: Facts) -> str:
    sources = ", ".join(m.name for m in facts.models if m.role == "source") or "several models"
    tuned = f" after supervised fine-tuning on the best answers of {sources}, and"
    return (
        f"{made.base.name}{tuned if 'sft' in made.training else ' after'} "
        "Weighted-Reward Preference\nOptimization "
        "([arXiv 2412.03187](https://arxiv.org/abs/2412.03187)) on preference rows of their "
        "answers and its own, made with wrpo_ray."
    )


def _use(made: Made) -> Iterator[str]:
    yield "```python"
    yield "from transformers import pipeline"
    yield ""
    yield 'chat = pipeline("text-generation", "path/to/this/folder")'
    yield 'print(chat([{"role": "user", "content": "..."}])[0]["generated_text"][-1]["content"])'
    yield "```"
    yield ""
    yield "vLLM: `vllm serve path/to/this/folder`. Ollama takes GGUF, which llama.cpp makes of the"
    yield "architectures that it knows:"
    yield ""
    yield "```bash"
    yield "git clone https://github.com/ggml-org/llama.cpp"
    yield "pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt"
    yield f"python llama.cpp/convert_hf_to_gguf.py path/to/this/folder --outfile {made.name}.gguf"
    yield f'echo "FROM ./{made.name}.gguf" > Modelfile'
    yield f"ollama create {made.name} -f Modelfile && ollama run {made.name}"
    yield "```"


def _method(made: Made) -> Iterator[str]:
    yield "The loss of a row is −log σ(α·r(x, y_ws) + (1−α)·r(x, y_wt) − r(x, y_l)) with"
    start, tuned = ("SFT", " after its fine-tuning") if "sft" in made.training else ("ref", "")
    yield f"r(x, y) = β·log(π(y|x) / π_{start}(y|x)): y_ws is the best answer of all sources, y_wt"
    yield f"the best and y_l the worst of {made.base.name}{tuned}, by the reward."
    yield ""


def _of_fused(made: Made, measure: str) -> Row | None:
    models = (made.evaluation or {}).get(measure, {}).get("models", {})
    return models["fused"]["all"] if "fused" in models else None


def _results(made: Made) -> Iterator[str]:
    for measure, scale, title in (("accuracy", 100, "accuracy, %"), ("reward", 1, "mean reward")):
        found = (made.evaluation or {}).get(measure)
        if not found:
            continue
        rows = [(n, *_cells(row["all"], scale)) for n, row in found["models"].items()]
        rows += [(f"{n} (paired)", *_cells(e, scale)) for n, e in found["contrasts"].items()]
        yield from table(("held-out prompts", title, "95 % interval", "prompts"), rows)
        yield ""


def _cells(estimate: Row, scale: int) -> tuple[str, str, str]:
    mean, low, high = (
        "-" if estimate[n] is None else f"{scale * estimate[n]:.2f}"
        for n in ("mean", "low", "high")
    )
    return mean, f"{low} to {high}", f"{estimate['n']:,}"


def check_place(to: Folder) -> None:
    """Raise UserError where the folder is a file's name."""
    if str(to).endswith((".jsonl", ".parquet", TEMPORARY_PREFIX)):
        raise UserError(f"export: --to {to}: a model goes into a folder")
