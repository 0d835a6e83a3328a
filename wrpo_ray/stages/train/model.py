"""Models to train: loading a folder, log-probs of answers, writing an ordinary model folder."""

import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wrpo_ray.config import LoraConfig, TrainConfig
from wrpo_ray.errors import UserError, WrpoError
from wrpo_ray.llm import attention
from wrpo_ray.llm.architecture import Use, check_loaded, check_weights, telling_of
from wrpo_ray.llm.chat import end_ids
from wrpo_ray.llm.rounding import Rounding, Tensors
from wrpo_ray.stages.train import slimming
from wrpo_ray.stages.train.logprobs import answer_logps, token_logps
from wrpo_ray.stages.train.memory import forward_tokens
from wrpo_ray.stages.train.packing import Batch, assign_micro_batches, costs, pack, pad
from wrpo_ray.stages.train.probe import NOT_HERE, RATES, UNPACKED, as_user_error, check_forward
from wrpo_ray.stages.train.recompute import recomputing
from wrpo_ray.stages.train.router_loss import RouterLoss
from wrpo_ray.stages.train.rows import Row
from wrpo_ray.storage.folder import Folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Policy(nn.Module):  # type: ignore[misc]
    """A causal language model that gives the log-probs of answers in place of logits.

    Its head's forward is replaced by one from hidden states and tokens to log-probs. So ZeRO-3,
    which gathers a module's weights around its forward, works unchanged. If `slim`, norms, gated
    MLPs and rotary positions keep less for the backward pass (see `slimming`), as do linear layers
    after them (see `recompute`); without it they stay as they are, to compare with.
    """

    def __init__(self, model: nn.Module, *, slim: bool = True):
        super().__init__()
        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        body, head = inner.base_model, inner.get_output_embeddings()
        if head is None or body is inner:
            kind = inner.config.get_text_config().model_type
            raise UserError(f"{kind}: its body and its head cannot be told apart; {NOT_HERE}")
        cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
        head.forward = lambda hidden, tokens: token_logps(
            hidden, head.weight, head.bias, tokens, cap
        )
        self._parts = {"body": body, "head": head}  # known to `model` already
        self._router_loss = RouterLoss.of(inner)
        self._routed: Tensor | None = None
        self.slim = slim
        if slim:
            slimming.slim(inner)

    def forward(self, batch: Batch) -> Tensor:
        """The summed log-prob of each answer of the batch, (A,), fp32."""
        layout = {} if batch.layout is None else {"layout": batch.layout}
        body = self._parts["body"]
        again = self.slim and torch.is_grad_enabled() and not body.is_activation_checkpointing
        routed = self._router_loss if torch.is_grad_enabled() else None
        self._routed = None
        with recomputing() if again else nullcontext():
            found = body(
                input_ids=batch.ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.positions,
                use_cache=False,
                **layout,
                **{"output_router_logits": routed is not None} if self._router_loss else {},
            )
        if routed and found.router_logits:
            self._routed = routed(found.router_logits, batch)
        return answer_logps(found.last_hidden_state, self._parts["head"], batch)

    def take_router_loss(self) -> Tensor | None:
        """The weighted loss of the routers in the last forward pass, (); it is given once.

        None if the pass was without gradients or the model's config.json asks for no such loss.
        """
        routed, self._routed = self._routed, None
        return routed

    def without_adapters(self) -> Any:
        """A context in which LoRA adapters are switched off."""
        disabled = getattr(self.model, "disable_adapter", None)
        return disabled() if disabled else nullcontext()


def collate(rows: Sequence[Row], config: TrainConfig) -> Batch:
    """A micro-batch of rows, packed or padded by `config.packing`."""
    return pack(rows) if config.packing else pad(rows)


def packed_policy(model: Any) -> Policy:
    """A transformers causal language model that gives log-probs of packed rows.

    The model itself is changed: attention over packed rows with a shared prompt (see `attention`),
    no dropout, and a head that gives log-probs in place of logits. So copy a model before, not
    after: the head of a later copy would still use the weights of the first one. If the config of a
    mixture of experts asks for the loss of its router, add `policy.take_router_loss()` to yours
    after each forward pass.

    Example:
        >>> policy = packed_policy(model)  # doctest: +SKIP
        >>> logps = policy(pack(rows)).reshape(len(rows), 3)  # doctest: +SKIP

    Raises:
        UserError: the head of the model cannot be told apart from its body, or the loss of its
            router is not known.
    """
    attention.register()
    model.set_attn_implementation(attention.SHARED_PROMPT)
    disable_dropout(model)
    return Policy(model)


def load_policy(folder: Path, config: TrainConfig, device: torch.device) -> Policy:
    """Load a model folder to train, with dropout off and, if configured, adapters."""
    model = load(folder, DTYPES[config.precision], packing=config.packing)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # frozen embeddings (LoRA) would cut the graph
    if config.lora:
        model = with_lora(model, config.lora)
    return Policy(model.to(device).train())


def load(folder: Path, dtype: torch.dtype, *, packing: bool) -> Any:
    """Load the causal language model of a folder, with dropout off.

    Unpacked, Gemma 2 needs eager attention, the only one that applies its soft cap.

    Raises:
        UserError: the weights are not those of its architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_weights(folder, Use.TRAINED)
    attention.register()
    model_type = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    plain = {"gemma2": "eager"}.get(model_type, "sdpa")
    kind = attention.SHARED_PROMPT if packing else plain
    remedy = UNPACKED if packing else NOT_HERE
    with as_user_error(model_type, "it cannot be loaded to train", remedy):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=kind,
            output_loading_info=True,
            trust_remote_code=False,
        )
    with telling_of(str(folder)):
        check_loaded(loaded, model)
    disable_dropout(model)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate and a router's noise to 0; the model's config keeps its own.

    Then the policy equals the reference at the first step, and a resumed run needs no random
    state. What was set is kept in `probe.RATES` of a module, as the probe compares with the model
    as it was.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        rates = {
            name: value
            for name, value in vars(module).items()
            if ("dropout" in name or "jitter" in name) and isinstance(value, float)
        }
        if rates:
            before = vars(module).get(RATES, {})
            vars(module).update({RATES: rates | before} | dict.fromkeys(rates, 0.0))


class Reference:
    """The frozen reference model of an actor that prepares rows."""

    def __init__(self, folder: Path, config: TrainConfig, on_gpu: bool):
        self.config = config
        self.device = torch.device("cuda" if on_gpu else "cpu")
        model = load(folder, DTYPES[config.precision], packing=config.packing)
        self.policy = Policy(model.to(self.device).eval())
        check_forward(self.policy, config, self.device)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the rows with the log-probs of their answers."""
        lengths = np.array([row.lengths for row in rows])
        budget = forward_tokens(self.config)
        (parts,) = assign_micro_batches(costs(lengths, packed=self.config.packing), 1, budget)
        done: dict[int, Row] = {}
        for part in filter(None, parts):
            batch = collate([rows[i] for i in part], self.config).to(self.device)
            logps = self.policy(batch).double().reshape(len(part), -1).tolist()
            done |= {
                i: replace(rows[i], reference=tuple(v)) for i, v in zip(part, logps, strict=True)
            }
        return [done[i] for i in range(len(rows))]


# --- adapters ----------------------------------------------------------------------------------


def with_lora(model: Any, config: LoraConfig) -> Any:
    """Add trainable adapters to the linear layers of a model, and freeze all else.

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


def gather_weights(
    model: nn.Module, base: Path, *, keep: bool, trained_alone: bool = False
) -> tuple[dict[str, Tensor], Rounding]:
    """Gather the model's weights on the CPU, all or only the trained ones; empty without `keep`.

    They are the weights of the forward pass. In bf16 the optimizer keeps fp32 master weights; the
    changes that rounding to bf16 loses are counted. All workers call it: sharded parameters are
    gathered one at a time. Tied weights are listed once, under the first of their names.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    rounding, before = Rounding(), Tensors(base)
    for name, parameter in model.named_parameters():
        if trained_alone and not parameter.requires_grad:
            continue
        is_sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
            if keep:
                weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
        if parameter.dtype != torch.float32 and parameter.requires_grad and not trained_alone:
            master = safe_get_full_fp32_param(parameter)
            if keep and master is not None:
                start = before.get(name, parameter.dtype)
                rounding.add(master.detach().cpu(), start, parameter.dtype)
    persistent = model.state_dict().keys() if keep and not trained_alone else ()
    buffers = {n: b.detach().cpu() for n, b in model.named_buffers() if n in persistent}
    return weights | buffers, rounding


def save(
    policy: Policy,
    base: Path,
    config: TrainConfig,
    tokenizer: Any,
    to: Folder,
    *,
    write: bool,
    adapters: Folder | None = None,
) -> Rounding:
    """Write weights, configs and tokenizer to `to`; all workers call it, `write` on one.

    The saved model computes what the policy does. Weights have the training precision; with LoRA
    they are merged in fp32, as bf16 would round most of the changes away, and the adapters go to
    `adapters`. generation_config lists every end of turn, so that generation stops there. The
    folder is written to a local disk, then uploaded; it is valid once the step's manifest exists.
    Returns the changes that bf16 loses or would lose.
    """
    alone = config.lora is not None
    weights, rounding = gather_weights(policy.model, base, keep=write, trained_alone=alone)
    if not write:
        return rounding
    model = policy.model
    if config.lora:
        model = _with_adapters(base, config, weights)
        if adapters:
            _upload(adapters, lambda folder: _save_adapters(model, weights, folder))
        model, rounding = _merged(model, Tensors(base), DTYPES[config.precision])
        weights = model.state_dict()
    _add_end_tokens(model.generation_config, end_ids(tokenizer, base))

    def save_whole(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

    _upload(to, save_whole)
    return rounding


def _upload(to: Folder, write: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        to.delete("")
        to.upload(Path(scratch))


def _add_end_tokens(generation: Any, ends: Collection[int]) -> None:
    """Add token ids that end a turn to a generation_config."""
    listed = generation.eos_token_id
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if missing := sorted(set(ends) - set(listed)):
        generation.eos_token_id = [*listed, *missing]


def _with_adapters(base: Path, config: TrainConfig, weights: dict[str, Tensor]) -> Any:
    """The base model in fp32 on the CPU, with the adapters of `weights`."""
    assert config.lora is not None
    network = load(base, DTYPES[config.precision], packing=False).float()
    model = with_lora(network, config.lora)
    missing = {n for n, p in model.named_parameters() if "lora_" in n} - weights.keys()
    if missing:
        raise WrpoError(f"lora: {min(missing)} was not trained")
    model.load_state_dict(weights, strict=False)
    return model


def _merged(model: Any, before: Tensors, trained_in: torch.dtype) -> tuple[Any, Rounding]:
    """Merge the adapters into the model, and count the changes that bf16 would lose."""
    rounding, merged = Rounding(), model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        rounding.add(parameter.detach(), before.get(name, trained_in), torch.bfloat16)
    return merged, rounding


def _save_adapters(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Save adapters for peft, without the path of their base, which is a local one."""
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = ""
    model.save_pretrained(folder, state_dict=weights)
