"""Export of the fused model: a folder to upload, with merged weights, LoRA adapters or both."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from wrpo_ray.config import Config
from wrpo_ray.errors import UserError
from wrpo_ray.export import gguf_model, model_card, model_files
from wrpo_ray.export.card_parts import CARD, CardFacts
from wrpo_ray.export.model_card import ModelCardFacts
from wrpo_ray.export.run_facts import StageJobs, last_name, run_facts, without_paths
from wrpo_ray.export.weights import DTYPES as BITS
from wrpo_ray.export.weights import Weights, dtype_of, dtype_of_tensors
from wrpo_ray.llm.model_folder import small_files
from wrpo_ray.llm.rounding import Tensors
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.failed_rows import jobs_of
from wrpo_ray.pipeline.model_sections import pinned
from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.evaluate.stage import Evaluate
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.stages.train.task import ADAPTERS
from wrpo_ray.storage.folder import HUB_SCHEME, Folder, check_writable
from wrpo_ray.storage.weight_files import weight_files

Row = dict[str, Any]
BASE, ADAPTER_CONFIG = "base", "adapter_config.json"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
ADAPTERS_USE = (
    "`adapters` holds the training as LoRA adapters, for the model in `base`: `vllm serve "
    "path/to/this/folder/base --enable-lora --lora-modules fused=path/to/this/folder/adapters`."
)


def export_model(
    config: Config,
    to: str,
    dtype: str = "auto",
    form: str = "merged",
    *,
    gguf: bool = False,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Write the fused model as a folder ready to upload; return the bytes of its weights.

    `dtype` is float32, bfloat16, float16 or auto. `auto` is the target's own precision, but
    float32 after LoRA, because half precision would round the changes away. `form` is `merged`,
    or after LoRA also `adapters` (with the model that they were trained on) or `both`. `gguf`
    also writes the merged weights as a GGUF file, named like the folder. `before` is called when
    the model is known to be there.

    Raises:
        UserError: the model is not trained yet or has no adapters, `to` is not writable, or the
            model has no GGUF form.
    """
    config = pinned(config)
    chain, place = Chain(config), Folder(to).absolute()
    jobs = jobs_of(chain)
    job = _finished(jobs, chain.root)
    model_files.check_place(place)
    step = chain.root / job.step.folder
    file = _gguf_file(step / "model", place, is_asked_for=gguf)
    before()
    check_writable(place, "--to")
    facts, size, lines = run_facts(config, chain.root, jobs), 0, []
    if form != "merged":
        size += _export_adapters(config, job, step, place, is_alone=form == "adapters")
        lines += [ADAPTERS_USE]
    if form != "adapters":
        is_lora = job.config.lora is not None  # merged weights are wider
        how = _weights(config, step / "model", dtype, is_lora)
        size += model_files.copy(step / "model", place, how)
        lines += [f"The weights are in {how.written}."]
        if lost := how.loss_text():
            log(f"export: {lost}")
            lines[-1] += f" Of the training, {lost}."
        if gguf:
            size += gguf_model.write_gguf(place.local(), file)
            lines += [f"`{file}` has the same weights and tokenizer for llama.cpp and Ollama."]
    made = replace(
        _card_facts(config, chain, jobs, facts, place), weights=tuple(lines), has_gguf=gguf
    )
    place.write(CARD, model_card.card(made, facts).encode())
    return size


def _finished(jobs: StageJobs, root: Folder) -> Train:
    """The job that trained the fused model.

    Raises:
        UserError: it is not done.
    """
    trained = {job.step.name: job for _, job in jobs if isinstance(job, Train)}
    if "wrpo" not in trained or not trained["wrpo"].step.is_done(root):
        raise UserError("export: the fused model is not there yet; run `wrpo train` first")
    return trained["wrpo"]


def _gguf_file(model: Folder, place: Folder, *, is_asked_for: bool) -> str:
    """The name of the GGUF file of an export.

    Raises:
        UserError: it cannot be written, or one is there that would be of other weights.
    """
    name = model_card.gguf_name(last_name(str(place)))
    if is_asked_for:
        gguf_model.check_gguf(model, place)
    elif place.exists(name):
        raise UserError(f"export: {place} holds {name}: delete it, or export with --gguf again")
    return name


def _weights(config: Config, model: Folder, dtype: str, has_lora: bool) -> Weights:
    """The precision in which to write the merged weights."""
    own, target = dtype_of(model.read_json("config.json")), _required_target(config)
    wanted = dtype
    if dtype == "auto":
        theirs = dtype_of(_config_of(target)) or dtype_of_tensors(target)
        wanted = own if has_lora or not theirs else theirs
    if wanted == own or not wanted:
        return Weights(written=own or "their own precision")
    is_wider = bool(own) and BITS[wanted] > BITS[own]
    before = None if is_wider else _tensors(target)
    return Weights(wanted, before, wanted, is_wider, as_before=dtype == "auto")


def _required_target(config: Config) -> Folder:
    assert config.target is not None  # the fused model is trained from it
    return Folder(config.target.model).absolute()


def _config_of(model: Folder) -> Row:
    """The config.json of a model; empty if it cannot be read."""
    try:
        return small_files(model).read_record("config.json")
    except (UserError, OSError):
        return {}


def _tensors(model: Folder) -> Tensors | None:
    """The weights of a model; None if they cannot be read."""
    try:
        return Tensors(model.local())
    except (UserError, OSError):
        return None


def _export_adapters(
    config: Config, job: Train, step: Folder, to: Folder, *, is_alone: bool
) -> int:
    """Write `adapters`, and in `base` the model that they were trained on; return its bytes.

    Raises:
        UserError: the model was trained without adapters, or they were not kept.
    """
    if job.config.lora is None:
        raise UserError("export: --weights: the fused model was trained without lora")
    adapters, merged = step / ADAPTERS, weight_files(to.files())
    if merged and is_alone:
        raise UserError(
            f"export: {to} holds merged weights, such as {merged[0]}; give a new folder"
        )
    if not adapters.exists(ADAPTER_CONFIG):
        raise UserError(f"export: --weights: {adapters} holds no adapters; train again")
    (to / ADAPTERS).delete("")
    (to / ADAPTERS).upload(adapters.local())
    settings = adapters.read_json(ADAPTER_CONFIG)
    is_target = job.base.uri == _required_target(config).uri and job.base.uri.startswith(HUB_SCHEME)
    name = job.base.uri.removeprefix(HUB_SCHEME).partition("@")[0] if is_target else BASE
    (to / ADAPTERS).write_json(ADAPTER_CONFIG, settings | {"base_model_name_or_path": name})
    base = job.base
    if base.uri.startswith(HUB_SCHEME):
        base = Folder(str(base.local(job.fingerprint)))
    return model_files.copy(base, to / BASE, Weights(PRECISIONS[job.config.precision]))


def _card_facts(
    config: Config, chain: Chain, jobs: StageJobs, facts: CardFacts, to: Folder
) -> ModelCardFacts:
    done = [
        job.step for _, job in jobs if isinstance(job, Evaluate) and job.step.is_done(chain.root)
    ]
    target = config.target.model if config.target else ""
    trained = {job.step.name: job.config for _, job in jobs if isinstance(job, Train)}
    settings = {name: trained[name].identity() for name in ("sft", "wrpo") if name in trained}
    return ModelCardFacts(
        name=last_name(str(to)),
        base=next(m for m in facts.models if m.role == "target"),
        hub_id=target.removeprefix(HUB_SCHEME).partition("@")[0]
        if target.startswith(HUB_SCHEME)
        else None,
        training={name: without_paths(section) for name, section in settings.items()},
        evaluation=(chain.root / done[0].folder).read_json("table.json") if done else None,
    )
