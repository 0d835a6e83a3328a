"""The dataset card: README.md as the Hugging Face hub reads it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from wrpo_ray.export.forms import Form
from wrpo_ray.export.statistics import BINS, Statistics
from wrpo_ray.export.write import DATA
from wrpo_ray.runtime.progress import log
from wrpo_ray.storage.folder import Folder

BAR = 24
"""Characters of a histogram's longest bar."""
COLUMNS = {
    "published": {
        "prompt_id": "hash of the prompt",
        "prompt": "the conversation that is answered",
        "chosen": "two answers: y_ws, the best of all sources, and y_wt, the target's own best",
        "rejected": "one answer: y_l, the target's own worst",
    },
    "trl": {
        "prompt": "the conversation that is answered",
        "chosen": "the preferred answer",
        "rejected": "the target's own worst answer",
    },
    "records": {
        "prompt_id": "hash of the prompt",
        "messages": "the conversation that is answered",
        "source_chosen": "y_ws, the best answer of all sources, with its source and reward",
        "target_chosen": "y_wt, the target's own best answer",
        "rejected": "y_l, the target's own worst answer",
        "source_margin": "reward of y_ws less that of y_wt",
        "target_margin": "reward of y_wt less that of y_l",
        "candidates": "source, sample number and reward of every answer to the prompt",
    },
}


@dataclass(frozen=True)
class Model:
    """A model that had a part in the rows."""

    role: str
    name: str
    model: str
    """Where its weights are from, without a path of this machine."""
    weights: str
    """What identifies them."""
    license: str | None


@dataclass(frozen=True)
class Facts:
    """What a card tells beside the rows' own counts."""

    models: list[Model]
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    """{step, counts} of the finished steps."""
    failures: list[dict[str, Any]]
    """{step, error, rows, message}"""
    versions: dict[str, str]


def license_of(name: str, given: str | None, folder: Folder | None) -> str | None:
    """A model's licence: as the config gives it, else as its model card or config.json does.

    `folder` is null where the model lies in none that can be read here.
    """
    found = _stated(folder) if folder else None
    if given and found and given != found:
        log(f"{name}: the config says licence {given}, {folder} says {found}; the config's is used")
    return given or found


def _stated(folder: Folder) -> str | None:
    from huggingface_hub import ModelCard

    stated: Any = None
    if folder.exists("README.md"):
        content = folder.read("README.md").decode("utf-8-sig", "replace")
        stated = ModelCard(content, ignore_metadata_errors=True).data.to_dict().get("license")
    if stated is None and folder.exists("config.json"):
        stated = json.loads(folder.read("config.json")).get("license")
    return stated if isinstance(stated, str) else None


def card(form: Form, statistics: Statistics, facts: Facts) -> str:
    """The whole README.md."""
    sections = {
        "Rows": _rows(form, statistics),
        "Models": _models(facts),
        "How they were made": fenced_settings(facts.settings),
        "Counts": counted(facts),
        "y_ws by source": _wins(statistics),
        "Rewards": _rewards(statistics),
        "Lengths": _lengths(statistics),
        "Failed rows": _failures(facts),
        "Versions": table(("package", "version"), facts.versions.items()),
    }
    parts = [_front_matter(form, statistics, facts), _introduction(form, statistics)]
    for title, lines in sections.items():
        body = "\n".join(lines)
        parts += [f"## {title}\n\n{body}"] if body else []
    return "\n\n".join(parts) + "\n"


def _front_matter(form: Form, statistics: Statistics, facts: Facts) -> str:
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        license=_license(facts),
        task_categories=["text-generation"],
        size_categories=size_category(statistics.rows * form.rows_each),
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": f"{DATA}/train-*"}],
            }
        ],
        tags=["preference", "wrpo", "model-fusion", *(["trl", "dpo"] * (form.name == "trl"))],
    )
    return f"---\n{data.to_yaml()}\n---"


def _license(facts: Facts) -> str:
    """One for all, where all models that answered have the same."""
    found = {m.license for m in facts.models if m.role != "reward"}
    if not found - {None}:
        return "unknown"
    return next(iter(found)) or "unknown" if len(found) == 1 else "other"


def size_category(rows: int) -> str:
    """The hub's word for a number of rows, such as `10K<n<100K`."""
    power = len(str(rows)) - 1
    return f"{_short(power)}<n<{_short(power + 1)}" if power >= 3 else "n<1K"


def _short(power: int) -> str:
    return f"{10 ** (power % 3)}{'KMBT'[power // 3 - 1]}"


def _introduction(form: Form, statistics: Statistics) -> str:
    rows = statistics.rows * form.rows_each
    return (
        "# Preference rows of a model fusion\n\n"
        f"{rows:,} rows for preference training of a target model on answers of several source "
        "models, by\nWeighted-Reward Preference Optimization "
        "([arXiv 2412.03187](https://arxiv.org/abs/2412.03187)), made with wrpo_ray.\n\n"
        "```python\n"
        "from datasets import load_dataset\n\n"
        'rows = load_dataset("path/to/this/folder", split="train")\n'
        "```"
    )


def _rows(form: Form, statistics: Statistics) -> Iterator[str]:
    columns = dict(COLUMNS[form.name])
    if form.name == "trl":
        which = {"target": "y_wt, the target's own best", "source": "y_ws, the best of all sources"}
        told = which.get(form.pairs, "y_ws in one row, y_wt in the next")
        columns["chosen"] = f"the preferred answer: {told}"
    yield from table(("column", "what it holds"), columns.items())
    if form.rows_each > 1:
        yield f"\nEach of {statistics.rows:,} prompts has {form.rows_each} rows."


def models_table(facts: Facts) -> Iterator[str]:
    """The models that had a part, with their licences."""
    told = ((m.role, m.name, m.model, m.weights, m.license or "unknown") for m in facts.models)
    yield from table(("role", "name", "model", "weights", "licence"), told)


def _models(facts: Facts) -> Iterator[str]:
    yield from models_table(facts)
    answered = {m.license or "unknown" for m in facts.models if m.role != "reward"}
    if len(answered) > 1:
        yield "\nThe answers come from models under different licences; each row is under its"
        yield "models' terms (`records` names the source of each answer), and the prompts under"
        yield "their own."


def fenced_settings(settings: dict[str, Any]) -> Iterator[str]:
    """Settings as YAML."""
    yield "```yaml"
    yield yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
    yield "```"


def counted(facts: Facts) -> Iterator[str]:
    """Rows of each step."""
    told = []
    for step in facts.steps:
        counts = step["counts"]
        dropped = [
            f"{name.removeprefix('dropped.')} {number:,}"
            for name, number in counts.items()
            if name.startswith("dropped") and number
        ]
        numbers = f"{counts.get('rows', 0):,}", f"{counts.get('failed', 0):,}"
        told.append((step["step"], *numbers, ", ".join(dropped)))
    yield from table(("step", "rows", "failed", "dropped"), told)


def _wins(statistics: Statistics) -> Iterator[str]:
    if statistics.wins:
        yield from _histogram(dict(statistics.wins.most_common()), "source")


def _rewards(statistics: Statistics) -> Iterator[str]:
    if not statistics.rewards:
        return
    edges = statistics.edges
    names = {i: f"{edges[i]:.4g} to {edges[i + 1]:.4g}" for i in range(BINS)}
    yield from _histograms(statistics.rewards, names, "reward")


def _lengths(statistics: Statistics) -> Iterator[str]:
    found = {e for counts in statistics.lengths.values() for e in counts}
    low, high = min(found, default=0), max(found, default=0)
    names = {e: f"below {2**e:,}" for e in range(low, high + 1)}
    yield from _histograms(statistics.lengths, names, "characters")


def _failures(facts: Facts) -> Iterator[str]:
    told = [
        (f["step"], f["error"], f"{f['rows']:,}", _escaped(f["message"])[:100])
        for f in facts.failures
    ]
    yield from table(("step", "error", "rows", "such as"), told) if told else ["None."]


# --- tables and bars ---------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _histogram(counts: dict[str, int], title: str) -> Iterator[str]:
    most = max(counts.values())
    width = max(len(name) for name in [title, *counts])
    yield "```"
    yield f"{title:{width}}  {'rows':>10}"
    for name, number in counts.items():
        yield f"{name:{width}}  {number:>10,}  {'█' * round(BAR * number / most)}".rstrip()
    yield "```"


def _histograms(
    counts: dict[str, Counter[int]], names: dict[int, str], title: str
) -> Iterator[str]:
    """One table with a column of numbers for each of several histograms over the same bins."""
    width = max(len(name) for name in [title, *names.values()])
    yield "```"
    yield f"{title:{width}}" + "".join(f"{column:>12}" for column in counts)
    for bin_, name in names.items():
        cells = "".join(f"{column[bin_]:>12,}" for column in counts.values())
        yield f"{name:{width}}{cells}"
    yield "```"
