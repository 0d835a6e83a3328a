"""Sections `sft` and `wrpo`: SFT and the preference objectives."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from wrpo_ray.config.base import PLACEMENT, Section
from wrpo_ray.config.resources import Actors
from wrpo_ray.text.addresses import without_secrets


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

    answers: ClassVar[tuple[str, ...]] = ("source_chosen",)
    """Names of a row's answers, in the order in which they are tokenized and stacked."""
    is_preference: ClassVar[bool] = False
    """Whether a row compares answers; else it is SFT on y_ws."""

    epochs: int = Field(1, ge=1)
    """Passes over the rows."""
    batch_size: int = Field(128, ge=1)
    """Rows per optimizer step, over all workers."""
    learning_rate: float = Field(7e-6, gt=0, le=1)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    clip: float = Field(1.0, ge=0)
    """Maximum norm of the whole gradient; 0 does not clip."""
    max_length: int = Field(2048, ge=8)
    """Maximum tokens of prompt and answer together."""
    max_prompt_length: int | None = Field(None, ge=1)
    """Maximum tokens of the prompt; rows with a longer one are dropped; null is no limit."""
    overflow: Literal["drop", "cut"] = "drop"
    """If an answer exceeds `max_length`: `drop` the row, or `cut` the end of each answer that is
    too long. The step's manifest counts both."""
    compat: Literal["none", "published"] = "none"
    """`published` tokenizes as the method's published script does, for replication: all answers
    from their texts, each after the assistant's header and before a second end token, even if it
    was cut off. If the longest answer does not fit, the prompt keeps its last `max_prompt_length`
    tokens, and then all answers are cut to `max_length - max_prompt_length`."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations; log-probs are always summed in fp32."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights. They are merged into the trained model, whose
    weights are fp32, and saved beside it."""
    holdout: float = Field(0.0, ge=0, le=0.5)
    """Share of the rows, by hash, to measure the loss on instead of training."""
    holdout_every: int = Field(50, ge=1, json_schema_extra=PLACEMENT)
    """Optimizer steps between measurements on held-out rows; the last step always has one."""
    zero_stage: Literal[0, 1, 2, 3, "auto"] = Field("auto", json_schema_extra=PLACEMENT)
    """DeepSpeed ZeRO stage; `auto` is 3, but 0 for a single worker on a CPU without offload, where
    sharding would only cost memory and time."""
    offload: Literal["none", "optimizer", "all"] = Field("none", json_schema_extra=PLACEMENT)
    """State that ZeRO keeps in CPU memory: the optimizer's, or (at stage 3) weights as well."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=PLACEMENT)
    """Recompute activations in the backward pass, to save memory."""
    packing: bool = Field(True, json_schema_extra=PLACEMENT)
    """Compute a row's prompt once for all of its answers, and pack rows without padding."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", json_schema_extra=PLACEMENT
    )
    """Maximum tokens of a micro-batch; a longer row is a micro-batch of its own. `auto` takes as
    many as fit into the memory, at most 2,048 on a CPU and 16,384 on a GPU."""
    workers: int = Field(1, ge=1, json_schema_extra=PLACEMENT)
    """Number of Ray Train workers."""
    min_workers: int | None = Field(None, ge=1, json_schema_extra=PLACEMENT)
    """Fewest workers to train with if nodes are lost or not ready yet; null needs all."""
    num_cpus: float | None = Field(None, ge=0, json_schema_extra=PLACEMENT)
    """CPUs per worker, and its threads. Null is 1; where the run starts Ray itself on a machine
    without GPUs, a worker gets its share of the cores."""
    num_gpus: int = Field(0, ge=0, le=1, json_schema_extra=PLACEMENT)
    """GPUs per worker; 0 trains on CPUs (gloo)."""
    resources: dict[str, float] = Field({}, json_schema_extra=PLACEMENT)
    """Custom resources per worker, such as those of a node type: {h100: 1}."""
    checkpoint_every: int = Field(100, ge=1, json_schema_extra=PLACEMENT)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=PLACEMENT)
    """Number of newest checkpoints to keep until the run has finished."""
    max_failures: int = Field(3, ge=0, json_schema_extra=PLACEMENT)
    """Maximum restarts of the workers from the last checkpoint."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), json_schema_extra=PLACEMENT
    )
    """Services that get metrics beside `metrics.jsonl`; each needs its package and settings."""

    def identity(self) -> dict[str, Any]:
        """With LoRA it includes the precision of merging, which was once bf16."""
        found = super().identity()
        return found | ({"lora": found["lora"] | {"merged": "fp32"}} if self.lora else {})

    @property
    def cpus(self) -> float:
        """CPUs per worker, 1 where the config leaves them out."""
        return 1.0 if self.num_cpus is None else self.num_cpus

    def stage_of(self, workers: int) -> int:
        """The ZeRO stage with this number of workers.

        Stage 0 in bf16 becomes stage 1: without ZeRO there are no fp32 master weights, and small
        updates vanish.
        """
        alone = workers == 1 and not self.num_gpus and self.offload == "none"
        stage = (0 if alone else 3) if self.zero_stage == "auto" else self.zero_stage
        return 1 if stage == 0 and self.precision == "bf16" else stage

    @property
    def takes_all_prompts(self) -> bool:
        """Whether the rows are those of all prompts, not only of those for SFT."""
        return False

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares with a reference model."""
        return self.reference_mode is not None

    @property
    def reference_mode(self) -> str | None:
        """Who computes log-probs under the reference, and when; None without one."""
        return None

    @property
    def has_second_model(self) -> bool:
        """Whether workers hold the reference; with LoRA it is the policy without adapters."""
        return self.reference_mode == "live" and self.lora is None

    @property
    def reference_actors(self) -> Actors | None:
        """The pool that is configured for log-probs under the reference."""
        return None

    @field_validator("micro_batch_tokens", mode="wrap")
    @classmethod
    def _tokens_or_auto(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """One error, where a union has one for each of its types."""
        try:
            return validate(value)
        except ValidationError:
            told = without_secrets(value)
            raise ValueError(f"give a number of at least 1, or auto (got {told!r})") from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length "
                f"({self.max_length})"
            )
        if self.compat == "published" and self.max_prompt_length is None:
            raise ValueError("compat: published needs max_prompt_length (the paper's is 1800)")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload needs a zero_stage of 1, 2 or 3")
        if self.offload == "all" and self.zero_stage not in (3, "auto"):
            raise ValueError("offload: all needs zero_stage 3")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers must be at most workers ({self.workers})")
        return self


class SftConfig(TrainConfig):
    """SFT of the target on y_ws.

    Example:
        >>> SftConfig(workers=8).learning_rate
        7e-06
    """

    prompts: Literal["split", "all"] = "split"
    """Prompts whose y_ws are trained on: those of the SFT split, or `all`, as in plain
    distillation, which leaves no unseen prompts for preference training."""

    @property
    def takes_all_prompts(self) -> bool:
        """Whether the rows are those of all prompts, not only of those for SFT."""
        return self.prompts == "all"

    @model_validator(mode="after")
    def _is_ours(self) -> Self:
        if self.compat == "published":
            raise ValueError(
                "compat: published is for wrpo; the published SFT packs sequences of several rows, "
                "with loss on prompts, which is not repeated here (leave compat out)"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """All but `prompts`, which is part of the key of the prepared rows."""
        return {name: value for name, value in super().identity().items() if name != "prompts"}


class AlphaConfig(Section):
    """The weight alpha of y_ws against y_wt (paper, equation 6)."""

    end: float = Field(0.1, ge=0, le=1)
    """alpha at the last step (`dynamic`) or at every step (`static`); 0 is DPO."""
    schedule: Literal["dynamic", "static"] = "dynamic"
    """`dynamic` grows linearly from 0 with the rows trained on."""


class ReferenceConfig(Section):
    """Log-probs under the reference model, the SFT model."""

    mode: Literal["stored", "split", "live"] = Field("stored", json_schema_extra=PLACEMENT)
    """`stored`: computed once, before training, by actors that each hold the whole model. `split`:
    computed once, by the training workers before their first step, with the weights split over them
    as in training; for a model that is larger than a GPU. `live`: computed in each step, by a
    second model on the workers (with LoRA: by the policy without its adapters)."""
    actors: Actors | None = Field(None, json_schema_extra=PLACEMENT)
    """The pool of actors that computes them; null takes the number and resources of `workers`."""


class WrpoConfig(TrainConfig):
    """Preference training (paper, equations 4 to 6).

    Example:
        >>> WrpoConfig(beta=0.1).alpha.end
        0.1
    """

    answers: ClassVar[tuple[str, ...]] = ("source_chosen", "target_chosen", "rejected")
    is_preference: ClassVar[bool] = True

    learning_rate: float = Field(3e-7, gt=0, le=1)
    """Peak learning rate."""
    objective: Literal["wrpo", "ipo", "simpo"] = "wrpo"
    """The loss; `wrpo` with `alpha.end: 0` is DPO. `simpo` needs no reference."""
    beta: float = Field(0.01, gt=0)
    """Scale of the implicit reward beta * log(pi/pi_ref)."""
    alpha: AlphaConfig = AlphaConfig()
    """The fusion coefficient alpha."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round (not for `ipo`)."""
    margin: float = Field(0.0, ge=0)
    """SimPO's gamma: by how much the chosen reward should exceed the rejected one."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of an SFT term: the negative log-prob of y_ws per answer token."""
    reference: ReferenceConfig = ReferenceConfig()
    """Source of the log-probs under the reference model pi_ref."""

    @property
    def reference_mode(self) -> str | None:
        """Who computes log-probs under the reference, and when; None without one."""
        return None if self.objective == "simpo" else self.reference.mode

    @property
    def reference_actors(self) -> Actors | None:
        """The pool that is configured for log-probs under the reference."""
        return self.reference.actors

    @model_validator(mode="after")
    def _fits_objective(self) -> Self:
        # not a discriminated union: it would put the objective into the paths of errors and
        # reject `margin: 0` elsewhere; `loss` has a class with its own fields per objective
        if self.margin and self.objective != "simpo":
            raise ValueError("margin belongs to objective: simpo")
        if self.label_smoothing and self.objective == "ipo":
            raise ValueError("label_smoothing does not belong to objective: ipo")
        return self
