"""Replicas of a model and of the reward: the processes behind the endpoint, on Ray Serve LLM."""

import asyncio
import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve.llm import LLMConfig, LLMServer

from wrpo_ray.config import RewardConfig, ServeConfig, ServedModel
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import Use, check_weights
from wrpo_ray.llm.chat import end_ids
from wrpo_ray.llm.reasoning import format_of
from wrpo_ray.llm.rendering import Template, load_tokenizer
from wrpo_ray.llm.vllm_settings import CPU_ENGINE, engine_env
from wrpo_ray.runtime.placement import thread_env
from wrpo_ray.serve.backends import DONE, MAX_BATCH, Call, Rejection, Replies, ongoing
from wrpo_ray.serve.grammars import Grammars
from wrpo_ray.serve.prompts import KEY, Prompts, longest_tokens
from wrpo_ray.serve.proxy import bind_to_loopback
from wrpo_ray.serve.thoughts import thoughts_on
from wrpo_ray.serve.validation import problem_of
from wrpo_ray.stages.score.base import Item, MissingReferenceError, TooLongError
from wrpo_ray.stages.score.rewards import load_reward
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.files import read_text

NO_PROMPT_LOGS = {"RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": "0"}
"""Ray Serve LLM writes prompts into its logs otherwise."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum LoRA ranks that vLLM offers."""
FAILED = "the engine failed"
LOG = logging.getLogger("ray.serve")


# --- a model ---------------------------------------------------------------------------------


class Model(LLMServer):  # type: ignore[misc]  # Ray has no types
    """A replica of a model: Ray's LLMServer with dictionaries as input and JSON texts as output.

    So the ingress does not import vLLM, and JSON is parsed and written here, where there are many
    processes for it.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, llm_config: LLMConfig, model: ServedModel, settings: ServeConfig
    ):
        bind_to_loopback()
        own = await asyncio.to_thread(_on_this_node, model, settings)
        folder = Path(own.model_loading_config.model_source)
        tokenizer = await asyncio.to_thread(load_tokenizer, folder, Template.of(model))
        if model.chat_template:  # vLLM takes it for chats with tools, too
            tokenizer.chat_template = tokenizer.get_chat_template()
        asks = model.reasoning is not None
        self._format = format_of(tokenizer, model.reasoning_parser) if asks else None
        self._texts = tokenizer
        self._grammars = Grammars(folder, settings.grammar_seconds)
        self._running: Counter[str] = Counter()
        is_one = model.parts == 1 and not model.actors.num_gpus
        await super().__init__(own, engine_cls=_engine_of_one() if is_one else None)
        engine = self.engine._engine_client
        context = engine.model_config.max_model_len
        self._prompts = Prompts(tokenizer, end_ids(tokenizer, folder), context)
        self._prompts.take_turns(engine.renderer)

    async def answer(self, call: Call, body: dict[str, Any], key: str) -> Replies:
        """Answer as `Backend.ask` does; every error is a `Rejection`.

        The engine prefers the key with the fewest requests: its priority is their number, and the
        lowest goes first.
        """
        KEY.set(key)
        body = body | {"priority": self._running[key]}
        self._running[key] += 1
        try:
            async for reply in self._answer(call, body):
                yield reply
        except Exception as error:  # its text may quote the prompt, and Serve would log it
            LOG.error("the engine failed: %s", type(error).__name__)
            is_dead = type(error).__name__ == "EngineDeadError"
            yield Rejection(503 if is_dead else 500, FAILED)
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]

    async def _answer(self, call: Call, body: dict[str, Any]) -> Replies:
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

        if fault := await self._grammars.why_not(body):
            yield Rejection(400, ": ".join(fault), fault[0])
            return
        kind = {"chat": ChatCompletionRequest, "completions": CompletionRequest}[call]
        try:
            self._prompts.check_length(body)
            if call == "chat":
                body = await self._prompts.add(body)
            format_ = self._format if call == "chat" else None
            thoughts = thoughts_on(body, format_, self._texts) if format_ else None
            if thoughts and thoughts.format.is_special:
                body |= {"skip_special_tokens": False}
            request = kind.model_validate(self._prompts.stopping(body))
        except Exception as error:  # some of vLLM's checks fail on what they do not expect
            yield _invalid(error, body)
            return
        ask = self.chat if call == "chat" else self.completions
        async for reply in await ask(request):
            items = reply if isinstance(reply, list) else [reply]
            if not isinstance(items[0], str):  # a whole answer, or vLLM's record of an error
                if refused := getattr(items[0], "error", None):
                    yield _rejection(**refused.model_dump())
                    return
                text = items[0].model_dump_json()
                yield [thoughts.whole(text) if thoughts else text, DONE]
                return
            texts = [text.removeprefix("data: ").strip() for text in items]
            if broken := [text for text in texts if text.startswith('{"error"')]:
                # vLLM goes on with [DONE] after it, as if the answer were whole.
                yield _rejection(**json.loads(broken[0])["error"], otherwise=503)
                return
            if texts := thoughts.chunks(texts) if thoughts else texts:
                yield texts


def _engine_of_one() -> Any:
    """Return the engine class for one CPU, which runs the model in its own process.

    `vllm serve` does so too. Ray Serve LLM starts another process for the model, and the two
    busy-wait.
    """
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine  # it imports vLLM

    class EngineOfOne(VLLMEngine):  # type: ignore[misc]
        def _start_async_llm_engine(self, args: Any, config: Any, *rest: Any) -> Any:
            config.parallel_config.distributed_executor_backend = "uni"
            return super()._start_async_llm_engine(args, config, *rest)

    return EngineOfOne


def _invalid(error: Exception, body: dict[str, Any]) -> Rejection:
    """Explain why vLLM rejects a request, without the given values."""
    from vllm.exceptions import VLLMClientError

    if isinstance(error, ValidationError):
        where, problem = problem_of(error, body)
        return Rejection(400, f"{where}: {problem}" if where else problem, where or None)
    if isinstance(error, VLLMClientError):  # no ValueError
        return Rejection(400, str(error.args[0]), getattr(error, "parameter", None))
    return Rejection(400, str(error) if isinstance(error, ValueError) else "vLLM cannot read it")


def _rejection(
    code: int, message: str, param: str | None = None, otherwise: int = 500, **_: Any
) -> Rejection:
    """Convert vLLM's error record; details of errors that the client did not cause are hidden."""
    is_clients = 400 <= code < 500
    return Rejection(code, message, param) if is_clients else Rejection(otherwise, FAILED)


def _on_this_node(model: ServedModel, settings: ServeConfig) -> LLMConfig:
    """Return the engine's settings, with the model's files copied to this node if needed."""
    folders = {name: Folder(uri).local() for name, uri in model.adapters.items()}
    source = Folder(model.model).local()
    check_weights(source, Use.ANSWERS)
    from vllm.config import StructuredOutputsConfig

    # vLLM's `auto` keeps the compiler of the first grammar for all, whatever it leaves out of them.
    one = {"structured_outputs_config": StructuredOutputsConfig(backend="xgrammar")}
    return engine_settings(model, settings, str(source), in_replica=one | _adapters(folders, model))


def engine_settings(
    model: ServedModel,
    settings: ServeConfig,
    source: str,
    *,
    in_replica: dict[str, Any] | None = None,
    deployment: dict[str, Any] | None = None,
) -> LLMConfig:
    """Return Ray Serve LLM's settings of a model whose files are at `source`."""
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
        # An upper bound for requests without one.
        "override_generation_config": {"max_new_tokens": settings.max_tokens},
        "enable_log_requests": False,
        "max_num_seqs": ongoing(model, settings),
        "scheduling_policy": "priority",
        **(CPU_ENGINE if on_cpu else {}),
        **(in_replica or {}),
    }
    chosen = {name: value for name, value in engine.items() if value is not None}
    bundle = {"CPU": actors.cpus, "GPU": actors.num_gpus, **actors.resources}
    env = engine_env(on_gpu=not on_cpu) | NO_PROMPT_LOGS | thread_env(actors.cpus)
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": source},
        engine_kwargs=chosen | model.engine,
        placement_group_config={"bundle_per_worker": {k: n for k, n in bundle.items() if n}},
        runtime_env={"env_vars": env},
        deployment_config=deployment or {},
    )


def _adapters(folders: dict[str, Path], model: ServedModel) -> dict[str, Any]:
    """Return vLLM's settings of LoRA adapters, named as clients name them.

    On the CPU, vLLM 0.29 applies the adapter of the last slot to a request without an adapter if
    it shares a batch with others; so one more slot is reserved and stays empty there.
    """
    if not folders:
        return {}
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    ranks = [json.loads((f / "adapter_config.json").read_bytes())["r"] for f in folders.values()]
    return {
        "enable_lora": True,
        "max_loras": len(folders) + (not model.actors.num_gpus),
        "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= max(ranks)),
        "lora_modules": [LoRAModulePath(name=n, path=str(f)) for n, f in folders.items()],
    }


# --- the reward ------------------------------------------------------------------------------


class Reward:
    """A replica of the reward, which scores answers in batches."""

    def __init__(self, reward: RewardConfig):
        bind_to_loopback()
        folders = [Folder(part.model).local() if part.model else None for part in reward.parts]
        self._reward = load_reward(reward, folders)
        self._characters = min(
            (
                part.max_length * longest_tokens(load_tokenizer(folder))[0]
                for part, folder in zip(reward.parts, folders, strict=True)
                if folder and part.overflow == "fail"
            ),
            default=math.inf,
        )

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.01)  # type: ignore[untyped-decorator]
    async def score(self, items: list[Item]) -> list[float | Rejection]:
        """Return a reward for each answer; one that cannot be scored is a `Rejection`."""
        short = [i for i, item in enumerate(items) if _characters(item) <= self._characters]
        outcomes = await asyncio.to_thread(self._reward.score, [items[i] for i in short])
        too_long = Rejection(400, f"messages: at most {self._characters} characters are scored")
        scored: list[float | Rejection] = [too_long] * len(items)
        for i, outcome in zip(short, outcomes, strict=True):
            scored[i] = _not_scored(outcome) if isinstance(outcome, Exception) else outcome
        return scored


def _characters(item: Item) -> int:
    return len(item.text) + sum(len(message["content"]) for message in item.messages)


def _not_scored(error: Exception) -> Rejection:
    """Convert an error; the text of one that is not ours may hold anything, so it is hidden."""
    if isinstance(error, TooLongError | MissingReferenceError | UserError):
        return Rejection(400, str(error))
    LOG.error("an answer could not be scored: %s", type(error).__name__)
    return Rejection(500, "the answer could not be scored")
