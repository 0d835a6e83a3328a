"""Numbers of rows and of prompts in the user's files, for plans: as far as is cheap."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from wrpo_ray.config import Config, ImportConfig, PromptsConfig, RecordedAnswers
from wrpo_ray.errors import UserError
from wrpo_ray.planning.input_texts import (
    Matches,
    answers_per_row,
    matches,
    prompt_keys,
    share_of_prompts,
)
from wrpo_ray.runtime.job import AnyInput
from wrpo_ray.stages.ingest.readers import exist, input_files
from wrpo_ray.storage.folder import Folder

BLOCK, HEAD = 1 << 24, 1 << 20
"""Bytes of a JSONL file that are read at once; and those of a large one that its length is
estimated from."""
DISTINCT = 1 << 26
"""Bytes of Parquet files up to which their prompts are compared, as equal ones are one."""


@dataclass(frozen=True)
class InputRows:
    """Counts the rows of a config's inputs; each path once."""

    config: Config
    known: dict[str, int] = field(default_factory=dict)
    """Rows by path."""
    matched: dict[str, Matches | None] = field(default_factory=dict)
    """By path and source, how recorded answers match; null if it is not known."""
    keys: dict[bool, frozenset[str] | None] = field(default_factory=dict)
    """The ids or keys of the prompts; null if they are too many to look at."""

    def of(self, given: PromptsConfig | ImportConfig, what: str) -> int:
        """Rows that an input gives, at most; `what` names it in errors.

        Raises:
            UserError: there is no such file, and no number is given for plans.
        """
        match given:
            case PromptsConfig():
                return self._prompts(given, what)
            case ImportConfig():
                return self._rows(given.path, what)

    def recorded(self, given: RecordedAnswers, source: str, what: str) -> tuple[int, float]:
        """Recorded answers of a source to prompts of the run, and these prompts; both at most.

        Raises:
            UserError: as for `of`.
        """
        rows, found = self._recorded(given, what), self._matches(given, source)
        if found is None:
            asked = rows * self._share_asked(what)
            found = Matches(asked / rows, asked / rows) if rows else Matches(0, 0)
        return math.ceil(rows * answers_per_row(given) * found.rows), rows * found.prompts

    def prompts(self, inputs: Sequence[AnyInput], what: str) -> int:
        """Prompts of several inputs; of recorded answers as their first rows are alike.

        Raises:
            UserError: as for `of`.
        """
        recorded = [given for given in inputs if isinstance(given, RecordedAnswers)]
        if not recorded:
            files = (one for one in inputs if not isinstance(one, RecordedAnswers))
            return sum(self.of(given, what) for given in files)
        rows = sum(self._rows(path, what) for path in {given.path for given in recorded})
        most = sum(self._recorded(given, what) for given in recorded)
        return math.ceil(min(most, rows * share_of_prompts(recorded)))

    def held_out(self, given: PromptsConfig, what: str) -> int:
        """Prompts to evaluate on, at most: those that are trained on are left out."""
        same = (given.path, given.columns.prompt)
        trained = [p for p in self.config.prompt_files if (p.path, p.columns.prompt) == same]
        return max(0, self.of(given, what) - sum(self.of(one, what) for one in trained))

    def _recorded(self, given: RecordedAnswers, what: str) -> float:
        """Rows of recorded answers that a source takes."""
        rows = self._rows(given.path, what)
        if not given.columns.source:
            return rows
        readers = (a.path for a in self.config.recorded_sections.values() if a.columns.source)
        return rows / list(readers).count(given.path)  # each takes a model's rows

    def _matches(self, given: RecordedAnswers, source: str) -> Matches | None:
        """How the answers match the prompts; None where that is not known."""
        files, is_by_id = self.config.prompt_files, given.columns.id is not None
        if not files:
            return None
        if is_by_id not in self.keys:
            self.keys[is_by_id] = prompt_keys(files, is_by_id=is_by_id)
        known, place = self.keys[is_by_id], f"{given.path} of {source}"
        if place not in self.matched:
            self.matched[place] = None if known is None else matches(given, source, known)
        return self.matched[place]

    def _share_asked(self, what: str) -> float:
        """Share of the prompts in the files that `limit` leaves."""
        files = self.config.prompt_files
        every = (one.model_copy(update={"limit": None}) for one in files)
        there = sum(self._prompts(one, what) for one in every)
        return sum(self._prompts(one, what) for one in files) / there if there else 1.0

    def _prompts(self, given: PromptsConfig, what: str) -> int:
        """Different prompts among the first `limit` rows; all rows where they are not compared."""
        key = f"{given.path} {given.columns.prompt} {given.limit}"
        if key not in self.known:
            rows = self._rows(given.path, what)
            rows = min(rows, given.limit or rows)
            self.known[key] = distinct_prompts(given, rows) if exist(given.path) else rows
        return self.known[key]

    def _rows(self, path: str, what: str) -> int:
        if path not in self.known:
            self.known[path] = self._count(path, what)
        return self.known[path]

    def _count(self, path: str, what: str) -> int:
        if not exist(path):
            if self.config.plan.prompts is None:
                raise UserError(f"{what}: no such file: {path}; or give its rows as plan.prompts")
            return self.config.plan.prompts
        try:
            with ThreadPoolExecutor(16) as threads:
                return sum(threads.map(count_rows, input_files(path, what)))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{what}: {Folder(path)} cannot be read: {error}") from None


def distinct_prompts(given: PromptsConfig, rows: int) -> int:
    """Different prompts in the first rows of Parquet files; `rows` where that is not cheap.

    Only prompts that are texts are compared, in local files of `DISTINCT` bytes together.
    """
    if Folder(given.path).is_remote:
        return rows
    files = [Folder(uri) for uri in input_files(given.path, given.path)]
    is_cheap = all(str(file).endswith(".parquet") for file in files)
    if not is_cheap or sum(file.size for file in files) > DISTINCT:
        return rows
    data = ds.dataset([file.path for file in files], format="parquet")
    try:
        prompts = data.head(rows, columns=[given.columns.prompt])
        return int(pc.count_distinct(prompts[given.columns.prompt]).as_py())
    except (pa.ArrowException, KeyError):  # conversations, or a column that a run will ask for
        return rows


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
