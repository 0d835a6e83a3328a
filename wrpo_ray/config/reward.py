"""Sections for rewards: reward models, functions, verifiers, judges, and mixtures of them."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    model_validator,
)

from wrpo_ray.config.base import PLACEMENT, ImportPath, Name, Section
from wrpo_ray.config.models import EndpointConfig
from wrpo_ray.config.resources import Actors


class CodeConfig(Section):
    """How the verifier `code` runs an answer's program."""

    timeout: float = Field(10, gt=0, le=3600)
    """Seconds for program and tests together."""
    memory: int = Field(512, ge=64)
    """MiB of address space for each of its processes, of which there are at most eight."""
    isolation: Literal["namespaces", "limits"] = "namespaces"
    """`namespaces`: no network, and no files but Python's own; refused where the kernel does not
    allow it, as in many containers. `limits`: limits alone (and another user, if this is root), so
    that a program can reach the network and read what its user can: for answers that you trust."""


class JudgeConfig(Section):
    """A language model that rates answers."""

    model: str
    """Its name at the endpoint."""
    endpoint: EndpointConfig
    """The server that has it."""
    template: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A Jinja file with the question to the judge, of `messages`, `answer` and `reference`, that
    asks for a rating such as [[5]]. Its content is what counts; null takes score/judge.py's."""
    worst: float = 1
    """The lowest rating that there is."""
    best: float = 10
    """The highest."""
    max_tokens: int = Field(1024, ge=1)
    """Longest judgement in tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> JudgeConfig:
        if self.worst >= self.best:
            raise ValueError(f"worst ({self.worst:g}) must be below best ({self.best:g})")
        return self


VerifierName = Literal["exact", "number", "code"]


class ScoreConfig(Section):
    """One thing that scores an answer: a reward model, a function, a verifier or a judge."""

    model: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A Hugging Face sequence classifier with one label, or ArmoRM-Llama3-8B-v0.1: a folder or a
    hub id, as for `sources`. Its content is what counts."""
    revision: str | None = Field(None, json_schema_extra=PLACEMENT)
    """Branch, tag or commit of a hub id, as for `sources`."""
    function: ImportPath | None = None
    """`module:function` called as f(messages, response, reference) -> float."""
    verifier: VerifierName | None = None
    """Compares with the reference, 1.0 or 0.0. `exact`: the same text, but for case and spaces.
    `number`: the same last number. `code`: the last Python block passes the tests that the
    reference holds (asserts)."""
    judge: JudgeConfig | None = None
    """A language model behind an endpoint that rates the answer."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the classifier; ArmoRM runs on transformers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the reward model."""
    max_length: int = Field(4096, ge=8)
    """Tokens of prompt and answer together that the reward model is given."""
    overflow: Literal["fail", "cut_prompt"] = "fail"
    """What to do with a longer pair: `fail` keeps it as a failed row, `cut_prompt` leaves out the
    prompt's beginning. An answer is never cut: one that is too long by itself fails."""
    batch_size: int = Field(32, ge=1, json_schema_extra=PLACEMENT)
    """Answers in one forward pass of the reward model."""
    code: CodeConfig = CodeConfig()
    """How the verifier `code` runs programs."""

    @model_validator(mode="after")
    def _one_kind(self) -> ScoreConfig:
        known = ("model", "function", "verifier", "judge", "mixture")
        kinds = [kind for kind in known if kind in type(self).model_fields]
        given = [kind for kind in kinds if getattr(self, kind)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(f'`{kind}`' for kind in kinds)}")
        of_model = ("revision", "engine", "dtype", "max_length", "overflow", "batch_size")
        owners = dict.fromkeys(of_model, "model")
        for name, owner in (owners | {"code": "verifier"}).items():
            if name in self.model_fields_set and owner not in given:
                raise ValueError(f"{name} belongs to `{owner}`")
        return self


class PartConfig(ScoreConfig):
    """A part of a mixture."""

    weight: float = Field(allow_inf_nan=False)
    """What its score is multiplied by; below 0 is a penalty."""


class RewardConfig(ScoreConfig):
    """What scores the answers."""

    name: Name = "reward"
    """Its name in tables and records."""
    mixture: tuple[PartConfig, ...] = ()
    """The reward is the sum of these parts' scores, as they are, each times its weight; an answer
    that one of them cannot score is a failed row."""
    actors: Actors = Field(Actors(), json_schema_extra=PLACEMENT)
    """The pool that scores; each actor holds all parts."""

    @property
    def parts(self) -> tuple[ScoreConfig, ...]:
        """What it consists of: the parts of a mixture, or this alone."""
        return self.mixture or (self,)

    @model_validator(mode="after")
    def _one_judge(self) -> RewardConfig:
        if self.actors.max > 1 and any(part.judge for part in self.parts):
            raise ValueError(
                "a judge is asked by one actor, so that its limits hold (actors.max: 1)"
            )
        return self
