"""Sections for models that answer: sampling, vLLM, and OpenAI-compatible endpoints."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from wrpo_ray.config.base import PLACEMENT, Name, Section
from wrpo_ray.config.resources import Actors


class SamplingConfig(Section):
    """How answers are sampled (paper, section 4.1)."""

    samples: int = Field(5, ge=1, le=1024)
    """Answers a prompt from each model."""
    temperature: float = Field(0.8, ge=0, le=2)
    """0 is greedy."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus mass."""
    top_k: int = Field(0, ge=0)
    """Tokens that are drawn from; 0 is no bound."""
    min_p: float = Field(0, ge=0, le=1)
    """Least probability of a token, as a share of the likeliest one's."""
    repetition_penalty: float = Field(1, gt=0)
    """Divides the logits of tokens that are there already; 1 does nothing."""
    max_tokens: int = Field(2048, ge=1)
    """Longest answer in tokens."""
    logprobs: int = Field(0, ge=0, le=20)
    """So many of the likeliest first tokens are kept with their log-probs, as judges need them."""

    @model_validator(mode="after")
    def _greedy_once(self) -> SamplingConfig:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("temperature 0 gives the same answer each time; set samples: 1")
        return self

    def updated(self, changes: SamplingOverride | None) -> SamplingConfig:
        """These settings with what `changes` sets."""
        given = changes.model_dump(exclude_none=True) if changes else {}
        return SamplingConfig(**self.model_dump() | given)


class SamplingOverride(Section):
    """A model's own sampling; null leaves the run's."""

    samples: int | None = Field(None, ge=1, le=1024)
    """Answers a prompt."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus mass."""
    top_k: int | None = Field(None, ge=0)
    """Tokens that are drawn from; 0 is no bound."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Least probability of a token, as a share of the likeliest one's."""
    repetition_penalty: float | None = Field(None, gt=0)
    """Divides the logits of tokens that are there already; 1 does nothing."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer in tokens."""


class EndpointConfig(Section):
    """A server that speaks OpenAI's chat completions, and what may be asked of it."""

    url: str
    """Its base, such as https://api.example.com/v1. It decides results: nothing else tells one
    server's weights and precision from another's under the same name."""
    key_env: str | None = Field(None, json_schema_extra=PLACEMENT)
    """Name of the environment variable with the key; null sends none."""
    concurrency: int = Field(32, ge=1, le=65536, json_schema_extra=PLACEMENT)
    """Calls in flight at the most."""
    requests_per_minute: int | None = Field(None, ge=1, json_schema_extra=PLACEMENT)
    """Calls a minute at the most, spread evenly; null sets no limit."""
    tokens_per_minute: int | None = Field(None, ge=1, json_schema_extra=PLACEMENT)
    """Tokens of prompts and answers a minute at the most; null sets no limit."""
    timeout: float = Field(600, gt=0, json_schema_extra=PLACEMENT)
    """Seconds for one whole answer."""
    attempts: int = Field(6, ge=1, le=100, json_schema_extra=PLACEMENT)
    """Times that a call is tried whose fault may pass."""
    extra: dict[str, Any] = {}
    """Further fields of each call, such as `reasoning_effort`; null leaves one out that is sent
    otherwise (`seed`, `top_p`, or `max_tokens` where a server wants `max_completion_tokens`)."""

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
    """A model that answers prompts, on vLLM or behind an endpoint."""

    name: Name
    """Its name in tables and records."""
    model: str
    """A Hugging Face model: a folder, local or in an object store, or a hub id (`org/name`, or
    `hf://org/name`). An existing local folder comes before a hub id. With an endpoint: the model's
    name there."""
    endpoint: EndpointConfig | None = None
    """The server that has the model; null loads it into vLLM."""
    revision: str | None = Field(None, json_schema_extra=PLACEMENT)
    """Branch, tag or commit of a hub id; null is the main branch. The commit that it is at when a
    run starts is what counts."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the engine."""
    max_model_len: int | None = Field(None, ge=8)
    """Context in tokens, prompt and answer together; null takes the model's own."""
    chat_template: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A Jinja file that replaces the tokenizer's own chat template; its content is what counts."""
    chat_template_args: dict[str, str | int | float | bool | None] = {}
    """Variables of the chat template, such as {enable_thinking: false}."""
    quantization: str | None = None
    """vLLM's name of the weights' format, such as `fp8`; null takes what the weights say."""
    sampling: SamplingOverride | None = None
    """What differs for this model from the run's `sampling`."""
    tensor_parallel: int = Field(1, ge=1, json_schema_extra=PLACEMENT)
    """GPUs that each layer is divided over."""
    pipeline_parallel: int = Field(1, ge=1, json_schema_extra=PLACEMENT)
    """Stages that the layers are divided into, each of `tensor_parallel` GPUs; they may lie on
    different nodes."""
    engine: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`; its tokenizer is always that of the model's own folder."""
    license: str | None = Field(None, json_schema_extra=PLACEMENT)
    """The model's licence by its Hugging Face id, for the card of exported rows; null reads it
    from the model folder's README.md."""
    actors: Actors = Field(Actors(), json_schema_extra=PLACEMENT)
    """Its pool of engines; with parallelism, `num_gpus` and `resources` are those of each part. An
    endpoint has one actor, so that its limits hold over all calls."""

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
        """Prompts and answers are tokenized with the folder's: another would read other texts."""
        for name in ("tokenizer", "tokenizer_revision", "skip_tokenizer_init"):
            if name in self.engine:
                raise ValueError(
                    f"engine.{name}: the tokenizer is that of the model folder; put another one's "
                    f"files there, in a copy of the folder"
                )
        return self

    @model_validator(mode="after")
    def _fits_endpoint(self) -> ModelConfig:
        if self.endpoint is None:
            return self
        here = {"name", "model", "endpoint", "sampling", "actors"}
        for name, field in type(self).model_fields.items():
            if name not in here and getattr(self, name) != field.default:
                raise ValueError(f"{name} belongs to a model on vLLM; an endpoint has its own")
        if self.actors.max > 1 or self.actors.num_gpus:
            raise ValueError("an endpoint is served by one actor without a GPU (actors.max: 1)")
        return self
