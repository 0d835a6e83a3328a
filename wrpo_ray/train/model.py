"""Models to train: loading a folder, log-probs of answers, writing an ordinary model folder."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wrpo_ray.config import LoraConfig, TrainConfig
from wrpo_ray.core.chat import end_ids
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import UserError
from wrpo_ray.train import attention
from wrpo_ray.train.logprobs import answer_logps, token_logps
from wrpo_ray.train.packing import Batch, costs, deal, pack, pad
from wrpo_ray.train.rows import Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD_TOKENS = 4
"""Without a backward pass a micro-batch is so many times larger."""


class Policy(nn.Module):
    """A causal language model that gives the log-probs of answers in place of logits.

    Its head's forward is replaced: it takes hidden states and tokens, and gives log-probs. So
    ZeRO-3, which gathers a module's weights around its forward, needs to know nothing of it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = inner.get_output_embeddings()
        cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
        head.forward = lambda hidden, tokens: token_logps(
            hidden, head.weight, head.bias, tokens, cap
        )
        self._parts = {"body": inner.base_model, "head": head}  # known to `model` already

    def forward(self, batch: Batch) -> Tensor:
        """The summed log-prob of each answer of the batch, (A,), fp32."""
        layout = {} if batch.layout is None else {"layout": batch.layout}
        hidden = self._parts["body"](
            input_ids=batch.ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.positions,
            use_cache=False,
            **layout,
        ).last_hidden_state
        return answer_logps(hidden, self._parts["head"], batch)

    def without_adapters(self) -> Any:
        """A context in which a LoRA policy is the model it started from."""
        disabled = getattr(self.model, "disable_adapter", None)
        return disabled() if disabled else nullcontext()


def collate(rows: Sequence[Row], config: TrainConfig) -> Batch:
    """A micro-batch of rows, packed or padded as the config says."""
    return pack(rows) if config.packing else pad(rows)


def load_policy(folder: Path, config: TrainConfig, device: torch.device) -> Policy:
    """The model of a folder to train, with dropout off and adapters if there are any."""
    model = load(folder, DTYPES[config.precision], packing=config.packing)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # frozen embeddings (LoRA) would cut the graph
    if config.lora:
        model = with_lora(model, config.lora)
    return Policy(model.to(device).train())


def load(folder: Path, dtype: torch.dtype, *, packing: bool) -> Any:
    """The causal language model of a folder, with dropout off.

    Unpacked, Gemma 2 takes eager attention, which alone applies its soft cap.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    plain = {"gemma2": "eager"}.get(AutoConfig.from_pretrained(folder).model_type, "sdpa")
    kind = attention.SHARED_PROMPT if packing else plain
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=kind)
    without_dropout(model)
    return model


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


class Reference:
    """The frozen model that log-probs are compared with, on an actor of its own."""

    def __init__(self, folder: Path, config: TrainConfig, on_gpu: bool):
        self.config = config
        self.device = torch.device("cuda" if on_gpu else "cpu")
        model = load(folder, DTYPES[config.precision], packing=config.packing)
        self.policy = Policy(model.to(self.device).eval())
        check_forward(self.policy, config, self.device)

    @torch.inference_mode()
    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows with the log-probs of their answers."""
        lengths = np.array([row.lengths for row in rows])
        budget = FORWARD_TOKENS * self.config.micro_batch_tokens
        (parts,) = deal(costs(lengths, packed=self.config.packing), 1, budget)
        done: dict[int, Row] = {}
        for part in filter(None, parts):
            batch = collate([rows[i] for i in part], self.config).to(self.device)
            logps = self.policy(batch).double().reshape(len(part), -1).tolist()
            done |= {
                i: replace(rows[i], reference=tuple(v)) for i, v in zip(part, logps, strict=True)
            }
        return [done[i] for i in range(len(rows))]


# --- whether a model can be trained this way ---------------------------------------------------


def check_forward(policy: Policy, config: TrainConfig, device: torch.device) -> None:
    """Compare our log-probs of a probe with those of the model's own logits.

    Raises:
        UserError: the architecture computes something else, such as scaled logits, or cannot
            share prompts, such as one with a recurrent state.
    """
    from torch.testing import assert_close

    _check_rope(policy.model.config.get_text_config(), config.max_length)
    probe = _probe(policy.model.config.get_text_config().vocab_size)
    tolerance = 2e-2 if config.precision == "bf16" else 1e-4
    with torch.no_grad():
        own = policy(collate([probe], config).to(device))
        plain = _plain_logps(policy, probe, device)
    try:
        assert_close(own, plain.to(own.dtype), rtol=tolerance, atol=tolerance)
    except AssertionError:
        kind = policy.model.config.model_type
        remedy = "set packing: false" if config.packing else "it cannot be trained here"
        raise UserError(
            f"{kind}: its log-probs of packed rows differ from those of its own logits "
            f"({own.tolist()} against {plain.tolist()}); {remedy}"
        ) from None


def _check_rope(settings: Any, max_length: int) -> None:
    """Refuse positions whose meaning depends on the longest row in company.

    transformers 5.23 chooses the scaling of these kinds by a forward pass's greatest position.
    """
    rope = getattr(settings, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or settings.max_position_embeddings
    if rope.get("rope_type") in ("longrope", "dynamic") and max_length > original:
        raise UserError(
            f"{settings.model_type}: rows above {original} tokens would change the log-probs of "
            f"others in their micro-batch ({rope['rope_type']} positions); set max_length to "
            f"{original}"
        )


def _probe(vocabulary: int) -> Row:
    ids = (np.arange(1, 13, dtype=np.int32) * 7) % vocabulary
    return Row("probe", ids[:4], (ids[4:6], ids[6:9], ids[9:]))


def _plain_logps(policy: Policy, row: Row, device: torch.device) -> Tensor:
    """The model's own forward pass, an answer at a time; the head is itself meanwhile."""
    head = policy._parts["head"]
    replaced = head.__dict__.pop("forward")
    implementation = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("eager")
    try:
        return torch.stack([_plain_logp(policy.model, row.prompt, a, device) for a in row.answers])
    finally:
        policy.model.set_attn_implementation(implementation)
        head.forward = replaced


def _plain_logp(model: Any, prompt: Any, answer: Any, device: torch.device) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]], device=device)
    table = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return table.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


# --- adapters ----------------------------------------------------------------------------------


def with_lora(model: Any, config: LoraConfig) -> Any:
    """The model with trainable adapters on its linear layers, all else frozen.

    Raises:
        UserError: `targets` names no layer of the model but, at most, its head.
    """
    import peft

    head = model.get_output_embeddings()  # its forward is replaced, so an adapter would idle there
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        exclude_modules=[name for name, module in model.named_modules() if module is head],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"lora.targets: {targets}: {' '.join(str(error).split())}") from None


# --- writing -----------------------------------------------------------------------------------


def gather_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The model's whole weights on the CPU; empty where `keep` is false.

    All workers call it: sharded parameters are gathered one at a time. Tied weights come once,
    under the first of their names.
    """
    import deepspeed

    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        is_sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
            if keep:
                weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
    persistent = model.state_dict().keys() if keep else ()
    buffers = {n: b.detach().cpu() for n, b in model.named_buffers() if n in persistent}
    return weights | buffers


def save(
    policy: Policy, base: Path, config: TrainConfig, tokenizer: Any, to: Folder, *, write: bool
) -> None:
    """Write weights, configs and tokenizer to `to`; all workers call it, `write` on one.

    Its generation_config lists every end of turn, so that whatever generates with it stops there.
    It is written next to the worker first and uploaded whole. It counts once the step's
    manifest is there.
    """
    weights = gather_weights(policy.model, keep=write)
    if not write:
        return
    model = policy.model
    if config.lora:
        model = merged(base, config, weights)
        weights = model.state_dict()
    _list_ends(model.generation_config, end_ids(tokenizer, base))
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, state_dict=weights)
        tokenizer.save_pretrained(scratch)
        to.delete("")
        to.upload(Path(scratch))


def _list_ends(generation: Any, ends: Collection[int]) -> None:
    """Add token ids that end a turn to those that a generation_config has."""
    listed = generation.eos_token_id
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if missing := sorted(set(ends) - set(listed)):
        generation.eos_token_id = [*listed, *missing]


def merged(base: Path, config: TrainConfig, weights: dict[str, Tensor]) -> Any:
    """The base model with the adapters of `weights` merged in, on the CPU."""
    assert config.lora is not None
    model = with_lora(load(base, DTYPES[config.precision], packing=False), config.lora)
    adapters = {name: value for name, value in weights.items() if "lora_" in name}
    model.load_state_dict(adapters, strict=False)
    return model.merge_and_unload()
