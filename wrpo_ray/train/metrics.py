"""Metrics of each optimizer step: summed over rows and workers, kept as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wrpo_ray.core.storage import Folder
from wrpo_ray.train.task import METRICS

Record = dict[str, Any]


class Sums:
    """Sums over the rows of a step, first on this worker, then over all of them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: int) -> None:
        """Add per-row values, each (B,); with weight 0 (a dummy) only their names."""
        for name, value in values.items():
            total = value.detach().double().sum() if weight else torch.zeros((), dtype=torch.double)
            self._sums[name] = self._sums.get(name, 0.0) + total.to(value.device)

    def reduce(self) -> dict[str, float]:
        """The sums over all workers; each calls it with the same names."""
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names])  # (metrics,)
        torch.distributed.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))


class MetricsFile:
    """`metrics.jsonl` of a step's folder, written by one worker.

    A local file grows line by line. In an object store it is written again now and then and
    at each `flush`. Lines of steps that a resumed run does again are dropped.
    """

    def __init__(self, folder: Folder, first_step: int, every: float = 15.0):
        self.folder, self.every = folder, every
        self.records = [r for r in read_metrics(folder) if r["step"] < first_step]
        self._write()

    def append(self, record: Record) -> None:
        """One more step."""
        self.records.append(record)
        if not self.folder.is_remote:
            with (Path(self.folder.path) / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        elif time.monotonic() - self._written > self.every:
            self._write()

    def flush(self) -> None:
        """Make everything so far visible."""
        if self.folder.is_remote:
            self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        self.folder.write(METRICS, text.encode())
        self._written = time.monotonic()


def read_metrics(folder: Folder) -> list[Record]:
    """The records of a step's folder; a line that a kill cut off is passed over."""
    if not folder.exists(METRICS):
        return []
    return [r for line in folder.read(METRICS).splitlines() if (r := _parse(line)) is not None]


def _parse(line: bytes) -> Record | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
