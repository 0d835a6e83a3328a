"""All checks of some manifests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from wrpo_ray.cluster_check import fit, pods, requests, rules, serving
from wrpo_ray.cluster_check.fit import NodeTypes
from wrpo_ray.cluster_check.manifests import LAUNCHER, Manifest, Problem, read
from wrpo_ray.cluster_check.objects import SPECS, RayObject, typed
from wrpo_ray.cluster_check.requests import Request
from wrpo_ray.cluster_check.schema import Schemas
from wrpo_ray.config import Config


@dataclass
class Report:
    """What was found in some manifests."""

    manifests: list[Manifest]
    problems: list[Problem] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """For each request the nodes that Ray would start for it."""


def check(
    paths: Sequence[str], config: Config | None = None, schemas: Schemas | None = None
) -> Report:
    """Check manifests, and whether a config's steps fit the Ray clusters among them.

    Raises:
        UserError: a path cannot be read.
    """
    manifests, unread = read(paths)
    report = Report(manifests, unread)
    for manifest in manifests:
        report.problems += rules.check_kind(manifest)
        report.problems += pods.check_references(manifest, manifests)
        faults = list(schemas.problems(manifest)) if schemas else []
        report.problems += faults
        if manifest.kind == LAUNCHER:
            asked = list(requests.of_config(config)) if config else []
            _fit(report, manifest, partial(fit.launcher_node_types, manifest.body), asked)
        elif manifest.kind in SPECS:
            _check_ray(report, manifest, {fault.field for fault in faults}, config)
    return report


def _check_ray(
    report: Report, manifest: Manifest, reported: set[str], config: Config | None
) -> None:
    """The rules for an object of Ray's; they need its types right, of which some are `reported`."""
    found = typed(manifest)
    if not isinstance(found, RayObject):
        report.problems += [problem for problem in found if problem.field not in reported]
        return
    broken = list(rules.check(found))
    report.problems += broken
    report.problems += pods.check(found)
    serve, faults = serving.read(found)
    report.problems += faults
    cluster = found.cluster
    if cluster is None or any(problem.rule in rules.UNREADABLE for problem in broken):
        return
    asked = list(requests.of_serving(serve)) if serve else []
    asked += requests.of_driver(found.job) if found.job else []
    asked += requests.of_config(config) if config and not found.service else []
    _fit(report, manifest, partial(fit.node_types, found, cluster), asked)


def _fit(
    report: Report, manifest: Manifest, types: Callable[[], NodeTypes], asked: list[Request]
) -> None:
    """Tell where each request goes, or why it cannot."""
    try:
        known = types()
    except ValueError as error:
        text = f"Ray cannot read its resources: {' '.join(str(error).split())}"
        report.problems.append(Problem(manifest, "", "resources", text))
        return
    for request in asked:
        wrong = fit.misfit(known, request)
        if wrong:
            report.problems.append(Problem(manifest, "", wrong[0], f"{request.what}: {wrong[1]}"))
        else:
            report.places.append(f"{manifest}: {request.what}: {_nodes(known, request)}")


def _nodes(types: NodeTypes, request: Request) -> str:
    nodes = types.nodes_for(request) or {}
    return ", ".join(f"{count} x {group}" for group, count in nodes.items())
