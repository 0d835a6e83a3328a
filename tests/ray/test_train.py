"""Training on a real Ray: against a plain torch loop, and through kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from tiny_models import preference_rows, write_model, write_preferences, write_selection

from wrpo_ray.config import AlphaConfig, TrainConfig, WrpoConfig
from wrpo_ray.core.run import Run
from wrpo_ray.core.steps import Step
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import UserError
from wrpo_ray.train.stage import Train, run

PAIRS, SELECTION = Step("pair"), Step("select")
SEED = 3
SETTINGS = {
    "batch_size": 8,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_length": 64,
    "precision": "fp32",
    "workers": 2,
    "num_cpus": 1,
    "micro_batch": 3,
    "checkpoint_every": 1000,
}
WRPO = WrpoConfig(**SETTINGS, beta=0.5, alpha=AlphaConfig(end=0.5))
LONG = WRPO.model_copy(update={"epochs": 10, "batch_size": 4, "micro_batch": 1, "zero_stage": 3,
                               "checkpoint_every": 5, "workers": 2})  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Folder:
    """An output folder with a base model and 21 rows: the last step of three has 5."""
    folder = Folder(str(tmp_path_factory.mktemp("out")))
    write_model(folder.local() / "base", tied=True)
    write_preferences(folder / PAIRS.folder, preference_rows(21))
    write_selection(folder / SELECTION.folder, preference_rows(21))
    return folder


def train(root: Folder, name: str, config: TrainConfig) -> Step:
    rows = PAIRS if isinstance(config, WrpoConfig) else SELECTION
    step = Step(name, {"train": config.identity()}, (rows,))
    run(Run(root, 4), [Train(step, rows, root / "base", config, SEED)])
    return step


def weights(root: Folder, step: Step) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    folder = (root / step.folder / "model").local()
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def metrics(root: Folder, step: Step) -> list[dict]:
    path = (root / step.folder).local() / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain(root: Folder, config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[float]]:
    """One process, one row at a time, torch alone: what the stage has to agree with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wrpo_ray.train.order import Order
    from wrpo_ray.train.rows import read_part, tokenize
    from wrpo_ray.train.schedule import alpha_at, learning_rate_at
    from wrpo_ray.train.task import SFT_ANSWERS, WRPO_ANSWERS

    preference = isinstance(config, WrpoConfig)
    names, step = (WRPO_ANSWERS, PAIRS) if preference else (SFT_ANSWERS, SELECTION)
    base = root.local() / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    records = sorted(read_part(root / step.folder, names, 0, 1), key=lambda r: r["prompt_id"])
    rows = tokenize(tokenizer, frozenset({1}), records, names, stage="x", max_length=64).kept
    model, reference = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
    order, losses = Order(len(rows), config.epochs, config.batch_size, SEED), []

    def logp(model, row, answer):
        ids = torch.tensor([[*row.prompt, *answer]])
        table = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return table.gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :].sum()

    def loss_of(row, alpha):
        own = [logp(model, row, answer) for answer in row.answers]
        if not preference:
            return -own[0]
        with torch.no_grad():
            ref = [logp(reference, row, answer) for answer in row.answers]
        ws, wt, lose = (config.beta * (a - b) for a, b in zip(own, ref, strict=True))
        return -torch.log(torch.sigmoid(alpha * ws + (1 - alpha) * wt - lose))

    for step_index in range(order.steps):
        batch = [rows[i] for i in order.batch(step_index)]
        alpha = alpha_at(config.alpha, step_index, order.steps) if preference else 0
        count = len(batch) if preference else sum(len(row.answers[0]) for row in batch)
        optimizer.param_groups[0]["lr"] = learning_rate_at(config, step_index, order.steps)
        optimizer.zero_grad()
        loss = torch.stack([loss_of(row, alpha) for row in batch]).sum() / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        losses.append(loss.item())
    return model.state_dict(), losses


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5, msg=name)


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


CASES = {
    "wrpo-zero3": WRPO,
    # three workers do not divide eight rows, one of them has a dummy in the last step
    "wrpo-three-workers": WRPO.model_copy(update={"workers": 3, "zero_stage": 1, "micro_batch": 1}),
    "sft": TrainConfig(**SETTINGS),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_a_plain_loop(local_ray, root, name):
    config = CASES[name]
    step = train(root, name, config)
    expected, losses = plain(root, config)
    assert_close(weights(root, step), expected)
    lines = metrics(root, step)
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-5)
    manifest = step.read_manifest(root)
    folder = root / step.folder
    assert manifest["counts"]["dropped"] == 0
    assert manifest["counts"]["steps"] == len(losses)
    assert manifest["counts"]["final_loss"] == lines[-1]["loss"]
    assert not folder.exists("checkpoints")
    if isinstance(config, WrpoConfig):
        assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert (lines[0]["alpha"], lines[-1]["alpha"]) == (0, 0.5)


def test_too_few_rows_and_workers_are_told_clearly(local_ray, root):
    with pytest.raises(UserError, match=r"99 workers need 99 CPUs and Ray has 4"):
        train(root, "crowd", WRPO.model_copy(update={"workers": 99}))
    with pytest.raises(UserError, match=r"21 rows have more than 8 tokens.*wrpo.max_length"):
        train(root, "short", WRPO.model_copy(update={"max_length": 8, "workers": 1}))


# --- kills -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(local_ray, root) -> dict[str, torch.Tensor]:
    step = train(root, "undisturbed", LONG)
    assert len(metrics(root, step)) == 60
    return weights(root, step)


def wait_for_steps(root: Folder, step: Step, count: int, seconds: float = 90) -> None:
    path = root.local() / step.folder / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, f"no {count} steps within {seconds} s"
        time.sleep(0.005)


def check_resumed(root: Folder, step: Step, expected: dict[str, torch.Tensor]) -> None:
    resumed_at = step.read_manifest(root)["counts"]["resumed_at"]
    assert resumed_at > 0
    assert resumed_at % 5 == 0
    assert [line["step"] for line in metrics(root, step)] == list(range(60))
    assert_same(weights(root, step), expected)


def test_a_killed_worker_is_replaced(local_ray, root, undisturbed):
    step = Step("worker-killed", {"train": LONG.identity()}, (PAIRS,))
    killed = []

    def kill() -> None:
        wait_for_steps(root, step, 28)
        workers = [p for p in psutil.Process().children(recursive=True) if _is_worker(p)]
        workers[-1].kill()
        killed.append(workers[-1].pid)

    killer = threading.Thread(target=kill)
    killer.start()
    assert train(root, "worker-killed", LONG) == step
    killer.join()
    assert killed
    check_resumed(root, step, undisturbed)


def _is_worker(process: psutil.Process) -> bool:
    """Whether it is a Ray Train worker of this session."""
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def start_driver(root: Folder) -> subprocess.Popen:
    """This module as a driver of its own, with a Ray of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, __file__, str(root)], env=environment, start_new_session=True
    )


def test_a_killed_driver_goes_on(root, undisturbed):
    step = Step("driver-killed", {"train": LONG.identity()}, (PAIRS,))
    first = start_driver(root)
    wait_for_steps(root, step, 28)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not step.is_done(root)
    assert start_driver(root).wait(timeout=120) == 0
    check_resumed(root, step, undisturbed)


if __name__ == "__main__":
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    train(Folder(sys.argv[1]), "driver-killed", LONG)
    ray.shutdown()
