"""Checkpoints between numbers of workers, ZeRO stages and precisions, with real DeepSpeed.

Two workers train and save in every way; then one, three and two new ones load what they saved.
What is compared is read through DeepSpeed's own `safe_get_full_*`, not through the code tested.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wrpo_ray.errors import WrpoError
from wrpo_ray.stages.train import state

BEFORE, AFTER = 3, 2
"""Optimizer steps before and after the checkpoint."""
KEPT = {"next_step": BEFORE, "note": "any JSON"}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# way to train -> ZeRO stage, precision, what is in the CPU's memory, parameters always gathered
WAYS: dict[str, tuple[int, str, tuple[str, ...], bool]] = {
    "zero0": (0, "fp32", (), True),
    "zero1": (1, "fp32", (), True),
    "zero2": (2, "fp32", (), True),
    "zero3": (3, "fp32", (), False),
    "zero3-gathered": (3, "fp32", (), True),
    "zero1-bf16": (1, "bf16", (), True),
    "zero3-bf16": (3, "bf16", (), True),
    "zero2-offload": (2, "bf16", ("optimizer",), True),
    "zero3-offload": (3, "bf16", ("optimizer",), False),
    "zero3-offload-all": (3, "bf16", ("optimizer", "param"), True),
}


class Tiny(nn.Module):
    """Tied head, a frozen layer, a scalar, and no size that two or three workers can divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.frozen = nn.Linear(7, 7)
        self.inner = nn.Linear(7, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        nn.init.eye_(self.frozen.weight)  # the same for every seed, for it is not saved
        nn.init.zeros_(self.frozen.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.frozen(self.embed(ids)))) * self.scale)


def make_engine(way: str, seed: int = 0) -> Any:
    """The engine as `train.deepspeed` sets it up, with two micro-batches a step."""
    import deepspeed

    stage, precision, offload, gathered = WAYS[way]
    zero: dict[str, Any] = {
        "stage": stage,
        "sub_group_size": 100,  # several groups at stage 3
        "stage3_param_persistence_threshold": 10**5 if gathered else 0,
    } | {f"offload_{what}": {"device": "cpu"} for what in offload}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    torch.manual_seed(seed)
    model = Tiny().to(DTYPES[precision])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=adam, config=settings)[0]


def train(engine: Any, first: int, end: int) -> list[float]:
    """The losses of each micro-batch on this worker, which has rows of its own."""
    losses = []
    for micro in range(first * 2, end * 2):
        torch.manual_seed(100 * micro + torch.distributed.get_rank())
        ids = torch.randint(11, (4, 5))
        loss = nn.functional.cross_entropy(engine(ids).float().flatten(0, 1), ids.flatten())
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        losses.append(loss.item())
    return losses


def read(engine: Any) -> dict[str, torch.Tensor]:
    """Weights of the forward pass, and whole masters, moments and steps in fp32."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage, values = engine.zero_optimization_stage(), {}
    if stage in (1, 2) and engine.basic_optimizer.state:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # else only after the next step
    for name, parameter in engine.module.named_parameters():
        with zero.GatheredParameters([parameter], enabled=stage == 3):
            values[name] = parameter.detach().clone()
        if not parameter.requires_grad:
            continue
        adam = engine.basic_optimizer.state.get(parameter, {})
        whole = parameter if stage == 0 else safe_get_full_fp32_param(parameter)
        values[f"{name} master"] = whole.detach().float().clone()
        for key in state.MOMENTS if engine.basic_optimizer.state else ():
            full = adam[key] if stage == 0 else safe_get_full_optimizer_state(parameter, key)
            values[f"{name} {key}"] = full.clone()
    steps = [entry["step"] for entry in engine.basic_optimizer.state.values()]
    return values | {"step": torch.stack(steps).unique()} if steps else values


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    wrong = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not wrong, wrong


def join(rank: int, workers: int, port: int) -> None:
    """Be one of the workers; DeepSpeed compiles nothing."""
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(workers)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers
    )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.init_distributed(verbose=False)


def saving(rank: int, workers: int, port: int, folder: Path) -> None:
    """Train and save in every way, then go on undisturbed."""
    join(rank, workers, port)
    state.FILE_BYTES = 500  # several files
    for way in WAYS:
        engine = make_engine(way)
        if way == "zero3":
            state.save_state(engine, folder / "new" / f"rank{rank}", {})
        train(engine, 0, BEFORE)
        state.save_state(engine, folder / way / f"rank{rank}", KEPT)
        saved = read(engine)
        losses = train(engine, BEFORE, BEFORE + AFTER)
        torch.save((saved, losses, read(engine)), folder / f"{way}-{rank}.pt")


def loading(rank: int, workers: int, port: int, folder: Path, pairs: list[Any]) -> None:
    """Load each (saved way, way) into a model of other weights, and compare."""
    join(rank, workers, port)
    for source, way in pairs:
        saved, losses, later = torch.load(folder / f"{source}-{rank % 2}.pt")
        engine = make_engine(way, seed=1)
        assert state.load_state(engine, folder / source) == KEPT
        same(read(engine), as_loaded(saved, DTYPES[WAYS[way][1]]))
        if workers == 2 and source == way:
            assert train(engine, BEFORE, BEFORE + AFTER) == losses
            same(read(engine), later)
    if workers == 2:
        from_the_start(rank, folder)
    if workers == 1:
        damaged(folder)


def as_loaded(saved: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What `read` tells after loading into a model of another precision."""
    masters = {name: value for name, value in saved.items() if name == "step" or " " in name}
    weights = saved.keys() - masters.keys()
    return masters | {n: saved.get(f"{n} master", saved[n]).to(dtype) for n in weights}


def from_the_start(rank: int, folder: Path) -> None:
    """A state without a step has no moments, and goes on all the same."""
    engine = make_engine("zero3", seed=1)
    assert state.load_state(engine, folder / "new") == {}
    assert not engine.basic_optimizer.state
    train(engine, 0, BEFORE)
    same(read(engine), torch.load(folder / f"zero3-{rank}.pt")[0])


def damaged(folder: Path) -> None:
    """A missing file is an error, and so is a parameter of another size."""
    engine = make_engine("zero1")
    (folder / "zero1" / "part-00001-00000.safetensors").unlink()
    with pytest.raises(WrpoError, match=r"has \d+ of \d+ elements"):
        state.load_state(engine, folder / "zero1")
    engine.module.register_parameter("scale", nn.Parameter(torch.ones(3)))
    with pytest.raises(WrpoError, match="scale has 1 of 3 elements"):
        state.load_state(engine, folder / "zero0")


def spawn(work: Any, workers: int, *args: Any) -> None:
    """Start workers as forks of one process that has imported the libraries, some seconds' work."""
    multiprocessing.set_forkserver_preload(
        ["deepspeed", "transformers.models.llama.modeling_llama", "wrpo_ray.stages.train.loop"]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        ending, (work, workers, port, *args), nprocs=workers, start_method="forkserver"
    )


def ending(rank: int, work: Any, *args: Any) -> None:
    """Workers that have done their work end together: gloo aborts a process it is still used in."""
    work(rank, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of states that two workers saved, each worker's files merged into one folder."""
    folder = tmp_path_factory.mktemp("states")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        spawn(saving, 2, folder)
    for part in sorted(folder.glob("*/rank*/*")):
        assert not (part.parents[1] / part.name).exists()
        part.rename(part.parents[1] / part.name)
    return folder


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def test_files_hold_each_trainable_element_once(saved):
    from safetensors import safe_open

    for way in WAYS:
        sizes: dict[str, int] = {}
        files = list((saved / way).glob("part-*"))
        assert {file.name[5:10] for file in files} == {"00000", "00001"}
        assert len(files) > 2
        for path in files:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    name = key.rpartition("|")[0]
                    assert file.get_slice(key).get_dtype() == "F32"
                    sizes[name] = sizes.get(name, 0) + file.get_slice(key).get_shape()[0]
        whole = {"embed.weight": 77, "inner.weight": 49, "inner.bias": 7, "scale": 1}
        kinds = (state.WEIGHT, *state.MOMENTS)
        assert sizes == {f"{name}|{kind}": n for name, n in whole.items() for kind in kinds}
        index = json.loads((saved / way / state.INDEX).read_text())
        assert index == {"adam_steps": BEFORE, "extra": KEPT}


def test_two_workers_go_on_bit_by_bit(saved):
    across = [("zero3", "zero2"), ("zero3", "zero3-bf16"), ("zero3-bf16", "zero1-bf16")]
    spawn(loading, 2, saved, [*((way, way) for way in WAYS), *across])


def test_three_workers_load_what_two_saved(saved):
    ways = ["zero0", "zero1", "zero3", "zero3-gathered", "zero3-offload-all", "zero1-bf16"]
    spawn(loading, 3, saved, [("zero3", way) for way in ways] + [("zero0", "zero3")])


def test_one_worker_loads_what_two_saved(saved):
    ways = ["zero0", "zero1", "zero2", "zero3", "zero3-bf16", "zero1-bf16", "zero2-offload"]
    spawn(loading, 1, saved, [("zero3", way) for way in ways] + [("zero2-offload", "zero0")])
