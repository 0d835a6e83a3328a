"""Checks that a folder's tensors are those of its architecture, from the headers alone.

transformers fills missing tensors with random numbers, and drops unknown ones. So a model is built
on torch's meta device, and transformers' own renaming and merging of tensors is run on shapes
alone; missing and unexpected tensors are rejected. A model of 70B parameters takes half a second.
For quantized weights the names are compared, module by module.

Not covered: architectures that transformers does not know, shapes of quantized weights, and names
of quantized experts.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from wrpo_ray.errors import UserError
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.tensors import SAVE_AGAIN, TensorHeader, Tensors, read_json, read_tensors

HARMLESS = re.compile(
    r"(rotary_emb\.inv_freq|\.masked_bias|position_ids|_extra_state"
    r"|(^|\.)h\.\d+\.attn\.((attention\.)?bias|causal_mask))$"
)
"""Unexpected tensors that may be ignored: buffers that old versions saved, such as causal masks."""
HEAD = re.compile(r"(^|\.)lm_head\.weight$")
"""A reward model trained from a language model often keeps that model's head."""
WRAPPED = re.compile(r"^(module|_orig_mod|_fsdp_wrapped_module)\.|\._orig_mod\.")
"""Parts of names that torch's wrappers add."""
INTEGERS = ("BOOL", "I", "U")
"""Prefixes of dtypes that cannot hold plain weights."""
PLAIN = ("weight", "bias")
"""The tensors of a module that is not quantized."""
EXPERTS = re.compile(r"\.experts\.")
"""transformers merges experts into tensors that quantized models need not have."""
RANDOM_ROUTERS = ("phimoe",)
"""Model types that sample experts in training, not only add noise that can be switched off."""
LANGUAGE_MODEL = "give a causal language model, such as LlamaForCausalLM"
TWO_HEADS = (
    "its head and its embeddings are two different tensors, although its config.json has "
    "tie_word_embeddings: true; set it to false, or save the model without the head"
)
ROWS = 4096
"""Rows of a head that are compared at a time."""
SHOWN = 3
"""Tensors named in an error message."""


class Use(StrEnum):
    """The use of a model folder."""

    ANSWERS = "answers"
    """It answers prompts, on vLLM."""
    TRAINED = "trained"
    """It is trained by transformers, and answers on vLLM."""
    REWARD = "reward"
    """It is a classifier whose output is a reward, run by transformers."""
    REWARD_ON_VLLM = "reward on vllm"
    """The same, on vLLM."""

    @property
    def is_reward(self) -> bool:
        """Whether it gives rewards; else it gives answers."""
        return self in (Use.REWARD, Use.REWARD_ON_VLLM)

    @property
    def needs_transformers(self) -> bool:
        """Whether transformers has to know the architecture."""
        return self in (Use.TRAINED, Use.REWARD)


@contextmanager
def telling_of(what: str) -> Iterator[None]:
    """Prefix the message of a UserError with its subject."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def check_weights(folder: Path, use: Use, store: Folder | None = None) -> None:
    """Check the tensors of a local folder that is about to be loaded.

    `store` has the weights if the folder has none.

    Raises:
        UserError: tensors are missing, left over, or of another shape.
    """
    with telling_of(str(store or folder)):
        tensors = read_tensors(store or Folder(str(folder)))
        if tensors is not None:
            check_tensors(folder, tensors, use)


def check_tensors(folder: Path, tensors: Tensors, use: Use) -> None:
    """Compare the tensors with the architecture of the `config.json` in a local folder.

    Raises:
        UserError: they differ, or transformers has to load them and does not know the model.
    """
    _check_names(tensors)
    config = load_config(folder, use)
    found = None if config is None else _class_of(config, use)
    if found is None:
        return
    is_quantized = bool(getattr(config, "quantization_config", None))
    compare = _missing_modules if is_quantized else _differences
    try:
        problems = compare(found, config, tensors)
        has_two_heads = not problems and _has_two_heads(found, config, folder, tensors)
    except Exception as error:  # a config can make a model's constructor raise anything
        raise UserError(
            f"its config.json makes no model ({_one_line(error)}); {SAVE_AGAIN}"
        ) from None
    if use.is_reward:
        problems = [problem for problem in problems if not HEAD.search(problem.split()[0])]
    refuse(problems, found.__name__)
    if has_two_heads:
        raise UserError(TWO_HEADS)


def check_routers(folder: Path) -> None:
    """Check that a mixture of experts with the `config.json` in a local folder can be trained.

    Raises:
        UserError: its routers draw experts at random, or have a loss that is not known.
    """
    config = load_config(folder, Use.TRAINED)
    if getattr(config.get_text_config(), "model_type", None) in RANDOM_ROUTERS:
        raise UserError("its routers draw experts at random in training, so it is not trained here")
    balancing_loss_of(_class_of(config, Use.TRAINED), config)


def balancing_loss_of(architecture: type, config: Any) -> Callable[..., Any] | None:
    """The function of the router's loss in transformers; None if the config does not ask for it.

    Raises:
        UserError: the config asks for it, and the architecture has none, or no weight for it.
    """
    text = config.get_text_config()
    if not any(getattr(part, "output_router_logits", False) for part in (config, text)):
        return None
    function = getattr(sys.modules[architecture.__module__], "load_balancing_loss_func", None)
    takes = inspect.signature(function).parameters if function else ()
    is_known = [*takes] == ["gate_logits", "num_experts", "top_k", "attention_mask"]
    if not is_known or not math.isfinite(getattr(text, "router_aux_loss_coef", math.nan)):
        raise UserError(
            "its config.json asks for the loss of its router (output_router_logits: true), which "
            f"is not known for {architecture.__name__}; set it to false to train without"
        )
    return function


def refuse(problems: list[str], architecture: str) -> None:
    """Raise UserError where there are problems of tensors."""
    if problems:
        raise UserError(
            f"its weights are not those of {architecture}: {first_of(problems)}; give the folder "
            f"that belongs to its config.json"
        )


def first_of(problems: list[str]) -> str:
    """The first problems, and how many more there are."""
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{'; '.join(problems[:SHOWN])}{more}"


def check_loaded(loaded: dict[str, Any], model: Any) -> None:
    """Check transformers' report on a model that it loaded, for file formats without headers.

    Raises:
        UserError: a tensor was initialized at random, or tied embeddings differ.
    """
    refuse([f"{name} is missing" for name in sorted(loaded["missing_keys"])], type(model).__name__)
    head = model.get_output_embeddings()
    is_tied = model.config.get_text_config().tie_word_embeddings
    if is_tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise UserError(TWO_HEADS)


def load_config(folder: Path, use: Use) -> Any:
    """Return the folder's config as transformers reads it; None if only vLLM may know the model.

    Raises:
        UserError: transformers cannot read it, or has to know the model and does not.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = read_json(Folder(str(folder)), "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if not use.needs_transformers:
            return None
        raise UserError(f"its config.json has model_type {kind!r}, which transformers cannot load")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each architecture checks its own values
        raise UserError(
            f"its config.json cannot be read ({_one_line(error)}); {SAVE_AGAIN}"
        ) from None


def _class_of(config: Any, use: Use) -> Any:
    """Return the class that loads the weights; None if transformers has none and need not."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mapping = {
        Use.TRAINED: auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        Use.REWARD: auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        Use.REWARD_ON_VLLM: auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }.get(use)
    if mapping is None:
        found = getattr(transformers, (config.architectures or [""])[0], None)
        if found is not None and not found.can_generate():
            raise UserError(f"its architecture {found.__name__} gives no answers; {LANGUAGE_MODEL}")
        return found
    if type(config) not in mapping:
        if not use.needs_transformers:
            return None
        kind = "language model" if use is Use.TRAINED else "classifier"
        raise UserError(f"transformers has no {kind} for its model_type {config.model_type!r}")
    return mapping[type(config)]


def _check_names(tensors: Tensors) -> None:
    if wrapped := next((name for name in tensors if WRAPPED.search(name)), None):
        raise UserError(
            f"its weights have names such as {wrapped}, as a wrapped model's (compiled, or for "
            f"several GPUs) state dict has; save the model inside the wrapper"
        )


def _differences(kind: Any, config: Any, tensors: Tensors) -> list[str]:
    """Return what does not fit, in words: missing, unknown, misshapen or unusable tensors."""
    wanted, found = _as_loaded(kind, config, tensors)
    unknown = [name for name in found.unexpected_keys if not HARMLESS.search(name)]
    return [
        *(f"{name} is missing" for name in sorted(found.missing_keys)),
        *(f"{name} is unknown" for name in sorted(unknown)),
        *(f"{n} has shape {tuple(a)}, not {tuple(b)}" for n, a, b in sorted(found.mismatched_keys)),
        *(f"{name} cannot be converted" for name in sorted(found.conversion_errors)),
        *(
            f"{name} has the type {tensor.dtype}"
            for name, tensor in sorted(tensors.items())
            if wanted.get(name) and tensor.dtype.startswith(INTEGERS)
        ),
    ]


def _missing_modules(kind: Any, config: Any, tensors: Tensors) -> list[str]:
    """Return the missing tensors of quantized weights, in words; vLLM leaves them uninitialized.

    A method stores a weight as several tensors of its module under names of its own, such as
    `qweight` and `scales`; any of them stands for the weight.
    """
    whole = dict(tensors)
    for name, header in tensors.items():
        module, _, last = name.rpartition(".")
        if last not in PLAIN:
            for part in PLAIN:
                whole.setdefault(f"{module}.{part}", header)
    _, found = _as_loaded(kind, config, whole)
    lost = found.missing_keys - set(found.conversion_errors)  # shapes of parts need not fit
    return [f"{name} is missing" for name in sorted(lost) if not EXPERTS.search(name)]


def _as_loaded(kind: Any, config: Any, tensors: Tensors) -> tuple[dict[str, bool], Any]:
    """Return {name: is it of floats} of the model, and transformers' report on the loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    model = without_memory(kind, config)
    wanted = {name: tensor.is_floating_point() for name, tensor in model.state_dict().items()}
    settings = LoadStateDictConfig(
        ignore_mismatched_sizes=True,
        device_map={"": "meta"},
        weight_mapping=get_model_conversion_mapping(model, None, None),
    )
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        found, _ = convert_and_load_state_dict_in_model(model, _empty(tensors), settings)
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(found)
    return wanted, found


def _has_two_heads(kind: Any, config: Any, folder: Path, tensors: Tensors) -> bool:
    """Whether a model with tied embeddings has a different head in local safetensors files."""
    if not config.get_text_config().tie_word_embeddings:
        return False
    model = without_memory(kind, config)
    modules = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    names = [f"{modules.get(id(end))}.weight" for end in ends]
    stored = [(folder / tensors[name].file, name) for name in names if name in tensors]
    is_here = all(file.suffix == ".safetensors" and file.is_file() for file, _ in stored)
    if len(stored) < 2 or not is_here or tensors[names[0]].shape != tensors[names[1]].shape:
        return False
    return not _are_equal(stored)


def _are_equal(stored: list[tuple[Path, str]]) -> bool:
    """Whether two tensors of one shape in safetensors have the same numbers."""
    import torch
    from safetensors import safe_open

    with ExitStack() as files:
        one, other = (
            files.enter_context(safe_open(file, framework="pt")).get_slice(name)
            for file, name in stored
        )
        return all(
            torch.equal(one[start : start + ROWS].float(), other[start : start + ROWS].float())
            for start in range(0, one.get_shape()[0], ROWS)
        )


def without_memory(kind: Any, config: Any) -> Any:
    """Return a model on the meta device: shapes without numbers."""
    import torch
    from transformers import initialization

    with ExitStack() as contexts:
        contexts.enter_context(torch.device("meta"))
        contexts.enter_context(initialization.no_init_weights())
        contexts.enter_context(initialization.no_tie_weights())
        contexts.enter_context(initialization.meta_device_safe_creation_ops())
        return kind(config)


def _empty(tensors: Tensors) -> dict[str, Any]:
    """Return tensors of the same shapes on the meta device."""
    import torch

    def made(header: TensorHeader) -> Any:
        return torch.empty(header.shape, dtype=torch.float32, device="meta")

    return {name: made(header) for name, header in tensors.items()}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
