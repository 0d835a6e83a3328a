"""Training on a real Ray: against a plain torch loop, and through kills."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import psutil
import pytest
import torch
from support.plain_training import plain_training
from support.tiny_models import preference_rows, write_model, write_preferences, write_selection
from support.waiting import LIMIT, start_patiently, wait_until

from wrpo_ray.config import AlphaConfig, LoraConfig, ReferenceConfig, TrainConfig, WrpoConfig
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.train import split_reference, stage
from wrpo_ray.stages.train.checkpoint import committed
from wrpo_ray.stages.train.model import Reference
from wrpo_ray.stages.train.prepare import Prepare
from wrpo_ray.stages.train.rows import PreparedRows
from wrpo_ray.stages.train.stage import Train
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

PAIRS, SELECTION = Step("pair"), Step("select")
SEED = 3
SETTINGS = {
    "batch_size": 8,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "clip": 0,  # clipped gradients, like Adam's steps, do not show by what they were scaled
    "max_length": 64,
    "precision": "fp32",
    "workers": 2,
    "num_cpus": 1,
    "micro_batch_tokens": 60,
    "checkpoint_every": 1000,
}
WRPO = WrpoConfig(**SETTINGS, beta=0.5, alpha=AlphaConfig(end=0.5))
STEPS, KILLED_AT = 36, 16
LONG = WRPO.model_copy(update={"epochs": 6, "batch_size": 4, "micro_batch_tokens": 40,
                               "checkpoint_every": 5, "holdout": 0.0})  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Folder:
    """An output folder with a base model and 21 rows: the last step of three has 5."""
    folder = Folder(str(tmp_path_factory.mktemp("out")))
    write_model(folder.local() / "base", tied=True)
    write_preferences(folder / PAIRS.folder, preference_rows(21))
    write_selection(folder / SELECTION.folder, preference_rows(21))
    return folder


def preparation(root: Folder, config: TrainConfig, pairs: Step = PAIRS) -> Prepare:
    """The job that prepares the rows of a config, with one actor."""
    preference = isinstance(config, WrpoConfig)
    name, rows = ("wrpo", pairs) if preference else ("sft", SELECTION)
    config = config.model_copy(update={"workers": 1})
    return Prepare(name, rows, root / "base", "base", config)


def prepared(root: Folder, config: TrainConfig, pairs: Step = PAIRS) -> Prepare:
    """The prepared rows of a config, made if they are not there."""
    job = preparation(root, config, pairs)
    if not job.step.is_done(root):
        Prepare.run(Run(root, 4), [job])
    return job


def step_of(name: str, rows: Prepare, config: TrainConfig) -> Step:
    return Step(name, {"train": config.identity()}, (rows.step,))


def train(root: Folder, name: str, config: TrainConfig, pairs: Step = PAIRS) -> Step:
    rows = prepared(root, config, pairs)
    step = step_of(name, rows, config)
    Train.run(Run(root, 4), [Train(step, rows.step, root / "base", "base", config, SEED)])
    return step


def weights(root: Folder, step: Step) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    folder = (root / step.folder / "model").local()
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def metrics(root: Folder, step: Step) -> list[dict]:
    path = (root / step.folder).local() / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(root: Folder, step: Step) -> list[float]:
    return [line["loss"] for line in metrics(root, step)]


def plain(
    root: Folder, config: TrainConfig
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """`plain_training` on the prepared rows of a config."""
    rows = (root / prepared(root, config).step.folder).local()
    return plain_training(root.local() / "base", rows, config, SEED)


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5, msg=name)


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


CASES = {
    "wrpo-zero3": WRPO,
    # a micro-batch a row, so three workers have two dummies in a step of four rows
    "wrpo-three-workers": WRPO.model_copy(
        update={"workers": 3, "batch_size": 4, "micro_batch_tokens": 1}
    ),
    "wrpo-padded": WRPO.model_copy(update={"packing": False, "zero_stage": 2, "clip": 0.05}),
    "wrpo-offloaded": WRPO.model_copy(update={"workers": 1, "offload": "all"}),
    "sft": TrainConfig(**SETTINGS),
}


LORA = LoraConfig(rank=4, alpha=8)
MATRIX = [(lora, zero) for lora in (None, LORA) for zero in (1, 3)]
MODES = ("stored", "split", "live")
BETAS = (0.1, 2.0)


def with_reference(mode: str, lora: LoraConfig | None, zero: int) -> WrpoConfig:
    """The learning rate is high, so that a reference that moved would show."""
    change = {"lora": lora, "zero_stage": zero, "learning_rate": 1e-2, "holdout": 0.2}
    return WRPO.model_copy(update=change | {"reference": ReferenceConfig(mode=mode)})


def name_of(mode: str, lora: LoraConfig | None, zero: int) -> str:
    return f"{mode}-{zero}-{bool(lora)}"


@pytest.fixture(scope="module")
def trained(local_ray, root) -> dict[str, Train]:
    """Every undisturbed training of this module, by its name.

    Those of two workers are trained in series: one group for each ZeRO stage trains one model
    after another, as the start of a group takes longer than a training. With three CPUs there is
    room for no second group.
    """
    configs = CASES | {"undisturbed": LONG}
    configs |= {f"beta-{beta}": WRPO.model_copy(update={"beta": beta}) for beta in BETAS}
    for mode in MODES:
        configs |= {name_of(mode, *case): with_reference(mode, *case) for case in MATRIX}
    rows_of = {name: preparation(root, config) for name, config in configs.items()}
    Prepare.run(Run(root, 4), list({job.step.folder: job for job in rows_of.values()}.values()))
    jobs = {}
    for name, config in configs.items():
        rows = rows_of[name]
        step, in_series = step_of(name, rows, config), config.workers == 2
        jobs[name] = Train(
            step, rows.step, root / "base", "base", config, SEED, in_series=in_series
        )
    Train.run(Run(root, 4), [job for job in jobs.values() if job.in_series])
    Train.run(Run(root, 4), [job for job in jobs.values() if not job.in_series])
    return jobs


@pytest.mark.parametrize("name", [*CASES, *(f"beta-{beta}" for beta in BETAS)])
def test_agrees_with_a_plain_loop(trained, root, name):
    step, config = trained[name].step, trained[name].config
    expected, expected_losses, norms = plain(root, config)
    assert_close(weights(root, step), expected)
    lines = metrics(root, step)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 0.05  # so that what clips does clip
    assert losses(root, step) == pytest.approx(expected_losses, abs=1e-5)
    manifest = step.read_manifest(root)
    assert manifest["counts"]["steps"] == len(lines)
    assert manifest["counts"]["final_loss"] == lines[-1]["loss"]
    assert not any((root / step.folder).exists(left) for left in ("checkpoints", "trained.json"))
    assert (lines[0]["padding"] > 0) == (name == "wrpo-padded")
    if isinstance(config, WrpoConfig):
        assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert (lines[0]["alpha"], lines[-1]["alpha"]) == (0, 0.5)


@pytest.mark.parametrize(("lora", "zero"), MATRIX, ids=lambda v: "lora" if v is LORA else str(v))
def test_every_reference_gives_the_losses_of_a_stored_one(trained, root, lora, zero):
    """{full, LoRA} x {ZeRO-1, ZeRO-3} x the modes, two workers, measured on rows held out."""
    found = {}
    for mode in MODES:
        step = trained[name_of(mode, lora, zero)].step
        found[mode] = step, losses(root, step)
        assert 0 < metrics(root, step)[-1]["holdout/loss"] < 2
        assert metrics(root, step)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert found["stored"][1][-1] != pytest.approx(0.6931472, abs=1e-3)
    for mode in ("split", "live"):
        assert found[mode][1] == pytest.approx(found["stored"][1], abs=1e-5)
        assert_close(weights(root, found[mode][0]), weights(root, found["stored"][0]))


def test_too_few_rows_and_workers_are_told_clearly(local_ray, root):
    with pytest.raises(UserError, match=r"99 workers need 99 CPUs and Ray has 3"):
        train(root, "crowd", WRPO.model_copy(update={"workers": 99}))
    with pytest.raises(UserError, match=r"21 rows have more than 8 tokens.*wrpo.max_length"):
        Prepare.run(
            Run(root, 4),
            [
                Prepare(
                    "wrpo",
                    PAIRS,
                    root / "base",
                    "base",
                    WRPO.model_copy(update={"max_length": 8, "workers": 1}),
                )
            ],
        )


# --- kills -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(trained, root) -> Step:
    step = trained["undisturbed"].step
    assert len(metrics(root, step)) == STEPS
    return step


def has_steps(root: Folder, step: Step, count: int, since: float = 0) -> bool:
    """Whether so many steps are in the metrics, of a run that wrote there after `since`."""
    path = root.local() / step.folder / "metrics.jsonl"
    if not path.exists() or path.stat().st_mtime < since:
        return False
    return path.read_bytes().count(b"\n") >= count


def check_resumed(root: Folder, step: Step, undisturbed: Step) -> None:
    """Loss of each step and the weights, bit by bit."""
    resumed_at = step.read_manifest(root)["counts"]["resumed_at"]
    assert resumed_at > 0
    assert resumed_at % 5 == 0
    assert [line["step"] for line in metrics(root, step)] == list(range(STEPS))
    assert losses(root, step) == losses(root, undisturbed)
    assert_same(weights(root, step), weights(root, undisturbed))


def workers() -> list[psutil.Process]:
    """The Ray Train workers of this module's Ray."""
    return [p for p in psutil.Process().children(recursive=True) if _is_worker(p)]


def _is_worker(process: psutil.Process) -> bool:
    """Whether it is a Ray Train worker of this session."""
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def halted(processes: list[psutil.Process]) -> Iterator[None]:
    """Stop processes for the time of the block."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def start_driver(root: Folder, name: str, *nodes: str) -> subprocess.Popen:
    """This module as a driver of its own: on the module's Ray, or with nodes of its own."""
    import ray

    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_health_check_period_ms": "1000",  # a lost node is seen after 8 s, not 15
        "RAY_health_check_failure_threshold": "8",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    }
    return subprocess.Popen(
        [sys.executable, __file__, str(root), name, *nodes],
        env=environment,
        start_new_session=True,
    )


def test_a_killed_worker_is_replaced_and_a_killed_driver_goes_on(local_ray, root, undisturbed):
    step = step_of("killed", prepared(root, LONG), LONG)
    driver = start_driver(root, "killed")
    wait_until(lambda: has_steps(root, step, KILLED_AT // 2), driver)
    killed = workers()
    killed[-1].kill()
    wait_until(lambda: len(set(workers()) - set(killed)) == 2, driver)
    replaced = time.time()
    wait_until(lambda: has_steps(root, step, KILLED_AT, replaced), driver)
    driver.kill()
    driver.wait()
    assert not step.is_done(root)
    wait_until(lambda: not workers())  # Ray ends them when it sees that their driver is gone
    assert train(root, "killed", LONG) == step
    check_resumed(root, step, undisturbed)


MANY, MANY_ROWS = Step("pair", {"many": True}), 200
SPLIT = WRPO.model_copy(update={
    "workers": 3, "batch_size": 80, "micro_batch_tokens": 1, "zero_stage": 3,
    "reference": ReferenceConfig(mode="split"),
})  # fmt: skip


def test_a_kill_within_the_pass_of_a_split_reference_redoes_no_part(
    local_ray, root, monkeypatch, capfd
):
    """Three workers, each with a third of the model; parts have 24 rows, a row a micro-batch."""
    write_preferences(root / MANY.folder, preference_rows(MANY_ROWS))
    rows, name = prepared(root, SPLIT, MANY), "split-killed"
    parts = split_reference.folder_of(root / rows.step.folder, SPLIT).local()
    monkeypatch.setattr(stage, "PROGRESS_INTERVAL", 0.2)
    driver = threading.Thread(target=train, args=(root, name, SPLIT, MANY))
    driver.start()
    wait_until(lambda: list(parts.glob("*.npy")))
    first, *_ = workers()
    first.suspend()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    assert len(kept) < MANY_ROWS // 24
    first.kill()
    driver.join()
    found = sorted(parts.glob("*.npy"))
    assert [path.name.split("-")[0] for path in found] == [f"{n:012}" for n in range(0, 200, 24)]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    told = capfd.readouterr()
    assert re.search(rf"{name}  reference of \d+ of {MANY_ROWS} rows", told.out + told.err)
    triples = PreparedRows((root / rows.step.folder).local())
    reference = Reference(root.local() / "base", SPLIT, on_gpu=False)
    want = [row.reference for row in reference([triples[i] for i in range(MANY_ROWS)])]
    got = np.concatenate([np.load(path) for path in found])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    # a row's policy is its reference at first, so that no row has the log-probs of another
    assert losses(root, step_of(name, rows, SPLIT))[0] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.soak
def test_five_kills_at_random_moments(root, undisturbed):
    """Drivers and workers in turn, at moments drawn by a seed."""
    rng, name = random.Random(7), "killed-often"
    step = step_of(name, prepared(root, LONG), LONG)
    for number, moment in enumerate(sorted(rng.sample(range(6, 28), 5))):
        started, driver = time.time(), start_driver(root, name)
        wait_until(partial(has_steps, root, step, moment, started), driver)
        tree = workers()
        if number % 2:
            rng.choice(tree).kill()
            wait_until(lambda tree=tree: not set(tree) & set(workers()), driver)
        driver.kill()
        driver.wait()
        wait_until(lambda: not workers())  # they write on until they see that it is dead
    assert start_driver(root, name).wait(LIMIT) == 0
    check_resumed(root, step, undisturbed)


ELASTIC = LONG.model_copy(update={"min_workers": 1})
ON_NOTICE = ELASTIC.model_copy(update={"checkpoint_every": 1000})


@pytest.mark.parametrize(
    ("name", "config"),
    [("lost", ELASTIC), pytest.param("announced", ON_NOTICE, marks=pytest.mark.soak)],
)
def test_a_lost_node_leaves_a_smaller_run_with_the_same_losses(root, undisturbed, name, config):
    """Two nodes with one CPU each; the second is lost in mid-run and does not come back.

    Where Ray tells of it before, as of a spot node, its workers save a checkpoint: the only one.
    """
    step = step_of(name, prepared(root, config), config)
    assert start_driver(root, name, "two-nodes").wait(LIMIT) == 0
    counts = step.read_manifest(root)["counts"]
    assert counts["workers"] == 1
    assert 0 < counts["resumed_at"] < STEPS
    assert losses(root, step) == pytest.approx(losses(root, undisturbed), abs=1e-4)
    assert_close(weights(root, step), weights(root, undisturbed))


def lose_a_node(root: Folder, name: str) -> None:
    """As a driver: train on two nodes, and end one in mid-run."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1}
    cluster = start_patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    second = start_patiently(lambda: cluster.add_node(num_cpus=1))
    ray.init(address=cluster.address, log_to_driver=False)
    config = {"announced": ON_NOTICE, "lost": ELASTIC}[name]
    step = step_of(name, prepared(root, config), config)

    def lose() -> None:
        if name == "announced":
            wait_until(lambda: has_steps(root, step, 1))
            # else they may be done before Ray Train looks at the nodes
            with halted(workers()):
                announce_end(cluster.address, second.node_id)
                time.sleep(2)
            wait_until(lambda: committed(root / step.folder / "checkpoints"))
        else:
            wait_until(lambda: has_steps(root, step, KILLED_AT))
        cluster.remove_node(second, allow_graceful=False)

    threading.Thread(target=lose, daemon=True).start()
    train(root, name, config)
    ray.shutdown()
    cluster.shutdown()


def announce_end(address: str, node: str) -> None:
    """Tell Ray that a node is about to leave, as a cloud does."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + 15) * 1000)
    GcsClient(address=address).drain_node(node, reason, "a spot node", deadline)


if __name__ == "__main__":
    import ray

    if sys.argv[3:]:
        lose_a_node(Folder(sys.argv[1]), sys.argv[2])
    else:
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
        train(Folder(sys.argv[1]), sys.argv[2], LONG)
        ray.shutdown()
