"""The ingress on Ray Serve: the endpoint's process and its handles of models and reward."""

import asyncio
import logging
import math
import time
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Gauge, Histogram

from wrpo_ray.config import ServeConfig
from wrpo_ray.data.records import Message
from wrpo_ray.serve.api import create
from wrpo_ray.serve.backends import Call, LostError, Rejection, Replies
from wrpo_ray.serve.errors import overloaded
from wrpo_ray.serve.keys import Keys
from wrpo_ray.stages.score.base import Item

STATUS_TTL = 2.0
"""Seconds for which a status of the replicas is reused."""
STATUS_WAIT = 5.0
"""Seconds that Serve's controller has to tell the status."""
LATENCY_BUCKETS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0]
"""Boundaries of the histograms, in seconds."""
LOG = logging.getLogger("ray.serve")


class ModelReplicas:
    """The replicas of a model, as a `Backend`."""

    def __init__(self, handle: DeploymentHandle):
        self._deployment = handle.deployment_name
        # Over gRPC, which is cheaper than Ray's objects for small texts (ADR 13).
        self._ask = handle.options(stream=True, method_name="answer", _by_reference=False)
        self._status_at, self._is_ready = -math.inf, False
        self._asking: asyncio.Task[None] | None = None

    async def ask(self, call: Call, body: dict[str, Any]) -> Replies:
        """Pass a request to a replica."""
        replies = self._ask.remote(call, body)
        try:
            async for reply in replies:
                yield reply
        except BackPressureError:
            raise overloaded() from None
        except (
            Exception
        ) as error:  # of Ray, Serve or gRPC; a replica returns its own as a Rejection
            LOG.warning("%s lost a replica: %s", self._deployment, type(error).__name__)
            raise LostError from None
        except BaseException:  # the client left; of a call that failed, cancel raises the error
            with suppress(Exception):
                replies.cancel()
            raise

    async def ready(self) -> bool:
        """Whether a replica is running; the status may be `STATUS_TTL` old.

        The controller is asked once at a time, however many clients want to know; it has
        `STATUS_WAIT` to answer, else no replica counts as running.
        """
        if self._asking is None and time.monotonic() > self._status_at + STATUS_TTL:
            self._asking = asyncio.create_task(self._ask_controller())
        if self._asking is not None:
            _, late = await asyncio.wait({self._asking}, timeout=STATUS_WAIT)
            return self._is_ready and not late
        return self._is_ready

    async def _ask_controller(self) -> None:
        try:
            self._is_ready = await asyncio.to_thread(_is_running, self._deployment)
        except Exception as error:
            LOG.warning("the status of %s is unknown: %s", self._deployment, type(error).__name__)
            self._is_ready = False
        self._status_at, self._asking = time.monotonic(), None


def _is_running(deployment: str) -> bool:
    applications = serve.status().applications.values()
    found = (a.deployments[deployment] for a in applications if deployment in a.deployments)
    return any(d.replica_states.get("RUNNING", 0) > 0 for d in found)


class RewardReplicas:
    """The replicas of the reward, as a `Scorer`."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def score(self, messages: list[Message], text: str) -> float | Rejection:
        """Pass an answer to a replica."""
        try:
            reward: float | Rejection = await self._handle.score.remote(Item(messages, text, None))
            return reward
        except BackPressureError:
            raise overloaded() from None
        except (RayError, RayServeException) as error:
            LOG.warning("the reward lost a replica: %s", type(error).__name__)
            raise LostError from None


class Metrics:
    """Metrics that Prometheus scrapes from Ray's nodes, as a `Recorder`; Serve adds its own."""

    def __init__(self) -> None:
        def counter(name: str, text: str, *tags: str) -> Counter:
            return Counter(f"wrpo_serve_{name}", description=text, tag_keys=tags)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(
                f"wrpo_serve_{name}",
                description=text,
                boundaries=LATENCY_BUCKETS,
                tag_keys=("model",),
            )

        self._requests = counter("requests", "Requests by outcome.", "model", "outcome")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "model")
        self._answer = counter("answer_tokens", "Tokens of answers.", "model")
        self._latency = histogram("latency_seconds", "Seconds for whole answers.")
        self._key_problems = Gauge(
            "wrpo_serve_key_problems",
            description="Lines of the keys that admit nobody; 1 too for a missing or empty file.",
        )
        self._first_token = histogram("first_token_seconds", "Seconds to a stream's first tokens.")

    def finished(self, model: str, outcome: str, seconds: float) -> None:
        """Count a request."""
        self._requests.inc(tags={"model": model, "outcome": outcome})
        if outcome == "200":
            self._latency.observe(seconds, tags={"model": model})

    def first_token(self, model: str, seconds: float) -> None:
        """Observe the time to the first tokens."""
        self._first_token.observe(max(seconds, 1e-6), tags={"model": model})

    def tokens(self, model: str, prompt: int, answer: int) -> None:
        """Count tokens."""
        self._prompt.inc(prompt, tags={"model": model})
        if answer:
            self._answer.inc(answer, tags={"model": model})

    def keys(self, problems: list[str]) -> None:
        """Log what is wrong with the keys, and set its number."""
        self._key_problems.set(len(problems))
        for problem in problems:
            LOG.error("keys: %s", problem)


class Ingress:
    """The endpoint's process; `keys` are the lines of the environment, which hold hashes."""

    def __init__(
        self,
        settings: ServeConfig,
        keys: str | None,
        models: dict[str, Any],
        reward: DeploymentHandle | None,
    ):
        self._settings, self._keys, self._models = settings, keys, models
        self._scorer = reward and RewardReplicas(reward)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        backends = {m.name: ModelReplicas(self._models[m.name]) for m in self._settings.models}
        names = {n: backends[m.name] for m in self._settings.models for n in (m.name, *m.adapters)}
        keys = Keys(self._keys, self._settings.keys)
        metrics = Metrics()
        keys.listen(metrics.keys)
        return create(self._settings, names, keys, metrics, self._scorer)
