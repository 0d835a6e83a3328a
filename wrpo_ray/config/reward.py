"""Section `reward`: reward models, functions, verifiers, judges, mixtures, rewards by group."""

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from wrpo_ray.config.base import NAME, PLACEMENT, ImportPath, Name, Section, without_unset
from wrpo_ray.config.models import EndpointConfig
from wrpo_ray.config.resources import Actors


class CodeConfig(Section):
    """Sandbox of the verifier `code`, which runs the program in an answer."""

    timeout: float = Field(10, gt=0, le=3600)
    """Time limit of program and tests together, in seconds; waiting for a core does not count."""
    memory: int = Field(512, ge=64)
    """Memory limit in MiB: of the program, all processes that it starts (at most eight in all) and
    its files together, and the address space of each process."""
    isolation: Literal["namespaces", "limits"] = "namespaces"
    """`namespaces`: no network, and no files but Python's own, by bubblewrap if it is installed;
    refused where the kernel does not allow it, as in many containers. `limits`: limits alone (and
    another user, if this is root), so that a program can reach the network and read what its user
    can: for answers that you trust."""


class JudgeConfig(Section):
    """A language model behind an endpoint that rates answers."""

    model: str
    """Name of the model at the endpoint."""
    endpoint: EndpointConfig
    """The server that hosts the model."""
    template: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A Jinja file with the question to the judge, of `messages`, `answer` and `reference`, that
    asks for a rating such as [[5]]. Results depend on its content, not on its path; null uses the
    template in score/judge.py."""
    worst: float = 1
    """Lowest rating of the scale."""
    best: float = 10
    """Highest rating of the scale."""
    max_tokens: int = Field(1024, ge=1)
    """Maximum tokens of a judgement."""
    reasoning: Literal["strip"] | None = None
    """`strip` reads no rating from reasoning that the server leaves in the judgement's text,
    between <think> and </think>. Reasoning in a field of its own is never read."""

    def identity(self) -> dict[str, Any]:
        """As in every section; `reasoning` only where it is set."""
        return without_unset(super().identity(), "reasoning")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.worst >= self.best:
            raise ValueError(f"worst ({self.worst:g}) must be below best ({self.best:g})")
        return self


VerifierName = Literal["exact", "number", "code"]


class ScoreConfig(Section):
    """A scorer of answers: a reward model, a function, a verifier or a judge."""

    model: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A Hugging Face sequence classifier with one label, or ArmoRM-Llama3-8B-v0.1: a folder or a
    hub id, as for `sources`. Results depend on its content, not on its path."""
    revision: str | None = Field(None, json_schema_extra=PLACEMENT)
    """Branch, tag or commit of a hub id, as for `sources`."""
    trust: Literal["pickle"] | None = Field(None, json_schema_extra=PLACEMENT)
    """Whether pickled weights of the model are allowed, as for `sources`."""
    function: ImportPath | None = None
    """`module:function`, called as f(messages, response, reference) -> float."""
    verifier: VerifierName | None = None
    """Compares with the reference: 1.0 or 0.0. `exact`: the same text, ignoring case and spaces.
    `number`: the same last number. `code`: the last Python block passes the tests that the
    reference holds (asserts)."""
    judge: JudgeConfig | None = None
    """A language model behind an endpoint that rates the answer."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Library that runs the classifier; ArmoRM needs transformers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the reward model."""
    max_length: int = Field(4096, ge=8)
    """Maximum tokens of prompt and answer together for the reward model."""
    overflow: Literal["fail", "cut_prompt"] = "fail"
    """Handling of longer pairs: `fail` makes a failed row, `cut_prompt` truncates the prompt's
    beginning. An answer is never truncated: one that is too long by itself fails."""
    batch_size: int = Field(32, ge=1, json_schema_extra=PLACEMENT)
    """Answers in one forward pass of the reward model."""
    code: CodeConfig = CodeConfig()
    """Sandbox of the verifier `code`."""

    @property
    def _may_be_empty(self) -> bool:
        """Whether it may have no kind."""
        return False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        known = ("model", "function", "verifier", "judge", "mixture")
        kinds = [kind for kind in known if kind in type(self).model_fields]
        given = [kind for kind in kinds if getattr(self, kind)]
        if len(given) != 1 and (given or not self._may_be_empty):
            raise ValueError(f"give exactly one of {', '.join(f'`{kind}`' for kind in kinds)}")
        of_model = ("revision", "trust", "engine", "dtype", "max_length", "overflow", "batch_size")
        owners = dict.fromkeys(of_model, "model")
        for name, owner in (owners | {"code": "verifier"}).items():
            if name in self.model_fields_set and owner not in given:
                raise ValueError(f"{name} belongs to `{owner}`")
        return self


class PartConfig(ScoreConfig):
    """A part of a mixture."""

    weight: float = Field(allow_inf_nan=False)
    """Factor of its score; a negative one is a penalty."""


class RewardConfig(ScoreConfig):
    """The reward: the score of an answer.

    Example:
        >>> RewardConfig(verifier="number").name
        'reward'
    """

    name: Name = "reward"
    """Name of the reward in tables and records."""
    mixture: tuple[PartConfig, ...] = ()
    """The reward is the weighted sum of the scores of these parts, without normalization; an answer
    that one part cannot score is a failed row."""
    actors: Actors = Field(Actors(), json_schema_extra=PLACEMENT)
    """The pool of scoring actors; each actor loads all parts."""

    @property
    def parts(self) -> tuple[ScoreConfig, ...]:
        """The parts of a mixture, or this scorer alone."""
        return self.mixture or (self,)

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if self.actors.max > 1 and any(part.judge for part in self.parts):
            raise ValueError(
                "a judge is asked by one actor, so that its limits hold (actors.max: 1)"
            )
        return self


class GroupedRewardConfig(RewardConfig):
    """The reward of a run: of all prompts alike, or by their group.

    Example:
        >>> by_group = {"maths": {"verifier": "number"}, "code": {"verifier": "code"}}
        >>> [reward.name for reward in GroupedRewardConfig(by_group=by_group).each]
        ['maths', 'code']
    """

    by_group: dict[str, RewardConfig] = {}
    """Rewards of prompts by their group (`prompts.columns.group`), each with a kind of its own. Its
    `name` is by default that of the group. A reward beside `by_group` is that of all other prompts;
    without one, every prompt must be of one of these groups."""

    @property
    def _may_be_empty(self) -> bool:
        return bool(self.by_group)

    @property
    def default(self) -> RewardConfig | None:
        """The reward of the prompts of all groups that `by_group` does not name; None without."""
        if not any((self.model, self.function, self.verifier, self.judge, self.mixture)):
            return None
        own = {name: getattr(self, name) for name in RewardConfig.model_fields}
        return RewardConfig.model_construct(self.model_fields_set - {"by_group"}, **own)

    @property
    def each(self) -> tuple[RewardConfig, ...]:
        """The different rewards, each once."""
        own = self.default
        found: list[RewardConfig] = []
        for reward in [*self.by_group.values(), *([own] if own else [])]:
            found += [] if reward in found else [reward]
        return tuple(found)

    def covered_by(self, reward: RewardConfig) -> tuple[tuple[str, ...], bool]:
        """The groups of a reward, sorted, and False; of `default` those not its own, and True."""
        is_default = reward == self.default
        names = (name for name, own in self.by_group.items() if (own == reward) != is_default)
        return tuple(sorted(names)), is_default

    @model_validator(mode="before")
    @classmethod
    def _of_one(cls, given: Any) -> Any:
        """A `RewardConfig`, as Python code may give it."""
        return given.model_dump(exclude_unset=True) if type(given) is RewardConfig else given

    @field_validator("by_group")
    @classmethod
    def _named(cls, by_group: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
        return {group: _with_name(group, reward) for group, reward in by_group.items()}

    @model_validator(mode="after")
    def _different_names(self) -> Self:
        if "actors" in self.model_fields_set and self.default is None:
            raise ValueError("actors: give them to the rewards in `by_group`, which have their own")
        names = [reward.name for reward in self.each]
        for name in dict.fromkeys(n for n in names if names.count(n) > 1):
            raise ValueError(f"the name {name!r} is given to two rewards; give one another `name`")
        return self


def _with_name(group: str, reward: RewardConfig) -> RewardConfig:
    """The reward of a group, by default with the group's name.

    Raises:
        ValueError: the group is empty, or has no fit name.
    """
    if not group.strip():
        raise ValueError("a group without a name; leave it out")
    if "name" in reward.model_fields_set:
        return reward
    if not re.fullmatch(NAME, group):
        raise ValueError(
            f"group {group!r}: give its reward a `name` of letters, digits and ._-, for tables and "
            f"folders"
        )
    return reward.model_copy(update={"name": group})
