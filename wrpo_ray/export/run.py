"""What a finished output holds, for those who look at it: failed rows, and preference rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from wrpo_ray.config import Config, ScoreConfig
from wrpo_ray.errors import UserError
from wrpo_ray.export import model as model_export
from wrpo_ray.export.card import (
    Facts,
    Model,
    card,
    license_of,
)
from wrpo_ray.export.forms import Form
from wrpo_ray.export.model import Made
from wrpo_ray.export.weights import DTYPES as BITS
from wrpo_ray.export.weights import Weights, dtype_of
from wrpo_ray.export.write import is_file, write_file, write_folder
from wrpo_ray.llm.rounding import Tensors
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.models import pinned
from wrpo_ray.pipeline.retries import Row, StageJob, failures_of, jobs_of
from wrpo_ray.runtime.job import JobKind
from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.stages.train.prepare import Prepare
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.stages.train.task import ADAPTERS
from wrpo_ray.storage.folder import HUB_SCHEME, Folder, check_writable
from wrpo_ray.storage.hub import HubModel
from wrpo_ray.storage.steps import Step
from wrpo_ray.storage.weight_files import weight_files

CARD = "README.md"
BASE, ADAPTER_CONFIG = "base", "adapter_config.json"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
ADAPTERS_USE = (
    "`adapters` holds what was learnt as LoRA adapters, for the model in `base`: `vllm serve "
    "path/to/this/folder/base --enable-lora --lora-modules fused=path/to/this/folder/adapters`."
)


def export(config: Config, to: str, form: Form) -> int:
    """Write the preference rows to a .jsonl or .parquet file, or as a dataset folder with a card.

    Returns how many rows were written.

    Raises:
        UserError: the preference step is not done or has no rows, or `to` cannot be written to.
    """
    config = pinned(config)
    chain = Chain(config, "pair")
    jobs, place = jobs_of(chain), Folder(to).absolute()
    step: Step = jobs[-1][1].step
    if not step.is_done(chain.root):
        raise UserError("export: the preference rows are not there yet; run `wrpo pair` first")
    if is_file(place):
        return write_file(chain.root / step.folder, place, form)
    check_writable(place, "--to")
    statistics = write_folder(chain.root / step.folder, place, form)
    text = card(form, statistics, _facts(config, chain.root, jobs))
    place.write(CARD, text.encode())
    return statistics.rows * form.rows_each


def export_model(config: Config, to: str, dtype: str = "auto", form: str = "merged") -> int:
    """Write the fused model as a folder ready to upload; returns the bytes of its weights.

    `dtype` is float32, bfloat16, float16 or auto: the target's own, but float32 for what LoRA
    trained, as half precision would round it away. `form` is `merged`, or for what LoRA trained
    also `adapters`, beside the model that they were trained on, or `both`.

    Raises:
        UserError: it is not trained yet, has no adapters, or `to` cannot be written to.
    """
    config = pinned(config)
    chain, place = Chain(config), Folder(to).absolute()
    jobs = jobs_of(chain)
    trained = {job.step.name: job for _, job in jobs if isinstance(job, Train)}
    if "wrpo" not in trained or not trained["wrpo"].step.is_done(chain.root):
        raise UserError("export: the fused model is not there yet; run `wrpo train` first")
    model_export.check_place(place)
    check_writable(place, "--to")
    job, facts, size, lines = trained["wrpo"], _facts(config, chain.root, jobs), 0, []
    step = chain.root / job.step.folder
    if form != "merged":
        size += _export_adapters(config, job, step, place, is_alone=form == "adapters")
        lines += [ADAPTERS_USE]
    if form != "adapters":
        how = _weights(config, step / "model", dtype, _has_lora(trained))
        size += model_export.copy(step / "model", place, how)
        lines += [f"The weights are in {how.written}."]
        if lost := how.told():
            log(f"export: {lost}")
            lines[-1] += f" Of the training, {lost}."
    made = replace(_made(config, chain, jobs, facts, place), weights=tuple(lines))
    place.write(CARD, model_export.card(made, facts).encode())
    return size


def _has_lora(trained: dict[str, Train]) -> bool:
    """Whether the last training had adapters: its result then has more bits than it was trained."""
    return trained["wrpo"].config.lora is not None


def _weights(config: Config, model: Folder, dtype: str, has_lora: bool) -> Weights:
    """How the merged weights are written."""
    own, target = dtype_of(model.read_json("config.json")), _required_target(config)
    wanted = dtype
    if dtype == "auto":
        theirs = dtype_of(_config_of(target))
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
    """The config.json of a model; empty where it cannot be had."""
    try:
        if model.uri.startswith(HUB_SCHEME):
            model = Folder(str(HubModel.at(model.uri).fetch_metadata()))
        return model.read_json("config.json")
    except (UserError, OSError):
        return {}


def _tensors(model: Folder) -> Tensors | None:
    """The weights of a model; None where they cannot be had."""
    try:
        return Tensors(model.local())
    except (UserError, OSError):
        return None


def _export_adapters(
    config: Config, job: Train, step: Folder, to: Folder, *, is_alone: bool
) -> int:
    """Write `adapters` and, as `base`, the model that they were trained on; returns its bytes.

    Raises:
        UserError: it was trained without adapters, or before they were kept.
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
    return model_export.copy(base, to / BASE, Weights(PRECISIONS[job.config.precision]))


def _made(config: Config, chain: Chain, jobs: list[StageJob], facts: Facts, to: Folder) -> Made:
    done = [j.step for _, j in jobs if j.kind is JobKind.EVALUATE and j.step.is_done(chain.root)]
    target = config.target.model if config.target else ""
    trained = {job.step.name: job.config for _, job in jobs if isinstance(job, Train)}
    settings = {name: trained[name].identity() for name in ("sft", "wrpo") if name in trained}
    return Made(
        name=_last(str(to)),
        base=next(m for m in facts.models if m.role == "target"),
        hub_id=target.removeprefix(HUB_SCHEME).partition("@")[0]
        if target.startswith(HUB_SCHEME)
        else None,
        training={name: _without_paths(section) for name, section in settings.items()},
        evaluation=(chain.root / done[0].folder).read_json("table.json") if done else None,
    )


def _facts(config: Config, root: Folder, jobs: list[StageJob]) -> Facts:
    done = [job.step for _, job in jobs if job.step.is_done(root)]
    records = [step.read_manifest(root) for step in done]
    settings: Row = {"seed": config.seed}
    for name in ("sampling", "split", "pair", "reward"):
        section = getattr(config, name)
        settings |= {name: _without_paths(section.identity())} if section else {}
    return Facts(
        models=list(_models(config, jobs)),
        settings=settings,
        steps=[{"step": r["step"], "counts": r["counts"]} for r in records],
        failures=failures_of(root, jobs),
        versions={k: v for record in records for k, v in record["versions"].items()},
    )


def _models(config: Config, jobs: list[StageJob]) -> Iterator[Model]:
    """The sources, the target and the reward model, as far as the config has them."""
    weights = {job.model.name: job.fingerprint for _, job in jobs if isinstance(job, Generate)}
    for _, job in jobs:
        if isinstance(job, Prepare) and config.target:  # the first: WRPO starts from target-SFT
            weights.setdefault(config.target.name, job.fingerprint)
        if isinstance(job, Score) and config.reward:
            weights[config.reward.name] = job.fingerprint
    answering = [("source", m) for m in config.sources]
    answering += [("target", config.target)] if config.target else []
    for role, m in answering:
        is_folder = not m.endpoint and not m.model.startswith(HUB_SCHEME)
        terms = license_of(m.name, m.license, Folder(m.model).absolute() if is_folder else None)
        yield Model(role, m.name, _last(m.model), weights.get(m.name, ""), terms)
    if config.reward:
        name, what = config.reward.name, ", ".join(map(_scorer, config.reward.parts))
        yield Model("reward", name, what, weights.get(name, ""), None)


def _scorer(part: ScoreConfig) -> str:
    """What a part of the reward is, without a path."""
    judge = f"judge {part.judge.model}" if part.judge else ""
    return (_last(part.model) if part.model else "") or part.function or part.verifier or judge


def _without_paths(settings: Row) -> Row:
    """What a card may show: of places on this machine only the last name."""
    given = {name: value for name, value in settings.items() if value is not None}
    return {k: _last(v) if k in ("model", "path") else v for k, v in given.items()}


def _last(path: str) -> str:
    return str(Folder(path)).rstrip("/").rsplit("/", 1)[-1]
