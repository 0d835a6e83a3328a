"""DeepSpeed engines: the config from ours, the policy with its optimizer, the frozen reference.

DeepSpeed averages gradients over workers; its division by gradient accumulation steps is switched
off. So a loss of `workers * own share of the mean` makes the gradient the exact mean (see `loop`).
"""

import collections
import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch

from wrpo_ray.config import TrainConfig
from wrpo_ray.stages.train.memory import BUCKET, SUB_GROUP


def prepare(config: TrainConfig) -> None:
    """Make DeepSpeed use the existing process group, and log errors only.

    On CPUs it must not compile operators either, which takes half a minute.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if config.num_gpus == 0:
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    deepspeed.init_distributed(verbose=False)


def engine_config(config: TrainConfig, workers: int) -> dict[str, Any]:
    """DeepSpeed's config dict.

    The number of micro-batches differs from step to step, so the loop marks the last one
    (`set_gradient_accumulation_boundary`); the sizes here only allow more than one.
    """
    return {
        "train_batch_size": 2 * workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": config.clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": _zero(config, config.stage_of(workers)),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _zero(config: TrainConfig, stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": config.num_gpus > 0,
        "reduce_bucket_size": BUCKET,
    }
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = BUCKET
        zero["sub_group_size"] = SUB_GROUP
    else:
        zero["allgather_bucket_size"] = BUCKET
    on_cpu = {"device": "cpu", "pin_memory": config.num_gpus > 0}
    if config.offload != "none":
        zero["offload_optimizer"] = on_cpu
    if config.offload == "all":
        zero["offload_param"] = on_cpu
    return zero


@contextlib.contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """A context in which `from_pretrained` shards each parameter as it is read, at stage 3."""
    from transformers.integrations import deepspeed as hooks

    if settings["zero_optimization"]["stage"] < 3:
        yield
        return
    marker = _Settings(settings)  # transformers keeps a weak reference only
    hooks.set_hf_deepspeed_config(marker)
    try:
        yield
    finally:
        hooks.unset_hf_deepspeed_config()


class _Settings:
    """The interface of a DeepSpeed config in transformers, whose class needs `accelerate`."""

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def is_zero3(self) -> bool:
        return True


def policy_engine(model: Any, config: TrainConfig, settings: dict[str, Any]) -> Any:
    """The engine that trains `model`, with torch's AdamW (DeepSpeed's own needs a compiler).

    It is the fused one, which needs no copies of the weights' size, one launch on GPUs, and on CPUs
    (with `offload` too) an eighth of the time.
    """
    import deepspeed

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def reference_engine(model: Any, settings: dict[str, Any]) -> Any:
    """`model` frozen: sharded like the policy under stage 3, else a plain replica."""
    model.requires_grad_(False)
    if settings["zero_optimization"]["stage"] < 3:
        return model
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=settings)
    return engine


def end_micro_batch(engine: Any, *, is_last: bool) -> float:
    """End a micro-batch; after the last of a step, update the weights.

    Returns the norm of the step's whole gradient before clipping, and 0 before the last. If the
    norm is not finite, the weights stay as they were. (DeepSpeed 0.19.8 skips such a step with
    ZeRO and reports infinity; without ZeRO it neither reports nor checks the norm.)
    """
    if engine.zero_optimization_stage() or not is_last:
        engine.step()
        return float(engine.get_global_grad_norm()) if is_last else 0.0
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        engine.step()
    return norm


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
