"""Runs all checks of manifests."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from wrpo_ray.config import Config
from wrpo_ray.kubernetes import (
    capacity,
    field_formats,
    job_config,
    neighbour_rules,
    network_rules,
    operator_rules,
    pod_rules,
    queue_rules,
    quota_rules,
    reference_rules,
    resource_requests,
    secret_rules,
    serve_config,
)
from wrpo_ray.kubernetes.capacity import NodeTypes
from wrpo_ray.kubernetes.manifests import LAUNCHER, Manifest, Problem, described, mapping, read
from wrpo_ray.kubernetes.ray_objects import SPECS, Job, RayObject, typed
from wrpo_ray.kubernetes.resource_requests import Request
from wrpo_ray.kubernetes.schema import Schemas

HARMLESS = ("unknown-field", "missing")
"""Rules after whose violation the remaining fields can still be evaluated."""


@dataclass
class Report:
    """The problems and placements found in manifests."""

    manifests: list[Manifest]
    problems: list[Problem] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """For each request, the nodes that Ray would start for it."""
    advice: list[Problem] = field(default_factory=list)
    """What works on some clusters only, or costs time or money, but no run."""
    needs: dict[str, list[str]] = field(default_factory=dict)
    """Objects that have to exist before, as `Kind/name`, by namespace."""
    uses: dict[str, list[str]] = field(default_factory=dict)
    """Objects that are used if they exist, likewise."""
    outputs: dict[str, list[Manifest]] = field(default_factory=dict)
    """The runs that write to an output."""


def check(
    paths: Sequence[str], config: Config | None = None, schemas: Schemas | None = None
) -> Report:
    """Check manifests, and whether a config's steps fit the Ray clusters among them.

    Raises:
        UserError: a path cannot be read.
    """
    manifests, unread = read(paths)
    report = check_objects(manifests, config, schemas)
    report.problems = unread + report.problems
    return report


def told_once(problems: Sequence[Problem]) -> list[str]:
    """Return the lines of problems; one that an object has in many fields is told once."""
    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((str(problem.where), problem.rule, problem.text), []).append(problem)
    lines = []
    for first, *others in groups.values():
        more = f" and {len(others)} more fields" if others else ""
        lines.append(str(replace(first, field=f"{first.field}{more}")))
    return lines


def check_objects(
    manifests: list[Manifest], config: Config | None = None, schemas: Schemas | None = None
) -> Report:
    """Check objects that are already read."""
    needs, uses = (
        reference_rules.external(manifests, is_optional) for is_optional in (False, True)
    )
    report = Report(manifests, needs=needs, uses=uses)
    for manifest in manifests:
        report.problems += operator_rules.check_kind(manifest)
        report.problems += _told(manifest, reference_rules.check, manifest, manifests)
        report.problems += _told(manifest, pod_rules.check_volumes, manifest)
        report.problems += _told(manifest, secret_rules.check, manifest)
        report.problems += _told(manifest, neighbour_rules.check, manifest, manifests)
        report.problems += _told(manifest, quota_rules.check_objects, manifest, manifests)
        faults = list(field_formats.check(manifest))  # which say more than schemas
        reported = {fault.field for fault in faults}
        found = schemas.problems(manifest) if schemas else ()
        faults += [problem for problem in found if problem.field not in reported]
        report.problems += faults
        if manifest.kind == LAUNCHER:
            asked = list(resource_requests.of_config(config)) if config else []
            _fit(report, manifest, partial(capacity.launcher_node_types, manifest.body), asked)
        elif manifest.kind in SPECS:
            _check_ray(report, manifest, faults, config)
    report.problems += _twice(report)
    if config and not any(_has_steps(manifest) for manifest in manifests):
        text = (
            "no RayCluster, RayJob with a cluster of its own, or launcher file is among the "
            "manifests, so whether its steps fit is not checked; leave --job out, or add one"
        )
        report.problems.append(Problem("--job", "", "job-unused", text))
    report.advice = [problem for problem in report.problems if problem.is_advice]
    report.problems = [problem for problem in report.problems if not problem.is_advice]
    return report


def _has_steps(manifest: Manifest) -> bool:
    """Whether an object has a cluster on which a config's steps may run."""
    is_job = manifest.kind == "RayJob" and "rayClusterSpec" in mapping(manifest.body.get("spec"))
    return is_job or manifest.kind in (LAUNCHER, "RayCluster")


def _check_ray(
    report: Report, manifest: Manifest, faults: list[Problem], config: Config | None
) -> None:
    """Apply the rules for a Ray object; those that evaluate fields need them to be valid."""
    found = typed(manifest)
    if not isinstance(found, RayObject):
        reported = tuple(fault.field for fault in faults)
        report.problems += [p for p in found if not reported or not p.field.startswith(reported)]
        return
    broken = _told(manifest, operator_rules.check, found)
    report.problems += broken + _told(manifest, network_rules.check, found, report.manifests)
    if any(fault.rule not in HARMLESS for fault in faults):
        return
    report.problems += _told(manifest, pod_rules.check, found)
    for rule in (queue_rules.check_quota, queue_rules.check_namespaces, quota_rules.check):
        report.problems += _told(manifest, rule, found, report.manifests)
    serve, faults = serve_config.read(found)
    report.problems += faults
    cluster = found.cluster
    if cluster is None or any(problem.rule in operator_rules.UNREADABLE for problem in broken):
        return
    configs = [config] if config else []
    if found.job:
        configs, faults = _configs_of(found, found.job, report.manifests, config)
        report.problems += faults
        for one in configs:
            output = job_config.output_of(found.job, one)
            report.problems += job_config.check_output(found, output)
            if one is not config:
                report.outputs.setdefault(output.rstrip("/"), []).append(manifest)
    served = list(resource_requests.of_serving(serve)) if serve else []
    asked = list(served)
    asked += resource_requests.of_driver(found.job) if found.job else []
    for one in () if found.service else configs:
        asked += [r for r in resource_requests.of_config(one) if r not in asked]
    _fit(report, manifest, partial(capacity.node_types, found, cluster), asked, served)


def _told(
    manifest: Manifest, rule: Callable[..., Iterable[Problem]], *given: object
) -> list[Problem]:
    """Return what a rule finds; what it cannot read, by itself or beside it, is a problem, too."""
    try:
        return list(rule(*given))
    except Exception as error:  # a value of a kind that neither schema nor rule expects
        return [_unreadable(manifest, rule.__module__, error)]


def _unreadable(manifest: Manifest, module: str, error: Exception) -> Problem:
    text = f"{module.rpartition('.')[2]} cannot read a value here: {described(error)}"
    return Problem(manifest, "", "unreadable", text)


def _configs_of(
    found: RayObject, job: Job, manifests: Sequence[Manifest], given: Config | None
) -> tuple[list[Config], list[Problem]]:
    """Return the configs that a RayJob runs, and their problems; the given one if elsewhere."""
    try:
        return job_config.check(found, job, manifests, given)
    except Exception as error:
        known = [given] if given else []
        return known, [_unreadable(found.manifest, job_config.__name__, error)]


def _twice(report: Report) -> Iterator[Problem]:
    """Yield the objects that replace each other, and the runs that write to one place."""
    seen: dict[tuple[str, str, str], Manifest] = {}
    for manifest in report.manifests:
        first = seen.setdefault((manifest.kind, manifest.namespace, manifest.name), manifest)
        is_other = first.file == manifest.file or first.body != manifest.body
        if first is not manifest and manifest.name and is_other:
            text = f"is the name of another {manifest.kind} too, in {first.file}; one replaces the "
            text += "other: give each its own"
            yield Problem(manifest, "metadata.name", "twice", text)
    for output, runs in report.outputs.items():
        first = runs[0]
        others = [one for one in runs if (one.name, one.namespace) != (first.name, first.namespace)]
        for other in others:
            if "://" in output or other.is_beside(first):
                text = (
                    f"writes to {output!r}, as RayJob/{first.name} does: two runs would write the "
                    f"same files; give each its own `output`"
                )
                yield Problem(other, job_config.FIELD, "output", text)


def _fit(
    report: Report,
    manifest: Manifest,
    types: Callable[[], NodeTypes],
    asked: list[Request],
    served: Sequence[Request] = (),
) -> None:
    """Report the nodes of each request, or why it does not fit; served models fit twice."""
    try:
        known = types()
        results = [(r, capacity.misfit(known, r), _nodes(known, r)) for r in asked]
        twice = [r for r in served if capacity.misfit(known, replace(r, count=2 * r.count))]
    except Exception as error:  # Ray's code does not validate its input
        text = f"Ray cannot read its resources: {described(error)}"
        report.problems.append(Problem(manifest, "", "resources", text))
        return
    misfits: dict[tuple[str, str], list[str]] = {}
    for request, wrong, nodes in results:
        if wrong:
            misfits.setdefault(wrong, []).append(request.what)
        elif request in twice:
            text = (
                f"{request.what}: no group has room for a second set of replicas: a changed model "
                f"waits for it forever while the old one answers; raise maxReplicas"
            )
            report.problems.append(Problem(manifest, "", "surge-room", text))
        if not wrong:
            report.places.append(f"{manifest}: {request.what}: {nodes}")
    for (rule, text), steps in misfits.items():
        report.problems.append(Problem(manifest, "", rule, f"{', '.join(steps)}: {text}"))


def _nodes(types: NodeTypes, request: Request) -> str:
    nodes = types.nodes_for(request) or {}
    return ", ".join(f"{count} x {group}" for group, count in nodes.items())
