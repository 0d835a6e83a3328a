"""Sections for `wrpo serve`."""

from __future__ import annotations

from pydantic import (
    Field,
    model_validator,
)

from wrpo_ray.config.base import Name, Section
from wrpo_ray.config.models import ModelConfig
from wrpo_ray.config.reward import RewardConfig


class ServedModel(ModelConfig):
    """A model behind `wrpo serve`: `actors` are its replicas, `name` what clients ask for."""

    adapters: dict[Name, str] = {}
    """LoRA adapters of this model, each a model of its own to clients: {name: folder}."""

    @model_validator(mode="after")
    def _is_here(self) -> ServedModel:
        if self.endpoint is not None:
            raise ValueError("endpoint: a served model is on vLLM; drop it")
        return self


class ServeConfig(Section):
    """What `wrpo serve` and a RayService serve, and how much of it a client gets.

    Limits hold over all replicas of the ingress together: each enforces its share.
    """

    models: tuple[ServedModel, ...] = Field(min_length=1)
    """The models, side by side."""
    reward: RewardConfig | None = None
    """What scores an answer at POST /v1/score, as in a run but without a reference; the playground
    shows it. Null scores nothing."""
    keys: str | None = None
    """A file of API keys, one a line: a name, the SHA-256 of the key in hex, and optionally the
    day (ISO 8601, UTC) on which it expires. It is read again when it changes. Null takes such
    lines from WRPO_SERVE_KEYS."""
    ingress_replicas: int = Field(1, ge=1, le=64)
    """Processes that check requests and pass answers on."""
    requests_per_minute: int = Field(600, ge=1)
    """Requests of one key in any 60 seconds."""
    concurrent: int = Field(64, ge=1)
    """Requests of one key in hand at once."""
    ongoing: int = Field(64, ge=1)
    """Requests that a replica of a model works on at once."""
    queue: int = Field(128, ge=0)
    """Requests for a model that wait for a replica; above it clients are told to try later."""
    max_body: int = Field(1_000_000, ge=100)
    """Bytes of a request."""
    max_depth: int = Field(32, ge=4, le=200)
    """Levels of a request's JSON."""
    max_tokens: int = Field(4096, ge=1)
    """Tokens of an answer at the most."""
    max_answers: int = Field(8, ge=1)
    """Answers of one request: prompts times `n`."""
    read_timeout: float = Field(10.0, gt=0)
    """Seconds in which a request's body has to arrive."""
    timeout: float = Field(300.0, gt=0)
    """Seconds for a whole answer, and for what is in hand when a replica is stopped."""

    @model_validator(mode="after")
    def _names_differ(self) -> ServeConfig:
        names = [name for m in self.models for name in (m.name, *m.adapters)]
        for name in {n for n in names if names.count(n) > 1}:
            raise ValueError(f"models: the name {name!r} is given twice; write NAME=FOLDER")
        return self
