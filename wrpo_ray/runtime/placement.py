"""Resources of actor pools, and whether the cluster has room for them."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from wrpo_ray.config import Actors
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.progress import log
from wrpo_ray.storage.folder import Folder

GPU_LABEL = "wrpo-ray/gpu"
NO_GPU_NODES = {GPU_LABEL: "!true"}
"""Ray's label selector of work without GPUs: it neither runs on nodes with this label nor starts
them. The manifests give the label to groups with GPUs; without it any node will do."""

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_TOP_PAD_": str(64 * 2**20)}
"""Environment of glibc's allocator for training: with an arena for each thread, what the backward
pass frees is not used again by the forward pass, which took 2 GB of 6."""

SPINS = "2000"
"""How often a thread of OpenMP (libgomp) looks for the others before it sleeps. Its own number is
300,000: milliseconds for which a core does nothing while what the others need waits for it."""

Model = tuple[Folder, str]
"""The folder of a model's weights, and their fingerprint (`Folder.local`)."""


@dataclass(frozen=True)
class Pool:
    """The specification of a pool of equal actors."""

    what: str
    """The pool's name in messages and in Ray's dashboard."""
    actors: Actors
    env: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    """Concurrent calls of an actor."""
    parts: int = 1
    """Worker processes with a GPU each that an actor starts; 1 is the actor alone."""
    has_model: bool = False
    """Whether its actors compute with a model, with a thread for each of their CPUs."""
    models: tuple[Model, ...] = ()
    """What its actors load."""
    row: float | None = None
    """Seconds of an actor for a row, as the user expects."""
    startup: float = 0.0
    """Seconds of its start, as the user expects."""
    is_light: bool = False
    """Whether its actors compute next to nothing, so that they need no core of their own."""

    @property
    def needs(self) -> dict[str, float]:
        """Resources of one actor with its worker processes."""
        actors = self.actors
        needs = {"CPU": actors.cpus, "GPU": actors.num_gpus * self.parts}
        return needs | {name: n * self.parts for name, n in actors.resources.items()}

    @property
    def selector(self) -> dict[str, str]:
        """Label selector of an actor."""
        return selector_for(self.actors.num_gpus, self.actors.resources)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Bundles of the placement group for one actor and its worker processes."""
        gpus = {"GPU": self.actors.num_gpus} if self.actors.num_gpus else {}
        return [{"CPU": self.actors.cpus}, *[gpus | self.actors.resources] * self.parts]


def selector_for(num_gpus: float, resources: dict[str, float]) -> dict[str, str]:
    """Label selector of a worker; one with a GPU or a custom resource goes where these are."""
    return {} if num_gpus or resources else NO_GPU_NODES


def fit_together(pools: list[Pool]) -> bool:
    """Whether the cluster as it is has room for one actor of each pool at once."""
    need = Counter[str]()
    for pool in pools:
        need.update(pool.needs)
    return has_room(need)


def has_room(need: Mapping[str, float]) -> bool:
    """Whether the cluster as it is has these resources for the run.

    Resources that others hold, such as the CPU of a submitted job's driver, do not count: actors
    that wait for each other's results could wait forever.
    """
    import ray

    def fits(have: dict[str, float]) -> bool:
        return all(n <= have.get(name, 0) for name, n in need.items())

    # the resources of earlier actors and tasks are free a moment after they ended
    deadline = time.monotonic() + 5
    while fits(ray.cluster_resources()) and time.monotonic() < deadline:
        if fits(ray.available_resources()):
            return True
        time.sleep(0.2)
    return False


def capacity_for(needs: dict[str, float]) -> int:
    """How many workers with these needs fit into the cluster as it is; at least 1."""
    import ray

    have = ray.cluster_resources()
    fitting = [int(have.get(name, 0) // n) for name, n in needs.items() if n]
    return max(1, min(fitting, default=1))


def check_capacity(what: str, count: int, kind: str, needs: dict[str, float]) -> None:
    """Reject workers that this machine can never place; a cluster may still grow.

    Raises:
        UserError: `count` workers with these needs each do not fit.
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
    """Whether this process started Ray, which then has this one node only."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    return bool(node and node.head)


def thread_env(num_cpus: float) -> dict[str, str]:
    """Environment of a worker with as many threads as CPUs, at least one.

    Several threads wait for each other for `SPINS`, unless the user's environment says how.
    """
    threads = max(1, int(num_cpus))
    env = {"OMP_NUM_THREADS": str(threads)}
    if threads == 1 or any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        return env
    return env | {"GOMP_SPINCOUNT": SPINS}
