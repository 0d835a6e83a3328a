"""KubeRay's schemas in the package: the full ones without texts, small, made by a command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.manifests import ray_objects
from support.shared_data import CRDS

from wrpo_ray.kubernetes.manifests import Manifest
from wrpo_ray.kubernetes.schema import BUNDLED, Schemas, bundle_of, kinds_of


def bundled() -> dict[str, Any]:
    return json.loads(BUNDLED.read_text())


def whole(part: Any, definitions: dict[str, Any]) -> Any:
    """A schema with its references replaced by what they refer to."""
    if isinstance(part, list):
        return [whole(item, definitions) for item in part]
    if not isinstance(part, dict):
        return part
    if isinstance(reference := part.get("$ref"), str):
        return whole(definitions[reference.removeprefix("#/definitions/")], definitions)
    return {key: whole(value, definitions) for key, value in part.items()}


def test_it_is_small_and_says_where_it_is_from():
    assert BUNDLED.stat().st_size < 100_000
    told = bundled()
    assert told["license"] == "Apache-2.0"
    assert told["source"] == "github.com/ray-project/kuberay 1.7.0"
    kinds = ("RayCluster", "RayCronJob", "RayJob", "RayService")
    assert list(told["kinds"]) == [f"{kind} ray.io/v1" for kind in kinds]


@pytest.mark.skipif(not CRDS.is_dir(), reason="the full schemas are not beside this checkout")
def test_it_is_what_the_full_schemas_say_without_their_texts():
    told, full = bundled(), kinds_of(str(CRDS))
    compared = {key for key in told["kinds"] if key in full}
    assert len(compared) == 3
    for key in compared:
        assert whole(told["kinds"][key], told["definitions"]) == full[key]
    name = "rayClusterSpec"
    assert "description" not in full["RayJob ray.io/v1"]["properties"]["spec"]["properties"][name]


def test_equal_parts_are_written_once_and_nothing_is_lost():
    pod = {"type": "object", "properties": {f"field-{n}": {"type": "string"} for n in range(9)}}
    outer = {"type": "object", "properties": {"description": pod, "b": {"items": pod}}}
    kinds = {"A g/v1": {"type": "object", "properties": {"x": outer, "y": outer, "z": pod}}}
    made = bundle_of(kinds)
    assert len(made["definitions"]) == 2
    assert {k: whole(s, made["definitions"]) for k, s in made["kinds"].items()} == kinds
    assert len(json.dumps(made)) < 0.5 * len(json.dumps(kinds))


def test_a_property_may_be_called_description(tmp_path: Path):
    named = {
        "type": "object",
        "description": "text",
        "properties": {"description": {"type": "string"}},
    }
    spec = {"group": "g", "names": {"kind": "A"}}
    version = {"name": "v1", "schema": {"openAPIV3Schema": named}}
    crd = {"kind": "CustomResourceDefinition", "spec": spec | {"versions": [version]}}
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(crd))
    without = {key: value for key, value in named.items() if key != "description"}
    assert kinds_of(str(tmp_path)) == {"A g/v1": without}


def test_the_command_writes_the_file_of_another_version(tmp_path: Path):
    crds = tmp_path / "crds"
    crds.mkdir()
    spec = {"group": "ray.io", "names": {"kind": "RayCluster"}}
    schema = {"type": "object", "properties": {"spec": {"type": "object"}}}
    version = {"name": "v1", "schema": {"openAPIV3Schema": schema}}
    crd = {"kind": "CustomResourceDefinition", "spec": spec | {"versions": [version]}}
    (crds / "crd.yaml").write_text(yaml.safe_dump(crd))
    command = [
        sys.executable,
        "-m",
        "wrpo_ray.kubernetes.schema",
        str(crds),
        "9.9.9",
        str(tmp_path),
    ]
    subprocess.run(command, check=True)
    made = json.loads((tmp_path / "kuberay-9.9.9.json").read_text())
    assert made["source"].endswith("kuberay 9.9.9")
    assert made["kinds"] == {"RayCluster ray.io/v1": schema}


def test_mistakes_are_found_behind_references():
    body = ray_objects()["RayJob"]
    group = body["spec"]["rayClusterSpec"]["workerGroupSpecs"][2]
    group["template"]["spec"]["containers"][0]["env"][0]["vlaue"] = "x"
    group["maxReplicas"] = "many"
    found = {(p.field, p.rule) for p in Schemas().problems(Manifest("file", body))}
    at = "spec.rayClusterSpec.workerGroupSpecs[2]"
    assert found == {
        (f"{at}.maxReplicas", "wrong-type"),
        (f"{at}.template.spec.containers[0].env[0].vlaue", "unknown-field"),
    }
