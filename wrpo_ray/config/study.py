"""Sections for `wrpo study`: cases, variants, seeds."""

from __future__ import annotations

from typing import Any

from pydantic import (
    Field,
    model_validator,
)

from wrpo_ray.config.base import Name, Section


class CaseConfig(Section):
    """A setting in which variants are compared, such as a set of sources."""

    config: str
    """A run's YAML file, by a path from the study's own."""
    set: dict[str, Any] = {}
    """Changes of it: {a.b: value}."""


class VariantConfig(Section):
    """A way to train that is compared with others, as changes of the case's config."""

    model: Name = "fused"
    """The model of the run that is compared: `fused`, `target-sft`, or a given one by its name;
    the chain runs no further than that needs."""
    sources: int | None = Field(None, ge=1)
    """Only the first so many sources; null takes all."""
    set: dict[str, Any] = {}
    """Changes of the case's config: {wrpo.beta: 0.3}."""
    seeds: int | None = Field(None, ge=1)
    """Only the first so many seeds; null takes all."""


class StudyConfig(Section):
    """Variants of training, over seeds and cases: `wrpo study`.

    What variants have in common, such as the sources' answers, is made once.
    """

    output: str
    """Folder of all results; each case has one of its own in it."""
    seeds: tuple[int, ...] = Field((42,), min_length=1)
    """The runs' `seed`: splits, samples, orders."""
    cases: dict[Name, CaseConfig] = Field(min_length=1)
    """Where they are compared."""
    variants: dict[Name, VariantConfig] = Field(min_length=1)
    """What is compared."""
    contrasts: tuple[tuple[Name, Name], ...] = ()
    """(a, b): the paired difference a - b, over the seeds and prompts that both have."""

    @model_validator(mode="after")
    def _known(self) -> StudyConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        for name in {name for pair in self.contrasts for name in pair} - set(self.variants):
            raise ValueError(f"contrasts: there is no variant {name!r}")
        return self
