"""Steps that read the user's files: their keys hold the content of the files, not their paths."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from wrpo_ray.config import Config, ImportConfig, PromptsConfig
from wrpo_ray.errors import UserError
from wrpo_ray.stages.ingest.cells import READING, beginnings_are, hold_more_than_text
from wrpo_ray.stages.ingest.readers import input_files
from wrpo_ray.stages.ingest.stage import OPTIONAL, REFERENCES
from wrpo_ray.stages.pair.overlap import are_unspaced
from wrpo_ray.storage.fingerprints import data_fingerprint
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

Input = PromptsConfig | ImportConfig


@dataclass(frozen=True)
class Inputs:
    """The input files of a config."""

    config: Config
    for_plan: bool
    """Whether files may be missing; a path then stands for their content."""

    def step(self, name: str, given: Input, inputs: tuple[Step, ...] = (), **config: Any) -> Step:
        """The step that reads an input; its key depends on the content of the files.

        Raises:
            UserError: a file cannot be read.
        """
        section = self._section(given)
        with _naming_section(section, given):
            files = [] if self._is_unknown(given) else input_files(given.path, section)
            content = data_fingerprint(files) if files else given.path
            has_more = hold_more_than_text(files, given.columns.of_text, content)
        read = given.identity() | {"path": content, "buckets": self.config.storage.buckets}
        read |= {"cells": READING} if has_more else {}
        reward = self.config.reward
        if reward and reward.by_group and name != "import":  # rewards of some groups need none
            read |= {REFERENCES: OPTIONAL}
        return Step(name, read | config, inputs)

    def is_unspaced(self, given: Input, step: Step) -> bool:
        """Whether prompts have text in a script without spaces between words.

        Raises:
            UserError: a file cannot be read.
        """
        section = self._section(given)
        with _naming_section(section, given):
            if self._is_unknown(given):
                return False
            files = input_files(given.path, section)
            content = step.config["path"]
            return beginnings_are(are_unspaced, files, given.columns.prompt, content)

    def _is_unknown(self, given: Input) -> bool:
        return self.for_plan and not Folder(given.path).exists()

    def _section(self, given: Input) -> str:
        """The section of the config that names the files."""
        own = {"prompts": self.config.prompts, "import": self.config.existing}
        return next((name for name, part in own.items() if part is given), "evaluate.prompts")


@contextmanager
def _naming_section(name: str, given: Input) -> Iterator[None]:
    """Report a file that cannot be read with the section that names it."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{name}: {Folder(given.path)} cannot be read: {error}") from None
