"""Sections for `wrpo study`: cases, variants, seeds."""

from typing import Any, Self

from pydantic import Field, model_validator

from wrpo_ray.config.base import Name, Section


class CaseConfig(Section):
    """A setting in which variants are compared, such as a set of sources."""

    config: str
    """The YAML file of a run, relative to the study's file."""
    set: dict[str, Any] = {}
    """Changes to that config: {a.b: value}."""


class VariantConfig(Section):
    """A training method to compare, as changes to the config of the case."""

    model: Name = "fused"
    """The model to compare: `fused`, `target-sft`, or the name of a given model. The chain runs
    only as far as this model needs."""
    sources: int | None = Field(None, ge=1)
    """Number of sources to use, from the first; null uses all."""
    set: dict[str, Any] = {}
    """Changes to the config of the case: {wrpo.beta: 0.3}."""
    seeds: int | None = Field(None, ge=1)
    """Number of seeds to use, from the first; null uses all."""


class StudyConfig(Section):
    """Variants of training, over seeds and cases: `wrpo study`.

    Work that variants share, such as the answers of the sources, is done once.
    """

    output: str
    """Folder of all results, with a subfolder for each case."""
    seeds: tuple[int, ...] = Field((42,), min_length=1)
    """Seeds of the runs: they decide splits, samples and orders."""
    cases: dict[Name, CaseConfig] = Field(min_length=1)
    """The settings in which variants are compared."""
    variants: dict[Name, VariantConfig] = Field(min_length=1)
    """The training methods to compare."""
    contrasts: tuple[tuple[Name, Name], ...] = ()
    """Pairs (a, b) of variants: the paired difference a - b over shared seeds and prompts."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        for name in {name for pair in self.contrasts for name in pair} - set(self.variants):
            raise ValueError(f"contrasts: there is no variant {name!r}")
        return self
