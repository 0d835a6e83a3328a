"""Shared by the cards of data sets and models: facts of the run, licences, Markdown tables."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from wrpo_ray.runtime.progress import log
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.display import fenced, markdown, one_line

CARD = "README.md"
"""The file that the Hugging Face hub shows as the card of a data set or model."""


@dataclass(frozen=True)
class CardModel:
    """A model that answered or scored the rows."""

    role: str
    name: str
    model: str
    """The source of its weights: a hub id, or the last part of a local path."""
    weights: str
    """Fingerprint of the weights."""
    license: str | None


@dataclass(frozen=True)
class CardFacts:
    """Facts of the run that both kinds of cards show."""

    models: list[CardModel]
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    """{step, counts} of the finished steps."""
    failures: list[dict[str, Any]]
    """{step, error, rows, message}"""
    versions: dict[str, str]


def license_of(name: str, given: str | None, folder: Folder | None) -> str | None:
    """Return a model's licence: from the config, else from its model card or config.json.

    `folder` is None if the model is in no folder that can be read here.
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
        metadata: Any = ModelCard(content, ignore_metadata_errors=True).data
        stated = metadata.get("license")
    if stated is None and folder.exists("config.json"):
        stated = json.loads(folder.read("config.json")).get("license")
    return one_line(stated)[:100] if isinstance(stated, str) else None


# --- sections --------------------------------------------------------------------------------


def models_table(facts: CardFacts) -> Iterator[str]:
    """The table of models with their licences."""
    told = ((m.role, m.name, m.model, m.weights, m.license or "unknown") for m in facts.models)
    yield from table(("role", "name", "model", "weights", "licence"), told)


def fenced_settings(settings: dict[str, Any]) -> Iterator[str]:
    """Settings as a block of YAML."""
    yield fenced(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip(), "yaml")


def steps_table(facts: CardFacts) -> Iterator[str]:
    """The table of steps: rows, failed rows, and dropped rows by reason."""
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


def table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    """A Markdown table; what its cells hold is shown as it is."""
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    for row in rows:
        yield "| " + " | ".join(markdown(str(cell)) for cell in row) + " |"
