"""Weights that vLLM's Run:ai Model Streamer reads: straight from an object store, or from a folder.

An engine that streams gets a local folder without weights, and their address in the store
(`model_weights`). The streamer knows a store by the environment of its process, which is made here
from the options of the address. What vLLM 0.29 takes from the headers of local weight files, and
so does not see of streamed ones, is refused. Tried with an S3 store, by engines on the CPU; GPUs
and Google's stores are not tried.
"""

import importlib.util
import os
from typing import Any
from urllib.parse import parse_qsl

from wrpo_ray.config import ModelConfig
from wrpo_ray.config.models import STREAMER
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import telling_of
from wrpo_ray.llm.model_folder import model_files
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.tensors import list_weight_files, read_json, read_tensors
from wrpo_ray.text.addresses import Address

LOADERS = {STREAMER: "runai_model_streamer", "fastsafetensors": "fastsafetensors"}
"""{`load_format` that vLLM needs another package for: what that is imported as}"""
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}
"""{scheme of an address: extra of the streamer's package for its store}"""
GIVEN = ("endpoint_override", "scheme", "region")
"""Options of an S3 address that the streamer gets."""
OF_WRITING = ("allow_bucket_creation", "allow_bucket_deletion", "allow_delayed_open")
COPY = "or leave stream_weights out, so that the nodes copy the model"
PARTS = ("text_config", "vision_config", "encoder_config")
"""Sections of a config.json in which vLLM looks for a dtype too."""
BY_HEADERS = ("awq", "gptq")
"""Parts of the names of quantization methods for which vLLM reads the headers of local files."""
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Variables of a store's URL: the streamer lists files by the first, and reads by the second."""
PASSED_ON = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
"""vLLM's variable with the names of those that an engine's workers on other nodes get too."""


def streams(model: ModelConfig, folder: Folder) -> bool:
    """Whether the model's engines read the weights of a folder in its store.

    A folder that was trained from the model may be on disk.
    """
    return model.stream_weights and _scheme(folder) in EXTRAS


def stream_arguments(folder: Folder) -> dict[str, Any]:
    """Return vLLM's arguments for weights that it reads in an object store."""
    scheme = "s3" if _scheme(folder) == "s3" else "gs"
    return {"load_format": STREAMER, "model_weights": f"{scheme}://{folder.path}"}


def stream_env(folder: Folder) -> dict[str, str]:
    """Return the environment by which the streamer finds the store of a folder."""
    if _scheme(folder) != "s3":
        return {}
    region = folder.filesystem.region
    env = {"AWS_REGION": region, "AWS_DEFAULT_REGION": region}
    given = (_endpoint(folder), *(os.environ.get(name, "") for name in ENDPOINTS))
    if endpoint := next(filter(None, given), None):  # as pyarrow looks for it
        env |= dict.fromkeys(ENDPOINTS, endpoint)
        env |= {"RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}
    names = dict.fromkeys([*os.environ.get(PASSED_ON, "").split(","), *env])
    return env | {PASSED_ON: ",".join(filter(None, names))}


def check_loader(what: str, model: ModelConfig, output: Folder) -> None:
    """Check that the model's way of loading is installed, and can reach the weights.

    Raises:
        UserError: a package is missing, or the streamer cannot read the model's store.
    """
    given = model.load_format
    if model.stream_weights:
        with telling_of(f"{what}: stream_weights"):
            _check_store(Folder(model.model), output)
    elif given and _lacks(package := LOADERS.get(given, "")):
        raise UserError(
            f"{what}: load_format: {given} needs its package: on every node, run pip install "
            f"{package.replace('_', '-')}, or leave load_format out"
        )


def _check_store(folder: Folder, output: Folder) -> None:
    address, streamer = Address.of(folder.uri), LOADERS[STREAMER]
    if address is None or address.scheme not in EXTRAS:
        raise UserError(
            f"vLLM reads weights from s3:// and gs:// only, not from {folder}; put the model into "
            f"such a store, {COPY}"
        )
    extra = EXTRAS[address.scheme]
    if _lacks(streamer) or _lacks(f"{streamer}_{extra}"):
        raise UserError(
            f"needs a package: on every node, run pip install "
            f"'{streamer.replace('_', '-')}[{extra}]', {COPY}"
        )
    given = GIVEN if address.scheme == "s3" else ()
    if others := [name for name in _options(folder) if name not in (*given, *OF_WRITING)]:
        raise UserError(f"vLLM's streamer has no option {others[0]} of a store; drop it, {COPY}")
    if "@" in address.authority:
        raise UserError(
            f"vLLM's streamer signs its requests, which the address forbids (anonymous@); give "
            f"it credentials, {COPY}"
        )
    if _endpoint(folder) and _scheme(output) == "s3" and not _endpoint(output):
        raise UserError(
            f"the store of {folder} is set for the engines' whole processes, and {output} names no "
            f"store of its own; give its address an endpoint_override, {COPY}"
        )


def check_streamed(what: str, model: ModelConfig) -> None:
    """Check that the streamer reads the model's weights as vLLM reads those of a copy.

    The folder has been checked for its use.

    Raises:
        UserError: it would read other weights, or in another way.
    """
    if model.load_format != STREAMER:
        return
    folder = Folder(model.model)
    is_streamed = streams(model, folder)
    with telling_of(f"{what}: {'stream_weights' if is_streamed else f'load_format: {STREAMER}'}"):
        _check_files(folder, is_streamed=is_streamed)
        if is_streamed:
            _check_headers(model, folder)


def _check_files(folder: Folder, *, is_streamed: bool) -> None:
    """Check that the weights are all safetensors files of the folder: the streamer reads these."""
    there, names = model_files(folder)
    weights, _ = list_weight_files(there, names)
    if not weights[0].endswith(".safetensors"):
        raise UserError(f"reads safetensors, and {weights[0]} is none; save the model as such")
    if there.is_remote and not is_streamed:
        return  # the copy has only what an engine needs
    others = [name for name in there.files(suffix=".safetensors") if name not in weights]
    if others:
        raise UserError(
            f"reads all safetensors files, also {others[0]}, which is no part of the weights; "
            f"delete it, or leave this way of loading out"
        )


def _check_headers(model: ModelConfig, folder: Folder) -> None:
    """Check that vLLM takes nothing of this model from the headers of local weights."""
    config = read_json(folder, "config.json")
    parts = [config, *(config[n] for n in PARTS if isinstance(config.get(n), dict))]
    is_typed = any(part.get("dtype") or part.get("torch_dtype") for part in parts)
    if model.dtype == "auto" and model.actors.num_gpus and not is_typed:
        raise UserError(f"its config.json names no dtype; set `dtype` of the model, {COPY}")
    methods = [(part.get("quantization_config") or {}).get("quant_method") for part in parts]
    method = next(filter(None, [model.quantization, *methods]), "")
    if any(name in method for name in BY_HEADERS):
        raise UserError(
            f"of {method} weights vLLM reads from a copy which layers are quantized; take another "
            f"method, {COPY}"
        )
    tensors = read_tensors(folder) or {}
    if _is_tied(config) and any(name.endswith("lm_head.weight") for name in tensors):
        raise UserError(
            "its weights have an lm_head.weight, which its config.json ties to the embeddings; "
            f"only a copy shows whether they are equal: drop the tensor, {COPY}"
        )


def _is_tied(config: dict[str, Any]) -> bool:
    """Whether a model's output is its embedding, by the defaults of its architecture too."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return bool(config.get("tie_word_embeddings", True))
    found = CONFIG_MAPPING[kind].from_dict(config)
    return bool(
        getattr(found, "tie_word_embeddings", False)
        or getattr(found.get_text_config(), "tie_word_embeddings", False)
    )


def _scheme(folder: Folder) -> str:
    """The scheme of an address in lower case; empty for a local folder."""
    address = Address.of(folder.uri)
    return address.scheme if address else ""


def _options(folder: Folder) -> dict[str, str]:
    address = Address.of(folder.uri)
    return dict(parse_qsl(address.options)) if address else {}


def _endpoint(folder: Folder) -> str:
    """The URL of the server that an address names; empty for the cloud's own."""
    options = _options(folder)
    given = options.get("endpoint_override", "")
    if not given or "://" in given:
        return given
    return f"{options.get('scheme', 'https')}://{given}"


def _lacks(package: str) -> bool:
    return bool(package) and importlib.util.find_spec(package) is None
