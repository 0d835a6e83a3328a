"""Build the whole zoo: train its models in parallel processes and save each when it is complete.

Imports no torch, so that a finished zoo is recognised at once; only child processes train.
"""

import fcntl
import importlib.metadata
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from wrpo_ray.errors import UserError
from wrpo_ray.zoo.skills import Question, Words, make_questions

RECIPE = 5
"""Version of the recipes: raise it with every change that alters what is built."""

RECIPES = ("near", "distant")
"""Names of `recipes.RECIPES`, which imports torch."""

PLACES: dict[str, str] = {
    "base": ".base",
    "gemma2-chars": "sources/gemma2-chars",
    "reward": "reward",
    "qwen3-bpe": "sources/qwen3-bpe",
    "llama-bytes": "sources/llama-bytes",
    "target": "target",
}
"""The folder of each model, in the order in which to train: the longest chain first."""

BUILT_ON_BASE = ("target", "reward")
"""Models that start from the base model, which is removed when they are complete."""

PROMPTS: dict[str, tuple[int, Words]] = {
    "prompts.jsonl": (3000, "train"),
    "eval.jsonl": (1800, "heldout"),
}
"""Prompt files: how many rows, on which words."""

Log = Callable[[str], Any]


def build_zoo(
    folder: Path, seed: int = 0, processes: int = 2, log: Log = print, recipe: str = "near"
) -> dict[str, Any]:
    """Train every model of the zoo that the folder does not hold yet, and write its prompts.

    An interrupted build continues with the missing models. The same seed gives the same zoo on the
    same machine. A file lock serialises builds of one folder.

    Args:
        folder: where to write the zoo; created if missing.
        seed: determines words, weights and orders.
        processes: how many models to train at the same time, one core each.
        log: called with one line of progress at a time; the processes print their own.
        recipe: `near`, with nearly perfect sources, or `distant`.

    Returns:
        The contents of zoo.json: seed, recipe, versions, and the measures of each model.

    Raises:
        UserError: (a ValueError) if the folder holds a zoo of another seed or recipe.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_builder(folder):
        identity = _identity(seed, recipe)
        check_same(folder, identity)
        missing = missing_models(folder)
        record = read_record(folder / "zoo.json")
        if record and not missing and all((folder / name).exists() for name in PROMPTS):
            return record
        write_record(folder / "zoo.json", {"complete": False, **identity})
        for name, (count, words) in PROMPTS.items():
            _write_questions(folder / name, make_questions(count, f"{seed}/{name}", words))
        if missing:
            log(f"zoo: training {', '.join(missing)} in {processes} processes")
            _train(folder, (seed, recipe), missing, processes, log)
        return _finish(folder, identity)


def _identity(seed: int, recipe: str) -> dict[str, Any]:
    """Everything that determines a zoo, as recorded in zoo.json."""
    return {"seed": seed, "recipe": RECIPE if recipe == "near" else f"{recipe} {RECIPE}"}


def missing_models(folder: Path) -> list[str]:
    """The models still to train, in order; the base model only if another one needs it."""
    missing = [name for name, place in PLACES.items() if not (folder / place).is_dir()]
    if "base" in missing and not set(BUILT_ON_BASE) & set(missing):
        missing.remove("base")
    return missing


def _train(
    folder: Path, kind: tuple[int, str], missing: list[str], processes: int, log: Log
) -> None:
    """Keep `processes` jobs running, always the first model whose base is complete."""
    waiting = list(missing)
    running: dict[Future[dict[str, float]], str] = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_child) as pool:
        try:
            while waiting or running:
                for name in _ready(waiting, running.values())[: processes - len(running)]:
                    waiting.remove(name)
                    running[pool.submit(_train_one, name, str(folder), *kind)] = name
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    log(_line(running.pop(job), job))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ready(waiting: list[str], running: Any) -> list[str]:
    base_missing = "base" in {*waiting, *running}
    return [name for name in waiting if not (base_missing and name in BUILT_ON_BASE)]


def _line(name: str, job: Future[dict[str, float]]) -> str:
    measures = ", ".join(f"{key} {value:g}" for key, value in job.result().items())
    return f"zoo: {name} done ({measures})"


def _start_child() -> None:
    """Prepare a child process before it imports torch: one thread, no network, end with its parent.

    Otherwise workers outlive a parent that is killed with -9, and write where the next build
    writes.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train_one(name: str, folder: str, seed: int, recipe: str) -> dict[str, float]:
    """Train one model in a sibling of its folder, which then takes the folder's name."""
    from transformers.utils import logging

    from wrpo_ray.zoo import recipes

    logging.disable_progress_bar()
    final = Path(folder) / PLACES[name]
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    measures = recipes.train(name, partial, Path(folder) / PLACES["base"], seed, recipe)
    partial.rename(final)
    return measures


def _finish(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Remove the base model and write zoo.json, which marks the zoo as complete."""
    shutil.rmtree(folder / PLACES["base"], ignore_errors=True)
    names = [name for name in PLACES if name != "base"]
    record = {
        "complete": True,
        **identity,
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("torch", "transformers", "tokenizers")
        },
        "models": {name: read_record(folder / PLACES[name] / "training.json") for name in names},
    }
    write_record(folder / "zoo.json", record)
    return record


def check_same(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder whose zoo, complete or not, has another seed or recipe."""
    record = read_record(folder / "zoo.json")
    for key, value in identity.items():
        if record and record.get(key) != value:
            raise UserError(
                f"{folder}: holds a zoo of {key} {record.get(key)}, not {value}; "
                "choose another folder or delete this one"
            )


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process ends, however it ends."""
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def read_record(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty without the file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    _replace(path, json.dumps(record, indent=2) + "\n")


def _write_questions(path: Path, questions: list[Question]) -> None:
    """Rows of prompt, reference, skill."""
    lines = [
        json.dumps({"prompt": q.prompt, "reference": q.answer, "skill": q.skill}) for q in questions
    ]
    _replace(path, "\n".join(lines) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
