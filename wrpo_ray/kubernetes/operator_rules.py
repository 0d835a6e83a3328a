"""Ray clusters that KubeRay's operator or Ray rejects, though the schema allows them.

Each rule yields the problems of an object. `job_rules`, `service_rules` and `queue_rules` have
those of RayJob, RayService and Kueue. Source, where no other is given: KubeRay 1.7.0,
ray-operator/controllers/ray/utils/validation.go (V) and constant.go (C).
"""

import re
from collections.abc import Iterator

from wrpo_ray.kubernetes import job_rules, queue_rules, service_rules
from wrpo_ray.kubernetes.manifests import LAUNCHER, Manifest, Problem
from wrpo_ray.kubernetes.ray_objects import Cluster, Faults, RayObject, value_of

LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
"""C:372-385: a cluster's Services append up to 10 characters, and may have 63; a RayJob's or
RayService's cluster has 6 characters more, and the RayJob of a RayCronJob 11."""
AUTH_SINCE, KUBERNETES_AUTH_SINCE, PRIORITY_SINCE = (2, 52), (2, 55), (2, 56)
"""The first Ray with token authentication (V:284-308), Kubernetes' tokens (V:300-308) and
priorities of groups (V:1112-1142)."""
SWITCH_V2 = "RAY_enable_autoscaler_v2"
GATES = {
    "network_policy": ("networkPolicy", "RayClusterNetworkPolicy"),
    "tls_options": ("tlsOptions", "RayClusterMTLS"),
    "history_server_options": ("historyServerOptions", "RayClusterHistoryServer"),
}
"""Fields that the operator rejects without a feature gate that is off by default
(pkg/features/features.go:105-117)."""
UNREADABLE = frozenset({"min-max-replicas", "replicas-range", "no-container"})
"""Rules that Ray's autoscaler relies on; it cannot evaluate objects that violate them."""


def check(found: RayObject) -> Iterator[Problem]:
    """Yield the problems of an object by all rules."""
    for field, rule, text in _faults(found):
        yield found.problem(field, rule, text)


def _faults(found: RayObject) -> Faults:
    if cluster := found.cluster:
        for check_cluster in CHECKS:
            yield from check_cluster(found, cluster)
        yield from _group_settings(found)
        yield from queue_rules.faults(found, cluster)
    if found.job:
        yield from job_rules.faults(found, found.job)
    if found.service:
        yield from service_rules.faults(found, found.service)


def version_of(text: str) -> tuple[int, ...]:
    """Return (2, 60, 0) for "2.60.0"; empty if it is not a version."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in match.groups(default="0")) if match else ()


# --- the cluster -----------------------------------------------------------------------------


def _head(found: RayObject, cluster: Cluster) -> Faults:
    head = cluster.head_group_spec
    cpus = head.resources.get("CPU", head.ray_start_params.get("num-cpus"))
    if cpus != "0":
        text = f'is {cpus or "missing"}; set "0", so that no step runs beside the control processes'
        yield f"{found.at}.headGroupSpec.rayStartParams.num-cpus", "head-cpus", text


def _autoscaling(found: RayObject, cluster: Cluster) -> Faults:
    options = f"{found.at}.autoscalerOptions"
    if cluster.autoscaler_options and not cluster.enable_in_tree_autoscaling:
        text = "is not true, so autoscalerOptions has no effect"
        yield f"{found.at}.enableInTreeAutoscaling", "autoscaling-off", text
    head_env = {e.name for e in cluster.head_group_spec.ray.env}
    if SWITCH_V2 in head_env and cluster.autoscaler_options and cluster.autoscaler_options.version:
        text = f"and the head's {SWITCH_V2}: set the former"
        yield f"{options}.version", "autoscaler-twice", text
    switch = value_of(cluster.head_group_spec.ray.env, SWITCH_V2)
    if switch in ("1", "true") and not cluster.enable_in_tree_autoscaling:  # V:205-212
        text = f"is not true, and the head has {SWITCH_V2}: set it, or leave the variable out"
        yield f"{found.at}.enableInTreeAutoscaling", "autoscaling-off", text
    given = cluster.autoscaler_options
    idle = given.idle_timeout_seconds if given else None
    if idle is not None and idle < 0:  # V:240-245
        yield f"{options}.idleTimeoutSeconds", "idle-timeout", f"is {idle}; it is 0 or more"


def _scaled_groups(found: RayObject, cluster: Cluster) -> Faults:
    options = f"{found.at}.autoscalerOptions"
    for path, group in found.workers:
        if group.idle_timeout_seconds is not None and not cluster.has_v2:
            yield (
                f"{path}.idleTimeoutSeconds",
                "idle-timeout-v2",
                f"has an effect only with {options}.version: v2 and enableInTreeAutoscaling: true",
            )
        if (group.idle_timeout_seconds or 0) < 0:  # V:1012-1014
            text = f"is {group.idle_timeout_seconds}; it is a number of seconds, 0 or more"
            yield f"{path}.idleTimeoutSeconds", "idle-timeout", text
        if group.priority and (
            not cluster.has_v2 or version_of(cluster.ray_version) < PRIORITY_SINCE
        ):
            text = "needs autoscaler v2 and rayVersion 2.56.0 or later"
            yield f"{path}.priority", "priority", text
        if group.suspend and cluster.enable_in_tree_autoscaling:
            text = "cannot be with the autoscaler; leave it out"
            yield f"{path}.suspend", "suspended-group", text
    for path, each in found.groups:
        policy = each.template.spec.restart_policy
        if policy not in ("", "Never") and cluster.has_v2:
            text = f"is {policy}; autoscaler v2 needs Never, or nothing"
            yield f"{path}.template.spec.restartPolicy", "restart-policy", text


def _worker_groups(found: RayObject, cluster: Cluster) -> Faults:
    names = [group.group_name for group in cluster.worker_group_specs]
    for name in sorted({n for n in names if names.count(n) > 1}):
        text = "is the name of two groups; the autoscaler knows groups by their names"
        yield f"{found.at}.workerGroupSpecs[{name}].groupName", "group-name", text
    for path, group in found.workers:
        least, most, now = group.min_replicas, group.max_replicas, group.replicas
        for key, value in (("minReplicas", least), ("maxReplicas", most)):
            if value is None:
                text = "is missing; set both minReplicas and maxReplicas"
                yield f"{path}.{key}", "min-max-replicas", text
        if least is not None and most is not None:
            if not 0 <= least <= most:
                text = f"is {least}; it has to be from 0 to maxReplicas ({most})"
                yield f"{path}.minReplicas", "replicas-range", text
            elif now is not None and not least <= now <= most:
                text = f"is {now}; it has to be from minReplicas ({least}) to maxReplicas ({most})"
                yield f"{path}.replicas", "replicas-range", text
        if group.num_of_hosts < 1:
            text = f"is {group.num_of_hosts}; a replica has at least one pod"
            yield f"{path}.numOfHosts", "replicas-range", text


def _group_settings(found: RayObject) -> Faults:
    for path, group in found.groups:
        if not group.template.spec.containers:
            text = "is empty; the first container runs Ray"
            yield f"{path}.template.spec.containers", "no-container", text
        twice = {"num-cpus", "num-gpus", "memory", "resources"} & set(group.ray_start_params)
        if group.resources and twice:
            text = f"and rayStartParams.{sorted(twice)[0]}: KubeRay refuses both; keep one"
            yield f"{path}.resources", "resources-twice", text
        if "labels" in group.ray_start_params:
            text = "is not supported; use the group's own field `labels`"
            yield f"{path}.rayStartParams.labels", "labels", text


def _auth(found: RayObject, cluster: Cluster) -> Faults:
    options = cluster.auth_options
    if options is None:
        return
    field, version = f"{found.at}.authOptions", version_of(cluster.ray_version)
    if options.mode == "token" and version < AUTH_SINCE:
        text = f"token needs rayVersion 2.52.0 or later (got {cluster.ray_version or 'none'})"
        yield f"{field}.mode", "auth-version", text
    if not options.enable_k8s_token_auth:
        return
    if found.manifest.kind != "RayCluster":  # V:606-608, 681-683
        text = f"is not supported for a {found.manifest.kind}; leave it out"
        yield f"{field}.enableK8sTokenAuth", "auth", text
    elif options.mode != "token" or options.secret_name or version < KUBERNETES_AUTH_SINCE:
        text = "needs mode: token, no secretName, and rayVersion 2.55.0 or later"
        yield f"{field}.enableK8sTokenAuth", "auth", text


def _redis(found: RayObject, cluster: Cluster) -> Faults:
    path, head = f"{found.at}.headGroupSpec", cluster.head_group_spec
    named = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
    for name in sorted(named & {e.name for e in head.ray.env}):
        text = f"belongs to {found.at}.gcsFaultToleranceOptions"
        yield f"{path}.template.spec.containers[0].env[{name}]", "redis", text
    for name in sorted({"redis-password", "redis-username"} & set(head.ray_start_params)):
        text = f"belongs to {found.at}.gcsFaultToleranceOptions"
        yield f"{path}.rayStartParams.{name}", "redis", text
    annotations, options = found.manifest.annotations, cluster.gcs_fault_tolerance_options
    for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if options is not None and annotations.get(name):  # V:153-156, 183-186
            text = f"cannot be with {found.at}.gcsFaultToleranceOptions; keep the latter"
            yield f"metadata.annotations.{name}", "redis", text


def _gates(found: RayObject, cluster: Cluster) -> Faults:
    for name, (field, gate) in GATES.items():
        if getattr(cluster, name) is not None:
            text = (
                f"needs the operator's feature gate {gate}, which is off by default; without it "
                f"the operator refuses the object"
            )
            yield f"{found.at}.{field}", "feature-gate", text
    options = cluster.gcs_fault_tolerance_options or {}
    if options.get("backend") == "rocksdb":  # V:335-338
        text = (
            "rocksdb needs the operator's feature gate GCSFaultToleranceEmbeddedStorage, which is "
            "off by default; without it the operator refuses the object"
        )
        yield f"{found.at}.gcsFaultToleranceOptions.backend", "feature-gate", text
    kind = (cluster.upgrade_strategy or {}).get("type")
    if kind and (found.manifest.kind != "RayCluster" or kind not in ("Recreate", "None")):
        text = f"is {kind!r}; a RayCluster alone has it, with Recreate or None"  # V:42-57
        yield f"{found.at}.upgradeStrategy.type", "upgrade", text


CHECKS = _head, _autoscaling, _scaled_groups, _worker_groups, _auth, _redis, _gates


# --- kinds -----------------------------------------------------------------------------------

KINDS = {
    "ray.io": (("v1",), ("RayCluster", "RayJob", "RayService", "RayCronJob")),
    "kueue.x-k8s.io": (
        ("v1beta2", "v1beta1"),
        ("ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass", "Topology"),
    ),
}
"""Known versions and kinds, by group; kinds of other groups are ignored."""


def check_kind(manifest: Manifest) -> Iterator[Problem]:
    """Check that the version and kind exist, and that the object has a name."""
    if manifest.kind == LAUNCHER:
        return
    for key, value in (("apiVersion", manifest.api_version), ("kind", manifest.kind)):
        if not value:
            yield Problem(manifest, key, "kind", "is missing; every object has it")
    if not manifest.name and manifest.kind and not manifest.metadata.get("generateName"):
        yield Problem(manifest, "metadata.name", "kind", "is missing; every object has it")
    yield from _known_kind(manifest)
    yield from _name(manifest)


def _name(manifest: Manifest) -> Iterator[Problem]:
    name, most = manifest.name, LONGEST_NAME.get(manifest.kind)
    if most is None or not name:
        return
    if len(name) > most:
        text = f"has {len(name)} characters; KubeRay allows {most} for a {manifest.kind}"
        yield Problem(manifest, "metadata.name", "name-length", text)
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        text = f"{name!r}: small letters, digits and -, beginning with a letter"
        yield Problem(manifest, "metadata.name", "name-form", text)


def _known_kind(manifest: Manifest) -> Iterator[Problem]:
    group, _, version = manifest.api_version.rpartition("/")
    ray_kinds = KINDS["ray.io"][1]
    if manifest.kind in ray_kinds and group != "ray.io":
        text = f"is {manifest.api_version}; a {manifest.kind} is of ray.io/v1"
        yield Problem(manifest, "apiVersion", "kind", text)
    if group not in KINDS:
        return
    versions, kinds = KINDS[group]
    if version not in versions:
        text = f"is {manifest.api_version}; write {group}/{versions[0]}"
        yield Problem(manifest, "apiVersion", "kind", text)
    if manifest.kind and manifest.kind not in kinds:
        text = f"{group} has no kind {manifest.kind!r}; known: {', '.join(kinds)}"
        yield Problem(manifest, "kind", "kind", text)
