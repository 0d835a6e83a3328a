"""Ray objects that Kueue's webhooks reject, or that its queues never admit.

Source: Kueue 0.19.1, pkg/controller/jobs: rayjob/rayjob_webhook.go (W), raycluster/common.go (R).
"""

from collections.abc import Iterator, Sequence

from wrpo_ray.kubernetes.manifests import Body, Manifest, Problem, mapping, selects
from wrpo_ray.kubernetes.ray_objects import Cluster, Faults, RayObject

QUEUE, ELASTIC = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/elastic-job"
POD_SETS = {18: "0.19", 10: "0.18", 8: "0.15"}
"""{maximum of pod sets in a workload: the first Kueue with it}: head, groups, submitter
(jobframework/constants.go:21 of 0.18.0 and 0.19.0; workload_types.go:36 of 0.15.0 to 0.17.8)."""
NAMESPACE = "kubernetes.io/metadata.name"
"""The label with a namespace's name, which Kubernetes sets."""
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
    local = _local_queue(found, manifests)
    queue = _cluster_queue(local, manifests) if local else None
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


def check_namespaces(found: RayObject, manifests: Sequence[Manifest]) -> Iterator[Problem]:
    """Yield a problem if the object's queue is in, or its quota is for, another namespace.

    A ClusterQueue admits the namespaces that its selector selects; without one, none
    (clusterqueue_types.go, `namespaceSelector`).
    """
    name, field = found.manifest.labels.get(QUEUE), f"metadata.labels.{QUEUE}"
    local = _local_queue(found, manifests)
    others = [one.namespace for one in manifests if (one.kind, one.name) == ("LocalQueue", name)]
    if local is None and others:
        text = (
            f"the LocalQueue {name!r} is in namespace {', '.join(sorted(others))}, and the object "
            f"in {found.manifest.namespace}: a queue is for its own namespace"
        )
        yield found.problem(field, "queue", text)
    queue = _cluster_queue(local, manifests) if local else None
    namespace = found.manifest.namespace or (local.namespace if local else "")
    if queue is not None and _admits(queue, namespace, manifests) is False:
        text = (
            f"its ClusterQueue's namespaceSelector does not select the namespace "
            f"{namespace or '(any)'}: the run is never admitted; select it, or {{}} for all"
        )
        yield found.problem(field, "queue-namespace", text)


def _admits(queue: Body, namespace: str, manifests: Sequence[Manifest]) -> bool | None:
    """Whether a queue admits a namespace; None if that depends on labels which are elsewhere."""
    selector = queue.get("namespaceSelector")
    if selector is None:
        return False
    given = [one for one in manifests if (one.kind, one.name) == ("Namespace", namespace)]
    wanted = {*mapping(selector.get("matchLabels"))}
    wanted |= {str(mapping(e).get("key")) for e in selector.get("matchExpressions") or []}
    if wanted and (not namespace or (not given and wanted != {NAMESPACE})):
        return None
    return selects(selector, {NAMESPACE: namespace} | (given[0].labels if given else {}))


def _local_queue(found: RayObject, manifests: Sequence[Manifest]) -> Manifest | None:
    name = found.manifest.labels.get(QUEUE)
    beside = [one for one in manifests if one.is_beside(found.manifest)]
    return next((one for one in beside if (one.kind, one.name) == ("LocalQueue", name)), None)


def _cluster_queue(local: Manifest, manifests: Sequence[Manifest]) -> Body | None:
    name = mapping(local.body.get("spec")).get("clusterQueue")
    queues = [one for one in manifests if (one.kind, one.name) == ("ClusterQueue", name)]
    return mapping(queues[0].body.get("spec")) if queues else None
