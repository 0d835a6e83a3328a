"""Settings, metrics and trackers, checkpoints' snapshots, DeepSpeed's config, the model folder."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.tiny_models import TEMPLATE, make_model, make_tokenizer, write_model

from wrpo_ray.config import LoraConfig, ReferenceConfig, TrainConfig, WrpoConfig, load
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.train import checkpoint, loop, model, probe
from wrpo_ray.stages.train.deepspeed import engine_config, policy_engine
from wrpo_ray.stages.train.metrics import (
    MetricsFile,
    Sums,
    check_trackers,
    peak_memory,
    read_metrics,
    trackers,
)
from wrpo_ray.stages.train.rows import Row
from wrpo_ray.stages.train.task import METRICS, Task
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

CPU = torch.device("cpu")
FP32 = TrainConfig(precision="fp32")
LORA = FP32.model_copy(update={"lora": LoraConfig(rank=2, alpha=8)})


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path))


@pytest.fixture(autouse=True)
def _deepspeed_on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def task(folder: Folder, config: TrainConfig) -> Task:
    return Task(Run(folder, 4), Step("wrpo"), folder, folder, "base", config, seed=0)


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "settings", "told"),
    [
        (
            "sft",
            {"max_length": 10, "max_prompt_length": 10},
            "sft: max_prompt_length (10) must be below max_length (10)",
        ),
        ("sft", {"compat": "published"}, "needs max_prompt_length (the paper's is 1800)"),
        ("sft", {"offload": "optimizer", "zero_stage": 0}, "needs a zero_stage of 1, 2 or 3"),
        ("sft", {"offload": "all", "zero_stage": 2}, "offload: all needs zero_stage 3"),
        ("sft", {"workers": 2, "min_workers": 3}, "min_workers must be at most workers (2)"),
        ("sft", {"holdout": 0.6}, "sft.holdout: input should be less than or equal to 0.5"),
        ("sft", {"trackers": ["tensorbord"]}, "should be 'tensorboard', 'wandb' or 'mlflow'"),
        ("sft", {"micro_batch": 2}, "unknown key; did you mean 'micro_batch_tokens'?"),
        ("sft", {"beta": 0.1}, "sft.beta: unknown key"),
        ("sft", {"lora": {"rnk": 2}}, "sft.lora.rnk: unknown key; did you mean 'rank'?"),
        ("sft", {"lora": {"targets": []}}, "sft.lora.targets: value should have at least 1 item"),
        ("wrpo", {"margin": 1}, "wrpo: margin belongs to objective: simpo"),
        (
            "wrpo",
            {"objective": "ipo", "label_smoothing": 0.1},
            "label_smoothing does not belong to objective: ipo",
        ),
        ("wrpo", {"objective": "dpo"}, "should be 'wrpo', 'ipo' or 'simpo' (got 'dpo')"),
        ("wrpo", {"label_smoothing": 0.5}, "label_smoothing: input should be less than 0.5"),
        ("wrpo", {"beta": 0}, "wrpo.beta: input should be greater than 0"),
        ("wrpo", {"alpha": {"end": 1.1}}, "wrpo.alpha.end: input should be less than or equal to"),
        (
            "wrpo",
            {"reference": {"mode": "disk"}},
            "should be 'stored', 'split' or 'live' (got 'disk')",
        ),
    ],
)
def test_bad_settings_are_told(tmp_path, section, settings, told):
    tree = {"output": "o", "import": {"path": "p", "format": "preferences"}, section: settings}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "c.yaml")
    (line,) = str(caught.value).splitlines()
    assert told in line


def test_good_settings_are_taken():
    TrainConfig(max_length=10, max_prompt_length=9, compat="published")
    TrainConfig(offload="all", zero_stage=3)
    TrainConfig(offload="optimizer", zero_stage=1)
    TrainConfig(workers=4, min_workers=1)
    WrpoConfig(objective="simpo", margin=0.5, label_smoothing=0.1)
    WrpoConfig(objective="ipo", sft_weight=0.1)


def test_placement_is_no_part_of_a_trained_model():
    same = {
        "workers": 8,
        "zero_stage": 0,
        "packing": False,
        "micro_batch_tokens": 5,
        "reference": {"mode": "live"},
        "trackers": ["wandb"],
        "gradient_checkpointing": True,
    }
    assert WrpoConfig(**same).identity() == WrpoConfig().identity()
    assert WrpoConfig(lora={}).identity() != WrpoConfig().identity()
    assert WrpoConfig(holdout=0.1).identity() != WrpoConfig().identity()


@pytest.mark.parametrize(
    ("config", "has_reference", "has_second_model"),
    [
        (TrainConfig(), False, False),
        (WrpoConfig(), True, False),
        (WrpoConfig(reference=ReferenceConfig(mode="live")), True, True),
        (WrpoConfig(reference=ReferenceConfig(mode="split")), True, False),
        (WrpoConfig(reference=ReferenceConfig(mode="live"), lora=LoraConfig()), True, False),
        (WrpoConfig(reference=ReferenceConfig(mode="live"), objective="simpo"), False, False),
    ],
)
def test_which_models_a_training_needs(config, has_reference, has_second_model):
    assert (config.has_reference, config.has_second_model) == (has_reference, has_second_model)


# --- metrics ----------------------------------------------------------------------------------


def test_custom_resources_reach_the_workers_and_the_reference(folder):
    from wrpo_ray.stages.train.prepare import Prepare
    from wrpo_ray.stages.train.stage import _trainer

    config = WrpoConfig(workers=3, num_cpus=2, num_gpus=1, resources={"train": 1})
    scaling = _trainer([task(folder, config)], folder).scaling_config
    assert scaling.resources_per_worker == {"CPU": 2, "GPU": 1, "train": 1}
    reference = Prepare("wrpo", Step("pair"), folder, "base", config).actors
    assert (reference.max, reference.num_gpus, reference.resources) == (3, 1, {"train": 1})
    rows_alone = Prepare(
        "sft", Step("select"), folder, "base", TrainConfig(num_gpus=1, resources={"train": 1})
    ).actors
    assert (rows_alone.num_gpus, rows_alone.resources) == (0, {})


def test_metrics_are_appended(folder):
    file = MetricsFile(folder, 0)
    for step in range(3):
        file.append({"step": step, "loss": 1.0})
        assert [r["step"] for r in read_metrics(folder)] == list(range(step + 1))


def test_a_resumed_run_has_no_line_twice(folder):
    text = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5))
    folder.write(METRICS, (text + '{"step": 5, "lo').encode())  # cut off by a kill
    file = MetricsFile(folder, 3)
    file.append({"step": 3, "loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(folder)] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0),
    ]  # fmt: skip


class Remote(Folder):
    """A folder that takes itself for one of an object store."""

    is_remote = property(lambda self: True)


def test_in_an_object_store_metrics_are_written_now_and_then(tmp_path):
    remote = Remote(str(tmp_path))
    file = MetricsFile(remote, 0)
    file.append({"step": 0})
    assert read_metrics(remote) == []
    file.flush()
    assert read_metrics(remote) == [{"step": 0}]
    often = MetricsFile(remote, 1, every=0)
    often.append({"step": 1})
    assert read_metrics(remote) == [{"step": 0}, {"step": 1}]


@pytest.mark.usefixtures("alone")
def test_sums_pass_over_dummies():
    """(1 + 2) + (3 + 4) = 10; a dummy's name counts and its values do not."""
    sums = Sums()
    sums.add({"loss": torch.tensor([1.0, 2.0], requires_grad=True)}, True)
    sums.add({"loss": torch.tensor([50.0]), "tokens": torch.tensor([7])}, False)
    sums.add({"loss": torch.tensor([3.0, 4.0])}, True)
    assert sums.reduce() == {"loss": 10.0, "tokens": 0.0}


@pytest.mark.usefixtures("alone")
def test_sums_are_in_float64():
    """2^24 + 1 is no number of fp32."""
    sums = Sums()
    sums.add({"tokens": torch.tensor([2.0**24])}, True)
    sums.add({"tokens": torch.tensor([1.0])}, True)
    assert sums.reduce()["tokens"] == 2**24 + 1


def test_peak_memory_of_this_process():
    """More than torch alone takes, less than a terabyte."""
    assert 0.05 < peak_memory(CPU) < 1000


# --- trackers ---------------------------------------------------------------------------------


RECORDS = [
    {"step": 4, "steps": 9, "loss": 0.5, "grad_norm": None, "rewards/margins": 1.5},
    {"step": 5, "steps": 9, "loss": 0.25, "grad_norm": 2.0, "rewards/margins": -1.0},
]


def read_events(path: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value of a TensorBoard file: length, CRC, event, CRC, and so on."""
    from tensorboardX.proto.event_pb2 import Event

    data, values, place = path.read_bytes(), {}, 0
    while place < len(data):
        (size,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + size])
        values |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        place += size + 16
    return values


def test_tensorboard(folder):
    run = task(folder, TrainConfig(trackers=("tensorboard",)))
    (tracker,) = trackers(run)
    for record in RECORDS:
        tracker.log(record)
    tracker.close()
    (path,) = (Path(run.folder.path) / "tensorboard").iterdir()
    assert read_events(path) == {
        ("loss", 4): 0.5,
        ("rewards/margins", 4): 1.5,
        ("loss", 5): 0.25,
        ("grad_norm", 5): 2.0,
        ("rewards/margins", 5): -1.0,
    }


def test_tensorboard_is_for_a_local_output(tmp_path):
    remote = task(Folder("s3://bucket/run"), TrainConfig(trackers=("tensorboard",)))
    with pytest.raises(UserError, match="local output only; use wandb or mlflow"):
        check_trackers(remote)


@pytest.mark.parametrize(
    ("name", "package"),
    [("wandb", "wandb"), ("mlflow", "mlflow"), ("tensorboard", "tensorboardX")],
)
def test_a_missing_package_is_told_with_the_remedy(folder, monkeypatch, name, package):
    for known in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, package, None)  # what import takes for not installed
    with pytest.raises(UserError, match=f"trackers: {name} .* pip install {package}$"):
        check_trackers(task(folder, TrainConfig(trackers=(name,))))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_trackers_are_told_numbers_and_steps(folder, monkeypatch, name):
    """Stand-ins with the functions of wandb and mlflow that are called."""
    told: list[tuple[dict[str, float], int]] = []
    started: list[dict[str, Any]] = []
    ended: list[str] = []

    def log(values: dict[str, float], step: int) -> None:
        told.append((values, step))

    def init(**arguments: Any) -> Any:
        started.append(arguments)
        return types.SimpleNamespace(log=log, finish=lambda: ended.append(name))

    module = types.SimpleNamespace(
        init=init,
        start_run=init,
        log_params=lambda params: None,
        log_metrics=log,
        end_run=lambda: ended.append(name),
    )
    monkeypatch.setitem(sys.modules, name, module)
    run = task(folder, TrainConfig(trackers=(name,)))
    (tracker,) = trackers(run)
    for record in RECORDS:
        tracker.log(record)
    tracker.close()
    assert ended == [name]
    assert told == [
        ({"loss": 0.5, "rewards/margins": 1.5}, 4),
        ({"loss": 0.25, "grad_norm": 2.0, "rewards/margins": -1.0}, 5),
    ]
    assert run.step.folder in started[0].values()


# --- DeepSpeed's config and checkpoints -------------------------------------------------------


PLACES = [(0, "none")] + [(s, o) for s in (1, 2, 3) for o in ("none", "optimizer")] + [(3, "all")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "offload"), PLACES)
def test_deepspeed_takes_its_config(stage, offload, precision):
    """As its own parser reads it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = TrainConfig(zero_stage=stage, offload=offload, precision=precision, clip=0.5)
    read = DeepSpeedConfig(engine_config(config, workers=1))
    zero = read.zero_config
    assert zero.stage == (1 if stage == 0 and precision == "bf16" else stage)
    on_cpu = zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu"
    assert on_cpu == (offload != "none")
    assert (zero.offload_param is not None) == (offload == "all")
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert read.gradient_clipping == 0.5
    assert read.gradient_accumulation_steps > 1  # or the loop could not say which is the last


@pytest.mark.parametrize("settings", [{}, {"num_gpus": 1}, {"num_gpus": 1, "offload": "optimizer"}])
def test_adam_is_fused_everywhere(settings, monkeypatch):
    import deepspeed

    monkeypatch.setattr(deepspeed, "initialize", lambda model, optimizer, config: (optimizer, 0))
    adam = policy_engine(torch.nn.Linear(2, 2), TrainConfig(**settings), {})
    assert adam.param_groups[0]["fused"] is True
    assert [p.numel() for p in adam.param_groups[0]["params"]] == [4, 2]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_deepspeeds_batch_size_is_a_product(workers):
    """Of 128 rows 3 workers could have none; the loop deals them itself."""
    got = engine_config(TrainConfig(workers=workers), workers)
    product = got["train_micro_batch_size_per_gpu"] * got["gradient_accumulation_steps"] * workers
    assert got["train_batch_size"] == product


GONE = '{"checkpoint_results": [{"checkpoint_dir_name": "x"}]}'


@pytest.mark.parametrize("text", ["", "{", "[]", '{"checkpoint_results": [1]}', GONE])
def test_a_damaged_snapshot_is_put_aside(folder, text):
    folder.write(checkpoint.SNAPSHOT, text.encode())
    checkpoint.repair(folder, "wrpo")
    assert not folder.exists(checkpoint.SNAPSHOT)


def test_a_whole_snapshot_stays(folder):
    checkpoint.repair(folder, "wrpo")  # nothing there, nothing to do
    folder.write("checkpoint_1/state", b"")
    listed = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}
    folder.write_json(checkpoint.SNAPSHOT, listed)
    checkpoint.repair(folder, "wrpo")
    assert folder.exists(checkpoint.SNAPSHOT)


def test_own_errors_are_returned_and_others_rise(folder, monkeypatch):
    """What is raised makes Ray Train start over."""

    def fail(error: Exception) -> None:
        def raise_it(_: Task, **__: bool) -> None:
            raise error

        monkeypatch.setattr(loop, "_train", raise_it)

    fail(UserError("no rows"))
    assert str(loop.work([task(folder, FP32)])) == "no rows"
    fail(RuntimeError("a node is gone"))
    with pytest.raises(RuntimeError, match="gone"):
        loop.work([task(folder, FP32)])


# --- the model --------------------------------------------------------------------------------


ROWS = [
    Row(
        name, np.array([7, 8, 9, 10][:n]), (np.array([11, 12, 1]), np.array([13, 1]), np.array([1]))
    )
    for n, name in enumerate("abcd", start=1)
]


def logps(policy: model.Policy, config: TrainConfig = FP32) -> torch.Tensor:
    with torch.no_grad():
        return policy(model.collate(ROWS, config))


def plain_logps(network: Any) -> torch.Tensor:
    """By transformers alone, an answer at a time."""
    with torch.no_grad():
        return torch.stack(
            [probe._plain_logp(network, r.prompt, a, CPU) for r in ROWS for a in r.answers]
        )


def saved(
    policy: model.Policy, base: Path, config: TrainConfig, to: Folder, write: bool = True
) -> Any:
    """The model that transformers loads from the folder of a trained one."""
    from transformers import AutoModelForCausalLM

    model.save(policy, base, config, make_tokenizer(), to, write=write)
    return AutoModelForCausalLM.from_pretrained(to.local()) if write else None


def read_json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_a_saved_model_is_the_same_model(folder, tied, packing):
    """An ordinary folder: the base's names and config, whatever attention it was trained with."""
    config = FP32.model_copy(update={"packing": packing})
    base = write_model(Path(folder.path) / "base", seed=4, tied=tied)
    policy, target = model.load_policy(base, config, CPU), folder / "model"
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    target.write("stale.bin", b"of an interrupted upload")
    got = saved(policy, base, config, target)
    assert not target.exists("stale.bin")
    original = make_model(seed=4, tied=tied)
    assert got.state_dict().keys() == original.state_dict().keys()
    for name, value in got.state_dict().items():
        assert torch.equal(value, original.state_dict()[name] * 1.01), name
    assert got.config.tie_word_embeddings == tied
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == tied
    for name in ("config.json", "generation_config.json"):
        assert read_json(target.local(), name) == read_json(base, name)
    torch.testing.assert_close(plain_logps(got), logps(policy, config), rtol=1e-5, atol=1e-5)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(target.local()).chat_template == TEMPLATE


def test_other_workers_write_nothing(folder):
    base = write_model(Path(folder.path) / "base")
    saved(model.load_policy(base, FP32, CPU), base, FP32, folder / "model", write=False)
    assert not folder.exists("model")


def test_a_policy_leaves_the_state_dict_as_it_was():
    network = make_model(seed=1, tied=True)
    names, parameters = list(network.state_dict()), list(network.parameters())
    policy = model.Policy(network)
    assert list(policy.model.state_dict()) == names
    assert all(a is b for a, b in zip(policy.parameters(), parameters, strict=True))


def test_a_loaded_policy_trains_in_its_precision(tmp_path):
    base = write_model(tmp_path)
    for precision, dtype in model.DTYPES.items():
        policy = model.load_policy(base, TrainConfig(precision=precision), CPU)
        assert policy.training
        assert policy.model.training
        assert {p.dtype for p in policy.parameters()} == {dtype}
        assert all(p.requires_grad for p in policy.parameters())
        assert logps(policy).dtype == torch.float32


def test_dropout_is_off_but_stays_in_the_config(tmp_path):
    path = write_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.9}))
    for settings in (FP32, FP32.model_copy(update={"packing": False}), LORA):
        policy = model.load_policy(path, settings, CPU)
        assert policy.training
        assert torch.equal(logps(policy, settings), logps(policy, settings))
        assert policy.model.config.attention_dropout == 0.9


def test_every_kind_of_dropout_is_off():
    layers = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.MultiheadAttention(4, 2, 0.5))
    model.disable_dropout(layers)
    assert (layers[0].p, layers[1].dropout) == (0.0, 0.0)


# --- adapters ---------------------------------------------------------------------------------


def adapted(base: Path, config: TrainConfig = LORA) -> model.Policy:
    """A policy with adapters as after some steps: new ones change nothing."""
    torch.manual_seed(3)
    policy = model.load_policy(base, config, CPU)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return policy


def test_new_adapters_change_nothing(tmp_path):
    base = write_model(tmp_path)
    policy = model.load_policy(base, LORA, CPU)
    torch.testing.assert_close(logps(policy), logps(model.load_policy(base, FP32, CPU)))


@pytest.mark.parametrize("tied", [False, True])
def test_merged_adapters_are_the_adapted_model(folder, tied):
    """The folder has the base's names; only adapted layers have other weights."""
    base = write_model(Path(folder.path) / "base", tied=tied)
    policy = adapted(base)
    got = saved(policy, base, LORA, folder / "model")
    assert not torch.allclose(logps(policy), logps(model.load_policy(base, FP32, CPU)), atol=0.1)
    torch.testing.assert_close(plain_logps(got), logps(policy), rtol=1e-4, atol=1e-4)
    for name, value in make_model(tied=tied).state_dict().items():
        is_adapted = name.endswith("_proj.weight")
        assert torch.equal(got.state_dict()[name], value) != is_adapted, name
    for name in ("config.json", "generation_config.json"):
        assert read_json((folder / "model").local(), name) == read_json(base, name)
    assert not (folder / "model").exists("adapter_config.json")


def test_without_adapters_it_is_the_base(tmp_path):
    base = write_model(tmp_path)
    policy = adapted(base)
    with policy.without_adapters():
        got = logps(policy)
    assert torch.equal(got, logps(model.load_policy(base, FP32, CPU)))
    assert not torch.equal(got, logps(policy))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "lm_head")])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_never_adapted(tmp_path, targets, tied):
    config = LORA.model_copy(update={"lora": LoraConfig(rank=2, targets=targets)})
    policy = model.load_policy(write_model(tmp_path, tied=tied), config, CPU)
    policy(model.collate(ROWS, config)).sum().backward()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name and "_proj" in name for name in trained)
    layers = 7 if targets == "all-linear" else 1
    assert len(trained) == 2 * 2 * layers  # A and B, two blocks
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("targets", [("lm_head",), ("c_attn",)])
def test_targets_that_name_no_layer_are_told(targets):
    with pytest.raises(UserError, match=rf"lora.targets: \['{targets[0]}'\]: "):
        model.with_lora(make_model(), LoraConfig(targets=targets))


def test_adapters_learn_with_gradient_checkpointing(tmp_path):
    """Frozen embeddings would cut the graph."""
    base, gradients = write_model(tmp_path), []
    for checkpointing in (False, True):
        config = LORA.model_copy(update={"gradient_checkpointing": checkpointing})
        policy = adapted(base, config)
        policy(model.collate(ROWS, config)).sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", ["stage", "prepare"])
def test_the_drivers_modules_import_neither_torch_nor_ray(module):
    code = (
        f"import sys, wrpo_ray.stages.train.{module}; print({{'torch', 'ray'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
