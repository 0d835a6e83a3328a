"""Validates objects with KubeRay's CustomResourceDefinitions; unknown fields are problems.

Kubernetes fills in defaults before it validates, and drops unknown fields with a warning at most.
Here required fields have to be present, and unknown ones are rejected. Not covered: rules in CEL
(`x-kubernetes-validations`; `operator_rules` has the relevant ones), and number formats.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wrpo_ray.errors import UserError
from wrpo_ray.kubernetes.manifests import Manifest, Problem
from wrpo_ray.kubernetes.ray_objects import LONGEST_SHOWN, path_text, shown
from wrpo_ray.text.documents import read_documents
from wrpo_ray.text.files import read_text

Schema = dict[str, Any]


class Schemas:
    """The schemas of a folder of CRDs, by kind and version."""

    def __init__(self, folder: str):
        texts = [read_text(file, "--crds") for file in sorted(Path(folder).glob("*.yaml"))]
        crds = [d for text in texts for d in read_documents(text) if _is_crd(d)]
        if not crds:
            raise UserError(f"--crds {folder}: no CustomResourceDefinition is in this folder")
        self._schemas = {
            (crd["spec"]["names"]["kind"], f"{crd['spec']['group']}/{version['name']}"): _closed(
                version["schema"]["openAPIV3Schema"]
            )
            for crd in crds
            for version in crd["spec"]["versions"]
        }

    def problems(self, manifest: Manifest) -> Iterator[Problem]:
        """Yield the violations of an object's schema; none for kinds without one."""
        from jsonschema import Draft7Validator

        schema = self._schemas.get((manifest.kind, manifest.api_version))
        if schema is None:
            return
        for error in Draft7Validator(schema).iter_errors(manifest.body):
            yield from _explained(manifest, error)


def _is_crd(document: Any) -> bool:
    return isinstance(document, dict) and document.get("kind") == "CustomResourceDefinition"


def _closed(schema: Schema) -> Schema:
    """Return the schema with unknown properties forbidden wherever properties are listed."""
    closed = dict(schema)
    if "properties" in schema:
        closed["properties"] = {name: _closed(part) for name, part in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            closed[key] = _closed(schema[key])
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def _explained(manifest: Manifest, error: Any) -> Iterator[Problem]:
    """Explain a validator's error; one problem for each unknown or missing field."""
    path = list(error.absolute_path)
    if error.validator == "additionalProperties":
        for name in sorted(set(error.instance) - set(error.schema["properties"])):
            yield Problem(
                manifest,
                path_text([*path, name]),
                "unknown-field",
                f"unknown field{_nearest(name, error.schema['properties'])}",
            )
    elif error.validator == "required":
        for name in sorted(set(error.validator_value) - set(error.instance)):
            text = "missing; it is required"
            yield Problem(manifest, path_text([*path, name]), "missing", text)
    elif error.validator in ("type", "anyOf"):
        wanted = error.validator_value
        kinds = [wanted] if isinstance(wanted, str) else [w["type"] for w in wanted]
        text = f"has to be of type {' or '.join(kinds)} (got {shown(error.instance)})"
        yield Problem(manifest, path_text(path), "wrong-type", text)
    else:
        text = f"{shown(error.instance)} is no value of it: {error.message[-LONGEST_SHOWN:]}"
        text = error.message if len(error.message) <= 2 * LONGEST_SHOWN else text
        yield Problem(manifest, path_text(path), "wrong-value", text)


def _nearest(name: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(sorted(known))}"
