"""Sections `actors` and `cluster`: numbers and resources of actors, and the Ray cluster."""

from typing import Self

from pydantic import Field, model_validator

from wrpo_ray.config.base import Section


class Actors(Section):
    """An autoscaling pool of Ray actors."""

    min: int = Field(1, ge=1)
    """Minimum number of actors."""
    max: int = Field(1, ge=1)
    """Maximum number of actors; the pool grows while the cluster has room."""
    num_cpus: float | None = Field(None, ge=0)
    """CPUs of each actor, and threads of its model. Null is 1; where the run starts Ray itself on a
    machine without GPUs, an actor with a model gets its share of the cores."""
    num_gpus: float = Field(0, ge=0)
    """GPUs of each actor; 0 runs it on the CPU."""
    resources: dict[str, float] = {}
    """Custom Ray resources of each actor, such as a node type's: {h100: 1}."""

    @property
    def cpus(self) -> float:
        """CPUs of each actor, 1 where the config leaves them out."""
        return 1.0 if self.num_cpus is None else self.num_cpus

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min})")
        return self


class ClusterConfig(Section):
    """The Ray cluster to run on."""

    address: str | None = None
    """Ray address; null uses RAY_ADDRESS, or starts Ray on this machine if that is not set."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs of a Ray that is started on this machine; null uses all cores."""
    cache_gb: float | None = Field(None, gt=0)
    """Disk for copies of weights on each node (in its WRPO_CACHE), in GB (10^9 bytes); null uses
    the node's WRPO_CACHE_GB, or all but 1 GB of the disk if that is not set."""
