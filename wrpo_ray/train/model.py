"""Loading a model folder to train, and writing the trained one as an ordinary model folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wrpo_ray.core.storage import Folder


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The causal language model of a folder, in training mode with dropout off.

    Gemma 2 takes eager attention, which alone applies its soft cap.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    attention = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **attention)
    without_dropout(model)
    return model.to(device).train()


def without_dropout(model: nn.Module) -> None:
    """Set every dropout rate of the modules to 0; the model's config keeps its own.

    Then the policy equals the reference at the first step, and a resumed run needs no random
    state.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def gather_weights(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """The model's whole weights on the CPU; empty where `keep` is false.

    All workers call it: sharded parameters are gathered one at a time. Tied weights come once,
    under the first of their names.
    """
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        is_sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
            if keep:
                weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
    persistent = model.state_dict().keys() if keep else ()
    buffers = {n: b.detach().cpu() for n, b in model.named_buffers() if n in persistent}
    return weights | buffers


def save(model: nn.Module, tokenizer: Any, to: Folder, *, write: bool) -> None:
    """Write weights, configs and tokenizer to `to`; all workers call it, `write` on one.

    It is written next to the worker first and uploaded whole. It counts once the step's
    manifest is there.
    """
    weights = gather_weights(model, keep=write)
    if not write:
        return
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, state_dict=weights)
        tokenizer.save_pretrained(scratch)
        to.delete("")
        to.upload(Path(scratch))
