"""The ingress on Ray Serve: the endpoint's process and its handles of models and reward."""

import asyncio
import logging
import math
import time
from contextlib import suppress
from typing import Any, NoReturn

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Gauge, Histogram

from wrpo_ray.config import ServeConfig
from wrpo_ray.data.records import Message
from wrpo_ray.serve.api import create
from wrpo_ray.serve.backends import MAX_BATCH, Call, LostError, Rejection, Replies, ongoing
from wrpo_ray.serve.keys import Keys
from wrpo_ray.serve.proxy import bind_to_loopback
from wrpo_ray.stages.score.base import Item

INGRESS = "Ingress"
"""The name of the deployment of the endpoint's processes."""
STATUS_TTL, STATUS_WAIT = 2.0, 10.0
"""Seconds from one question for the replicas to the next; without an answer, none counts as ready
after `STATUS_WAIT`."""
LATENCY_BUCKETS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0]
"""Boundaries of the histograms, in seconds."""
LOG = logging.getLogger("ray.serve")


class Running:
    """The number of running replicas of each deployment; at most about `STATUS_TTL` old."""

    def __init__(self, app: str):
        self._app, self._told_at = app, -math.inf
        self._counts: dict[str, int] = {}

    def count(self, deployment: str) -> int:
        """Return a deployment's number."""
        return self._counts.get(deployment, 0)

    def is_running(self, deployment: str) -> bool:
        """Whether a replica of a deployment runs, as far as was heard of late."""
        is_known = time.monotonic() < self._told_at + STATUS_WAIT
        return is_known and self.count(deployment) > 0

    async def watch(self) -> NoReturn:
        """Ask Serve's controller again and again, however many clients want to know."""
        while True:
            with suppress(Exception):  # while the controller is away, the last numbers hold
                self._counts = await asyncio.to_thread(self._ask)
                self._told_at = time.monotonic()
            await asyncio.sleep(STATUS_TTL)

    def _ask(self) -> dict[str, int]:
        deployments = serve.status().applications[self._app].deployments
        return {name: d.replica_states.get("RUNNING", 0) for name, d in deployments.items()}

    def share(self, deployment: str, ongoing: int) -> int:
        """Return how many requests one ingress may have at replicas that take `ongoing` each."""
        return math.ceil(max(1, self.count(deployment)) * ongoing / self.ingresses())

    def ingresses(self) -> int:
        """Return the number of ingresses."""
        return max(1, self.count(INGRESS))


class ModelReplicas:
    """The replicas of a model, as a `Backend`."""

    def __init__(self, handle: DeploymentHandle, running: Running, ongoing: int):
        self._deployment, self._running, self._ongoing = handle.deployment_name, running, ongoing
        # Over gRPC, which is cheaper than Ray's objects for small texts (ADR 13).
        self._ask = handle.options(stream=True, method_name="answer", _by_reference=False)

    async def ask(self, call: Call, body: dict[str, Any], key: str) -> Replies:
        """Pass a request to a replica."""
        replies = self._ask.remote(call, body, key)
        try:
            async for reply in replies:
                yield reply
        except (
            Exception
        ) as error:  # of Ray, Serve or gRPC; a replica returns its own as a Rejection
            LOG.warning("%s lost a replica: %s", self._deployment, type(error).__name__)
            raise LostError from None
        except BaseException:  # the client left; of a call that failed, cancel raises the error
            with suppress(Exception):
                replies.cancel()
            raise

    def places(self) -> int:
        """Return how many requests its replicas take from this ingress."""
        return self._running.share(self._deployment, self._ongoing)

    async def ready(self) -> bool:
        """Whether a replica is running."""
        return self._running.is_running(self._deployment)


class RewardReplicas:
    """The replicas of the reward, as a `Scorer`."""

    def __init__(self, handle: DeploymentHandle, running: Running, ongoing: int):
        self._handle, self._running, self._ongoing = handle, running, ongoing

    async def score(self, messages: list[Message], text: str) -> float | Rejection:
        """Pass an answer to a replica."""
        try:
            reward: float | Rejection = await self._handle.score.remote(Item(messages, text, None))
            return reward
        except (RayError, RayServeException) as error:
            LOG.warning("the reward lost a replica: %s", type(error).__name__)
            raise LostError from None

    def places(self) -> int:
        """Return how many answers its replicas take from this ingress."""
        return self._running.share(self._handle.deployment_name, self._ongoing)


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
        bind_to_loopback()
        self._settings, self._keys, self._models = settings, keys, models
        self._running = Running(serve.get_replica_context().app_name)
        self._scorer = reward and RewardReplicas(reward, self._running, MAX_BATCH)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        running = self._running
        self._watching = asyncio.create_task(running.watch())
        backends = {
            m.name: ModelReplicas(self._models[m.name], running, ongoing(m, self._settings))
            for m in self._settings.models
        }
        names = {n: backends[m.name] for m in self._settings.models for n in (m.name, *m.adapters)}
        keys = Keys(self._keys, self._settings.keys)
        metrics = Metrics()
        keys.listen(metrics.keys)
        return create(self._settings, names, keys, metrics, self._scorer, running.ingresses)
