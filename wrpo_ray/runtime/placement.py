"""What actors need, and whether the cluster has room for them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from wrpo_ray.config import Actors
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.progress import log


@dataclass(frozen=True)
class Pool:
    """Actors of one kind."""

    what: str
    """Its name in messages."""
    actors: Actors
    env: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    """Calls that an actor has in hand at once."""
    parts: int = 1
    """Workers, one for each GPU, that an actor starts itself; 1 is the actor alone."""

    @property
    def needs(self) -> dict[str, float]:
        """Resources of one actor with its parts."""
        actors = self.actors
        needs = {"CPU": actors.num_cpus, "GPU": actors.num_gpus * self.parts}
        return needs | {name: n * self.parts for name, n in actors.resources.items()}

    @property
    def bundles(self) -> list[dict[str, float]]:
        """A placement group for one actor and its parts."""
        gpus = {"GPU": self.actors.num_gpus} if self.actors.num_gpus else {}
        return [{"CPU": self.actors.num_cpus}, *[gpus | self.actors.resources] * self.parts]


def fit_together(pools: list[Pool]) -> bool:
    """Whether the cluster as it is has room for one actor of each pool at once.

    What others hold for good, such as the driver of a submitted job its CPU, is no room: actors
    that wait for each other's results could wait forever.
    """
    import ray

    need = Counter[str]()
    for pool in pools:
        need.update(pool.needs)

    def fits(have: dict[str, float]) -> bool:
        return all(n <= have.get(name, 0) for name, n in need.items())

    # what earlier actors and tasks held is free a moment after they ended
    deadline = time.monotonic() + 5
    while fits(ray.cluster_resources()) and time.monotonic() < deadline:
        if fits(ray.available_resources()):
            return True
        time.sleep(0.2)
    return False


def capacity_for(needs: dict[str, float]) -> int:
    """How many that `need` so much the cluster has room for as it is; 1 if for none yet."""
    import ray

    have = ray.cluster_resources()
    fitting = [int(have.get(name, 0) // n) for name, n in needs.items() if n]
    return max(1, min(fitting, default=1))


def check_capacity(what: str, count: int, kind: str, needs: dict[str, float]) -> None:
    """Refuse what a Ray of this machine can never place; a cluster may still grow.

    Raises:
        UserError: `count` workers, each of which `needs` so much, do not fit.
    """
    import ray

    have = ray.cluster_resources()
    need = {name: count * n for name, n in needs.items()}
    short = {name: n for name, n in need.items() if n > have.get(name, 0)}
    if not short:
        return
    name, wanted = next(iter(short.items()))
    lack = f"{count} {kind} need {wanted:g} {name}s and Ray has {have.get(name, 0):g}"
    if is_own_ray():
        raise UserError(f"{what}: {lack}; set fewer or less for each of them")
    log(f"{what}: {lack}; waiting for the cluster to grow")


def is_own_ray() -> bool:
    """Whether this process started the cluster, which then has this one node for good."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    return bool(node and node.head)


def thread_env(num_cpus: float) -> dict[str, str]:
    """Environment of a worker: as many threads as it has CPUs, at least one."""
    return {"OMP_NUM_THREADS": str(max(1, int(num_cpus)))}
