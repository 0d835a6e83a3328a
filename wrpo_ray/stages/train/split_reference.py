"""Log-probs under a reference that is split over the training workers, before the first step.

Training starts from the reference. So until the first optimizer step the policy is the reference,
with its weights split over the workers as in training (ZeRO-3, offload), and may be larger than a
GPU. The workers go through all rows in parts of a few micro-batches each. The first worker writes a
part's log-probs as a file beside the prepared rows, `<first row>-<end>.npy`. So a run that was
killed goes on after the last part, with any number of workers, and trainings on the same rows with
the same model in the same precision (other betas) find them there.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed as dist

from wrpo_ray.config import TrainConfig
from wrpo_ray.stages.train import faults, model, packing
from wrpo_ray.stages.train.memory import BESIDE_TRAINING
from wrpo_ray.storage.folder import Folder

if TYPE_CHECKING:
    from wrpo_ray.stages.train.loop import Trainer

PART = 8
"""Micro-batches of each worker in a part, about."""
SUFFIX = ".npy"


def folder_of(rows: Folder, config: TrainConfig) -> Folder:
    """The folder of the parts; `rows` is that of the prepared rows, whose key names the model."""
    return rows / f"reference-{config.precision}"


def rows_done(folder: Folder) -> int:
    """How many rows, from the first on, the files of a folder have log-probs of."""
    return max((end for _, end, _ in _files(folder)), default=0)


def logps_of_all(trainer: Trainer) -> np.ndarray:
    """The reference's log-probs of all rows, (rows, answers) in nats; all workers call it.

    Raises:
        UserError: one is not finite; on all workers.
    """
    config, rows = trainer.task.config, trainer.rows
    folder, is_first = folder_of(trainer.task.rows, config), dist.get_rank() == 0
    logps = np.zeros((len(rows), len(config.answers)))
    done = _from_first_worker(_read(folder, logps) if is_first else 0, logps)
    costs = np.array(packing.costs(rows.lengths, packed=config.packing))
    before = np.concatenate([[0], np.cumsum(costs)])
    while done < len(rows):
        end = _end_of_part(before, done, _tokens(config))
        part = logps[done:end]  # a view
        _fill(part, trainer, done, costs[done:end].tolist())
        faults.check_reference(trainer, done, part)
        if is_first:
            _write(folder, f"{done:012}-{end:012}{SUFFIX}", part)
        done = end
    return logps


def _tokens(config: TrainConfig) -> int:
    """Tokens of a micro-batch."""
    assert config.micro_batch_tokens != "auto"  # `fitted` has chosen
    return BESIDE_TRAINING * config.micro_batch_tokens


def _end_of_part(before: np.ndarray, first: int, budget: int) -> int:
    """The end of the part from row `first` on; `before` (rows + 1,) are the tokens before each."""
    count = PART * int(dist.get_world_size())
    end = int(np.searchsorted(before, before[first] + count * budget, side="right")) - 1
    return min(max(end, first + count), len(before) - 1)


def _fill(part: np.ndarray, trainer: Trainer, first: int, costs: list[int]) -> None:
    """Fill (rows, answers) zeros with the log-probs of the rows from `first` on, on all workers."""
    config, rank = trainer.task.config, dist.get_rank()
    workers = dist.get_world_size()
    for indices, is_real in packing.micro_batches_of(rank, costs, workers, _tokens(config)):
        rows = [trainer.rows[first + i] for i in indices]
        batch = model.collate(rows, config).to(trainer.device)
        found = trainer.logps_without_adapters(batch).double().cpu().numpy()
        if is_real:
            part[list(indices)] = found.reshape(len(rows), -1)
    dist.all_reduce(torch.from_numpy(part))  # each row is one worker's, and 0 on the others


# --- parts on disk -----------------------------------------------------------------------------


def _files(folder: Folder) -> Iterator[tuple[int, int, str]]:
    """First row, end and name of the files whose rows follow one another from the first row on.

    They may overlap, where different numbers of workers wrote them.
    """
    done = 0
    for name in folder.files(suffix=SUFFIX):
        first, end = map(int, name.removesuffix(SUFFIX).split("-"))
        if first <= done < end:
            yield first, end, name
            done = end


def _read(folder: Folder, logps: np.ndarray) -> int:
    """Fill in what the files have; returns the number of rows. A damaged file is made again."""
    done = 0
    for first, end, name in _files(folder):
        try:
            part = np.load(io.BytesIO(folder.read(name)), allow_pickle=False)
            logps[done:end] = part.reshape(end - first, -1)[done - first :]
        except (ValueError, EOFError):
            folder.delete(name)
            break
        done = end
    return done


def _from_first_worker(done: int, logps: np.ndarray) -> int:
    """Copy the first worker's first `done` rows to all workers; returns their number."""
    number = torch.tensor([done])
    dist.broadcast(number, 0)
    done = int(number.item())
    if done:
        dist.broadcast(torch.from_numpy(logps[:done]), 0)
    return done


def _write(folder: Folder, name: str, part: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, part)
    folder.write(name, file.getvalue())
