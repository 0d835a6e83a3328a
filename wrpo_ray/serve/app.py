"""Models on Ray Serve LLM and the endpoint before them: `build` for RayService and `wrpo serve`.

This module speaks Ray, its neighbours don't.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment
from ray.serve.metrics import Counter, Histogram

from wrpo_ray import config
from wrpo_ray.config import (
    Actors,
    RewardConfig,
    ServeConfig,
    ServedModel,
)
from wrpo_ray.data.records import Message
from wrpo_ray.errors import UserError, WrpoError
from wrpo_ray.llm.architecture import Use, check_weights
from wrpo_ray.llm.chat import end_ids
from wrpo_ray.llm.rendering import Template, load_tokenizer
from wrpo_ray.llm.vllm import CPU_ENGINE, engine_env
from wrpo_ray.runtime.cluster import keeping_sigterm
from wrpo_ray.runtime.placement import thread_env
from wrpo_ray.runtime.temporary import shorten_temporary_folders
from wrpo_ray.serve.api import (
    DONE,
    Call,
    LostError,
    Refusal,
    create,
)
from wrpo_ray.serve.body import problem_of
from wrpo_ray.serve.check import checked, lines
from wrpo_ray.serve.errors import overloaded
from wrpo_ray.serve.keys import Keys
from wrpo_ray.serve.prompts import Prompts
from wrpo_ray.stages.score.base import Item, MissingReferenceError, TooLongError
from wrpo_ray.stages.score.rewards import load_reward
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.files import read_text

APP = "wrpo"
"""The application's name on Ray Serve."""
QUIET = {"RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": "0"}
"""Ray Serve LLM writes prompts into its logs otherwise."""
PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
"""HAProxy in the place of Ray Serve's own proxy (ADR 13)."""
PROXIED = ("127.0.0.1", "localhost", "0.0.0.0")
"""Hosts at which HAProxy finds the ingress, which it looks for at 127.0.0.1."""
INGRESS_CPUS = 0.25
INGRESS_ONGOING = 4096
"""Requests in an ingress; far above what keys and queues let in, so that those tell clients."""
LOOK_AGAIN = 2.0
"""Seconds for which a look at the replicas holds."""
SECONDS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0]
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM makes room for."""
ANSWERS = 32
"""Answers that a replica of the reward takes at once, at the most."""
FAILED = "the engine failed"
LOG = logging.getLogger("ray.serve")


# --- a model ---------------------------------------------------------------------------------


class Model(LLMServer):
    """A replica of a model: Ray's own, asked with plain dictionaries and answering in JSON texts.

    So the ingress need not import vLLM, and records are read and written here, where there are
    many processes for it.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, llm_config: LLMConfig, model: ServedModel, max_tokens: int
    ):
        own = await asyncio.to_thread(_on_this_node, model, max_tokens)
        folder = Path(own.model_loading_config.model_source)
        tokenizer = await asyncio.to_thread(load_tokenizer, folder, Template.of(model))
        if model.chat_template:  # vLLM takes it for chats with tools, too
            tokenizer.chat_template = tokenizer.get_chat_template()
        self._prompts = Prompts(tokenizer, end_ids(tokenizer, folder))
        is_one = model.parts == 1 and not model.actors.num_gpus
        await super().__init__(own, engine_cls=_engine_of_one() if is_one else None)

    async def answer(
        self, call: Call, body: dict[str, Any]
    ) -> AsyncGenerator[list[str] | Refusal, None]:
        """Answer as `api.Backend.ask` does; whatever goes wrong is a `Refusal`."""
        try:
            async for reply in self._answer(call, body):
                yield reply
        except Exception as error:  # its text may quote the prompt, and Serve would log it
            LOG.error("the engine failed: %s", type(error).__name__)
            is_dead = type(error).__name__ == "EngineDeadError"
            yield Refusal(503 if is_dead else 500, FAILED)

    async def _answer(
        self, call: Call, body: dict[str, Any]
    ) -> AsyncGenerator[list[str] | Refusal, None]:
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

        kind = {"chat": ChatCompletionRequest, "completions": CompletionRequest}[call]
        try:
            if call == "chat":
                body = await self._prompts.add(body)
            request = kind.model_validate(self._prompts.stopping(body))
        except Exception as error:  # some of vLLM's checks fail on what they do not expect
            yield _unreadable(error, body)
            return
        async for reply in await getattr(self, call)(request):
            items = reply if isinstance(reply, list) else [reply]
            if not isinstance(items[0], str):  # a whole answer, or vLLM's record of an error
                refused = getattr(items[0], "error", None)
                yield (
                    _refusal(**refused.model_dump())
                    if refused
                    else [items[0].model_dump_json(), DONE]
                )
                return
            texts = [text.removeprefix("data: ").strip() for text in items]
            if broken := [text for text in texts if text.startswith('{"error"')]:
                # vLLM goes on with [DONE] after it, as if the answer were whole.
                yield _refusal(**json.loads(broken[0])["error"], otherwise=503)
                return
            yield texts


def _engine_of_one() -> Any:
    """The engine for one CPU, as `vllm serve` starts it.

    Ray Serve LLM gives the model a process of its own, and the two spin while they wait.
    """
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine  # it imports vLLM

    class EngineOfOne(VLLMEngine):
        def _start_async_llm_engine(self, args: Any, config: Any, *rest: Any) -> Any:
            config.parallel_config.distributed_executor_backend = "uni"
            return super()._start_async_llm_engine(args, config, *rest)

    return EngineOfOne


def _unreadable(error: Exception, body: dict[str, Any]) -> Refusal:
    """What is wrong with a request that vLLM does not take, without what was given."""
    from vllm.exceptions import VLLMClientError

    if isinstance(error, ValidationError):
        where, problem = problem_of(error, body)
        return Refusal(400, f"{where}: {problem}" if where else problem, where or None)
    if isinstance(error, VLLMClientError):  # no ValueError
        return Refusal(400, str(error.args[0]), getattr(error, "parameter", None))
    return Refusal(400, str(error) if isinstance(error, ValueError) else "vLLM cannot read it")


def _refusal(
    code: int, message: str, param: str | None = None, otherwise: int = 500, **_: Any
) -> Refusal:
    """What is made of vLLM's record of an error; those that are not the client's stay inside."""
    is_clients = 400 <= code < 500
    return Refusal(code, message, param) if is_clients else Refusal(otherwise, FAILED)


def _on_this_node(model: ServedModel, max_tokens: int) -> LLMConfig:
    """The engine's settings, with the model's files where they lie here."""
    folders = {name: Folder(uri).local() for name, uri in model.adapters.items()}
    source = Folder(model.model).local()
    check_weights(source, Use.ANSWERS)
    return engine_settings(model, max_tokens, str(source), adapters=_adapters(folders, model))


def engine_settings(
    model: ServedModel,
    max_tokens: int,
    source: str,
    *,
    adapters: dict[str, Any] | None = None,
    deployment: dict[str, Any] | None = None,
) -> LLMConfig:
    """Ray's settings of a model whose files are at `source`."""
    actors = model.actors
    on_cpu = not actors.num_gpus
    engine: dict[str, Any] = {
        "dtype": model.dtype,
        "quantization": model.quantization,
        "max_model_len": model.max_model_len,
        "tensor_parallel_size": model.tensor_parallel,
        "pipeline_parallel_size": model.pipeline_parallel,
        "chat_template": model.chat_template and read_text(model.chat_template, "chat_template"),
        "default_chat_template_kwargs": model.chat_template_args or None,
        # An upper bound that holds where a client gives none.
        "override_generation_config": {"max_new_tokens": max_tokens},
        "enable_log_requests": False,
        **(CPU_ENGINE if on_cpu else {}),
        **(adapters or {}),
    }
    chosen = {name: value for name, value in engine.items() if value is not None}
    bundle = {"CPU": actors.num_cpus, "GPU": actors.num_gpus, **actors.resources}
    env = engine_env(on_gpu=not on_cpu) | QUIET | thread_env(actors.num_cpus)
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": source},
        engine_kwargs=chosen | model.engine,
        placement_group_config={"bundle_per_worker": {k: n for k, n in bundle.items() if n}},
        runtime_env={"env_vars": env},
        deployment_config=deployment or {},
    )


def _adapters(folders: dict[str, Path], model: ServedModel) -> dict[str, Any]:
    """Settings of LoRA adapters in vLLM, by the names that clients use.

    On the CPU vLLM (0.29) takes a request without an adapter for one of the last place of all,
    where it is in a batch with others; so that place stays empty there.
    """
    if not folders:
        return {}
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    ranks = [json.loads((f / "adapter_config.json").read_bytes())["r"] for f in folders.values()]
    return {
        "enable_lora": True,
        "max_loras": len(folders) + (not model.actors.num_gpus),
        "max_lora_rank": next(rank for rank in RANKS if rank >= max(ranks)),
        "lora_modules": [LoRAModulePath(name=n, path=str(f)) for n, f in folders.items()],
    }


# --- the reward ------------------------------------------------------------------------------


class Reward:
    """A replica of the reward, which takes several answers at once."""

    def __init__(self, reward: RewardConfig):
        folders = [Folder(part.model).local() if part.model else None for part in reward.parts]
        self._reward = load_reward(reward, folders)

    @serve.batch(max_batch_size=ANSWERS, batch_wait_timeout_s=0.01)
    async def score(self, items: list[Item]) -> list[float | Refusal]:
        """A reward for each answer; one that cannot be scored is a `Refusal`."""
        outcomes = await asyncio.to_thread(self._reward.score, items)
        return [_refused(o) if isinstance(o, Exception) else o for o in outcomes]


def _refused(error: Exception) -> Refusal:
    """What a client is told; the text of an error that is not ours may hold anything."""
    if isinstance(error, TooLongError | MissingReferenceError | UserError):
        return Refusal(400, str(error))
    LOG.error("an answer could not be scored: %s", type(error).__name__)
    return Refusal(500, "the answer could not be scored")


class Scored:
    """The reward's replicas (`api.Scorer`)."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def score(self, messages: list[Message], text: str) -> float | Refusal:
        """Pass an answer to a replica."""
        try:
            return await self._handle.score.remote(Item(messages, text, None))
        except BackPressureError:
            raise overloaded() from None
        except (RayError, RayServeException) as error:
            LOG.warning("the reward lost a replica: %s", type(error).__name__)
            raise LostError from None


# --- the ingress -----------------------------------------------------------------------------


class Served:
    """A model's replicas (`api.Backend`)."""

    def __init__(self, handle: DeploymentHandle):
        self._deployment = handle.deployment_name
        # By gRPC, which for small texts is cheaper than Ray's objects (ADR 13).
        self._ask = handle.options(stream=True, method_name="answer", _by_reference=False)
        self._looked, self._is_ready = 0.0, False

    async def ask(
        self, call: Call, body: dict[str, Any]
    ) -> AsyncGenerator[list[str] | Refusal, None]:
        """Pass a request to a replica."""
        replies = self._ask.remote(call, body)
        try:
            async for reply in replies:
                yield reply
        except BackPressureError:
            raise overloaded() from None
        except Exception as error:  # of Ray, Serve or gRPC; a replica gives its own as a Refusal
            LOG.warning("%s lost a replica: %s", self._deployment, type(error).__name__)
            raise LostError from None
        except BaseException:  # the client left; of a call that failed, cancel raises the error
            with suppress(Exception):
                replies.cancel()
            raise

    async def ready(self) -> bool:
        """Whether a replica runs, as of a moment ago."""
        if time.monotonic() > self._looked + LOOK_AGAIN:
            self._is_ready = await asyncio.to_thread(_runs, self._deployment)
            self._looked = time.monotonic()
        return self._is_ready


def _runs(deployment: str) -> bool:
    applications = serve.status().applications.values()
    found = (a.deployments[deployment] for a in applications if deployment in a.deployments)
    return any(d.replica_states.get("RUNNING", 0) > 0 for d in found)


class Metrics:
    """What Prometheus reads from Ray's nodes (`api.Recorder`); Serve adds its own."""

    def __init__(self) -> None:
        def counter(name: str, text: str, *tags: str) -> Counter:
            return Counter(f"wrpo_serve_{name}", description=text, tag_keys=tags)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(
                f"wrpo_serve_{name}", description=text, boundaries=SECONDS, tag_keys=("model",)
            )

        self._requests = counter("requests", "Requests by outcome.", "model", "outcome")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "model")
        self._answer = counter("answer_tokens", "Tokens of answers.", "model")
        self._latency = histogram("latency_seconds", "Seconds for whole answers.")
        self._first = histogram("first_token_seconds", "Seconds to a stream's first tokens.")

    def finished(self, model: str, outcome: str, seconds: float) -> None:
        """Count a request."""
        self._requests.inc(tags={"model": model, "outcome": outcome})
        if outcome == "200":
            self._latency.observe(seconds, tags={"model": model})

    def first(self, model: str, seconds: float) -> None:
        """Note the time to the first tokens."""
        self._first.observe(max(seconds, 1e-6), tags={"model": model})

    def tokens(self, model: str, prompt: int, answer: int) -> None:
        """Count tokens."""
        self._prompt.inc(prompt, tags={"model": model})
        if answer:
            self._answer.inc(answer, tags={"model": model})


class Ingress:
    """The endpoint's process; keys that come from the environment come as hashes."""

    def __init__(
        self,
        settings: ServeConfig,
        keys: str | None,
        models: dict[str, Any],
        reward: DeploymentHandle | None,
    ):
        self._settings, self._keys, self._models = settings, keys, models
        self._scorer = reward and Scored(reward)

    async def __serve_build_asgi_app__(self) -> Any:
        backends = {m.name: Served(self._models[m.name]) for m in self._settings.models}
        names = {n: backends[m.name] for m in self._settings.models for n in (m.name, *m.adapters)}
        keys = Keys(self._keys, self._settings.keys)
        return create(self._settings, names, keys, Metrics(), self._scorer)


# --- building and running --------------------------------------------------------------------


def build(args: dict[str, Any]) -> Application:
    """The application of a tree of `config.ServeConfig`; models are checked before any starts.

    Raises:
        UserError: the tree, a model or the keys are wrong.
    """
    return application(checked(config.serving(args)))


def application(settings: ServeConfig) -> Application:
    """The application of settings that are `check.checked`."""
    drain = {"graceful_shutdown_timeout_s": settings.timeout + 5}
    models = {model.name: _deployment(model, settings, drain) for model in settings.models}
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=INGRESS_ONGOING,
        max_queued_requests=INGRESS_ONGOING,
        backpressure_config={"status_code": 429, "retry_after_s": 2},
        **drain,
    )
    reward = settings.reward and _reward(settings.reward, settings, drain)
    return ingress.bind(settings, lines(settings), models, reward)


def _reward(reward: RewardConfig, settings: ServeConfig, drain: dict[str, Any]) -> Application:
    actors = reward.actors
    env = engine_env(on_gpu=actors.num_gpus > 0) | thread_env(actors.num_cpus)
    deployment = serve.deployment(
        Reward,
        name="Reward",
        ray_actor_options={
            "num_cpus": actors.num_cpus,
            "num_gpus": actors.num_gpus,
            "resources": actors.resources,
            "runtime_env": {"env_vars": env},
        },
        max_ongoing_requests=settings.ongoing,
        max_queued_requests=settings.queue,
        **_replicas(actors, settings),
        **drain,
    )
    return deployment.bind(reward)


def _replicas(actors: Actors, settings: ServeConfig) -> dict[str, Any]:
    """How many there are; of a number that cannot change Serve has nothing to reckon."""
    if actors.min == actors.max:
        return {"num_replicas": actors.min}
    scaling = {"min_replicas": actors.min, "max_replicas": actors.max}
    scaling["target_ongoing_requests"] = max(1, settings.ongoing // 2)
    return {"autoscaling_config": scaling}


def _deployment(model: ServedModel, settings: ServeConfig, drain: dict[str, Any]) -> Application:
    deployment = {
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": settings.ongoing,
        "max_queued_requests": settings.queue,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        **_replicas(model.actors, settings),
        **drain,
    }
    return build_llm_deployment(
        engine_settings(model, settings.max_tokens, model.model, deployment=deployment),
        bind_kwargs={"model": model, "max_tokens": settings.max_tokens},
        deployment_cls=Model,
    )


def run(settings: ServeConfig, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serve checked settings until a signal comes, then let what is in hand finish.

    Takes the cluster at RAY_ADDRESS, or starts Ray on this machine. A Serve that runs there keeps
    its other applications, and its own address.
    """
    os.environ |= QUIET | {"RAY_BACKEND_LOG_LEVEL": "fatal"}
    address = os.environ.get("RAY_ADDRESS", "local")
    alone: dict[str, Any] = {}
    with ExitStack() as until_the_end:
        if address == "local":
            shorten_temporary_folders()
            # All that is served shares the cores; Ray would let what does not fit wait for ever.
            cpus = max(os.cpu_count() or 1, math.ceil(_cpus(settings)))
            alone = {"include_dashboard": False, "num_cpus": cpus}
            until_the_end.enter_context(_on_this_machine(host, settings.timeout))
        with keeping_sigterm():  # Ray's own handler aborts after three seconds
            ray.init(address=address, log_to_driver=False, logging_level="warning", **alone)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        until_the_end.callback(ray.shutdown)
        until_the_end.callback(_drain, settings.timeout + 15)
        serve.start(http_options=HTTPOptions(host=host, port=port))
        _start(settings)
        ready()
        signal.pause()


@contextmanager
def _on_this_machine(host: str, timeout: float) -> Iterator[None]:
    """The environment of a Serve that starts here; what is given already stays.

    Its processes have the priority of others, and HAProxy has files and ports of its own.
    """
    env = {"RAY_worker_niceness": "0"}
    with tempfile.TemporaryDirectory(
        prefix="wrpo-serve-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:  # a short path, for HAProxy's sockets
        if sys.platform == "linux" and host in PROXIED:  # where Ray brings HAProxy
            env |= PROXY | _haproxy(Path(folder), math.ceil(timeout) + 15)
        os.environ |= env | {name: os.environ[name] for name in env if name in os.environ}
        yield


def _haproxy(folder: Path, longest: int) -> dict[str, str]:
    """Settings of the one HAProxy here; nothing that it waits for takes `longest` seconds."""
    metrics, stats, fallback = _free_ports(3)
    own = {
        "CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "SOCKET_PATH": folder / "admin.sock",
        "SERVER_STATE_BASE": folder,
        "SERVER_STATE_FILE": folder / "server-state",
        "METRICS_SOCKET_PATH": folder / "metrics.sock",
        "LOG_TARGET": folder / "nobody-listens.sock",  # else the syslog of the machine
        "METRICS_PORT": metrics,
        "STATS_PORT": stats,
        "TIMEOUT_SERVER_S": longest,
        "HARD_STOP_AFTER_S": longest,  # of an old one, after a change of ingresses
    }
    return {f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in own.items()} | {
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        # It is told at once that an ingress ends.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def _free_ports(count: int) -> list[int]:
    """Ports below those that the system gives to connections, so that they are free later too."""
    with ExitStack() as held:
        free: list[int] = []
        for port in random.sample(range(20_000, 30_000), 1000):
            with suppress(OSError):
                held.enter_context(socket.create_server(("", port)))
                free.append(port)
            if len(free) == count:
                break
        return free


def _cpus(settings: ServeConfig) -> float:
    """CPUs that Ray counts for all that is there from the start."""
    models = sum(m.actors.min * m.parts * m.actors.num_cpus for m in settings.models)
    reward = settings.reward.actors if settings.reward else None
    return (
        models
        + settings.ingress_replicas * INGRESS_CPUS
        + (reward.min * reward.num_cpus if reward else 0)
    )


def _start(settings: ServeConfig) -> None:
    try:
        serve.run(application(settings), name=APP, route_prefix="/")
    except (RuntimeError, TimeoutError) as error:
        why = " ".join(str(error).split())[-500:]
        raise WrpoError(f"serve: the models did not start: {why}") from error


def _drain(seconds: float) -> None:
    """Take no more requests, and wait for what is in hand."""
    serve.delete(APP, _blocking=False)  # that of Ray waits for a minute only
    deadline = time.monotonic() + seconds
    while APP in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.2)
