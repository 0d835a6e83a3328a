"""The model card of the fused model: README.md as the Hugging Face hub reads it.

Not covered: what licences allow. The card names them, warns where they differ or are unknown,
and quotes no law.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wrpo_ray.export.card_parts import (
    CardFacts,
    CardModel,
    fenced_settings,
    models_table,
    steps_table,
    table,
)
from wrpo_ray.text.display import markdown

TERMS = (
    (r"llama3$", "does not allow answers to improve other models than Llama 3 itself"),
    (r"llama3\.\d|llama4", "asks models made with its answers to be named after it"),
    (r"gemma", "counts models trained on its answers as derivatives under the same terms"),
    (r"qwen|tongyi", "asks models made with its answers to say so"),
    (r"cc-by-nc|non-?commercial|research", "does not allow commercial use"),
    (r"other|unknown", "says nothing: find the terms"),
)
"""(pattern of a licence, its condition); the first match counts."""
Row = dict[str, Any]


@dataclass(frozen=True)
class ModelCardFacts:
    """Facts of the fused model that its card shows beside those of the run."""

    name: str
    base: CardModel
    hub_id: str | None
    """Hub id of the base; None if it is a folder."""
    training: Row
    """Settings of the training."""
    evaluation: Row | None
    """The table of the held-out comparison."""
    weights: tuple[str, ...] = ()
    """Notes on the precision and form of the weights, a line each."""
    has_gguf: bool = False
    """Whether the folder has the weights also as the file `gguf_name(name)`."""


def card(made: ModelCardFacts, facts: CardFacts) -> str:
    """Return the text of the card, with the metadata that the Hugging Face hub reads."""
    sections = {
        "Use": _use(made),
        "Weights": list(made.weights),
        "Models and licences": [*models_table(facts), *licence_notes(facts)],
        "How it was made": [*_method(made), *fenced_settings({"training": made.training})],
        "Data": [*fenced_settings(facts.settings), "", *steps_table(facts)],
        "Results": _results(made),
        "Versions": table(("package", "version"), facts.versions.items()),
    }
    parts = [_front_matter(made, facts), f"# {markdown(made.name)}\n\n{_introduction(made, facts)}"]
    for title, lines in sections.items():
        body = "\n".join(lines)
        parts += [f"## {title}\n\n{body}"] if body else []
    return "\n\n".join(parts) + "\n"


def _front_matter(made: ModelCardFacts, facts: CardFacts) -> str:
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


def _license(facts: CardFacts) -> str:
    """The licence that the target and all sources share; else `other`."""
    found = {m.license for m in facts.models if m.role != "reward"}
    return (next(iter(found)) if len(found) == 1 else None) or "other"


def licence_notes(facts: CardFacts) -> Iterator[str]:
    """Warnings about licences that differ, are unknown, or have conditions."""
    models = [m for m in facts.models if m.role != "reward"]
    named = {m.license or "unknown" for m in models}
    if len(named) > 1:
        yield "\n> **Warning: these licences differ.** The weights come from the target and were"
        yield "> trained on answers of the sources: each of these licences may bind this model."
    for licence in sorted(named):
        told = next((what for form, what in TERMS if re.search(form, licence, re.IGNORECASE)), "")
        if told:
            who = ", ".join(m.name for m in models if (m.license or "unknown") == licence)
            whose = f"Licence {markdown(licence)} ({markdown(who)})"
            yield f"\n> {whose} {told}. Read it before you publish."


def _introduction(made: ModelCardFacts, facts: CardFacts) -> str:
    names = [markdown(m.name) for m in facts.models if m.role == "source"]
    sources = ", ".join(names) or "several models"
    tuned = f" after supervised fine-tuning on the best answers of {sources}, and"
    return (
        f"{markdown(made.base.name)}{tuned if 'sft' in made.training else ' after'} "
        "Weighted-Reward Preference\nOptimization "
        "([arXiv 2412.03187](https://arxiv.org/abs/2412.03187)) on preference rows of their "
        "answers and its own, made with wrpo_ray."
    )


def _use(made: ModelCardFacts) -> Iterator[str]:
    yield "```python"
    yield "from transformers import pipeline"
    yield ""
    yield 'chat = pipeline("text-generation", "path/to/this/folder")'
    yield 'print(chat([{"role": "user", "content": "..."}])[0]["generated_text"][-1]["content"])'
    yield "```"
    yield ""
    file = gguf_name(made.name)
    name = file.removesuffix(".gguf")
    if made.has_gguf:
        yield f"vLLM: `vllm serve path/to/this/folder`. llama.cpp and Ollama take `{file}`:"
        yield ""
        yield "```bash"
    else:
        yield "vLLM: `vllm serve path/to/this/folder`. Ollama takes GGUF, which llama.cpp makes of"
        yield "the architectures that it knows:"
        yield ""
        yield "```bash"
        yield "git clone https://github.com/ggml-org/llama.cpp"
        yield "pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt"
        yield f"python llama.cpp/convert_hf_to_gguf.py path/to/this/folder --outfile {file}"
    yield f'echo "FROM ./{file}" > Modelfile'
    yield f"ollama create {name} -f Modelfile && ollama run {name}"
    yield "```"


def gguf_name(name: str) -> str:
    """The GGUF file of a model of this name, without what shells and paths take for their own."""
    return re.sub(r"[^\w.-]+", "-", name) + ".gguf"


def _method(made: ModelCardFacts) -> Iterator[str]:
    yield "The loss of a row is −log σ(α·r(x, y_ws) + (1−α)·r(x, y_wt) − r(x, y_l)) with"
    start, tuned = ("SFT", " after its fine-tuning") if "sft" in made.training else ("ref", "")
    yield f"r(x, y) = β·log(π(y|x) / π_{start}(y|x)): y_ws is the best answer of all sources, y_wt"
    yield f"the best and y_l the worst of {markdown(made.base.name)}{tuned}, by the reward."
    yield ""


def _of_fused(made: ModelCardFacts, measure: str) -> Row | None:
    models = (made.evaluation or {}).get(measure, {}).get("models", {})
    return models["fused"]["all"] if "fused" in models else None


def _results(made: ModelCardFacts) -> Iterator[str]:
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
