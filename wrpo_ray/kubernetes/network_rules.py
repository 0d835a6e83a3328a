"""Whether network policies let the job that cleans up Redis reach it.

KubeRay deletes a cluster's keys by a job with the head's pod and labels, but the node type
`redis-cleanup` (1.7.0, controllers/ray/raycluster_controller.go:1807-1880). A RayCluster is not
gone before that job's end, or 300 s (:289-352).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from wrpo_ray.kubernetes.manifests import Manifest, Problem, mapping, selects
from wrpo_ray.kubernetes.ray_objects import RayObject

CLEANUP = {
    "ray.io/is-ray-node": "yes",
    "ray.io/node-type": "redis-cleanup",
    "ray.io/group": "headgroup",
    "app.kubernetes.io/name": "kuberay",
    "app.kubernetes.io/created-by": "kuberay-operator",
}
"""Labels of the job's pod (common/pod.go:1165-1176), without the names of its cluster."""
REDIS_PORT = 6379
Labels = dict[str, Any]


def check(found: RayObject, manifests: Sequence[Manifest]) -> Iterator[Problem]:
    """Yield the policies' problem, if the cluster has its state in Redis."""
    options = (found.cluster and found.cluster.gcs_fault_tolerance_options) or {}
    address = str(options.get("redisAddress") or "").rpartition("//")[2].partition(",")[0]
    if not address:
        return
    host, _, port = address.partition(":")
    number = int(port) if port.isdecimal() else REDIS_PORT
    beside = [one for one in manifests if one.is_beside(found.manifest)]
    service, _, domain = host.partition(".")
    there = domain.partition(".")[0] or found.manifest.namespace
    near = [one for one in manifests if there in ("", one.namespace) or not one.namespace]
    redis = _labels_behind(service, near)
    pod = found.cluster.head_group_spec.template.metadata.labels | CLEANUP if found.cluster else {}
    closed = _closed("Egress", "to", pod, redis, number, beside)
    if not closed and redis is not None:
        closed = _closed("Ingress", "from", redis, pod, number, near)
    if closed:
        yield found.problem(
            f"{found.at}.gcsFaultToleranceOptions.redisAddress",
            "redis-clean-up",
            f"the NetworkPolicy {closed!r} keeps the job that deletes the cluster's keys from "
            f"Redis: each deleted cluster waits 5 minutes for it, and its keys stay. Admit pods "
            f"with ray.io/node-type: redis-cleanup",
        )


def _labels_behind(service: str, manifests: Sequence[Manifest]) -> Labels | None:
    """Return the labels of the pods behind a Service; None if it is not among the manifests."""
    for manifest in manifests:
        if manifest.kind == "Service" and manifest.name == service:
            selector = mapping(manifest.body.get("spec")).get("selector")
            return mapping(selector) or None
    return None


def _closed(
    direction: str,
    side: str,
    pod: Labels,
    peer: Labels | None,
    port: int,
    manifests: Sequence[Manifest],
) -> str | None:
    """Return the policy that closes a pod's connections to a peer; None if they are open."""
    closing = None
    for manifest in (one for one in manifests if one.kind == "NetworkPolicy"):
        spec = mapping(manifest.body.get("spec"))
        types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]
        if direction not in types or not selects(spec.get("podSelector"), pod):
            continue
        rules = spec.get(direction.lower()) or []
        if any(_admits(rule, side, peer, port) for rule in rules if isinstance(rule, dict)):
            return None
        closing = closing or manifest.name
    return closing


def _admits(rule: dict[str, Any], side: str, peer: Labels | None, port: int) -> bool:
    ports = [mapping(entry) for entry in rule.get("ports") or []]
    if ports and not any(_has(entry, port) for entry in ports):
        return False
    peers = [mapping(entry) for entry in rule.get(side) or []]
    if not peers:
        return True
    if peer is None:  # elsewhere: only a rule that names the port can be meant for it
        return bool(ports)
    return any(_is_peer(p, peer) for p in peers)


def _has(ports: dict[str, Any], port: int) -> bool:
    """Whether an entry of `ports` has a port; one with a name may be any."""
    first, last = ports.get("port"), ports.get("endPort")
    if ports.get("protocol", "TCP") != "TCP":
        return False
    if not isinstance(first, int):
        return True
    return first <= port <= (last if isinstance(last, int) else first)


def _is_peer(given: dict[str, Any], labels: Labels) -> bool:
    """Whether a pod may be meant: a block of addresses or a namespace may have it."""
    return "podSelector" not in given or selects(given["podSelector"], labels)
