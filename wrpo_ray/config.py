"""One frozen config tree, read from YAML: every field with type, bound, default and unit.

Nothing here imports torch or ray. `load` reports all problems of a file at once, each as
`path: problem (got value)`, and suggests the nearest name for an unknown key.
Fields marked `PLACEMENT` say where and how fast a step runs, never what it computes, and
stay out of its identity (`Section.identity`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from wrpo_ray.addresses import Address, public, shown
from wrpo_ray.errors import UserError
from wrpo_ray.reading import KeyTwiceError, read_yaml, yaml_problem
from wrpo_ray.text_files import read_text
from wrpo_ray.values import as_written

PLACEMENT: Any = {"placement": True}
"""`json_schema_extra` of fields that do not change results."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]
ImportPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A part of the tree: frozen, and closed to unknown keys.

    Its numbers are finite and given as numbers, and its addresses hold no credentials.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        return as_written(value, cls.model_fields[info.field_name or ""].annotation)

    def identity(self) -> dict[str, Any]:
        """The JSON-ready fields that decide a result: all but those marked `PLACEMENT`."""
        names = [n for n, f in type(self).model_fields.items() if f.json_schema_extra != PLACEMENT]
        dumped = self.model_dump(mode="json", include=set(names))
        return {n: _identity(getattr(self, n), dumped[n]) for n in names}


def _identity(value: Any, dumped: Any) -> Any:
    if isinstance(value, tuple):
        return [_identity(*pair) for pair in zip(value, dumped, strict=True)]
    return value.identity() if isinstance(value, Section) else dumped


class Columns(Section):
    """Which columns of the user's file hold what; null where the file has no such column."""

    prompt: str = "prompt"
    """The prompt: a string, a {role, content} record, or a list of them."""
    reference: str | None = None
    """The right answer: a text, a number (written exactly as it is; a whole float as 42), true or
    false, a date, or a list of these of which any is right. Nulls are not allowed in it."""
    group: str | None = None
    """What to split evaluation tables by, such as a skill or category."""

    @property
    def of_prompt(self) -> list[str]:
        """Columns that hold a prompt and what belongs to it."""
        return [c for c in (self.prompt, self.reference, self.group) if c]

    @property
    def of_text(self) -> list[str]:
        """Columns whose cells become text."""
        return [c for c in (self.reference, self.group) if c]


class PromptsConfig(Section):
    """The prompts to fuse on."""

    path: str
    """A JSONL or Parquet file, or a folder of them, local or in an object store; the name as it
    is, with nothing escaped."""
    columns: Columns = Columns()
    """Column names in the file."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many rows, files in the order of their names; null uses all."""

    @property
    def needed(self) -> list[str]:
        """Columns that the files must have."""
        return self.columns.of_prompt


class ResponseColumns(Columns):
    """Column names of a file of existing responses."""

    response: str = "response"
    """The answer's text; in the format `candidates` a list of them."""
    source: str = "model"
    """The name of the model that answered."""
    reward: str = "reward"
    """The answer's score, a finite number, higher is better; in `candidates` a list of them."""


class ImportConfig(Section):
    """Existing answers that enter the chain instead of generated ones."""

    path: str
    """A JSONL or Parquet file, or a folder of them."""
    format: Literal["responses", "candidates", "preferences"] = "responses"
    """`responses`: one scored answer a row. `candidates`: all of a model's answers to a prompt in
    one row, {prompt, all_generated_responses: [text, ...], all_rm_scores: [number, ...]}, as in
    princeton-nlp/llama3-ultrafeedback-armorm. `preferences`: the published rows
    {prompt_id, prompt, chosen: [y_ws, y_wt], rejected: [y_l]}."""
    columns: ResponseColumns = ResponseColumns()
    """Column names, for `responses` and `candidates` (whose defaults are the names above)."""
    source: Name | None = None
    """The model that gave all answers; null where a column names it."""
    target: str | None = None
    """The model whose answers are the target's own (y_wt, y_l), by its name in `source`."""

    @model_validator(mode="before")
    @classmethod
    def _columns_of_candidates(cls, given: Any) -> Any:
        columns = given.get("columns", {}) if isinstance(given, dict) else None
        if not isinstance(columns, dict) or given.get("format") != "candidates":
            return given
        names = {"response": "all_generated_responses", "reward": "all_rm_scores"}
        return given | {"columns": names | columns}

    @property
    def needed(self) -> list[str]:
        """Columns that the files must have."""
        if self.format == "preferences":
            return ["prompt", "chosen", "rejected"]
        of_answer = [self.columns.response, self.columns.reward]
        return self.columns.of_prompt + of_answer + [self.columns.source] * (self.source is None)


class Actors(Section):
    """An autoscaling pool of Ray actors."""

    min: int = Field(1, ge=1)
    """Actors kept for certain."""
    max: int = Field(1, ge=1)
    """Actors at the most, as the cluster has room."""
    num_cpus: float = Field(1, ge=0)
    """CPUs for an actor."""
    num_gpus: float = Field(0, ge=0)
    """GPUs for an actor; 0 runs it on the CPU."""
    resources: dict[str, float] = {}
    """Custom resources for an actor, such as a node type's: {h100: 1}."""

    @model_validator(mode="after")
    def _ordered(self) -> Actors:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min})")
        return self


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


class SplitConfig(Section):
    """How prompts are divided, by a hash of the prompt."""

    sft: float = Field(1 / 3, ge=0, le=1)
    """Share of the prompts for SFT on y_ws; the rest are for preferences."""


class AnswersConfig(Section):
    """Which sampled answers may be chosen or rejected; the score of every answer is kept.

    What falls under several of these counts as the first of them.
    """

    empty: Literal["keep", "drop"] = "drop"
    """Answers without any visible character: there is nothing in them to learn."""
    refusals: Literal["keep", "drop"] = "keep"
    """Answers that match one of `refusal_patterns`. Some prompts are rightly refused, which the
    reward can tell and a pattern cannot."""
    refusal_patterns: tuple[str, ...] = (
        r"^\s*(i'm |i am )?(very |really |so )?sorry,? (but )?(i|as an ai)\b",
        r"^\s*(i apologi[sz]e|my apologies|unfortunately)\b[^.!?\n]{0,40}"
        r"\bi('m| am)? (can't|cannot|can not|unable|not able|won't|will not)\b",
        r"^\s*i('m| am)? (can't|cannot|can not|unable to|not able to|won't|will not) "
        r"(assist|help|provide|comply|answer|create|generate|write|discuss|fulfil)",
        r"^\s*as an ai( language)?( model| assistant)?,? i",
    )
    """Regular expressions (RE2) of refusals, searched in the answer regardless of case, with
    curly apostrophes read as straight ones. These are English, and hold an answer's start."""
    cut_off: Literal["keep", "reject_only", "drop"] = "reject_only"
    """Answers cut off at `max_tokens`. As y_ws or y_wt they would teach to leave off anywhere; as
    y_l they show what the target really does. Imported answers do not tell."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Answers of the same model with the same text to a prompt, but for the first. Where equal
    texts have equal rewards they only win more ties."""


class ContaminationConfig(Section):
    """Training prompts that share text with the prompts of `evaluate`."""

    action: Literal["drop", "report", "off"] = "report"
    """`report` measures and counts them; `drop` also leaves them out of SFT and preferences. It
    is not the default because prompts built from one template share it."""
    ngram: int = Field(13, ge=2)
    """Consecutive words that have to be the same, regardless of case and punctuation (13: GPT-3,
    arXiv 2005.14165, appendix C); in scripts without spaces, such as Chinese or Thai, consecutive
    letters. A shorter prompt counts as a whole."""


class PairConfig(Section):
    """How candidates become preference rows."""

    policy: Literal["wrpo", "fusechat3"] = "wrpo"
    """`wrpo`: y_ws is the best answer of all sources, y_wt and y_l are the best and the worst of
    the target's own. `fusechat3` (arXiv 2503.04222): chosen and rejected are the best and the worst
    of one source, the one whose best is best; the row has the chosen answer as both y_ws and
    y_wt, and trains by DPO (`wrpo.alpha.end: 0`). The target is not sampled."""
    source_below_target: Literal["keep", "drop"] = "keep"
    """What to do with a row whose y_ws scores below its y_wt."""
    min_margin: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Least reward of the better of the target's (or the source's) two answers above the worse;
    null is 0, or 0.01 for `fusechat3`. Equal rewards never make a row."""
    max_margin: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The greatest such margin; null is no bound, or 0.1 for `fusechat3`."""
    max_similarity: float | None = Field(None, ge=0, le=1)
    """Greatest likeness of these two answers: the share of character 5-grams they have in common,
    regardless of case and spacing. DPO on near-duplicates can lower both (arXiv 2402.13228).
    null only drops equal texts."""
    verifier: ImportPath | None = None
    """`module:function` called as f(messages, response, reference) -> 1.0 or 0.0. For prompts with
    a reference only right answers may then be chosen, and only wrong ones rejected."""
    contamination: ContaminationConfig = ContaminationConfig()
    """Overlap with the evaluation prompts."""

    @property
    def margins(self) -> tuple[float, float]:
        """Least and greatest margin."""
        low, high = (0.01, 0.1) if self.policy == "fusechat3" else (0.0, float("inf"))
        low = low if self.min_margin is None else self.min_margin
        return low, high if self.max_margin is None else self.max_margin

    @model_validator(mode="after")
    def _consistent(self) -> PairConfig:
        low, high = self.margins
        if high < low:
            raise ValueError(f"max_margin ({high:g}) must be at least min_margin ({low:g})")
        if self.policy == "fusechat3" and self.source_below_target == "drop":
            raise ValueError("source_below_target belongs to policy: wrpo")
        return self


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), by peft."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(32, ge=1)
    """Scale: an adapter's output is multiplied by alpha / rank."""
    targets: tuple[str, ...] | Literal["all-linear"] = Field("all-linear", min_length=1)
    """Names of the linear layers that get an adapter; the head never does."""


class TrainConfig(Section):
    """One fine-tuning run on Ray Train and DeepSpeed."""

    epochs: int = Field(1, ge=1)
    """Passes over the rows."""
    batch_size: int = Field(128, ge=1)
    """Rows an optimizer step, over all workers."""
    learning_rate: float = Field(7e-6, gt=0, le=1)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps in which the rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decay."""
    clip: float = Field(1.0, ge=0)
    """Greatest norm of the whole gradient; 0 does not clip."""
    max_length: int = Field(2048, ge=8)
    """Tokens of prompt and answer together."""
    max_prompt_length: int | None = Field(None, ge=1)
    """Tokens of the prompt; a row with a longer one is dropped and counted; null is no bound."""
    overflow: Literal["drop", "cut"] = "drop"
    """What to do with a row whose answers exceed `max_length`: `drop` it, or `cut` each answer
    that is too long, and only that one, at its end; both are counted."""
    compat: Literal["none", "published"] = "none"
    """`published` tokenizes as the method's published script, for replication: all answers from
    their texts, each with the assistant's header in front and a second end token behind, also one
    that was cut off; where the longest does not fit, the prompt keeps its last
    `max_prompt_length` tokens, and then all answers are cut to `max_length - max_prompt_length`."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations; log-probs are always summed in fp32."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; they are merged into the result, whose
    weights are fp32, and kept beside it."""
    holdout: float = Field(0.0, ge=0, le=0.5)
    """Share of the rows, by hash, that are kept from training to measure the loss on."""
    holdout_every: int = Field(50, ge=1, json_schema_extra=PLACEMENT)
    """Optimizer steps between measurements on the rows held out; the last step always has one."""
    zero_stage: Literal[0, 1, 2, 3] = Field(3, json_schema_extra=PLACEMENT)
    """DeepSpeed ZeRO stage."""
    offload: Literal["none", "optimizer", "all"] = Field("none", json_schema_extra=PLACEMENT)
    """What ZeRO keeps in the CPU's memory: the optimizer's state, or (stage 3) weights as well."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=PLACEMENT)
    """Compute activations again in the backward pass instead of keeping them."""
    packing: bool = Field(True, json_schema_extra=PLACEMENT)
    """Compute a row's prompt once for all its answers, and pack rows without padding."""
    micro_batch_tokens: int = Field(8192, ge=1, json_schema_extra=PLACEMENT)
    """Tokens a worker holds in one forward pass; a longer row makes a pass of its own."""
    workers: int = Field(1, ge=1, json_schema_extra=PLACEMENT)
    """Ray Train workers."""
    min_workers: int | None = Field(None, ge=1, json_schema_extra=PLACEMENT)
    """Fewest workers to go on with when nodes are lost or not there yet; null needs all."""
    num_cpus: float = Field(1, ge=0, json_schema_extra=PLACEMENT)
    """CPUs for a worker."""
    num_gpus: int = Field(0, ge=0, le=1, json_schema_extra=PLACEMENT)
    """1 trains on GPUs, one a worker; 0 on the CPU (gloo)."""
    resources: dict[str, float] = Field({}, json_schema_extra=PLACEMENT)
    """Custom resources for a worker, such as a node type's: {h100: 1}."""
    checkpoint_every: int = Field(100, ge=1, json_schema_extra=PLACEMENT)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=PLACEMENT)
    """Newest checkpoints kept until the run is finished."""
    max_failures: int = Field(3, ge=0, json_schema_extra=PLACEMENT)
    """How often Ray Train restarts the workers from the last checkpoint."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), json_schema_extra=PLACEMENT
    )
    """Where metrics go beside `metrics.jsonl`; each needs its package and its own settings."""

    def identity(self) -> dict[str, Any]:
        """With LoRA it says how adapters are merged, which was once in bf16."""
        found = super().identity()
        return found | ({"lora": found["lora"] | {"merged": "fp32"}} if self.lora else {})

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares with a reference model."""
        return False

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length "
                f"({self.max_length})"
            )
        if self.compat == "published" and self.max_prompt_length is None:
            raise ValueError("compat: published needs max_prompt_length (the paper's is 1800)")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload needs a zero_stage of 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError("offload: all needs zero_stage 3")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers must be at most workers ({self.workers})")
        return self


class SftConfig(TrainConfig):
    """SFT of the target on y_ws."""

    prompts: Literal["split", "all"] = "split"
    """Whose y_ws: those of the prompts for SFT, or `all`, as plain distillation has them, which
    leaves none unseen for preferences."""

    @model_validator(mode="after")
    def _is_ours(self) -> SftConfig:
        if self.compat == "published":
            raise ValueError(
                "compat: published is for wrpo; the published SFT packs sequences of several rows, "
                "with loss on prompts, which is not repeated here (leave compat out)"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Without `prompts`, which the step of the rows has."""
        return {name: value for name, value in super().identity().items() if name != "prompts"}


class AlphaConfig(Section):
    """The weight of the source's answer against the target's (paper, equation 6)."""

    end: float = Field(0.1, ge=0, le=1)
    """alpha at the last step (`dynamic`) or at every step (`static`); 0 is DPO."""
    schedule: Literal["dynamic", "static"] = "dynamic"
    """`dynamic` grows linearly from 0 with the rows consumed."""


class ReferenceConfig(Section):
    """Log-probs under the reference model, the SFT model."""

    mode: Literal["stored", "live"] = Field("stored", json_schema_extra=PLACEMENT)
    """`stored`: computed once, before training, and kept with the rows. `live`: computed in each
    step by a second model that the workers hold (with LoRA: by the same without its adapters)."""
    actors: Actors | None = Field(None, json_schema_extra=PLACEMENT)
    """The pool that computes them; null takes as many as there are workers, each with as much."""


class WrpoConfig(TrainConfig):
    """Preference training (paper, equations 4 to 6)."""

    learning_rate: float = Field(3e-7, gt=0, le=1)
    """Peak learning rate."""
    objective: Literal["wrpo", "ipo", "simpo"] = "wrpo"
    """The loss; `wrpo` with `alpha.end: 0` is DPO. `simpo` needs no reference."""
    beta: float = Field(0.01, gt=0)
    """Scale of the implicit reward beta * log(pi/pi_ref)."""
    alpha: AlphaConfig = AlphaConfig()
    """The fusion coefficient."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round (not for `ipo`)."""
    margin: float = Field(0.0, ge=0)
    """SimPO's gamma: by how much the chosen reward should exceed the rejected one."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of an SFT term: the negative log-prob of y_ws an answer token."""
    reference: ReferenceConfig = ReferenceConfig()
    """Where the log-probs under pi_ref come from."""

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares with a reference model."""
        return self.objective != "simpo"

    @model_validator(mode="after")
    def _fits_objective(self) -> WrpoConfig:
        if self.margin and self.objective != "simpo":
            raise ValueError("margin belongs to objective: simpo")
        if self.label_smoothing and self.objective == "ipo":
            raise ValueError("label_smoothing does not belong to objective: ipo")
        return self


class AlpacaEvalConfig(Section):
    """AlpacaEval 2: win rate and length-controlled win rate against GPT-4 Turbo's answers."""

    path: str
    """The folder that `wrpo fetch alpaca_eval` fills."""
    sampling: SamplingConfig = SamplingConfig(samples=1, temperature=0.0, top_p=1.0)
    """How models answer; the benchmark leaves it to each."""


class ArenaHardConfig(Section):
    """Arena-Hard v0.1: win rate against GPT-4-0314's answers, in two games a question."""

    path: str
    """The folder that `wrpo fetch arena_hard` fills."""
    sampling: SamplingConfig = SamplingConfig(
        samples=1, temperature=0.0, top_p=1.0, max_tokens=4096
    )
    """How models answer; greedily in the benchmark's own runs."""
    style_control: bool = False
    """Also the win rate without what length and markdown win, in a column of its own."""


class MTBenchConfig(Section):
    """MT-Bench: ratings from 1 to 10 of two turns; the temperature goes by the category."""

    path: str
    """The folder that `wrpo fetch mt_bench` fills."""
    max_tokens: int = Field(1024, ge=1)
    """Longest answer in tokens."""


class BenchmarksConfig(Section):
    """Public benchmarks, each judged by `evaluate.judge`."""

    alpaca_eval: AlpacaEvalConfig | None = None
    """AlpacaEval 2."""
    arena_hard: ArenaHardConfig | None = None
    """Arena-Hard v0.1."""
    mt_bench: MTBenchConfig | None = None
    """MT-Bench."""


class PairwiseConfig(Section):
    """Pairs of models on the held-out prompts: win, tie and loss."""

    pairs: tuple[tuple[Name, Name], ...] = ()
    """(model, against which); none is the fused model against the target."""
    by: Literal["judge", "reward"] = "judge"
    """`judge`: two games with the answers' positions swapped, a contradiction is a tie.
    `reward`: the higher reward wins."""
    margin: float = Field(0.0, ge=0, allow_inf_nan=False)
    """For `by: reward`: rewards that differ by no more are a tie."""
    template: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A Jinja file with the question to the judge, of `messages`, `first` and `second`, that asks
    for [[A]], [[B]] or [[C]] (a tie). Its content is what counts; null takes our own."""
    max_tokens: int = Field(1024, ge=1)
    """Longest judgment in tokens."""


class BaselinesConfig(Section):
    """Collective models that need no training, compared like the others (not on MT-Bench)."""

    best_of_sources: bool = False
    """Of the sources' answers the one with the highest reward (LLM-Blender, arXiv 2306.02561)."""
    mixture: Name | None = None
    """A model that is given the sources' answers to a prompt and writes its own from them
    (mixture of agents, arXiv 2406.04692); the name of one of the compared models."""


class EvaluateConfig(Section):
    """Held-out evaluation of every model of the run, and of others."""

    prompts: PromptsConfig | None = None
    """Held-out prompts; those that are also training prompts are left out and counted."""
    models: tuple[ModelConfig, ...] = ()
    """Further models to compare, such as a checkpoint or another run's fused model."""
    judge: ModelConfig | None = None
    """The model that judges, behind an endpoint or on vLLM."""
    judged: tuple[Name, ...] = ()
    """Which models benchmarks look at; none is all, the baselines too."""
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    """Public benchmarks."""
    pairwise: PairwiseConfig | None = None
    """Pairs of models on `prompts`."""
    baselines: BaselinesConfig = BaselinesConfig()
    """Collective models."""
    sampling: SamplingConfig = SamplingConfig(samples=1, temperature=0.0, top_p=1.0)
    """How answers are drawn; greedy by default."""
    verifier: str | None = Field(None, pattern=r"^(exact|number|code|[\w.]+:\w+)$")
    """What tells a right answer: `exact`, `number` or `code`, as for `reward`, or
    `module:function` called as f(messages, response, reference) -> 1.0 or 0.0."""
    dpo_baseline: bool = True
    """Also train and evaluate plain DPO (alpha = 0) on (y_wt, y_l) from the same SFT model."""


class StorageConfig(Section):
    """How data lies in the output folder."""

    buckets: int = Field(64, ge=1, le=65536)
    """Parts that prompts are hashed into, a power of two: the unit of parallel work."""
    chunk: int = Field(64, ge=1, json_schema_extra=PLACEMENT)
    """Prompts committed at once, and batches of scores: what a crash can lose, for each actor."""

    @model_validator(mode="after")
    def _power_of_two(self) -> StorageConfig:
        if self.buckets & (self.buckets - 1):
            raise ValueError(f"buckets must be a power of two, such as 64 (got {self.buckets})")
        return self


class ClusterConfig(Section):
    """The Ray cluster to run on."""

    address: str | None = None
    """Ray address; null takes RAY_ADDRESS, and without it starts Ray on this machine."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs of a Ray started on this machine; null takes the cores it has."""
    cache_gb: float | None = Field(None, gt=0)
    """GB (10^9 bytes) of disk that copies of weights may take on each node, in its WRPO_CACHE;
    null takes the node's WRPO_CACHE_GB, and without that all but 1 GB of the disk."""


NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class PricesConfig(Section):
    """What work costs, in any one currency.

    A pool has the name of its model or reward, or of its step: `rows-sft`, `rows-wrpo`, `sft`,
    `wrpo`, `dpo`.
    """

    gpu_hour: NotNegative = 0.0
    """One GPU for an hour, in pools that `pools` does not name."""
    pools: dict[Name, NotNegative] = {}
    """One GPU for an hour, by pool: for clusters with several kinds of GPUs."""
    input_tokens: dict[Name, NotNegative] = {}
    """A million prompt tokens, by source: for endpoints."""
    output_tokens: dict[Name, NotNegative] = {}
    """A million answer tokens, by source: for endpoints."""


class BudgetConfig(Section):
    """When to stop, over all calls on this output together; null is no bound.

    A run stops at the next finished bucket, or checkpoint in training, with exit code 3. What
    actors had in hand since they last committed is done again when a higher budget goes on.
    """

    output_tokens: int | None = Field(None, ge=1)
    """Tokens that sources and target-SFT may answer."""
    money: float | None = Field(None, gt=0)
    """Money by `prices`; with `gpu_hour: 1` it is a budget of GPU-hours."""
    hours: float | None = Field(None, gt=0)
    """Hours on the clock."""


class PlanConfig(Section):
    """What `wrpo plan` cannot know; what the output already shows is measured there instead."""

    prompts: int | None = Field(None, ge=1)
    """Number of prompts (or imported rows), where their file is not there yet."""
    prompt_tokens: float = Field(200, gt=0)
    """Mean tokens of a prompt."""
    output_tokens: float = Field(400, gt=0)
    """Mean tokens of an answer."""
    rates: dict[Name, Positive] = {}
    """By pool (see `prices`) and for one actor or worker: a model's output tokens a second, the
    reward's answers a second, the tokens a second of `rows-wrpo`, `sft`, `wrpo` and `dpo`."""
    parameters: dict[Name, Positive] = {}
    """Weights that a token meets, by model, for guessed rates of models that are not there."""
    startup: dict[Name, NotNegative] = {}
    """Seconds until an engine of a model answers; else guessed by its size."""
    gpu_tflops: float = Field(990, gt=0)
    """Dense bf16 TFLOP/s of a GPU, for guessed rates; the default is an H100's."""


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


class Config(Section):
    """A fusion run."""

    output: str
    """Folder of all results, local or in an object store (s3://, gs://). What opens the store is in
    the environment or the machine's role, never in an address."""
    seed: int = Field(42, ge=0, lt=2**31)
    """Decides splits, samples, orders."""
    prompts: PromptsConfig | None = None
    """Prompts to generate answers for."""
    existing: ImportConfig | None = Field(None, alias="import")
    """Existing answers, instead of `prompts` and `sources`."""
    sources: tuple[ModelConfig, ...] = ()
    """The source models."""
    target: ModelConfig | None = None
    """The model to be improved."""
    sampling: SamplingConfig = SamplingConfig()
    """How sources and target-SFT are sampled."""
    reward: RewardConfig | None = None
    """What scores the answers."""
    split: SplitConfig = SplitConfig()
    """SFT and preference prompts."""
    answers: AnswersConfig = AnswersConfig()
    """Which answers may be chosen or rejected."""
    pair: PairConfig = PairConfig()
    """Selection of y_ws, y_wt, y_l."""
    sft: SftConfig | None = SftConfig()
    """SFT of the target on y_ws (paper, section 4.1). null leaves it out: the target itself is
    sampled, trained and compared with; with `wrpo.alpha.end: 0` that is on-policy DPO."""
    wrpo: WrpoConfig = WrpoConfig()
    """Preference training of target-SFT."""
    evaluate: EvaluateConfig | None = None
    """Held-out evaluation."""
    storage: StorageConfig = StorageConfig()
    """Layout of the output."""
    cluster: ClusterConfig = Field(ClusterConfig(), json_schema_extra=PLACEMENT)
    """Where to run."""
    prices: PricesConfig = Field(PricesConfig(), json_schema_extra=PLACEMENT)
    """What work costs."""
    budget: BudgetConfig = Field(BudgetConfig(), json_schema_extra=PLACEMENT)
    """When to stop."""
    plan: PlanConfig = Field(PlanConfig(), json_schema_extra=PLACEMENT)
    """What `wrpo plan` reckons with."""
    report: bool = Field(True, json_schema_extra=PLACEMENT)
    """Write `report.html` into the output as steps finish; `wrpo report` makes it at any time."""
    failure_limit: float = Field(0.01, ge=0, le=1, json_schema_extra=PLACEMENT)
    """Greatest share of failed rows in a step before the run stops."""
    max_attempts: int = Field(3, ge=1, json_schema_extra=PLACEMENT)
    """Runs in which an answer or a score is tried before it stays failed; `wrpo failures --retry`
    gives as many again."""

    @model_validator(mode="after")
    def _whole(self) -> Config:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        asked, has_input = self.evaluate, self.prompts or self.existing
        if (self.prompts and self.existing) or (not has_input and not (asked and asked.models)):
            yield "give exactly one of `prompts` and `import`"
        if self.prompts and not self.sources:
            yield "sources: zero sources, so nothing to fuse; add at least one {name, model}"
        if self.prompts and not self.reward:
            yield "reward: missing; give `model`, `function`, `verifier`, `judge` or `mixture`"
        yield from self._without_reference()
        if self.target and self.target.endpoint:
            yield "target: it is trained, so it needs weights: give a model folder, no endpoint"
        if asked and has_input and not self.target:
            yield "evaluate: needs a `target`"
        if asked and not (self.reward or asked.verifier or asked.judge):
            yield "evaluate: needs a `reward`, a `verifier` or a `judge`"
        yield from self._without_judge()
        if self.pair.policy == "fusechat3" and self.wrpo.alpha.end:
            yield (
                "pair.policy: fusechat3 trains by DPO, its rows have one chosen answer; set "
                "wrpo.alpha.end: 0"
            )
        if self.pair.verifier and self.existing:
            yield "pair.verifier: works on generated answers, not on those of `import`"
        names = [m.name for m in self.sources] + ([self.target.name] if self.target else [])
        names += [m.name for m in asked.models] if asked else []
        taken = {"target-sft", "target-dpo", "fused", "best-of-sources", "mixture"}
        reserved = taken & set(names)
        if reserved:
            yield f"sources: the name {sorted(reserved)[0]!r} is taken by the run's own models"
        for name in {n for n in names if names.count(n) > 1}:
            yield f"sources: the name {name!r} is given twice"

    def _without_judge(self) -> Iterator[str]:
        """What an evaluation lacks for what it is asked for."""
        asked = self.evaluate
        if asked is None:
            return
        pairs, baselines = asked.pairwise, asked.baselines
        has_benchmark = any(
            getattr(asked.benchmarks, name) for name in BenchmarksConfig.model_fields
        )
        if not asked.prompts and not has_benchmark:
            yield "evaluate: give `prompts` or one of `benchmarks`"
        if not asked.judge and (has_benchmark or (pairs and pairs.by == "judge")):
            yield "evaluate.judge: missing; benchmarks and `pairwise.by: judge` need it"
        if pairs and not asked.prompts:
            yield "evaluate.pairwise: needs `evaluate.prompts`"
        if not self.reward and (baselines.best_of_sources or (pairs and pairs.by == "reward")):
            yield "evaluate: best_of_sources and `pairwise.by: reward` need a `reward`"
        if not self.sources and (baselines.best_of_sources or baselines.mixture):
            yield "evaluate.baselines: need `sources`"

    def _without_reference(self) -> Iterator[str]:
        """Verifiers that have nothing to compare with."""
        lack = "verifies answers, so set {}.columns.reference to the column with the right ones"
        verifies = bool(self.reward and any(part.verifier for part in self.reward.parts))
        if verifies and self.prompts and not self.prompts.columns.reference:
            yield f"reward: it {lack.format('prompts')}"
        asked = self.evaluate
        checks = bool(asked and asked.verifier in get_args(VerifierName))
        held_out = asked.prompts if asked else None
        if held_out and (verifies or checks) and not held_out.columns.reference:
            yield f"evaluate: it {lack.format('evaluate.prompts')}"


class CaseConfig(Section):
    """A setting in which variants are compared, such as a set of sources."""

    config: str
    """A run's YAML file, by a path from the study's own."""
    set: dict[str, Any] = {}
    """Changes of it: {a.b: value}."""


class VariantConfig(Section):
    """A way to train that is compared with others, as changes of the case's config."""

    model: Name = "fused"
    """The model of the run that is compared: `fused`, `target-sft`, or a given one by its name;
    the chain runs no further than that needs."""
    sources: int | None = Field(None, ge=1)
    """Only the first so many sources; null takes all."""
    set: dict[str, Any] = {}
    """Changes of the case's config: {wrpo.beta: 0.3}."""
    seeds: int | None = Field(None, ge=1)
    """Only the first so many seeds; null takes all."""


class StudyConfig(Section):
    """Variants of training, over seeds and cases: `wrpo study`.

    What variants have in common, such as the sources' answers, is made once.
    """

    output: str
    """Folder of all results; each case has one of its own in it."""
    seeds: tuple[int, ...] = Field((42,), min_length=1)
    """The runs' `seed`: splits, samples, orders."""
    cases: dict[Name, CaseConfig] = Field(min_length=1)
    """Where they are compared."""
    variants: dict[Name, VariantConfig] = Field(min_length=1)
    """What is compared."""
    contrasts: tuple[tuple[Name, Name], ...] = ()
    """(a, b): the paired difference a - b, over the seeds and prompts that both have."""

    @model_validator(mode="after")
    def _known(self) -> StudyConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        for name in {name for pair in self.contrasts for name in pair} - set(self.variants):
            raise ValueError(f"contrasts: there is no variant {name!r}")
        return self


# --- loading -----------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), check everything.

    Raises:
        UserError: with one line for each problem.
    """
    return _checked(Config, _read_yaml(path), overrides, f"{path}: ")


def serving(tree: dict[str, Any], overrides: Sequence[str] = ()) -> ServeConfig:
    """Check the settings of `wrpo serve`, given as a tree, after applying overrides.

    Raises:
        UserError: with one line for each problem.
    """
    return _checked(ServeConfig, tree, overrides, "serve: ")


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML file; the configs of its cases are not read yet (see `study_config`).

    Raises:
        UserError: with one line for each problem.
    """
    study = _checked(StudyConfig, _read_yaml(path), overrides, f"{path}: ")
    cases = {
        name: case.model_copy(update={"config": str(Path(path).parent / case.config)})
        for name, case in study.cases.items()
    }
    return study.model_copy(update={"cases": cases})


def study_config(study: StudyConfig, case: str, variant: str) -> Config:
    """The config of a variant in a case, with the first seed.

    Raises:
        UserError: with one line for each problem.
    """
    place, asked = study.cases[case], study.variants[variant]
    tree = _read_yaml(place.config)
    fixed = {
        "output": f"{study.output}/{case}",
        "seed": study.seeds[0],
        "evaluate.dpo_baseline": False,  # a variant, if it is wanted
    }
    where = f"{place.config} ({case}, {variant})"
    for changes in (place.set, asked.set, fixed):
        for dotted, value in changes.items():
            _put(tree, dotted, value, f"{where}: {dotted}")
    if asked.sources:
        tree["sources"] = (tree.get("sources") or [])[: asked.sources]
    return _checked(Config, tree, (), f"{where}: ")


def read_serving(path: str | Path) -> dict[str, Any]:
    """A YAML file's tree for `serving`.

    Raises:
        UserError: the file cannot be read.
    """
    return _read_yaml(path)


def _checked(kind: type[S], tree: Any, overrides: Sequence[str], where: str) -> S:
    for override in overrides:
        _override(tree, override)
    try:
        return _validated(kind, tree, where)
    except RecursionError:
        raise UserError(f"{where}a value holds itself, or is nested too deeply") from None


def _validated(kind: type[S], tree: Any, where: str) -> S:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [explain(kind, e) for e in error.errors()]
        raise UserError("\n".join(f"{where}{shown(line)}" for line in lines)) from None


def _read_yaml(path: str | Path) -> dict[str, Any]:
    if Address.of(str(path)):
        raise UserError(f"{shown(str(path))}: a config is a file on this machine; copy it here")
    if not Path(path).exists():
        raise UserError(f"{path}: no such config file; see jobs/ for examples")
    try:
        tree = read_yaml(read_text(path, "config"))
    except KeyTwiceError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys (got {type(tree).__name__})")
    return tree


def _override(tree: Any, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set {shown(override)}: write it as a.b=value")
    try:
        value = read_yaml(text)
    except KeyTwiceError as error:
        raise UserError(f"--set {dotted}: {error}") from None
    except yaml.YAMLError:
        raise UserError(f"--set {dotted}: the value is not valid YAML") from None
    _put(tree, dotted, value, f"--set {dotted}")


def _put(tree: Any, dotted: str, value: Any, what: str) -> None:
    """Change the value at `a.b` in a tree."""
    *parents, last = dotted.split(".")
    try:
        for key in parents:
            tree = tree[int(key)] if isinstance(tree, list) else tree.setdefault(key, {})
        tree[int(last) if isinstance(tree, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise UserError(f"{what}: the config has no such place") from None


def explain(kind: type[Section], error: Mapping[str, Any]) -> str:
    """A problem of a section in one line, as `path: problem (got value)`."""
    where = ".".join(str(public(part)) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(kind, error['loc'])}"
    if error["type"] == "missing":
        return f"{where}: missing; it is required"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]} (got {public(error['input'])!r})"


def _nearest(kind: type[Section], loc: tuple[str | int, ...]) -> str:
    *parents, unknown = loc
    section = _section_at(kind, parents)
    names = [f.alias or n for n, f in section.model_fields.items()] if section else []
    close = difflib.get_close_matches(str(unknown), names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(names)}"


def _section_at(section: type[Section] | None, loc: list[str | int]) -> type[Section] | None:
    is_name = False  # of one of the user's own, in a mapping of sections
    for part in loc:
        if isinstance(part, int) or section is None or is_name:
            is_name = False
            continue
        fields = {f.alias or n: f for n, f in section.model_fields.items()}
        annotation = fields[part].annotation if part in fields else None
        section, is_name = _section_in(annotation), get_origin(annotation) is dict
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((s for a in get_args(annotation) if (s := _section_in(a))), None)
