"""Reads manifests, and defines the problems that are found in them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from wrpo_ray.errors import UserError
from wrpo_ray.text.addresses import Address, address_problem, redact
from wrpo_ray.text.documents import describe_yaml_error, read_document, read_documents
from wrpo_ray.text.files import decode, read_text

Body = dict[str, Any]
LONGEST = 600
"""Maximum characters of a problem's text, and of its path."""
ADVICE = frozenset(
    {
        "autoscaler-log", "cpus-per-gpu", "deprecated", "disk", "ends-for-good", "evictions",
        "feature-gate", "gpu-label", "queue-version", "quota-most", "replicas", "slow-head",
        "stop-wait", "storage-class", "surge-room",
    }
)  # fmt: skip
"""Rules whose violation works on some clusters, or costs time or money but no run."""
KLOG = re.compile(r"^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [^\s\]]+\] ")
"""What kubectl's logs have before a message: level, time, process and line of its source."""
KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
"""Names of the file that makes a folder one for `kubectl kustomize`."""
SHOWN = 8
"""Maximum folders named in a message."""
LAUNCHER = "launcher"
"""The kind assigned to a file of Ray's cluster launcher, which has none."""


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
        return mapping(self.body.get("metadata"))

    @property
    def namespace(self) -> str:
        """Its namespace; empty if `kubectl apply -n` decides it."""
        return str(self.metadata.get("namespace") or "")

    def is_beside(self, other: "Manifest") -> bool:
        """Whether both are, or can be, in one namespace."""
        return self.namespace == other.namespace or not (self.namespace and other.namespace)

    @property
    def labels(self) -> Body:
        """Its labels."""
        return mapping(self.metadata.get("labels"))

    @property
    def annotations(self) -> Body:
        """Its annotations."""
        return mapping(self.metadata.get("annotations"))

    @property
    def name(self) -> str:
        """Its name; that of a launcher file is the cluster's."""
        return str(self.metadata.get("name") or self.body.get("cluster_name") or "")

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}/{self.name}"


@dataclass(frozen=True)
class Problem:
    """A violation of a rule, with its place."""

    where: Manifest | str
    """The object, or a file without objects."""
    field: str
    """Path in the object, groups by their names: `spec.workerGroupSpecs[train].replicas`."""
    rule: str
    """Name of the rule, such as `name-length`."""
    text: str
    """The problem, and the remedy."""

    @property
    def is_advice(self) -> bool:
        """Whether the object can be applied as it is."""
        return self.rule in ADVICE

    def __str__(self) -> str:
        place = f"{self.where}: {self.field}" if self.field else str(self.where)
        return f"{_printable(place)}: {_printable(self.text)} [{self.rule}]"


def described(error: Exception) -> str:
    """Return an error of a library that reads values in words for those who wrote them."""
    if isinstance(error, TypeError | AttributeError | LookupError):
        return "a value is of another type than expected; compare it with cluster/"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split()) or type(error).__name__


def mapping(value: Any) -> Body:
    """Return a value that may be a mapping; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def selects(selector: Any, labels: Body) -> bool:
    """Whether a selector selects labels; by `matchLabels` and by `In`, `NotIn` and `Exists`."""
    given = mapping(selector)
    if any(labels.get(name) != value for name, value in mapping(given.get("matchLabels")).items()):
        return False
    for entry in map(mapping, given.get("matchExpressions") or []):
        key, values = str(entry.get("key")), entry.get("values") or []
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }
        if not holds.get(str(entry.get("operator")), False):
            return False
    return True


def document_in(text: Any) -> Any:
    """Return the value of YAML inside a field; None where it is none, which other rules tell."""
    try:
        return read_document(text) if isinstance(text, str) else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _printable(text: str) -> str:
    """Return a text on one line and cut to `LONGEST`; names and values in a file may be longer."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def read(paths: Sequence[str]) -> tuple[list[Manifest], list[Problem]]:
    """Return the objects of YAML files, folders (kustomizations are rendered) or stdin (`-`).

    Raises:
        UserError: a path does not exist, or a folder cannot be rendered.
    """
    manifests: list[Manifest] = []
    problems: list[Problem] = []
    for path in paths:
        before = len(manifests) + len(problems)
        for file, text in _texts(path):
            try:
                documents = [d for d in read_documents(text) if d is not None]
                for document in documents:
                    json.dumps(document, default=str)  # raises if the document has a circle
            except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
                problems.append(Problem(file, "", "yaml", describe_yaml_error(error)))
                continue
            for item in (item for document in documents for item in _items(document)):
                if wrong := _no_object(item):
                    problems.append(Problem(file, "", "yaml", wrong))
                else:
                    manifests.append(Manifest(file, _given(item)))
        if len(manifests) + len(problems) == before:
            text = "has no object, so there is nothing to check"
            problems.append(Problem(path, "", "empty", text))
    return manifests, problems


def _given(value: Any) -> Any:
    """Return a tree without the keys whose value is null: to Kubernetes they are absent."""
    if isinstance(value, dict):
        return {key: _given(part) for key, part in value.items() if part is not None}
    return [_given(part) for part in value] if isinstance(value, list) else value


def _items(document: Any) -> list[Any]:
    """Return the items of a List, which `kubectl get -o yaml` prints, or the document itself."""
    is_list = isinstance(document, dict) and document.get("kind") == "List"
    items = document.get("items") if is_list else None
    return items if isinstance(items, list) else [document]


def _no_object(item: Any) -> str | None:
    """Return why a document is not an object; None if it may be one."""
    if not isinstance(item, dict):
        return f"holds a {type(item).__name__}; an object is a mapping of keys"
    for key, place in _keys(item):
        if not isinstance(key, str):
            under = f" under {place!r}" if place else ""
            return f"the key {key!r}{under} is no text; write it in quotes"
    return None


def _keys(value: Any, place: Any = None) -> Iterator[tuple[Any, Any]]:
    """Yield each key of a tree with the key above it."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key, place
            yield from _keys(part, key)
    elif isinstance(value, list):
        for part in value:
            yield from _keys(part, place)


def _texts(path: str) -> Iterator[tuple[str, str]]:
    if path == "-":
        yield "stdin", decode(sys.stdin.buffer.read(), "stdin")
        return
    if Address.of(path) or address_problem(path):
        raise UserError(f"{redact(path)}: manifests are files on this machine; copy them here")
    place = Path(path)
    if any((place / name).exists() for name in KUSTOMIZATIONS):
        yield path, _kustomize(place)
        return
    for file in _files(place) if place.is_dir() else [place]:
        yield str(file), read_text(file, "manifest")


def _files(folder: Path) -> list[Path]:
    """Return the manifests of a folder.

    Raises:
        UserError: it has none, or kustomizations in subfolders, which would be passed over.
    """
    below = sorted({str(f.parent) for name in KUSTOMIZATIONS for f in folder.rglob(name)})
    if below:
        more = f" and {len(below) - SHOWN} more" if len(below) > SHOWN else ""
        raise UserError(
            f"{folder}: has no kustomization of its own, but its subfolders do; give those to "
            f"check: {', '.join(below[:SHOWN])}{more}"
        )
    files = sorted(file for end in ("yaml", "yml", "json") for file in folder.glob(f"*.{end}"))
    if not files:
        raise UserError(f"{folder}: no .yaml, .yml or .json file is in this folder")
    return files


def _kustomize(folder: Path) -> str:
    if not shutil.which("kubectl"):
        raise UserError(
            f"{folder}: a kustomization is rendered by kubectl, which is not here; give the "
            f"output of `kubectl kustomize {folder}` instead (as a file, or - for stdin)"
        )
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)],  # nosec B607 # the user's own kubectl
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        told = " ".join(KLOG.sub("", line) for line in done.stderr.splitlines())
        raise UserError(f"{folder}: kubectl kustomize: {' '.join(told.split())}")
    return done.stdout
