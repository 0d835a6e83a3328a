"""Resource requests of a config's steps, a RayJob's driver and a RayService's replicas."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from wrpo_ray.config import Config, ModelConfig, Section, TrainConfig, serving
from wrpo_ray.errors import UserError
from wrpo_ray.kubernetes.ray_objects import Job
from wrpo_ray.kubernetes.serve_config import own_applications
from wrpo_ray.runtime.placement import NO_GPU_NODES, Pool, selector_for

Needs = dict[str, float]
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Request:
    """Bundles of resources, each on one node, that are needed at the same time."""

    what: str
    """The step or process, as users know it."""
    bundles: tuple[Needs, ...]
    """The bundles of one actor, engine or training run."""
    count: int = 1
    """The number of actors, engines or training runs."""
    parts: int = 1
    """Workers of one engine, which need nodes of one replica."""
    selector: dict[str, str] = field(default_factory=dict)
    """Ray's label selector of each bundle."""


def of_config(config: Config) -> Iterator[Request]:
    """Yield one request for each step: its minimum of actors, or all workers of a training run.

    Models and rewards are found anywhere in the config.
    """
    yield Request("steps without a model", ({"CPU": 1.0},), selector=NO_GPU_NODES)
    models = {(m.name, repr(m.actors), m.parts): m for m in _sections(config, ModelConfig)}
    for model in models.values():
        yield of_model(f"generate {model.name}", model)
    for reward in config.reward.each if config.reward else ():
        yield _of_pool(Pool(f"score with {reward.name}", reward.actors))
    if config.target:
        if config.sft:
            yield from _of_training("sft", config.sft)
        yield from _of_training("wrpo", config.wrpo)


def _sections(value: Any, kind: type[S]) -> Iterator[S]:
    """Yield all sections of a type, in the order of the config."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Section):
        for name in type(value).model_fields:
            yield from _sections(getattr(value, name), kind)
    elif isinstance(value, tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _sections(part, kind)


def of_model(what: str, model: ModelConfig) -> Request:
    """Return the minimum of engines; one with parts requests a bundle for each part."""
    if model.parts == 1:
        return _of_pool(Pool(what, model.actors))
    part = _given({"GPU": model.actors.num_gpus} | model.actors.resources)
    engine = ({"CPU": model.actors.cpus}, *[part] * model.parts)
    return Request(what, engine, model.actors.min, model.parts)


def _of_pool(pool: Pool) -> Request:
    return Request(pool.what, (_given(pool.needs),), pool.actors.min, selector=pool.selector)


def _of_training(name: str, config: TrainConfig) -> Iterator[Request]:
    worker = _given({"CPU": config.cpus, "GPU": config.num_gpus} | config.resources)
    selector = selector_for(config.num_gpus, config.resources)
    yield Request(name, (worker,) * (config.min_workers or config.workers), selector=selector)
    if config.reference_actors:
        yield _of_pool(Pool(f"{name}'s reference", config.reference_actors))


def _given(needs: Needs) -> Needs:
    return {name: float(n) for name, n in needs.items() if n}


def of_driver(job: Job) -> Iterator[Request]:
    """Yield the request of the entrypoint, if it has one; otherwise it runs on the head."""
    needs = {"CPU": job.entrypoint_num_cpus, "GPU": job.entrypoint_num_gpus}
    if job.entrypoint_resources:
        needs |= json.loads(job.entrypoint_resources)
    if any(needs.values()):
        yield Request("entrypoint", (_given(needs),))


def of_serving(serve: dict[str, Any]) -> Iterator[Request]:
    """Yield the minimum replicas of a Serve config: its deployments, and the served models."""
    for app in serve.get("applications", []):
        for deployment in app.get("deployments", []):
            yield _of_deployment(f"serve {deployment.get('name')}", deployment)
    for _, arguments in own_applications(serve):
        with suppress(UserError):  # reported by `serve_config.read`
            served = serving(arguments)
            for model in served.models:
                yield of_model(f"serve {model.name}", model)
            if served.reward:
                pool = Pool(f"serve {served.reward.name}", served.reward.actors)
                yield replace(_of_pool(pool), selector={})  # Serve places it


def _of_deployment(what: str, deployment: dict[str, Any]) -> Request:
    options = deployment.get("ray_actor_options") or {}
    needs = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0)}
    bundles = deployment.get("placement_group_bundles") or [needs | options.get("resources", {})]
    scaling = deployment.get("autoscaling_config") or {}
    count = scaling.get("min_replicas", deployment.get("num_replicas"))
    return Request(what, tuple(map(_given, bundles)), count if isinstance(count, int) else 1)
