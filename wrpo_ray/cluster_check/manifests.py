"""Manifests as objects, and what can be wrong with them in words."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wrpo_ray.errors import UserError
from wrpo_ray.text_files import decode, read_text

Body = dict[str, Any]
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where it is there: KubeRay's schemas have 60,000 lines, 15 s for the other."""
LAUNCHER = "launcher"
"""The kind given to a file of Ray's cluster launcher, which has none."""


@dataclass(frozen=True)
class Manifest:
    """One object of a file."""

    file: str
    body: Body

    @property
    def kind(self) -> str:
        """Such as `RayJob`; empty where it is missing."""
        is_launcher = "available_node_types" in self.body
        return LAUNCHER if is_launcher else str(self.body.get("kind") or "")

    @property
    def api_version(self) -> str:
        """Such as `ray.io/v1`."""
        return str(self.body.get("apiVersion") or "")

    @property
    def metadata(self) -> Body:
        """Name, labels, annotations."""
        found = self.body.get("metadata")
        return found if isinstance(found, dict) else {}

    @property
    def name(self) -> str:
        """Its name; that of a launcher file is the cluster's."""
        return str(self.metadata.get("name") or self.body.get("cluster_name") or "")

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}/{self.name}"


@dataclass(frozen=True)
class Problem:
    """What is wrong, where, and by which rule."""

    where: Manifest | str
    """The object, or a file that holds none."""
    field: str
    """Path in the object, groups by their names: `spec.workerGroupSpecs[train].replicas`."""
    rule: str
    """Name of the rule, such as `name-length`."""
    text: str
    """What is wrong, and the remedy."""

    def __str__(self) -> str:
        place = f"{self.where}: {self.field}" if self.field else str(self.where)
        return f"{place}: {self.text} [{self.rule}]"


def read(paths: Sequence[str]) -> tuple[list[Manifest], list[Problem]]:
    """The objects of YAML files, of folders (kustomize's are rendered), or of stdin (`-`).

    Raises:
        UserError: a path is not there, or a folder cannot be rendered.
    """
    manifests: list[Manifest] = []
    problems: list[Problem] = []
    for path in paths:
        for file, text in _texts(path):
            try:
                documents = [d for d in yaml.load_all(text, LOADER) if d is not None]
            except yaml.YAMLError as error:
                problems.append(Problem(file, "", "yaml", " ".join(str(error).split())))
                continue
            for document in documents:
                if isinstance(document, dict):
                    manifests += [Manifest(file, body) for body in _items(document)]
                else:
                    text = f"holds a {type(document).__name__}; an object is a mapping of keys"
                    problems.append(Problem(file, "", "yaml", text))
    return manifests, problems


def _items(document: Body) -> list[Body]:
    """What `kubectl get -o yaml` wraps into a List, or the document itself."""
    items = document.get("items") if document.get("kind") == "List" else None
    return [i for i in items if isinstance(i, dict)] if isinstance(items, list) else [document]


def _texts(path: str) -> Iterator[tuple[str, str]]:
    if path == "-":
        yield "stdin", decode(sys.stdin.buffer.read(), "stdin")
        return
    place = Path(path)
    if (place / "kustomization.yaml").exists():
        yield path, _kustomize(place)
        return
    files = sorted(place.glob("*.yaml")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"{path}: no .yaml file is in this folder")
    for file in files:
        yield str(file), read_text(file, "manifest")


def _kustomize(folder: Path) -> str:
    if not shutil.which("kubectl"):
        raise UserError(
            f"{folder}: a kustomization is rendered by kubectl, which is not here; give the "
            f"output of `kubectl kustomize {folder}` instead (as a file, or - for stdin)"
        )
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{folder}: kubectl kustomize: {' '.join(done.stderr.split())}")
    return done.stdout
