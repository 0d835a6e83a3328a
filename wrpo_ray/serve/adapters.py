"""Checks that a LoRA adapter belongs to the model it is served with, by the headers of its files.

vLLM ignores tensors that fit no layer of the model, and takes the rank from the adapter's config.
So an adapter of another model, or an incomplete one, would answer, but not as it was trained.
"""

import re
from collections.abc import Iterator
from typing import Any

from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import first_of, telling_of
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.tensors import SAVE_AGAIN, Tensors, check_trusted, read_file, read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
SPECIAL = ("layers_to_transform", "layers_pattern", "exclude_modules", "rank_pattern")
"""Settings of peft with which some layers have no adapter, or one of another rank."""


def check_adapter(
    folder: Folder, base: Folder, base_tensors: Tensors | None, trust: str | None = None
) -> None:
    """Check an adapter's files against the tensors of its model, if these are known.

    `trust` is "pickle" if its weights may be pickled.

    Raises:
        UserError: a file is missing or broken, or a tensor is missing or of another shape.
    """
    if not folder.exists(CONFIG):
        raise UserError(f"{folder} has no adapter_config.json; give a LoRA")
    with telling_of(str(folder)):
        config = read_json(folder, CONFIG)
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        raise UserError(f"{folder}: {CONFIG}: is not of a LoRA; {SAVE_AGAIN}")
    file = next((name for name in WEIGHTS if folder.exists(name)), None)
    if file is None:
        raise UserError(f"{folder} has no {WEIGHTS[0]}; {SAVE_AGAIN}")
    with telling_of(str(folder)):
        check_trusted([file], trust)
        tensors = read_file(folder, file)
    if tensors is None:
        return  # the format of torch before 1.6, which has no header
    is_text = not {"text_config", "vision_config"} & read_json(base, "config.json").keys()
    known = base_tensors if is_text else None  # names of other models differ between files and vLLM
    problems = list(_problems(tensors, config, known))
    if problems:
        raise UserError(
            f"{folder} is no whole LoRA of this model: {first_of(problems)}; give the adapter that "
            f"belongs to it"
        )


def _problems(tensors: Tensors, config: dict[str, Any], base: Tensors | None) -> Iterator[str]:
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, header in tensors.items():
        if match := NAME.fullmatch(name):
            modules.setdefault(match["module"], {})[match["part"]] = header.shape
        else:
            yield f"{name} is unknown"
    rank = config.get("r")
    for module, shapes in modules.items():
        for part in {"A", "B"} - shapes.keys():
            yield f"base_model.model.{module}.lora_{part}.weight is missing"
        yield from _mismatches(module, shapes, None if config.get("rank_pattern") else rank, base)
    for module in sorted(set(_expected_modules(config, base)) - modules.keys()):
        yield f"base_model.model.{module}.lora_A.weight is missing"


def _mismatches(
    module: str, shapes: dict[str, tuple[int, ...]], rank: Any, base: Tensors | None
) -> Iterator[str]:
    """Yield the mismatches between A (rank, in), B (out, rank) and the weight (out, in)."""
    if base is not None and f"{module}.weight" not in base:
        yield f"the model has no {module}.weight"
        return
    own = base[f"{module}.weight"].shape if base else None
    for part, shape in sorted(shapes.items()):
        ranks, sizes = (shape[:1], shape[1:]) if part == "A" else (shape[1:], shape[:1])
        size = own and (own[1:] if part == "A" else own[:1])
        if (rank is not None and ranks != (rank,)) or (size is not None and sizes != size):
            yield f"base_model.model.{module}.lora_{part}.weight has shape {shape}"


def _expected_modules(config: dict[str, Any], base: Tensors | None) -> Iterator[str]:
    """Yield the modules that have adapters by the config, if it determines them."""
    targets = config.get("target_modules")
    if base is None or not targets or targets == "all-linear" or any(map(config.get, SPECIAL)):
        return
    ends = tuple(targets) if isinstance(targets, list) else ()
    for name, header in base.items():
        module = name.removesuffix(".weight")
        if module == name or len(header.shape) != 2:
            continue
        if isinstance(targets, str):
            is_target = re.fullmatch(targets, module) is not None
        else:
            is_target = module in ends or any(module.endswith(f".{end}") for end in ends)
        if is_target:
            yield module
