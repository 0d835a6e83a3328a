"""The Serve config of a RayService, by Ray Serve's own schema, closed to unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from wrpo_ray.cluster_check.manifests import Problem
from wrpo_ray.cluster_check.objects import RayObject, path_text

FIELD = "spec.serveConfigV2"


def read(found: RayObject) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The config of a RayService, and what is wrong with it; no config where it cannot be read."""
    from ray.serve.schema import ServeDeploySchema

    if not found.service:
        return None, []
    try:
        given = yaml.safe_load(found.service.serve_config_v2)
        if not isinstance(given, dict):
            raise ValueError("is missing or no mapping; it lists `applications`")
        ServeDeploySchema.model_validate(given)
    except ValidationError as error:
        lines = [(path_text((*e["loc"],)), e["msg"]) for e in error.errors()]
        return None, [found.problem(f"{FIELD}.{at}", "serve-config", text) for at, text in lines]
    except (yaml.YAMLError, ValueError) as error:
        return None, [found.problem(FIELD, "serve-config", " ".join(str(error).split()))]
    unknown = [found.problem(f"{FIELD}.{at}", "serve-config", text) for at, text in _unknown(given)]
    return given, unknown


def _unknown(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that Serve would pass over."""
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    parts: list[tuple[str, dict[str, Any], type[BaseModel]]] = [("", given, ServeDeploySchema)]
    for i, app in enumerate(given.get("applications", [])):
        parts.append((f"applications[{i}].", app, ServeApplicationSchema))
        for j, deployment in enumerate(app.get("deployments", [])):
            parts.append((f"applications[{i}].deployments[{j}].", deployment, DeploymentSchema))
    for path, part, schema in parts:
        for name in sorted(set(part) - set(schema.model_fields)):
            yield f"{path}{name}", "Ray Serve has no such key, and would pass over it"
