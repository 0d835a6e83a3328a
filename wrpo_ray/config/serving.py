"""The config of `wrpo serve`: models, keys and limits."""

from typing import Self

from pydantic import Field, model_validator

from wrpo_ray.config.base import Name, Section
from wrpo_ray.config.models import ModelConfig
from wrpo_ray.config.reward import RewardConfig

MAX_INGRESSES = 64


class ServedModel(ModelConfig):
    """A model behind `wrpo serve`: `actors` are its replicas, clients request it by `name`."""

    adapters: dict[Name, str] = {}
    """LoRA adapters of this model, {name: folder}; clients see each as a model of its own."""

    @model_validator(mode="after")
    def _is_here(self) -> Self:
        if self.endpoint is not None:
            raise ValueError("endpoint: a served model is on vLLM; drop it")
        if self.stream_weights:
            raise ValueError("stream_weights: a served model is copied to its nodes; drop it")
        return self


class ServeConfig(Section):
    """Models and limits of `wrpo serve` and of a RayService.

    Limits hold over all replicas of the ingress together: each enforces its share.
    """

    models: tuple[ServedModel, ...] = Field(min_length=1)
    """The models that are served."""
    reward: RewardConfig | None = None
    """Reward of an answer at POST /v1/score, as in a run but without a reference; the playground
    shows it. Null turns scoring off."""
    keys: str | None = None
    """A file of API keys, one a line: a name, the SHA-256 of the key in hex, and optionally the
    day (ISO 8601, UTC) on which it expires. It is read again when it changes. Null reads the
    same lines from the variable WRPO_SERVE_KEYS."""
    ingress_replicas: int | None = Field(None, ge=1, le=MAX_INGRESSES)
    """Ingress processes, which check requests and stream answers. Null starts one for every
    replica of a model, up to 64, and changes their number with that of the replicas."""
    requests_per_minute: int = Field(600, ge=1)
    """Maximum requests of one key in any 60 seconds."""
    concurrent: int = Field(64, ge=1)
    """Maximum concurrent requests of one key."""
    connections: int = Field(512, ge=1)
    """Maximum connections from one address, where `wrpo serve` starts HAProxy; a proxy in front is
    one address."""
    ongoing: int = Field(256, ge=1)
    """Maximum concurrent requests in a replica of a model, and in its engine, as `max_num_seqs`.
    `engine: {max_num_seqs: ...}` of a model goes first."""
    queue: int = Field(128, ge=0)
    """Maximum requests that wait for the replicas of a model. Keys take turns. Beyond it, requests
    of the key with the most get HTTP 429."""
    max_body: int = Field(1_000_000, ge=100)
    """Maximum bytes of a request."""
    max_depth: int = Field(32, ge=4, le=200)
    """Maximum nesting depth of a request's JSON."""
    max_tokens: int = Field(4096, ge=1)
    """Maximum tokens of an answer."""
    max_answers: int = Field(8, ge=1)
    """Maximum answers of one request: prompts times `n`."""
    grammar_seconds: float = Field(3.0, gt=0, le=600)
    """CPU time of compiling the grammars of a request (`response_format`, `tools`), in seconds;
    HTTP 400 beyond it."""
    read_timeout: float = Field(10.0, gt=0)
    """Timeout for receiving a request's headers, where `wrpo serve` starts HAProxy, and then for
    its body, in seconds."""
    timeout: float = Field(300.0, gt=0)
    """Timeout for a whole answer, and for open requests when a replica stops, in seconds."""

    @property
    def ingresses(self) -> tuple[int, int]:
        """The least and the most ingresses: as many as replicas of models, if none are set.

        One process streams about as fast as one replica generates (ADR 13).
        """
        if self.ingress_replicas:
            return self.ingress_replicas, self.ingress_replicas
        actors = [model.actors for model in self.models]
        least, most = sum(a.min for a in actors), sum(a.max for a in actors)
        return min(least, MAX_INGRESSES), min(most, MAX_INGRESSES)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [name for m in self.models for name in (m.name, *m.adapters)]
        for name in {n for n in names if names.count(n) > 1}:
            raise ValueError(f"models: the name {name!r} is given twice; write NAME=FOLDER")
        return self
