"""Sections for actors and the Ray cluster."""

from __future__ import annotations

from pydantic import (
    Field,
    model_validator,
)

from wrpo_ray.config.base import Section


class Actors(Section):
    """An autoscaling pool of Ray actors."""

    min: int = Field(1, ge=1)
    """Actors kept for certain."""
    max: int = Field(1, ge=1)
    """Actors at the most, as the cluster has room."""
    num_cpus: float = Field(1, ge=0)
    """CPUs for an actor."""
    num_gpus: float = Field(0, ge=0)
    """GPUs for an actor; 0 runs it on the CPU."""
    resources: dict[str, float] = {}
    """Custom resources for an actor, such as a node type's: {h100: 1}."""

    @model_validator(mode="after")
    def _ordered(self) -> Actors:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min})")
        return self


class ClusterConfig(Section):
    """The Ray cluster to run on."""

    address: str | None = None
    """Ray address; null takes RAY_ADDRESS, and without it starts Ray on this machine."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs of a Ray started on this machine; null takes the cores it has."""
    cache_gb: float | None = Field(None, gt=0)
    """GB (10^9 bytes) of disk that copies of weights may take on each node, in its WRPO_CACHE;
    null takes the node's WRPO_CACHE_GB, and without that all but 1 GB of the disk."""
