"""CPUs of actors and workers whose config names none: their share of this machine's cores.

Only where the run started Ray itself, on a machine without GPUs: on a cluster others may work, and
its nodes differ. What Ray reserves for an actor is what its threads use, so that pools that run at
once never have more threads than cores: with more, threads that wait for each other stand still.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import psutil

from wrpo_ray.runtime.placement import Pool, is_own_ray


class Machine(NamedTuple):
    """The cores that a run has for itself, and the most that one actor may take."""

    cores: int
    most: int


NONE = Machine(0, 1)
"""A cluster, or a machine with GPUs: one CPU for each actor."""


def machine_of(ray: dict[str, float], physical: int | None, threads: str | None) -> Machine:
    """Return the machine that has Ray's resources `ray`, and this number of physical cores.

    Two threads on one core are no quicker than one. `threads` is OMP_NUM_THREADS of the driver's
    environment, if it is set: the most for each actor.

    Example:
        >>> machine_of({"CPU": 16.0}, 8, None)
        Machine(cores=8, most=8)
        >>> machine_of({"CPU": 16.0}, 8, "2")
        Machine(cores=8, most=2)
    """
    if ray.get("GPU"):
        return NONE
    cores = min(int(ray.get("CPU", 0)), physical or math.inf)
    limit = int(threads) if threads and threads.isdigit() else cores
    return Machine(int(cores), max(1, int(min(limit, cores))))


def this_machine() -> Machine:
    """Return this machine if the run started Ray on it, else `NONE`; Ray is connected."""
    import ray

    if not is_own_ray():
        return NONE
    threads = os.environ.get("OMP_NUM_THREADS")
    return machine_of(ray.cluster_resources(), psutil.cpu_count(logical=False), threads)


def share(machine: Machine, unset: int, given: float = 0) -> float:
    """Return the CPUs of each of `unset` actors beside others that have `given` CPUs; at least 1.

    Example:
        >>> share(Machine(8, 8), 2, given=1)
        3.0
    """
    left = math.floor(machine.cores - given) // max(1, unset)
    return float(max(1, min(left, machine.most)))


def with_shares(
    pools: Sequence[Pool], beside: Sequence[Pool] = (), machine: Machine | None = None
) -> list[Pool]:
    """Return pools that run at once, and beside others, with the CPUs of each actor decided.

    One light actor beside models has none: with a core of its own, it would idle on one of two.
    """
    machine = machine or this_machine()
    at_once = [*pools, *beside]
    unset = sum(pool.actors.max for pool in at_once if _takes_a_share(pool))
    has_room = machine != NONE and unset > 0
    others = [p for p in at_once if not (_takes_a_share(p) or (has_room and _is_light(p)))]
    each = share(machine, unset, sum(p.actors.max * p.needs["CPU"] for p in others))
    decided = [0.0 if has_room and _is_light(p) else each for p in pools]
    return [
        p if p in others else replace(p, actors=p.actors.model_copy(update={"num_cpus": cpus}))
        for p, cpus in zip(pools, decided, strict=True)
    ]


def _takes_a_share(pool: Pool) -> bool:
    return pool.has_model and pool.actors.num_cpus is None and not pool.actors.num_gpus


def _is_light(pool: Pool) -> bool:
    """Whether it is one light actor whose CPUs the config does not set; several are to compute."""
    actors = pool.actors
    is_unset = actors.num_cpus is None and not (actors.num_gpus or actors.resources)
    return pool.is_light and is_unset and actors.max == 1
