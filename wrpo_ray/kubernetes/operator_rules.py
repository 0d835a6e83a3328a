"""Configurations that KubeRay's operator, Ray or Kueue reject, though the schema allows them.

Each rule yields the problems of an object. Sources: KubeRay 1.7's validation of RayCluster,
RayJob and RayService, its documentation, and Kueue's webhooks for Ray.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from wrpo_ray.kubernetes.manifests import LAUNCHER, Manifest, Problem
from wrpo_ray.kubernetes.ray_objects import (
    Cluster,
    DeletionRule,
    Job,
    RayObject,
    Service,
    UpgradeStrategy,
)
from wrpo_ray.text.documents import describe_yaml_error, read_document

LONGEST_NAME = {"RayCluster": 63, "RayJob": 47, "RayService": 47}
"""KubeRay appends to names, and the result may have 63 characters."""
AUTH_SINCE = (2, 52)
"""The first Ray with token authentication."""
SWITCH_V2 = "RAY_enable_autoscaler_v2"
QUEUE, ELASTIC = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/elastic-job"
POD_SETS = 8
"""Maximum pod sets in a workload of Kueue."""
UPGRADES = (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade")
UNREADABLE = frozenset({"min-max-replicas", "replicas-range", "no-container"})
"""Rules that Ray's autoscaler relies on; it cannot evaluate objects that violate them."""
Faults = Iterator[tuple[str, str, str]]
"""(field, rule, what is wrong)."""


def check(found: RayObject) -> Iterator[Problem]:
    """Yield the problems of an object by all rules."""
    for field, rule, text in _faults(found):
        yield found.problem(field, rule, text)


def _faults(found: RayObject) -> Faults:
    yield from _name(found)
    if cluster := found.cluster:
        for check_cluster in (_head, _autoscaling, _worker_groups, _auth, _redis, _queue):
            yield from check_cluster(found, cluster)
        yield from _group_settings(found)
    if job := found.job:
        for check_job in (_job, _job_modes, _clean_up):
            yield from check_job(found, job)
        yield from _runtime_env(job)
    if found.service and found.service.upgrade_strategy:
        yield from _upgrade(found, found.service, found.service.upgrade_strategy)


def version_of(text: str) -> tuple[int, ...]:
    """Return (2, 60, 0) for "2.60.0"; empty if it is not a version."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in match.groups(default="0")) if match else ()


# --- every object ----------------------------------------------------------------------------


def _name(found: RayObject) -> Faults:
    name, most = found.manifest.name, LONGEST_NAME[found.manifest.kind]
    if len(name) > most:
        text = f"has {len(name)} characters; KubeRay allows {most} for a {found.manifest.kind}"
        yield "metadata.name", "name-length", text
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        text = f"{name!r}: small letters, digits and -, beginning with a letter"
        yield "metadata.name", "name-form", text


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
    head_env = {e.name: e.value for e in cluster.head_group_spec.ray.env}
    if SWITCH_V2 in head_env and cluster.autoscaler_options and cluster.autoscaler_options.version:
        text = f"and the head's {SWITCH_V2}: set the former"
        yield f"{options}.version", "autoscaler-twice", text
    for path, group in found.workers:
        if group.idle_timeout_seconds is not None and not cluster.has_v2:
            yield (
                f"{path}.idleTimeoutSeconds",
                "idle-timeout-v2",
                f"has an effect only with {options}.version: v2 and enableInTreeAutoscaling: true",
            )
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
    is_token = cluster.auth_options and cluster.auth_options.mode == "token"
    if is_token and version_of(cluster.ray_version) < AUTH_SINCE:
        text = f"token needs rayVersion 2.52.0 or later (got {cluster.ray_version or 'none'})"
        yield f"{found.at}.authOptions.mode", "auth-version", text


def _redis(found: RayObject, cluster: Cluster) -> Faults:
    path, head = f"{found.at}.headGroupSpec", cluster.head_group_spec
    named = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
    for name in sorted(named & {e.name for e in head.ray.env}):
        text = f"belongs to {found.at}.gcsFaultToleranceOptions"
        yield f"{path}.template.spec.containers[0].env[{name}]", "redis", text
    for name in sorted({"redis-password", "redis-username"} & set(head.ray_start_params)):
        text = f"belongs to {found.at}.gcsFaultToleranceOptions"
        yield f"{path}.rayStartParams.{name}", "redis", text


# --- RayJob ----------------------------------------------------------------------------------


def _job(_: RayObject, job: Job) -> Faults:
    if not job.ray_cluster_spec and not job.cluster_selector:
        text = "is missing; give it, or clusterSelector for a cluster that is there"
        yield "spec.rayClusterSpec", "no-cluster", text
    if job.cluster_selector and not job.cluster_selector.get("ray.io/cluster"):
        text = "names no cluster; write {ray.io/cluster: NAME}"
        yield "spec.clusterSelector", "no-cluster", text
    if not job.entrypoint.strip() and job.submission_mode != "InteractiveMode":
        text = "is missing; it is the command to run"
        yield "spec.entrypoint", "entrypoint", text
    if job.active_deadline_seconds is not None and job.active_deadline_seconds <= 0:
        text = f"is {job.active_deadline_seconds}; it is a number of seconds above 0"
        yield "spec.activeDeadlineSeconds", "deadline", text
    if job.backoff_limit < 0:
        text = f"is {job.backoff_limit}; it is a number of further tries, 0 or more"
        yield "spec.backoffLimit", "backoff", text
    if job.suspend and (not job.shutdown_after_job_finishes or job.cluster_selector):
        text = "needs shutdownAfterJobFinishes: true, and a cluster of the job's own"
        yield "spec.suspend", "suspended-job", text


def _job_modes(found: RayObject, job: Job) -> Faults:
    if job.submission_mode == "InteractiveMode" and job.backoff_limit > 0:
        text = "cannot be with submissionMode: InteractiveMode"
        yield "spec.backoffLimit", "backoff", text
    if job.submission_mode != "SidecarMode":
        return
    unfit = {
        "submitterPodTemplate": job.submitter_pod_template,
        "submitterConfig": job.submitter_config,
        "clusterSelector": job.cluster_selector or None,
    }
    for name, value in unfit.items():
        if value is not None:
            text = "cannot be with submissionMode: SidecarMode, which submits from the head's pod"
            yield f"spec.{name}", "sidecar-mode", text
    head = job.ray_cluster_spec and job.ray_cluster_spec.head_group_spec
    if head and head.template.spec.restart_policy not in ("", "Never"):
        text = "SidecarMode needs Never, or nothing"
        place = f"{found.at}.headGroupSpec.template.spec.restartPolicy"
        yield place, "sidecar-mode", text


def _clean_up(found: RayObject, job: Job) -> Faults:
    if job.ttl_seconds_after_finished < 0:
        text = f"is {job.ttl_seconds_after_finished}; it is a number of seconds, 0 or more"
        yield "spec.ttlSecondsAfterFinished", "clean-up", text
    if job.ttl_seconds_after_finished > 0 and not job.shutdown_after_job_finishes:
        text = "needs shutdownAfterJobFinishes: true"
        yield "spec.ttlSecondsAfterFinished", "clean-up", text
    strategy = job.deletion_strategy
    if not strategy:
        return
    path, rules = "spec.deletionStrategy", strategy.deletion_rules
    older = [p for p in (strategy.on_success, strategy.on_failure) if p is not None]
    if rules and job.shutdown_after_job_finishes:
        text = "and shutdownAfterJobFinishes: two ways to clean up; keep one"
        yield f"{path}.deletionRules", "both-clean-ups", text
    if rules and older:
        text = "and onSuccess or onFailure: two ways to clean up; keep one"
        yield f"{path}.deletionRules", "both-clean-ups", text
    if not rules and len(older) < 2:
        text = "needs deletionRules, or both onSuccess and onFailure"
        yield path, "clean-up", text
    policies = [rule.policy for rule in rules] + [str(p.get("policy")) for p in older]
    if "DeleteWorkers" in policies and found.cluster and found.cluster.enable_in_tree_autoscaling:
        text = "DeleteWorkers cannot be with the autoscaler; use DeleteCluster"
        yield path, "clean-up", text
    yield from _deletion_order(rules)


def _deletion_order(rules: Sequence[DeletionRule]) -> Faults:
    """For one status, workers are deleted before the cluster, and the cluster before the job."""
    order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
    by_status: dict[tuple[str | None, str | None], list[tuple[int, int]]] = {}
    for rule in rules:
        when = rule.condition
        if (when.job_status is None) == (when.job_deployment_status is None):
            text = "a condition has either jobStatus or jobDeploymentStatus"
            yield "spec.deletionStrategy.deletionRules", "clean-up", text
        if rule.policy in order:
            key = when.job_status, when.job_deployment_status
            by_status.setdefault(key, []).append((order.index(rule.policy), when.ttl_seconds))
    for (status, _), steps in by_status.items():
        seconds = [ttl for _, ttl in sorted(steps)]
        if seconds != sorted(seconds) or len({place for place, _ in steps}) < len(steps):
            text = f"{status}: each policy once, with ttlSeconds rising from workers to the job"
            yield "spec.deletionStrategy.deletionRules", "clean-up", text


def _runtime_env(job: Job) -> Faults:
    if not job.runtime_env:
        return
    field = "spec.runtimeEnvYAML"
    try:
        given = read_document(job.runtime_env)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = f"is not valid YAML: {describe_yaml_error(error)}"
        yield field, "runtime-env", text
        return
    yield from _runtime_env_keys(field, given)


def _runtime_env_keys(field: str, given: Any) -> Faults:
    from ray.runtime_env import RuntimeEnv

    try:
        RuntimeEnv(**given)
    except Exception as error:  # its checks do not validate all input
        yield field, "runtime-env", f"Ray refuses it: {' '.join(str(error).split())}"
        return
    for name in sorted(set(given) - set(RuntimeEnv.known_fields)):
        yield f"{field}.{name}", "runtime-env", "Ray has no such key"


# --- RayService, Kueue -----------------------------------------------------------------------


def _upgrade(found: RayObject, service: Service, strategy: UpgradeStrategy) -> Faults:
    path = "spec.upgradeStrategy"
    if strategy.type not in UPGRADES:
        text = f"is {strategy.type!r}; known: {', '.join(filter(None, UPGRADES))}"
        yield f"{path}.type", "upgrade", text
    if strategy.type != "NewClusterWithIncrementalUpgrade":
        return
    if not service.ray_cluster_config.enable_in_tree_autoscaling:
        text = "an incremental upgrade needs the autoscaler"
        yield f"{found.at}.enableInTreeAutoscaling", "upgrade", text
    if not strategy.cluster_upgrade_options:
        text = "an incremental upgrade needs clusterUpgradeOptions with a gatewayClassName"
        yield f"{path}.clusterUpgradeOptions", "upgrade", text


def _queue(found: RayObject, cluster: Cluster) -> Faults:
    """Kueue's conditions for an object in a queue."""
    if QUEUE not in found.manifest.labels:
        return
    annotations = found.manifest.annotations
    if cluster.enable_in_tree_autoscaling and annotations.get(ELASTIC) != "true":
        text = f'a queued cluster scales only with the annotation {ELASTIC}: "true"'
        yield f"{found.at}.enableInTreeAutoscaling", "queue", text
    job = found.job
    if job and not job.shutdown_after_job_finishes:
        text = "has to be true in a queue, or the quota is never given back"
        yield "spec.shutdownAfterJobFinishes", "queue", text
    room = POD_SETS - 1 - bool(job and job.submission_mode == "K8sJobMode")
    if len(found.workers) > room:
        text = f"has {len(found.workers)} groups; a workload of Kueue has room for {room} here"
        yield f"{found.at}.workerGroupSpecs", "queue", text


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
