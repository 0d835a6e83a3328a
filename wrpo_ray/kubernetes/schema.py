"""Validates objects with KubeRay's CustomResourceDefinitions; unknown fields are problems.

Kubernetes fills in defaults before it validates, and drops unknown fields with a warning at most.
Here required fields have to be present, and unknown ones are rejected. Not covered: rules in CEL
(`x-kubernetes-validations`; `operator_rules` has the relevant ones), and number formats.

The schemas of KubeRay 1.7.0 (Apache-2.0, github.com/ray-project/kuberay) come with the package,
without texts. `python -m wrpo_ray.kubernetes.schema FOLDER VERSION TARGET` writes those of a
folder, such as a checkout's `ray-operator/config/crd/bases`, to a file in the folder TARGET.
"""

import difflib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from wrpo_ray.errors import UserError
from wrpo_ray.kubernetes import secret_rules
from wrpo_ray.kubernetes.manifests import Manifest, Problem
from wrpo_ray.kubernetes.ray_objects import LONGEST_SHOWN, path_text, shown
from wrpo_ray.text.documents import read_documents
from wrpo_ray.text.files import read_text

Schema = dict[str, Any]


BUNDLED = Path(__file__).with_name("kuberay-1.7.0.json")
TEXTS = ("description", "x-kubernetes-validations")
"""Keys of a schema that do not change what is valid here."""
SHARED_SIZE = 80
"""Minimum characters of a part that is written once and referred to."""


class Schemas:
    """The schemas of a folder of CRDs, or those of the package, by kind and version.

    Raises:
        UserError: the folder has no CRD.
    """

    def __init__(self, folder: str | None = None):
        if folder is None:
            bundle = json.loads(BUNDLED.read_text())
        else:
            bundle = {"definitions": {}, "kinds": kinds_of(folder)}
        definitions = {name: _closed(part) for name, part in bundle["definitions"].items()}
        self._schemas = {
            tuple(key.split()): _closed(schema) | {"definitions": definitions}
            for key, schema in bundle["kinds"].items()
        }

    def problems(self, manifest: Manifest) -> Iterator[Problem]:
        """Yield the violations of an object's schema; none for kinds without one."""
        from jsonschema import Draft7Validator

        schema = self._schemas.get((manifest.kind, manifest.api_version))
        if schema is None:
            return
        for error in Draft7Validator(schema).iter_errors(manifest.body):
            path, value = list(error.absolute_path), error.instance
            for problem in _explained(manifest, error):
                text = problem.text.replace(repr(value), shown(value))
                yield replace(problem, text=secret_rules.hide(manifest, path, value, text))


def kinds_of(folder: str) -> dict[str, Schema]:
    """Return the schema of each `KIND GROUP/VERSION` of a folder of CRDs, without texts.

    Raises:
        UserError: the folder has no CRD.
    """
    texts = [read_text(file, "--crds") for file in sorted(Path(folder).glob("*.yaml"))]
    crds = [d for text in texts for d in read_documents(text) if _is_crd(d)]
    if not crds:
        raise UserError(f"--crds {folder}: no CustomResourceDefinition is in this folder")
    return {
        f"{crd['spec']['names']['kind']} {crd['spec']['group']}/{version['name']}": _without_texts(
            version["schema"]["openAPIV3Schema"]
        )
        for crd in crds
        for version in crd["spec"]["versions"]
    }


def _without_texts(schema: Any, is_schema: bool = True) -> Any:
    """Return a schema without `TEXTS`, which may be names of properties."""
    if isinstance(schema, list):
        return [_without_texts(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: _without_texts(part, not (is_schema and name == "properties"))
        for name, part in schema.items()
        if not is_schema or name not in TEXTS
    }


def bundle_of(kinds: dict[str, Schema]) -> dict[str, Any]:
    """Return schemas whose equal parts are written once: pods have the same fields everywhere."""
    counts = Counter(text for kind in kinds.values() for text in _parts(kind))
    often = sorted(t for t, n in counts.items() if n > 1 and len(t) >= SHARED_SIZE)
    names = {text: f"{number}" for number, text in enumerate(often)}
    definitions = {name: _shared(json.loads(text), names, text) for text, name in names.items()}
    return {"definitions": definitions, "kinds": {k: _shared(s, names) for k, s in kinds.items()}}


def _parts(schema: Any) -> Iterator[str]:
    """Yield each schema in a schema as text."""
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield _text(schema)
        for part in schema.values():
            yield from _parts(part)


def _shared(schema: Any, names: dict[str, str], itself: str = "") -> Any:
    """Return a schema with references in the place of parts that have a name."""
    if not isinstance(schema, dict):
        return schema
    text = _text(schema)
    if text in names and text != itself:
        return {"$ref": f"#/definitions/{names[text]}"}
    return {key: _shared(part, names) for key, part in schema.items()}


def _text(schema: Schema) -> str:
    return json.dumps(schema, sort_keys=True, separators=(",", ":"))


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


if __name__ == "__main__":
    source, version, target = sys.argv[1:]
    told = {"source": f"github.com/ray-project/kuberay {version}", "license": "Apache-2.0"}
    made = told | bundle_of({k: s for k, s in kinds_of(source).items() if k.endswith("ray.io/v1")})
    Path(target, f"kuberay-{version}.json").write_text(_text(made) + "\n")
