"""Sections of models that answer (`sources`, `target`, judges): vLLM, endpoints, sampling."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from wrpo_ray.config.base import PLACEMENT, Name, Section, without_unset
from wrpo_ray.config.resources import Actors

PERFORMANCE = (
    "async_scheduling",
    "attention_backend",
    "block_size",
    "compilation_config",
    "cpu_offload_gb",
    "cudagraph_capture_sizes",
    "disable_custom_all_reduce",
    "enable_chunked_prefill",
    "enable_expert_parallel",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "load_format",
    "long_prefill_token_threshold",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_parallel_loading_workers",
    "model_loader_extra_config",
    "num_gpu_blocks_override",
    "optimization_level",
    "performance_mode",
    "safetensors_load_strategy",
    "safetensors_prefetch_num_threads",
)
"""Arguments of `vllm.LLM` that change answers by no more than rounding (vLLM 0.29)."""
STREAMER = "runai_streamer"
"""vLLM's name of the way of loading that reads files, or objects, in several streams."""
LOAD_FORMATS = ("auto", "safetensors", "fastsafetensors", STREAMER)
"""Ways of loading that read the folder's own weights."""


class SamplingConfig(Section):
    """How answers are sampled (paper, section 4.1)."""

    samples: int = Field(5, ge=1, le=1024)
    """Answers of each model to a prompt."""
    temperature: float = Field(0.8, ge=0, le=2)
    """0 is greedy."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Probability mass of nucleus sampling."""
    top_k: int = Field(0, ge=0)
    """Number of likeliest tokens to sample from; 0 is no limit."""
    min_p: float = Field(0, ge=0, le=1)
    """Minimum probability of a token, relative to the likeliest token."""
    repetition_penalty: float = Field(1, gt=0)
    """Divides the logits of tokens that already occur; 1 turns it off."""
    max_tokens: int = Field(2048, ge=1)
    """Maximum tokens of an answer."""
    logprobs: int = Field(0, ge=0, le=20)
    """Number of likeliest first tokens to record with their log-probs; some judges need them."""
    seeds: Literal["request", "run"] = "request"
    """`request`: each sample is drawn by a seed of its own, so that it can be drawn again. `run`:
    an engine draws all by one seed of its start, which keeps vLLM on its fastest sampler for GPUs;
    then two runs have different answers, and so have the samples that a resumed run lacked."""

    def identity(self) -> dict[str, Any]:
        """As in every section; seeds only where they are not the requests' own."""
        found = super().identity()
        return found if self.seeds != "request" else {n: found[n] for n in found if n != "seeds"}

    @model_validator(mode="after")
    def _greedy_once(self) -> SamplingConfig:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("temperature 0 gives the same answer each time; set samples: 1")
        return self

    def updated(self, changes: SamplingOverride | None) -> SamplingConfig:
        """These settings with the values of `changes`."""
        given = changes.model_dump(exclude_none=True) if changes else {}
        return SamplingConfig(**self.model_dump() | given)


class SamplingOverride(Section):
    """Sampling of one model; null keeps the run's setting."""

    samples: int | None = Field(None, ge=1, le=1024)
    """Answers to a prompt."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Probability mass of nucleus sampling."""
    top_k: int | None = Field(None, ge=0)
    """Number of likeliest tokens to sample from; 0 is no limit."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Minimum probability of a token, relative to the likeliest token."""
    repetition_penalty: float | None = Field(None, gt=0)
    """Divides the logits of tokens that already occur; 1 turns it off."""
    max_tokens: int | None = Field(None, ge=1)
    """Maximum tokens of an answer."""


class EndpointConfig(Section):
    """A server with OpenAI's chat completions API, and its limits."""

    url: str
    """Base URL, such as https://api.example.com/v1. It is part of the steps' keys, because servers
    can have different weights or precisions under the same model name."""
    key_env: str | None = Field(None, json_schema_extra=PLACEMENT)
    """Name of the environment variable with the API key; null sends no key."""
    concurrency: int = Field(32, ge=1, le=65536, json_schema_extra=PLACEMENT)
    """Maximum concurrent calls."""
    requests_per_minute: int | None = Field(None, ge=1, json_schema_extra=PLACEMENT)
    """Maximum calls per minute, evenly spaced; null is no limit."""
    tokens_per_minute: int | None = Field(None, ge=1, json_schema_extra=PLACEMENT)
    """Maximum tokens of prompts and answers per minute; null is no limit."""
    timeout: float = Field(600, gt=0, json_schema_extra=PLACEMENT)
    """Timeout for a whole answer, in seconds."""
    attempts: int = Field(6, ge=1, le=100, json_schema_extra=PLACEMENT)
    """Attempts of a call that fails with a temporary error."""
    extra: dict[str, Any] = {}
    """Additional fields of each call, such as `reasoning_effort`; null omits a field that is sent
    by default (`seed`, `top_p`, or `max_tokens` if a server needs `max_completion_tokens`)."""

    @field_validator("url")
    @classmethod
    def _is_base(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ValueError("no address of a server; write it as https://host/v1") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write it as https://host/v1")
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("leave /chat/completions out; it is added")
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _is_no_key(cls, name: str | None) -> str | None:
        # The value is not repeated: it may be the key itself.
        if name is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError("give the variable's name, in capitals such as OPENAI_API_KEY")
        return name

    @field_validator("extra")
    @classmethod
    def _leaves_the_call(cls, extra: dict[str, Any]) -> dict[str, Any]:
        fixed = {"model", "messages", "n", "stream"} & set(extra)
        if extra.get("seed") is not None:
            fixed.add("seed")
        if fixed:
            raise ValueError(f"{sorted(fixed)[0]} is not for `extra`: each call has its own")
        return extra


class ModelConfig(Section):
    """A model that answers prompts, on vLLM or behind an endpoint.

    Example:
        >>> ModelConfig(name="qwen", model="Qwen/Qwen3-8B", actors={"max": 4}).actors.max
        4
    """

    name: Name
    """Name of the model in tables and records."""
    model: str
    """A Hugging Face model: a folder, local or in an object store, or a hub id (`org/name`, or
    `hf://org/name`). An existing local folder takes precedence over a hub id. With an endpoint: the
    model's name there."""
    endpoint: EndpointConfig | None = None
    """The server that hosts the model; null loads it into vLLM."""
    revision: str | None = Field(None, json_schema_extra=PLACEMENT)
    """Branch, tag or commit of a hub id; null is the main branch. An output keeps the
    commit that its first run began with."""
    trust: Literal["pickle"] | None = Field(None, json_schema_extra=PLACEMENT)
    """`pickle` allows weights in PyTorch's pickled form (*.bin), a format that can hold code; null
    takes safetensors only. Code in a model's folder never runs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the engine."""
    max_model_len: int | None = Field(None, ge=8)
    """Context in tokens, prompt and answer together; null uses the model's own limit."""
    chat_template: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A Jinja file that replaces the tokenizer's own chat template; results depend on its
    content, not on its path."""
    chat_template_args: dict[str, str | int | float | bool | None] = {}
    """Variables of the chat template, such as {enable_thinking: false}."""
    reasoning: Literal["keep", "strip"] | None = None
    """Reasoning that a thinking model writes before its answer, as <think>...</think>. Rewards,
    verifiers and judges read the answer only. `strip`: only the answer is trained on; `keep`: the
    reasoning too. Null reads no markers: all that the model writes is its answer."""
    reasoning_parser: str | None = None
    """vLLM's name of the reasoning's format, such as `deepseek_r1`. Null takes the markers from the
    chat template or the vocabulary; with an endpoint, they are <think> and </think>."""
    quantization: str | None = None
    """vLLM's name of the weights' format, such as `fp8`; null uses the one in config.json."""
    sampling: SamplingOverride | None = None
    """Changes to the run's `sampling` for this model."""
    groups: tuple[str, ...] | None = Field(None, min_length=1, json_schema_extra=PLACEMENT)
    """Of a source: the groups of prompts (`prompts.columns.group`) that it answers; null: all
    prompts. Which prompts it answers does not change its answers. In the evaluation all models
    answer all prompts."""
    tensor_parallel: int = Field(1, ge=1, json_schema_extra=PLACEMENT)
    """Number of GPUs that each layer is split over."""
    pipeline_parallel: int = Field(1, ge=1, json_schema_extra=PLACEMENT)
    """Number of pipeline stages, each on `tensor_parallel` GPUs; they may be on different nodes."""
    engine: dict[str, Any] = {}
    """Additional arguments of `vllm.LLM`; the tokenizer is always the one in the model's folder.
    Answers are generated again when they change."""
    performance: dict[str, Any] = Field({}, json_schema_extra=PLACEMENT)
    """Arguments of `vllm.LLM` for speed and memory, such as {max_num_seqs: 512}: the answers that
    are there stay valid when they change."""
    stream_weights: bool = Field(False, json_schema_extra=PLACEMENT)
    """Whether engines read the weights straight from the object store, by vLLM's `runai_streamer`,
    without a copy on the node. False copies them to each node, from node to node."""
    license: str | None = Field(None, json_schema_extra=PLACEMENT)
    """The model's licence by its Hugging Face id, for the card of exported rows; null reads it
    from the model folder's README.md."""
    actors: Actors = Field(Actors(), json_schema_extra=PLACEMENT)
    """Its pool of engines; with parallelism, `num_gpus` and `resources` are per worker. An endpoint
    has one actor, so that its limits hold over all calls."""

    def identity(self) -> dict[str, Any]:
        """As in every section; a policy of reasoning only where one is set."""
        return without_unset(super().identity(), "reasoning", "reasoning_parser")

    @model_validator(mode="after")
    def _parser_is_used(self) -> ModelConfig:
        if self.reasoning_parser and not self.reasoning:
            raise ValueError("reasoning_parser: set `reasoning` too, to keep or strip")
        return self

    @property
    def parts(self) -> int:
        """Workers of one engine, one for each GPU."""
        return self.tensor_parallel * self.pipeline_parallel

    @model_validator(mode="after")
    def _parallel(self) -> ModelConfig:
        if self.parts > 1 and self.actors.num_gpus not in (0, 1):
            raise ValueError("with tensor_parallel or pipeline_parallel, actors.num_gpus is 1")
        return self

    @model_validator(mode="after")
    def _own_tokenizer(self) -> ModelConfig:
        """Another tokenizer than the folder's would read other texts; code would not be ours."""
        for name in ("tokenizer", "tokenizer_revision", "skip_tokenizer_init"):
            if name in self.engine:
                raise ValueError(
                    f"engine.{name}: the tokenizer is that of the model folder; put another one's "
                    f"files there, in a copy of the folder"
                )
        if "model_weights" in self.engine:
            raise ValueError("engine.model_weights: the weights are those of `model`; drop it")
        if self.engine.get("trust_remote_code"):
            raise ValueError("engine.trust_remote_code: code in a model's folder never runs")
        return self

    @model_validator(mode="after")
    def _performance_alone(self) -> ModelConfig:
        """An argument that changes answers has to be part of their identity."""
        for name, value in self.performance.items():
            if name not in PERFORMANCE:
                raise ValueError(
                    f"performance.{name}: not among {', '.join(PERFORMANCE)}; others go into "
                    f"`engine`, with which answers are generated again"
                )
            if name in self.engine:
                raise ValueError(f"performance.{name}: it is in `engine` too; leave one out")
            if name == "load_format" and value not in LOAD_FORMATS:
                raise ValueError(
                    f"performance.load_format: {value!r} is not among {', '.join(LOAD_FORMATS)}"
                )
        return self

    @property
    def load_format(self) -> str | None:
        """How vLLM reads the weights, in its lower case; None is its own choice."""
        own = STREAMER if self.stream_weights else None
        given = (self.performance | self.engine).get("load_format", own)
        return str(given).lower() if given else None

    @model_validator(mode="after")
    def _streams_by_streamer(self) -> ModelConfig:
        if self.stream_weights and self.load_format != STREAMER:
            raise ValueError(f"stream_weights: loads by {STREAMER}; leave load_format out")
        return self

    @model_validator(mode="after")
    def _fits_endpoint(self) -> ModelConfig:
        if self.endpoint is None:
            return self
        of_any = {"name", "model", "endpoint", "sampling", "groups", "actors"}
        here = of_any | {"reasoning", "reasoning_parser"}
        for name, field in type(self).model_fields.items():
            if name not in here and getattr(self, name) != field.default:
                raise ValueError(f"{name} belongs to a model on vLLM; an endpoint has its own")
        if self.actors.max > 1 or self.actors.num_gpus:
            raise ValueError("an endpoint is served by one actor without a GPU (actors.max: 1)")
        return self
