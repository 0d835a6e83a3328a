"""Ray objects that Kueue's webhooks reject.

Source: Kueue 0.19.1, pkg/controller/jobs: rayjob/rayjob_webhook.go (W), raycluster/common.go (R).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from wrpo_ray.kubernetes.manifests import Manifest, Problem
from wrpo_ray.kubernetes.ray_objects import Cluster, Faults, RayObject

QUEUE, ELASTIC = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/elastic-job"
POD_SETS = {18: "0.19", 10: "0.18", 8: "0.15"}
"""{maximum of pod sets in a workload: the first Kueue with it}: head, groups, submitter
(jobframework/constants.go:21 of 0.18.0 and 0.19.0; workload_types.go:36 of 0.15.0 to 0.17.8)."""
HEAD = "head"
"""The name of the head's pod set, which no group may have (R:318-326)."""


def faults(found: RayObject, cluster: Cluster) -> Faults:
    """Yield the problems of an object in a queue."""
    if QUEUE not in found.manifest.labels:
        return
    annotations = found.manifest.annotations
    if cluster.enable_in_tree_autoscaling and annotations.get(ELASTIC) != "true":  # R:301-311
        text = f'a queued cluster scales only with the annotation {ELASTIC}: "true"'
        yield f"{found.at}.enableInTreeAutoscaling", "queue", text
    job = found.job
    if job and not job.shutdown_after_job_finishes:  # W:137-140
        text = "has to be true in a queue, or the quota is never given back"
        yield "spec.shutdownAfterJobFinishes", "queue", text
    if job and job.cluster_selector:  # W:117-122
        text = "cannot be with a queue and a rayClusterSpec: Kueue starts the job's own cluster"
        yield "spec.clusterSelector", "queue", text
    for path, group in found.workers:
        if group.group_name == HEAD:
            text = f"{HEAD!r} is the name that Kueue gives the head; take another"
            yield f"{path}.groupName", "queue", text
    yield from _pod_sets(found)


def _pod_sets(found: RayObject) -> Faults:
    job, groups = found.job, len(found.workers)
    others = 1 + bool(job and job.submission_mode == "K8sJobMode")
    versions = {most - others: version for most, version in POD_SETS.items()}
    room = max(versions)
    field = f"{found.at}.workerGroupSpecs"
    if groups > room:
        text = f"has {groups} groups; a workload of Kueue has room for {room} here"
        yield field, "queue", text
    elif groups > min(versions):
        since = versions[min(most for most in versions if most >= groups)]
        text = (
            f"has {groups} groups; that needs Kueue {since} or later, and an older one has room "
            f"for {min(versions)} here"
        )
        yield field, "queue-version", text


def check_quota(found: RayObject, manifests: Sequence[Manifest]) -> Iterator[Problem]:
    """Yield the resources that the object's queue, if it is among the manifests, has no quota for.

    Kueue never admits a pod with such a request (0.19.1,
    scheduler/flavorassigner/flavorassigner.go:1036).
    """
    name = found.manifest.labels.get(QUEUE)
    local = _spec(manifests, "LocalQueue", name) if name else None
    queue = _spec(manifests, "ClusterQueue", local.get("clusterQueue")) if local else None
    if not queue:
        return
    covered = {
        resource
        for group in queue.get("resourceGroups") or []
        for resource in group.get("coveredResources") or []
    }
    for path, group in found.groups:
        asked = group.ray.resources
        missing = sorted({*asked.requests, *asked.limits} - covered)
        if missing:
            field = f"{path}.template.spec.containers[0].resources.requests"
            text = (
                f"asks for {', '.join(missing)}, of which its ClusterQueue "
                f"covers nothing: the run is never admitted; add it to coveredResources, with a "
                f"quota"
            )
            yield found.problem(field, "queue-quota", text)


def _spec(manifests: Sequence[Manifest], kind: str, name: Any) -> dict[str, Any] | None:
    for manifest in manifests:
        if (manifest.kind, manifest.name) == (kind, name):
            spec = manifest.body.get("spec")
            return spec if isinstance(spec, dict) else None
    return None
