"""CPUs of actors and workers whose config names none: by Ray's resources, cores and neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from wrpo_ray.config import Actors, EndpointConfig, ModelConfig, RewardConfig, WrpoConfig
from wrpo_ray.llm.rendering import OWN
from wrpo_ray.runtime import cores
from wrpo_ray.runtime.cores import NONE, Machine, machine_of, share, this_machine, with_shares
from wrpo_ray.runtime.placement import SPINS, Pool, thread_env
from wrpo_ray.stages.generate import stage as generate
from wrpo_ray.stages.score import stage as score
from wrpo_ray.stages.train.stage import Train, _needs, _with_shares
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

EIGHT = Machine(8, 8)


def model_pool(**actors: Any) -> Pool:
    return Pool("model", Actors(**actors), has_model=True)


def cpus(pools: list[Pool]) -> list[float]:
    return [pool.needs["CPU"] for pool in pools]


@pytest.mark.parametrize(
    ("resources", "physical", "threads", "expected"),
    [
        ({"CPU": 8.0}, 8, None, (8, 8)),
        ({"CPU": 16.0}, 8, None, (8, 8)),  # two threads on each core
        ({"CPU": 3.0}, 8, None, (3, 3)),  # cluster.num_cpus, or a container's limit
        ({"CPU": 8.0}, None, None, (8, 8)),  # the system does not tell
        ({"CPU": 8.0}, 8, "1", (8, 1)),
        ({"CPU": 8.0}, 8, "64", (8, 8)),
        ({"CPU": 8.0}, 8, "4,2", (8, 8)),  # OpenMP's form for nested regions
        ({"CPU": 8.0}, 8, "0", (8, 1)),
        ({"CPU": 64.0, "GPU": 1.0}, 64, None, NONE),
        ({}, 8, None, (0, 1)),
    ],
)
def test_the_machine_is_what_ray_and_the_system_say(resources, physical, threads, expected):
    assert machine_of(resources, physical, threads) == expected


@pytest.mark.parametrize(
    ("machine", "unset", "given", "expected"),
    [
        (EIGHT, 1, 0, 8),
        (EIGHT, 2, 0, 4),
        (EIGHT, 3, 0, 2),
        (EIGHT, 2, 1, 3),
        (EIGHT, 2, 0.5, 3),
        (EIGHT, 20, 0, 1),
        (EIGHT, 1, 64, 1),
        (Machine(8, 2), 1, 0, 2),  # OMP_NUM_THREADS=2
        (Machine(2, 2), 1, 1, 1),
        (NONE, 1, 0, 1),
    ],
)
def test_a_share_is_never_more_than_what_is_left_and_at_least_one(machine, unset, given, expected):
    assert share(machine, unset, given) == expected


def test_a_cluster_that_was_there_gives_one_cpu(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0})
    monkeypatch.setattr(cores, "is_own_ray", lambda: False)
    assert this_machine() == NONE
    monkeypatch.setattr(cores, "is_own_ray", lambda: True)
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: 64 if logical else 32)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert this_machine() == (32, 32)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert this_machine() == (32, 1)


def test_pools_that_run_at_once_share_the_cores():
    given = Pool("given", Actors(num_cpus=2, max=2), has_model=True)
    plain = Pool("plain", Actors())
    assert cpus(with_shares([model_pool()], machine=EIGHT)) == [8]
    assert cpus(with_shares([model_pool(max=2)], machine=EIGHT)) == [4]
    assert cpus(with_shares([model_pool(), model_pool()], machine=EIGHT)) == [4, 4]
    assert cpus(with_shares([model_pool()], [plain], machine=EIGHT)) == [7]
    assert cpus(with_shares([model_pool(), given], machine=EIGHT)) == [4, 2]
    assert cpus(with_shares([given, plain], [model_pool()], machine=EIGHT)) == [2, 1]
    assert cpus(with_shares([model_pool(num_gpus=1)], machine=EIGHT)) == [1]
    assert cpus(with_shares([model_pool()], machine=NONE)) == [1]


@pytest.mark.parametrize("machine", [Machine(n, n) for n in (1, 2, 3, 5, 8, 12)])
def test_threads_never_exceed_the_cores_where_one_cpu_each_would_not(machine):
    """Over all numbers of actors of two pools, one of a phase beside."""
    for one in range(1, 13):
        for other in range(1, 13):
            a, b = model_pool(max=one), model_pool(max=other)
            (x,), (y,) = with_shares([a], [b], machine), with_shares([b], [a], machine)
            assert x.needs == y.needs
            threads = one * x.needs["CPU"] + other * y.needs["CPU"]
            assert threads <= max(machine.cores, one + other)


def test_what_computes_takes_a_share():
    """Engines and reward models do; endpoints, verifiers and functions have one CPU."""
    model = ModelConfig(name="m", model="m")
    server = ModelConfig(name="m", model="m", endpoint=EndpointConfig(url="http://a/v1"))
    classifier, verifier = RewardConfig(model="r"), RewardConfig(verifier="number")
    pools = [generate.pool_of(model), generate.pool_of(server)]
    pools += [score.pool_of(classifier), score.pool_of(verifier)]
    assert [cpus(with_shares([pool], machine=EIGHT)) for pool in pools] == [[8], [1], [8], [1]]


def test_work_without_a_model_leaves_the_cores_to_engines_beside_it():
    """Verifiers, functions, judges and endpoints; not programs, or what the config gives CPUs."""
    two, model = Machine(2, 2), ModelConfig(name="m", model="m")
    engine = generate.pool_of(model)
    server = ModelConfig(name="s", model="s", endpoint=EndpointConfig(url="http://a/v1"))
    for light in (
        score.pool_of(RewardConfig(verifier="number")),
        score.pool_of(RewardConfig(function="math:sqrt")),
        generate.pool_of(server),
    ):
        assert cpus(with_shares([light], [engine], two)) == [0]
        assert cpus(with_shares([engine], [light], two)) == [2]
        assert cpus(with_shares([light, engine], machine=two)) == [0, 2]
        assert cpus(with_shares([light], machine=two)) == [1]
        assert cpus(with_shares([light, engine], machine=NONE)) == [1, 1]
    for heavy in (
        score.pool_of(RewardConfig(verifier="code")),
        score.pool_of(RewardConfig(function="math:sqrt", actors=Actors(num_cpus=1))),
        score.pool_of(RewardConfig(function="math:sqrt", actors=Actors(max=2))),
    ):
        n = heavy.actors.max
        assert cpus(with_shares([heavy], [engine], EIGHT)) == [1]
        assert cpus(with_shares([engine], [heavy], EIGHT)) == [8 - n]


def training(**settings: Any) -> Train:
    at = Folder("m")
    return Train(Step("wrpo"), Step("rows"), at, "m", WrpoConfig(**settings), 3, OWN)


@pytest.mark.parametrize(
    ("settings", "at_once", "expected"),
    [
        ({}, 1, 8),
        ({"workers": 2}, 1, 4),
        ({"workers": 2}, 2, 2),
        ({"num_cpus": 3}, 1, 3),
        ({"num_gpus": 1}, 1, 1),
    ],
)
def test_workers_of_trainings_share_the_cores(settings, at_once, expected):
    ((job,),) = _with_shares([[training(**settings)]], at_once, EIGHT)
    assert _needs(job, 1)["CPU"] == expected
    assert job.config.identity() == training(**settings).config.identity()


def test_several_threads_wait_for_each_other_asleep_unless_the_user_says_how(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert thread_env(0.5) == thread_env(1) == {"OMP_NUM_THREADS": "1"}
    assert thread_env(2.5) == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": SPINS}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert thread_env(2.5) == {"OMP_NUM_THREADS": "2"}
