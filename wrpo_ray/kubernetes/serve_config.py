"""Checks the Serve config of a RayService with Ray Serve's schema; unknown keys are problems."""

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from wrpo_ray.config import serving
from wrpo_ray.errors import UserError
from wrpo_ray.kubernetes.manifests import Problem, described
from wrpo_ray.kubernetes.ray_objects import RayObject, path_text
from wrpo_ray.text.documents import describe_yaml_error, read_document

FIELD = "spec.serveConfigV2"
OWN = "wrpo_ray.serve.app:build"


def read(found: RayObject) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Return the config of a RayService and its problems; None if it cannot be parsed."""
    from ray.serve.schema import ServeDeploySchema

    if not found.service:
        return None, []
    try:
        given = read_document(found.service.serve_config_v2)
        if not isinstance(given, dict):
            raise ValueError("is missing or no mapping; it lists `applications`")
        ServeDeploySchema.model_validate(given)
    except ValidationError as error:
        lines = [(path_text((*e["loc"],)), e["msg"]) for e in error.errors()]
        return None, [found.problem(f"{FIELD}.{at}", "serve-config", text) for at, text in lines]
    except Exception as error:  # of YAML, or of a validator that expects other types
        is_yaml = isinstance(error, yaml.YAMLError | RecursionError)
        text = describe_yaml_error(error) if is_yaml else described(error)
        return None, [found.problem(FIELD, "serve-config", text)]
    problems = [*_unknown(given), *_own_arguments(given)]
    return given, [found.problem(f"{FIELD}.{at}", "serve-config", text) for at, text in problems]


def own_applications(given: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the index and arguments of the applications that are this project's."""
    for number, app in enumerate(given.get("applications", [])):
        if app.get("import_path") == OWN:
            yield number, app.get("args") or {}


def _own_arguments(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the problems in the arguments of `wrpo_ray.serve.app:build`."""
    for number, arguments in own_applications(given):
        try:
            serving(arguments)
        except UserError as error:
            for line in str(error).splitlines():
                yield f"applications[{number}].args", line


def _unknown(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys that Ray Serve would ignore."""
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    parts: list[tuple[str, dict[str, Any], type[BaseModel]]] = [("", given, ServeDeploySchema)]
    for i, app in enumerate(given.get("applications", [])):
        parts.append((f"applications[{i}].", app, ServeApplicationSchema))
        for j, deployment in enumerate(app.get("deployments", [])):
            parts.append((f"applications[{i}].deployments[{j}].", deployment, DeploymentSchema))
    for path, part, schema in parts:
        for name in sorted(set(part) - set(schema.model_fields)):
            yield f"{path}{name}", "Ray Serve has no such key, and would pass over it"
