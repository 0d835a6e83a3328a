"""Numbers of rows in the user's files, for plans: exact for Parquet, else as far as is cheap."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow.dataset as ds

from wrpo_ray.config import Config, PromptsConfig, RecordedAnswers
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.job import AnyInput
from wrpo_ray.stages.ingest.readers import exist, input_files
from wrpo_ray.storage.folder import Folder

BLOCK, HEAD = 1 << 24, 1 << 20
"""Bytes of a JSONL file that are read at once; and those of a large one that its length is
estimated from."""


@dataclass(frozen=True)
class InputRows:
    """Counts the rows of a config's inputs; each path once."""

    config: Config
    known: dict[str, int] = field(default_factory=dict)
    """Rows by path."""

    def of(self, given: AnyInput, what: str) -> int:
        """Rows that an input gives, at most; `what` names it in errors.

        Raises:
            UserError: there is no such file, and no number is given for plans.
        """
        if given.path not in self.known:
            self.known[given.path] = self._count(given.path, what)
        rows = self.known[given.path]
        if isinstance(given, RecordedAnswers) and given.columns.source:
            readers = (a.path for a in self.config.recorded_sections.values() if a.columns.source)
            return math.ceil(rows / list(readers).count(given.path))  # each takes a model's rows
        limit = given.limit if isinstance(given, PromptsConfig) else None
        return min(rows, limit or rows)

    def _count(self, path: str, what: str) -> int:
        if not exist(path):
            if self.config.plan.prompts is None:
                raise UserError(f"{what}: no such file: {path}; or give its rows as plan.prompts")
            return self.config.plan.prompts
        with ThreadPoolExecutor(16) as threads:
            return sum(threads.map(count_rows, input_files(path, what)))


def count_rows(uri: str) -> int:
    """Rows of a Parquet file by its footer, lines of a JSONL file by its newlines.

    Of a large file in a store, by its size and the length of its first lines.
    """
    file = Folder(uri)
    if str(file).endswith(".parquet"):
        return int(ds.dataset(file.path, filesystem=file.filesystem, format="parquet").count_rows())
    if file.is_remote and file.size > BLOCK:
        with file.filesystem.open_input_file(file.path) as stream:
            first = stream.read(HEAD)
        return round(file.size * max(1, int(first.count(b"\n"))) / len(first))
    lines, last = 0, b"\n"
    with file.filesystem.open_input_stream(file.path) as stream:
        while block := stream.read(BLOCK):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")
