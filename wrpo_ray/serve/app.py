"""The application on Ray Serve: `build` for a RayService, `run` for `wrpo serve`."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.llm import build_llm_deployment

from wrpo_ray import config
from wrpo_ray.config import RewardConfig, ServeConfig, ServedModel
from wrpo_ray.errors import WrpoError
from wrpo_ray.llm.vllm_settings import engine_env
from wrpo_ray.runtime.cluster import keeping_sigterm, protect_token
from wrpo_ray.runtime.placement import thread_env
from wrpo_ray.runtime.temporary import shorten_temporary_folders
from wrpo_ray.serve.backends import MAX_BATCH, ongoing
from wrpo_ray.serve.check import checked, lines
from wrpo_ray.serve.headers import CALLBACK
from wrpo_ray.serve.ingress import INGRESS, Ingress
from wrpo_ray.serve.keys import CHECK_INTERVAL, Keys
from wrpo_ray.serve.models import NO_PROMPT_LOGS, Model, Reward, engine_settings
from wrpo_ray.serve.proxy import local_proxy

APP_NAME = "wrpo"
"""The application's name on Ray Serve."""
INGRESS_CPUS = 0.25
INGRESS_ONGOING = 4096
"""Requests in an ingress: far above what keys and queues admit, so that those reject first."""
SURGE = 100
"""Replicas, in percent, that a change starts beside the old ones, which answer until those are
ready. With Ray Serve's default, 0, a change stops the only replica first."""


def build(args: dict[str, Any]) -> Application:
    """Return the application for a tree of `ServeConfig`; models are checked before any starts.

    Raises:
        UserError: the tree, a model or the keys are wrong.
    """
    return application(checked(config.serving(args)))


def application(settings: ServeConfig) -> Application:
    """Return the application for settings that `check.checked` returned."""
    change = {
        "graceful_shutdown_timeout_s": settings.timeout + 5,
        "max_surge_percent": SURGE,
    }
    models = {model.name: _deployment(model, settings, change) for model in settings.models}
    most = max(ongoing(model, settings) for model in settings.models)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        **_replicas(*settings.ingresses, most),
        ray_actor_options={"num_cpus": INGRESS_CPUS, "runtime_env": {"env_vars": CALLBACK}},
        max_ongoing_requests=INGRESS_ONGOING,
        max_queued_requests=INGRESS_ONGOING,
        backpressure_config={"status_code": 429, "retry_after_s": 2},
        **change,
    )
    reward = settings.reward and _reward(settings.reward, settings, change)
    return ingress.bind(settings, lines(settings), models, reward)


def _reward(reward: RewardConfig, settings: ServeConfig, change: dict[str, Any]) -> Application:
    actors = reward.actors
    env = engine_env(on_gpu=actors.num_gpus > 0) | thread_env(actors.cpus)
    deployment = serve.deployment(
        Reward,
        name="Reward",
        ray_actor_options={
            "num_cpus": actors.cpus,
            "num_gpus": actors.num_gpus,
            "resources": actors.resources,
            "runtime_env": {"env_vars": env},
        },
        max_ongoing_requests=MAX_BATCH,
        **_replicas(actors.min, actors.max, MAX_BATCH),
        **change,
    )
    return deployment.bind(reward)


def _replicas(least: int, most: int, ongoing: int) -> dict[str, Any]:
    """Return the number of replicas, or the bounds of autoscaling where it may change."""
    if least == most:
        return {"num_replicas": least}
    scaling = {"min_replicas": least, "max_replicas": most}
    return {"autoscaling_config": scaling | {"target_ongoing_requests": max(1, ongoing // 2)}}


def _deployment(model: ServedModel, settings: ServeConfig, change: dict[str, Any]) -> Application:
    deployment = {
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": ongoing(model, settings),
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        **_replicas(model.actors.min, model.actors.max, ongoing(model, settings)),
        **change,
    }
    return build_llm_deployment(
        engine_settings(model, settings, model.model, deployment=deployment),
        bind_kwargs={"model": model, "settings": settings},
        deployment_cls=Model,
    )


def run(settings: ServeConfig, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serve checked settings until a signal arrives, then finish the running requests.

    Connects to the cluster at RAY_ADDRESS, or starts Ray on this machine. A Serve that runs on the
    cluster keeps its other applications and its address.
    """
    os.environ |= NO_PROMPT_LOGS | {"RAY_BACKEND_LOG_LEVEL": "fatal"}
    address = os.environ.get("RAY_ADDRESS", "local")
    alone: dict[str, Any] = {}
    with ExitStack() as until_the_end:
        if address == "local":
            shorten_temporary_folders()
            # All replicas share the cores; Ray would never start those that do not fit.
            cpus = max(os.cpu_count() or 1, math.ceil(_cpus(settings)))
            alone = {"include_dashboard": False, "num_cpus": cpus}
            host = until_the_end.enter_context(local_proxy(host, settings))
        protect_token(create=address == "local")
        with keeping_sigterm():  # Ray's own handler aborts after three seconds
            ray.init(address=address, log_to_driver=False, logging_level="warning", **alone)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        until_the_end.callback(ray.shutdown)
        until_the_end.callback(_drain, settings.timeout + 15)
        serve.start(http_options=HTTPOptions(host=host, port=port))
        _start(settings)
        ready()
        keys = Keys(lines(settings), settings.keys)
        keys.listen(_tell)
        while True:  # a signal raises
            time.sleep(CHECK_INTERVAL)
            keys.check()


def _tell(problems: list[str]) -> None:
    """Tell the operator what is wrong with the keys, which the ingress logs where nobody looks."""
    for problem in problems:
        print(f"wrpo: warning: {problem}", file=sys.stderr, flush=True)


def _cpus(settings: ServeConfig) -> float:
    """Return the CPUs that Ray reserves for all initial replicas."""
    models = sum(m.actors.min * m.parts * m.actors.cpus for m in settings.models)
    reward = settings.reward.actors if settings.reward else None
    return (
        models + settings.ingresses[0] * INGRESS_CPUS + (reward.min * reward.cpus if reward else 0)
    )


def _start(settings: ServeConfig) -> None:
    try:
        serve.run(application(settings), name=APP_NAME, route_prefix="/")
    except (RuntimeError, TimeoutError) as error:
        why = " ".join(str(error).split())[-500:]
        raise WrpoError(f"serve: the models did not start: {why}") from error


def _drain(seconds: float) -> None:
    """Accept no more requests, and wait for the running ones."""
    serve.delete(APP_NAME, _blocking=False)  # Ray's own wait ends after a minute
    deadline = time.monotonic() + seconds
    while APP_NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.2)
