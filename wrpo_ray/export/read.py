"""Rows of a run's output in Python: an Arrow table, a reader of batches, or a Hugging Face dataset.

Rows are found by the outline in the output (`chain.json`): neither the config nor the models are
needed, and no Ray. They are those of this run alone: a folder of answers can also hold other
prompts, more samples, or an answer twice, written again after a crash.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from wrpo_ray.data import outline as outlines
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, buckets, read_bucket
from wrpo_ray.data.outline import Outline, StepOutline
from wrpo_ray.data.samples import ANSWER_KEY, Groups, unique_rows
from wrpo_ray.data.shards import list_shards
from wrpo_ray.errors import UserError
from wrpo_ray.storage.folder import Folder

if TYPE_CHECKING:
    from datasets import Dataset

What = Literal["prompts", "answers", "scored", "selection", "preferences", "verdicts", "failures"]
As = Literal["arrow", "reader", "dataset"]
TRAINING = ("sft", "preference")
"""Splits of the prompts that are trained on."""
SCHEMAS: dict[What, pa.Schema] = {
    "prompts": records.PROMPT,
    "answers": records.RESPONSE,
    "scored": records.SCORED,
    "selection": records.SELECTION,
    "preferences": records.PREFERENCE,
    "verdicts": records.JUDGMENT,
    "failures": records.FAILURE,
}
KINDS: dict[What, tuple[str, ...]] = {
    "prompts": ("ingestprompts",),
    "answers": ("generate",),
    "scored": ("score", "ingestresponses"),
    "selection": ("select",),
    "preferences": ("pair", "ingestpreferences"),
    "verdicts": ("verdicts",),
}
"""Kinds of steps that make the rows; every kind can have failures."""


def read(
    output: str | Path,
    what: What = "preferences",
    *,
    columns: Sequence[str] | None = None,
    split: str | None = None,
    step: str | None = None,
    as_: As = "arrow",
) -> pa.Table | pa.RecordBatchReader | Dataset:
    """Return rows of a run's output, local or in an object store.

        pairs = wrpo_ray.read("runs/demo", columns=["prompt_id", "source_margin"]).to_pandas()

    Args:
        output: The folder that the config calls `output`.
        what: `prompts`; `answers` (as generated); `scored` (answers with their reward);
            `selection` (y_ws of each prompt); `preferences` (y_ws, y_wt, y_l); `verdicts` (of
            judges, by game or turn); `failures` (failed rows). `wrpo_ray.data.records` has their
            columns.
        columns: The columns to load; None loads all of them.
        split: Of prompts, answers and selections only those of this split of the prompts: `sft`,
            `preference` or `eval`; None is `sft` and `preference`, or all of a named `step`.
        step: Only the rows of this stage or step, such as `sample` or `score-reward-qwen`. A
            verifier's outcomes are read only by their step, such as `score-verifier-qwen`.
        as_: `arrow` is a `pyarrow.Table`. `reader` is a `pyarrow.RecordBatchReader`, which loads
            one bucket of the prompts at a time. `dataset` is a `datasets.Dataset` in memory.

    Raises:
        UserError: no run is there, it has no such rows or columns, or a step is not done.

    Example:
        >>> pairs = read("out/demo", columns=["prompt_id", "source_margin"])  # doctest: +SKIP
        >>> pairs.num_rows  # doctest: +SKIP
        1834
    """
    root = Folder(str(output)).absolute()
    reading = _Reading(
        root, outlines.read_outline(root), what, _columns(what, columns), split, step
    )
    steps = reading.steps()
    if as_ not in get_args(As):
        raise UserError(f"read: as_={as_!r}: give one of {', '.join(get_args(As))}")
    reader = pa.RecordBatchReader.from_batches(reading.schema, reading.batches(steps))
    if as_ == "reader":
        return reader
    return reader.read_all() if as_ == "arrow" else _dataset(reader.read_all())


def _columns(what: What, columns: Sequence[str] | None) -> list[str]:
    if what not in SCHEMAS:
        raise UserError(f"read: there are no rows {what!r}; give one of {', '.join(SCHEMAS)}")
    known = SCHEMAS[what].names
    if unknown := [name for name in columns or () if name not in known]:
        raise UserError(f"read: {what} have no column {unknown[0]!r}; there are {', '.join(known)}")
    return list(known if columns is None else columns)


def _dataset(table: pa.Table) -> Dataset:
    try:
        from datasets import Dataset
    except ImportError:
        raise UserError("read: as_='dataset' needs `datasets`: pip install datasets") from None
    return Dataset(table.replace_schema_metadata())


@dataclass(frozen=True)
class _Reading:
    """Which rows of an output to read."""

    root: Folder
    outline: Outline
    what: What
    columns: list[str]
    split: str | None
    step: str | None
    session: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def schema(self) -> pa.Schema:
        """Of the rows that are returned."""
        whole = SCHEMAS[self.what]
        return pa.schema([whole.field(name) for name in self.columns])

    @property
    def splits(self) -> tuple[str, ...] | None:
        """Splits of the prompts whose rows are wanted; None for all of a named step."""
        if self.split is not None:
            return (self.split,)
        return None if self.step else TRAINING

    def steps(self) -> list[StepOutline]:
        """The steps with these rows, of the stage or step that is named, if one is.

        Raises:
            UserError: there is none, one is not done, or its rows are not divided by split.
        """
        named = [s for s in self.outline.steps if self.step in (None, s.stage, s.name)]
        if self.what == "failures" and named:
            return named
        found = [s for s in named if s.kind in KINDS.get(self.what, ()) and self._has_rows(s)]
        if not found:
            asked = {"split": self.split, "step": self.step}
            of = "".join(f" of {name} {value}" for name, value in asked.items() if value)
            stages = ", ".join(dict.fromkeys(step.stage for step in self.outline.steps))
            raise UserError(f"read: {self.root} has no {self.what}{of}; it has the stages {stages}")
        if self.split and any(step.kind == "ingestresponses" for step in found):
            raise UserError("read: imported answers are not divided by split; leave `split` out")
        for step in found:
            if not step.is_done(self.root):
                raise UserError(
                    f"read: the step {step.name} of {self.root} is not done; "
                    f"run `wrpo {step.stage}`"
                )
        return found

    def _has_rows(self, step: StepOutline) -> bool:
        """Whether a step can have wanted rows; a verifier's verdicts only where it is named."""
        is_of_split = self.splits is None or not step.splits or set(step.splits) & set(self.splits)
        return bool(is_of_split) and (self.step is not None or step.outcome != "verdict")

    def batches(self, steps: list[StepOutline]) -> Iterator[pa.RecordBatch]:
        """The rows, step by step and bucket by bucket."""
        for step in steps:
            for table in self._tables(step):
                yield from table.select(self.columns).cast(self.schema).to_batches()

    def _tables(self, step: StepOutline) -> Iterator[pa.Table]:
        if self.what == "failures":
            folder = step.failures(self.root)
            for shard in list_shards(folder):
                yield folder.read_table(shard.path, self.columns)
            return
        parts = step.stores if step.kind == "ingestresponses" else (step.folder,)
        for folder in (self.root / part for part in parts):
            for bucket in buckets(self.outline.buckets):
                yield self._bucket(step, folder, replace(bucket, session=self.session))

    def _bucket(self, step: StepOutline, folder: Folder, bucket: Bucket) -> pa.Table:
        """A bucket's rows of a step."""
        schema = SCHEMAS[self.what]
        needed = [name for name in (*ANSWER_KEY, "split") if name in schema.names]
        table = read_bucket(folder, bucket, schema, list(dict.fromkeys([*needed, *self.columns])))
        if "split" in needed:
            if self.splits is None:
                return table
            return table.filter(pc.is_in(table["split"], pa.array(self.splits)))
        if not step.splits:
            return table
        inside = pc.is_in(table["prompt_id"], self._prompt_ids(step, bucket)).to_numpy()
        if step.samples is not None:
            inside &= table["sample"].to_numpy() < step.samples
        return table.take(unique_rows(table, inside))

    def _prompt_ids(self, step: StepOutline, bucket: Bucket) -> pa.Array:
        """Ids of the prompts of the wanted splits that a step answers or scores."""
        prompts = next(s for s in self.outline.steps if s.key == step.prompts)
        folder = self.root / prompts.folder
        table = read_bucket(folder, bucket, records.PROMPT, ["prompt_id", "split", "group"])
        if step.groups is not None:
            table = table.filter(Groups(step.groups, step.other_groups).mask(table["group"]))
        splits = step.splits if self.splits is None else set(step.splits) & set(self.splits)
        wanted = pa.array(sorted(splits), pa.string())
        return table.filter(pc.is_in(table["split"], wanted))["prompt_id"].combine_chunks()
