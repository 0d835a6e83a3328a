"""The buckets that a worker of a pool fills, with what it knows of their stores."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from wrpo_ray.data.buckets import Bucket
from wrpo_ray.data.failures import EarlierFailures, retrying_failures
from wrpo_ray.data.finished import Filling
from wrpo_ray.data.shards import share_layouts
from wrpo_ray.runtime.context import Run
from wrpo_ray.storage.steps import Step


class Workplace:
    """The buckets that one worker fills, for steps of which each row {job, bucket} names one.

    The driver, or else the worker, looks once which buckets each store has. What it fills for the
    first time, in a store that no other step fills at the same time, need not be listed: what was
    there at that look was written by earlier runs, and nothing came after it.
    """

    def __init__(self, run: Run, steps: Sequence[Step], parts: Mapping[int, int]):
        """`parts` has, by number of a step, that of the one that fills a part of its buckets."""
        self.run, self.steps, self.parts = run, steps, parts
        self._id = uuid.uuid4().hex
        share_layouts(self._id, run.layouts)
        self._seen: set[tuple[int, int]] = set()

    def bucket(self, row: dict[str, Any]) -> Bucket:
        """The row's bucket, to read what other steps wrote into it."""
        return self.run.bucket(row["bucket"], self._id)

    @contextmanager
    def filling(
        self, row: dict[str, Any], schema: pa.Schema
    ) -> Iterator[tuple[Filling, EarlierFailures]]:
        """The row's bucket, to fill it, with its failed rows of earlier runs, which are retried.

        What failed a moment ago where a part of the bucket was filled is not tried again.
        """
        step, place = self.steps[row["job"]], (row["job"], row["bucket"])
        is_alone = [other.folder for other in self.steps].count(step.folder) == 1
        is_first = place not in self._seen and not row.get("is_again")
        self._seen.add(place)
        own = replace(self.bucket(row), is_untouched=is_alone and is_first)
        kept, number = step.failures(self.run.root), self.parts.get(row["job"])
        part = None if number is None else self.steps[number].failures(self.run.root)
        with retrying_failures(kept, own, self.run.max_attempts, part) as earlier:
            store = self.run.root / step.folder
            yield Filling(store, step.key, own, schema, is_alone=is_alone), earlier
