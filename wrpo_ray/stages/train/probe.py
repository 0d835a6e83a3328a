"""Check, before training, that a model's packed log-probs equal those of its own logits.

The probe row is longer than every attention window and chunk of the model's config that rows can
exceed: a model that applies them by its own mask, which packed rows lack, fails only there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wrpo_ray.config import TrainConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm.attention import changing_positions, reachable_spans
from wrpo_ray.stages.train.packing import pack, pad
from wrpo_ray.stages.train.rows import Row
from wrpo_ray.stages.train.sizes import ROUTER_LOSS
from wrpo_ray.stages.train.slimming import own_forwards

if TYPE_CHECKING:
    from wrpo_ray.stages.train.model import Policy

PROMPT, ANSWERS = 4, (2, 3, 7)
"""Tokens of the shortest probe."""
NO_MEMORY = "can't allocate memory"
"""Text of torch's error when the CPU has no memory left; the error has no type of its own."""
RATES = "_rates"
"""Attribute of a module with its rates of dropout and noise as the model was loaded."""
UNPACKED, NOT_HERE = "set packing: false", "it cannot be trained here"


def check_forward(policy: Policy, config: TrainConfig, device: torch.device) -> None:
    """Compare our log-probs of a probe row with those of the model's own logits.

    Raises:
        UserError: they differ, as with scaled logits or a recurrent state; they are not finite; or
            memory is too small for the check.
    """
    settings = policy.model.config.get_text_config()
    _check_rope(settings, config.max_length)
    probe = _probe(settings, config.max_length)
    with torch.no_grad():
        window = max(reachable_spans(settings, config.max_length), default=0)
        failing = as_user_error(settings.model_type, "its own forward pass fails", NOT_HERE)
        with failing, _memory_errors(settings.model_type, window):
            plain = _plain_logps(policy, probe, device)
        _check_finite(policy, plain)
        remedy = UNPACKED if config.packing else NOT_HERE
        failing = as_user_error(settings.model_type, "it cannot be given rows in this form", remedy)
        with failing, _memory_errors(settings.model_type, window):
            own = policy((pack if config.packing else pad)([probe]).to(device))
    if not _agree(own, plain.to(own.dtype), config):
        raise UserError(
            f"{settings.model_type}: its log-probs of {'packed' if config.packing else 'padded'} "
            f"rows differ from those of its own logits "
            f"({own.tolist()} against {plain.tolist()}); {remedy}"
        )


@contextlib.contextmanager
def as_user_error(kind: str, what: str, remedy: str) -> Iterator[None]:
    """Raise any error of a model's code as a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it may raise anything
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{kind}: {what} ({told}); {remedy}") from error


@contextlib.contextmanager
def _memory_errors(kind: str, window: int) -> Iterator[None]:
    """Raise UserError if memory is too small for a probe longer than `window`; 0 is no window.

    The model's own eager forward pass holds the whole square of attention weights.
    """
    try:
        yield
    except RuntimeError as error:
        is_memory = isinstance(error, torch.OutOfMemoryError) or NO_MEMORY in str(error)
        if not (is_memory and window):
            raise
        raise UserError(
            f"{kind}: too little memory for the probe of its window of {window} tokens; set "
            f"max_length to at most {window}"
        ) from error


def _agree(own: Tensor, plain: Tensor, config: TrainConfig) -> bool:
    tolerance = 2e-2 if config.precision == "bf16" else 1e-4
    if own.shape != plain.shape:
        return False
    return bool(torch.allclose(own, plain, rtol=tolerance, atol=tolerance))


def _check_finite(policy: Policy, plain: Tensor) -> None:
    if bool(torch.isfinite(plain).all()):
        return
    for name, parameter in policy.model.named_parameters():
        part = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3: this worker's share
        if not bool(torch.isfinite(part.detach()).all()):
            cause = f"the weight {name} is not finite"
            break
    else:
        cause = "its weights are finite, so this precision is too narrow for it"
    kind = policy.model.config.get_text_config().model_type
    raise UserError(f"{kind}: its log-probs are not finite ({plain.tolist()}): {cause}")


def _check_rope(settings: Any, max_length: int) -> None:
    """Reject position encodings that depend on the longest row of a micro-batch."""
    if found := changing_positions(settings, max_length):
        kind, original = found
        raise UserError(
            f"{settings.model_type}: rows above {original} tokens would change the log-probs "
            f"of others in their micro-batch ({kind} positions); set max_length to {original}"
        )


def _probe(settings: Any, max_length: int) -> Row:
    """A row with short answers, whose prompt is longer than all spans that rows can exceed."""
    longest, answer = max(PROMPT, max_length - max(ANSWERS)), max(ANSWERS)
    reachable = reachable_spans(settings, max_length)
    prompt = min(longest, max([PROMPT, *(span + answer for span in reachable)]))
    ids = (np.arange(1, prompt + sum(ANSWERS) + 1, dtype=np.int32) * 7) % settings.vocab_size
    parts = np.split(ids, np.cumsum([prompt, *ANSWERS])[:-1])
    return Row("probe", parts[0], tuple(parts[1:]))


def _plain_logps(policy: Policy, row: Row, device: torch.device) -> Tensor:
    """Log-probs by the model's own head and eager attention, one answer at a time."""
    head = policy._parts["head"]
    replaced = head.__dict__.pop("forward")
    implementation = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("eager")
    try:
        with own_forwards(policy.model), _as_loaded(policy.model):
            each = [_plain_logp(policy.model, row.prompt, a, device) for a in row.answers]
        return torch.stack(each)
    finally:
        policy.model.set_attn_implementation(implementation)
        head.forward = replaced


@contextlib.contextmanager
def _as_loaded(model: Any) -> Iterator[None]:
    """The model with its own rates, out of training: as it answers."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for module in modes:
            vars(module).update(getattr(module, RATES, {}))
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            vars(module).update(dict.fromkeys(getattr(module, RATES, {}), 0.0))


def _plain_logp(model: Any, prompt: Any, answer: Any, device: torch.device) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]], device=device)
    is_routed = hasattr(model.config.get_text_config(), ROUTER_LOSS)
    without_loss = {ROUTER_LOSS: False} if is_routed else {}
    logits = model(input_ids=ids, use_cache=False, **without_loss).logits
    table = logits[0, :-1].float().log_softmax(-1)
    return table.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
