"""ResourceQuotas of a namespace that the pods of a Ray object exceed.

A quota refuses each pod that would exceed it (Kubernetes 1.33,
pkg/quota/v1/evaluator/core/pods.go).
Counted are the containers that the operator adds, too (KubeRay 1.7.0, controllers/ray/common:
pod.go:988-999, job.go:235-244).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wrpo_ray.kubernetes.manifests import Manifest, Problem, mapping
from wrpo_ray.kubernetes.ray_objects import (
    RAY_KINDS,
    Container,
    PodSpec,
    RayObject,
    Resources,
    number_of,
)

HALF_CPU = {"cpu": "500m", "memory": "512Mi"}
AUTOSCALER = Container(
    name="autoscaler", resources=Resources(requests=dict(HALF_CPU), limits=dict(HALF_CPU))
)
SUBMITTER = Container(
    name="ray-job-submitter",
    resources=Resources(
        requests={"cpu": "500m", "memory": "200Mi"}, limits={"cpu": "1", "memory": "1Gi"}
    ),
)
REQUIRED = ("cpu", "memory")
"""What each container of a pod has to name under a quota of it (:191-217)."""
SHORT = {"cpu", "memory", "ephemeral-storage"}
"""Resources that a quota may name without `requests.`."""
Needs = Counter[tuple[str, str]]
"""{(`requests` or `limits`, resource): number}; pods are (`requests`, `pods`)."""


@dataclass(frozen=True)
class Pods:
    """Equal pods of an object."""

    name: str
    needs: Needs
    """Of one replica."""
    least: int
    most: int


def check(found: RayObject, manifests: Sequence[Manifest]) -> Iterator[Problem]:
    """Yield what the quotas of the object's namespace, if they are among the manifests, refuse."""
    beside = [one for one in manifests if one.is_beside(found.manifest)]
    quotas = [one for one in beside if one.kind == "ResourceQuota"]
    if not quotas or not found.cluster:
        return
    defaults = _defaults(beside)
    pods = list(_pods(found, defaults))
    for quota in quotas:
        spec = mapping(quota.body.get("spec"))
        if spec.get("scopes") or spec.get("scopeSelector"):
            continue  # of some pods only
        hard = {_key(name): number_of(n) for name, n in mapping(spec.get("hard")).items()}
        yield from _refused(found, quota, hard, pods)
        for name in REQUIRED:
            for part in ("requests", "limits"):
                if (part, name) in hard:
                    yield from _unnamed(found, quota, part, name, defaults)


def check_objects(quota: Manifest, manifests: Sequence[Manifest]) -> Iterator[Problem]:
    """Yield what a quota allows less of than the manifests have: claims, storage, Ray objects."""
    if quota.kind != "ResourceQuota":
        return
    hard = mapping(mapping(quota.body.get("spec")).get("hard"))
    has: Counter[str] = Counter()
    for manifest in (one for one in manifests if one.is_beside(quota)):
        spec = mapping(manifest.body.get("spec"))
        if manifest.kind == "PersistentVolumeClaim":
            asked = mapping(mapping(spec.get("resources")).get("requests")).get("storage", 0)
            has["persistentvolumeclaims"] += 1
            has["count/persistentvolumeclaims"] += 1
            has["requests.storage"] += int(number_of(asked))
        if manifest.kind in RAY_KINDS:
            makes_one = manifest.kind == "RayService" or "rayClusterSpec" in spec
            has[f"count/{manifest.kind.lower()}s.ray.io"] += 1
            has["count/rayclusters.ray.io"] += makes_one
    for name in sorted(set(hard) & set(has)):
        if has[name] > number_of(hard[name]):
            wanted = _text("memory" if name == "requests.storage" else name, has[name])
            text = f"is {hard[name]}, and these manifests need {wanted}: the rest is refused"
            yield Problem(quota, f"spec.hard.{name}", "quota", text)


def _key(name: str) -> tuple[str, str]:
    part, _, resource = name.partition(".")
    if part in ("requests", "limits"):
        return part, resource
    return ("requests", "pods" if name == "count/pods" else name)


def _refused(
    found: RayObject, quota: Manifest, hard: dict[tuple[str, str], float], pods: list[Pods]
) -> Iterator[Problem]:
    field, least = found.at, _sum((p.needs, p.least) for p in pods)
    if over := _over(hard, least):
        text = f"its first pods ask for {over} of the ResourceQuota {quota.name!r}: it never starts"
        yield found.problem(field, "quota", text)
        return
    for group in pods:
        if group.most > group.least and (over := _over(hard, _sum([(least, 1), (group.needs, 1)]))):
            text = (
                f"{group.name}: with the first replica the pods ask for {over} of the "
                f"ResourceQuota {quota.name!r}: its steps wait forever; raise the quota, or set "
                f"maxReplicas to 0"
            )
            yield found.problem(field, "quota", text)
    if over := _over(hard, _sum((p.needs, p.most) for p in pods)):
        text = (
            f"with all replicas the pods ask for {over} of the ResourceQuota {quota.name!r}: "
            f"beyond it Kubernetes refuses pods, and steps go on with the nodes that there are"
        )
        yield found.problem(field, "quota-most", text)


def _sum(parts: Iterable[tuple[Needs, int]]) -> Needs:
    total: Needs = Counter()
    for needs, times in parts:
        for key, number in needs.items():
            total[key] += number * times
    return total


def _over(hard: dict[tuple[str, str], float], needs: Needs) -> str:
    """Return what is above a quota, as text."""
    return ", ".join(
        f"{_text(name, needs[part, name])} {name} ({part}) where there are {_text(name, most)}"
        for (part, name), most in hard.items()
        if needs[part, name] > most
    )


def _text(name: str, number: float) -> str:
    is_bytes = name in ("memory", "ephemeral-storage")
    return f"{number / 2**30:,.6g}Gi" if is_bytes else f"{number:,.6g}"


def _unnamed(
    found: RayObject, quota: Manifest, part: str, name: str, defaults: Resources
) -> Iterator[Problem]:
    for path, group in found.groups:
        pod = group.template.spec
        for container in (*pod.containers, *pod.init_containers):
            if name not in _asked(container, part, defaults):
                text = (
                    f"is missing for the container {container.name!r}, and the ResourceQuota "
                    f"{quota.name!r} has {part}.{name}: Kubernetes refuses the pod; set it, or a "
                    f"default in a LimitRange"
                )
                yield found.problem(f"{path}.template.spec.{part}.{name}", "quota", text)


# --- pods ------------------------------------------------------------------------------------


def _pods(found: RayObject, defaults: Resources) -> Iterator[Pods]:
    """Yield the pods of an object, with those that the operator makes."""
    cluster, job = found.cluster, found.job
    added = []
    if cluster and cluster.enable_in_tree_autoscaling:
        given = cluster.autoscaler_options and cluster.autoscaler_options.resources
        added.append(AUTOSCALER.model_copy(update={"resources": given}) if given else AUTOSCALER)
    if job and job.submission_mode == "SidecarMode":
        added.append(SUBMITTER)
    if cluster:
        head = cluster.head_group_spec.template.spec
        yield Pods("head", _of_pod(head, added, defaults), 1, 1)
    if job and job.submission_mode == "K8sJobMode":
        template = job.submitter_pod_template
        pod = template.spec if template else PodSpec(containers=[SUBMITTER])
        yield Pods("submitter", _of_pod(pod, [], defaults), 1, 1)
    for _, group in found.workers:
        needs = _sum([(_of_pod(group.template.spec, [], defaults), group.num_of_hosts)])
        yield Pods(group.group_name, needs, group.min_replicas or 0, group.max_replicas or 0)


def _of_pod(pod: PodSpec, added: Sequence[Container], defaults: Resources) -> Needs:
    """Return what a pod counts for: at its start, or when all run, whichever is more.

    Init containers run one after another, beside the sidecars (`restartPolicy: Always`) before.
    """
    sidecars: Needs = Counter()
    most: Needs = Counter()
    for container in pod.init_containers:
        asked = _needs(container, defaults)
        most |= _sum([(sidecars, 1), (asked, 1)])
        if container.restart_policy == "Always":
            sidecars = _sum([(sidecars, 1), (asked, 1)])
    running = [_needs(container, defaults) for container in (*pod.containers, *added)]
    most |= _sum([(sidecars, 1), *((needs, 1) for needs in running)])
    most["requests", "pods"] = 1
    return most


def _needs(container: Container, defaults: Resources) -> Needs:
    return Counter(
        {
            (part, name): number
            for part in ("requests", "limits")
            for name, number in _asked(container, part, defaults).items()
        }
    )


def _asked(container: Container, part: str, defaults: Resources) -> dict[str, float]:
    """Return a container's requests or limits; a limit without a request is one, too."""
    given = container.resources
    limits = defaults.limits | given.limits
    asked = (
        limits if part == "limits" else limits | defaults.requests | given.limits | given.requests
    )
    return {name: number_of(number) for name, number in asked.items()}


def _defaults(manifests: Sequence[Manifest]) -> Resources:
    """Return what LimitRanges give to containers without requests or limits."""
    requests: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    for manifest in manifests:
        if manifest.kind == "LimitRange":
            for entry in map(mapping, mapping(manifest.body.get("spec")).get("limits") or []):
                if entry.get("type") == "Container":
                    requests |= mapping(entry.get("defaultRequest"))
                    limits |= mapping(entry.get("default"))
    return Resources(requests=requests, limits=limits)
