"""Formats of exported preference rows, as functions of Arrow batches.

- `published`: {prompt_id, prompt, chosen: [y_ws, y_wt], rejected: [y_l]}, the format of the data
  sets that the method's authors released (`data.published`).
- `trl`: {prompt, chosen, rejected}, each a list of messages: TRL's conversational preference form
  with an explicit prompt. The pair is (y_wt, y_l), (y_ws, y_l), or one row of each.
- `records`: every column (`data.records.PREFERENCE`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from wrpo_ray.data.published import PUBLISHED
from wrpo_ray.data.records import ANSWER, MESSAGES, PREFERENCE

Name = Literal["published", "trl", "records"]
Pairs = Literal["target", "source", "both"]
CHOSEN: dict[Pairs, tuple[str, ...]] = {
    "target": ("target_chosen",),
    "source": ("source_chosen",),
    "both": ("source_chosen", "target_chosen"),
}
TRL = pa.schema([("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES)])


@dataclass(frozen=True)
class Form:
    """A format, and for `trl` which pairs."""

    name: Name = "published"
    pairs: Pairs = "target"

    @property
    def schema(self) -> pa.Schema:
        """Schema of the exported rows."""
        return {"published": PUBLISHED, "trl": TRL, "records": PREFERENCE}[self.name]

    @property
    def answers(self) -> tuple[str, ...]:
        """Columns of the type ANSWER."""
        return tuple(field.name for field in self.schema if field.type == ANSWER)

    @property
    def rows_each(self) -> int:
        """Exported rows for each PREFERENCE record."""
        return len(CHOSEN[self.pairs]) if self.name == "trl" else 1

    def of(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Convert PREFERENCE records to rows of this format."""
        if self.name == "records":
            return batch.cast(PREFERENCE)
        if self.name == "published":
            chosen = assistant_messages(text(batch, "source_chosen"), text(batch, "target_chosen"))
            rejected = assistant_messages(text(batch, "rejected"))
            columns = [batch["prompt_id"], batch["messages"].cast(MESSAGES), chosen, rejected]
            return pa.RecordBatch.from_arrays(columns, schema=PUBLISHED)
        answers = [assistant_messages(text(batch, name)) for name in CHOSEN[self.pairs]]
        again = [batch["messages"].cast(MESSAGES), assistant_messages(text(batch, "rejected"))]
        prompts, rejected = (interleaved([column] * len(answers)) for column in again)
        return pa.RecordBatch.from_arrays([prompts, interleaved(answers), rejected], schema=TRL)


def text(batch: pa.RecordBatch, answer: str) -> pa.Array:
    """The texts of the column of an answer."""
    return batch[answer].field("text")


def assistant_messages(*texts: pa.Array) -> pa.ListArray:
    """For each row a list of assistant messages, one from each column of texts."""
    contents = interleaved(list(texts))
    roles = pa.repeat(pa.scalar("assistant"), len(contents))
    messages = pa.StructArray.from_arrays([roles, contents], fields=list(MESSAGES.value_type))
    starts = np.arange(0, len(contents) + 1, len(texts), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), messages, type=MESSAGES)


def interleaved(columns: list[pa.Array]) -> pa.Array:
    """Interleave columns: the first value of each, then the second of each, and so on."""
    if len(columns) == 1:
        return columns[0]
    order = np.arange(len(columns) * len(columns[0])).reshape(len(columns), -1).T.ravel()
    return pa.concat_arrays(columns).take(pa.array(order))
