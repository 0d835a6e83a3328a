"""Jobs that read the user's files: their keys hold the content of the files, not their paths."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from wrpo_ray.config import Config, PromptsConfig, RecordedAnswers
from wrpo_ray.data.samples import Prompts
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.job import AnyInput
from wrpo_ray.stages.ingest.cells import READING, beginnings_are, hold_more_than_text
from wrpo_ray.stages.ingest.readers import exist, input_files
from wrpo_ray.stages.ingest.recorded import IngestJoinedPrompts, IngestRecorded
from wrpo_ray.stages.ingest.stage import OPTIONAL, REFERENCES, IngestPrompts
from wrpo_ray.stages.pair.overlap import are_unspaced
from wrpo_ray.storage.fingerprints import data_fingerprint
from wrpo_ray.storage.folder import HUB_SCHEME, Folder
from wrpo_ray.storage.steps import Step


@dataclass(frozen=True)
class Inputs:
    """The input files of a config."""

    config: Config
    for_plan: bool
    """Whether files may be missing; a path then stands for their content."""
    known: dict[str, str] = field(default_factory=dict)
    """Fingerprints by path: several sources can have their answers in one file."""
    listed: dict[str, list[str]] = field(default_factory=dict)
    """Files by path: each is listed once."""

    def step(
        self, name: str, given: AnyInput, inputs: tuple[Step, ...] = (), **config: Any
    ) -> Step:
        """The step that reads an input; its key depends on the content of the files.

        Raises:
            UserError: a file cannot be read.
        """
        section = self._section(given)
        with _naming_section(section, given):
            files = self._files(given, section)
            content = self._content(given, files)
            # nothing was made of a data set on the hub before there was this version
            is_on_hub = given.path.startswith(HUB_SCHEME)
            texts = given.columns.of_text
            has_more = is_on_hub or hold_more_than_text(files, texts, content)
        read = given.identity() | {"path": content, "buckets": self.config.storage.buckets}
        read |= {"cells": READING} if has_more else {}
        if name != "import":
            read |= self._references
        return Step(name, read | config, inputs)

    @property
    def _references(self) -> dict[str, str]:
        """That prompts may lack a reference, for keys; rewards of some groups need none."""
        reward = self.config.reward
        return {REFERENCES: OPTIONAL} if reward and reward.by_group else {}

    def prompts(self, splits: dict[str, float]) -> IngestPrompts | IngestJoinedPrompts:
        """The job that reads the prompts to train on: from their files, else with the answers.

        Raises:
            UserError: a file cannot be read.
        """
        seed, given = self.config.seed, self.config.prompts or self.config.existing
        if given and not isinstance(given, tuple):
            step = self.step("prompts", given, splits=splits, seed=seed)
            return IngestPrompts(step, given, splits, seed)
        answers = tuple(self.config.recorded.values())
        files: tuple[PromptsConfig | RecordedAnswers, ...] = self.config.prompt_files or answers
        found = {json.dumps(self._prompts_of(one)): one for one in files}
        read = {"files": sorted(found), "buckets": self.config.storage.buckets, "cells": READING}
        read |= self._references
        step = Step("prompts", read | {"splits": splits, "seed": seed})
        parts = (IngestPrompts(step, one, splits, seed) for one in found.values())
        return IngestJoinedPrompts(tuple(parts))

    def _prompts_of(self, given: PromptsConfig | RecordedAnswers) -> list[str | int | None]:
        """Everything that decides the prompts in one of several files."""
        columns = given.columns
        more = [given.group, given.limit] if isinstance(given, PromptsConfig) else []
        return [self.fingerprint(given), columns.prompt, columns.reference, columns.group, *more]

    def recorded_sources(self, prompts: Prompts) -> dict[str, IngestRecorded]:
        """{name: job} that read the recorded answers of sources.

        Raises:
            UserError: a file cannot be read.
        """
        given = self.config.recorded.items()
        return {name: self._recorded(name, answers, prompts) for name, answers in given}

    def recorded_target(self, prompts: Prompts) -> list[IngestRecorded]:
        """The job that reads the recorded answers of the target; none if it is sampled.

        Raises:
            UserError: a file cannot be read.
        """
        target = self.config.target
        if target is None or target.answers is None:
            return []
        return [self._recorded(target.name, target.answers, prompts, is_own=True)]

    def _recorded(
        self, name: str, given: RecordedAnswers, prompts: Prompts, *, is_own: bool = False
    ) -> IngestRecorded:
        """The job that reads recorded answers; its store does not depend on the run's prompts."""
        by_id = self.config.prompt_files if given.columns.id else ()
        store = given.identity() | {"path": self.fingerprint(given), "source": name}
        store |= {"buckets": self.config.storage.buckets, "cells": READING}
        if by_id:
            ids = [[self.fingerprint(p), p.columns.prompt, p.columns.id] for p in by_id]
            store["ids"] = ids if isinstance(self.config.prompts, tuple) else ids[0]
        asked = {"splits": list(prompts.splits)}
        step = Step(f"recorded-{name}", asked, prompts.inputs, store, source=name)
        return IngestRecorded(step, name, given, prompts, by_id, is_own)

    def fingerprint(self, given: AnyInput) -> str:
        """A hash of the content of the files.

        Raises:
            UserError: a file cannot be read.
        """
        if given.path in self.known:
            return self.known[given.path]
        section = self._section(given)
        with _naming_section(section, given):
            return self._content(given, self._files(given, section))

    def _files(self, given: AnyInput, section: str) -> list[str]:
        """The files of an input; none in a plan without them."""
        if given.path not in self.listed:
            is_unknown = self._is_unknown(given)
            self.listed[given.path] = [] if is_unknown else input_files(given.path, section)
        return self.listed[given.path]

    def _content(self, given: AnyInput, files: list[str]) -> str:
        if given.path not in self.known:
            self.known[given.path] = data_fingerprint(files) if files else given.path
        return self.known[given.path]

    def are_prompts_unspaced(self) -> bool:
        """`is_unspaced` of the prompts to train on."""
        existing = (self.config.existing,) if self.config.existing else ()
        given = self.config.prompt_files or existing or self.config.recorded.values()
        return any(map(self.is_unspaced, given))

    def is_unspaced(self, given: AnyInput) -> bool:
        """Whether prompts have text in a script without spaces between words.

        Raises:
            UserError: a file cannot be read.
        """
        section = self._section(given)
        with _naming_section(section, given):
            if not self._files(given, section):
                return False
            if given.path.startswith(HUB_SCHEME):
                return True  # it is asked for results that were made in another way before
            files = self._files(given, section)
            content = self._content(given, files)
            return beginnings_are(are_unspaced, files, given.columns.prompt, content)

    def _is_unknown(self, given: AnyInput) -> bool:
        return self.for_plan and not exist(given.path)

    def _section(self, given: AnyInput) -> str:
        """The section of the config that names the files."""
        own: dict[str, Any] = {"import": self.config.existing}
        own |= self.config.prompt_sections | self.config.recorded_sections
        return next((name for name, part in own.items() if part is given), "evaluate.prompts")


@contextmanager
def _naming_section(name: str, given: AnyInput) -> Iterator[None]:
    """Report a file that cannot be read with the section that names it."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{name}: {Folder(given.path)} cannot be read: {error}") from None
