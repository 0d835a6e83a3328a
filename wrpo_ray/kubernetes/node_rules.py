"""Settings of a cluster's pods that lose work, waste GPUs, or ask for nodes that few clouds have.

Source: KubeRay 1.7.0, ray-operator/controllers/ray/common/pod.go (P).
"""

from collections.abc import Callable

from wrpo_ray.kubernetes.ray_objects import GPU, Cluster, Faults, Group, RayObject, number_of
from wrpo_ray.runtime.placement import NO_GPU_NODES

LOGS, LOGS_PATH = "ray-logs", "/tmp/ray"  # nosec B108 # compared with
"""The volume that head and autoscaler share, and its path (P:30-31)."""
STAY = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}
"""Annotations that keep Karpenter and the cluster autoscaler from emptying a pod's node."""
CPUS_PER_GPU = 10
"""CPUs for each GPU that common nodes have room for beside the system's pods: p4d.24xlarge and
ND96asr have 12, a2-highgpu and g2-standard 12, p5.48xlarge 24."""


def faults(found: RayObject, cluster: Cluster) -> Faults:
    """Yield the problems of an object's nodes."""
    for path, group in found.groups:
        if group.template.spec.containers:
            yield from _no_gpus(path, group)
    if cluster.enable_in_tree_autoscaling:
        yield from _replicas(found)
        yield from _open_to_all_work(found)
        yield from _autoscaler_log(f"{found.at}.headGroupSpec", cluster.head_group_spec)
    yield from _each(found, _may_be_evicted, "metadata.annotations", "evictions", EVICTED)
    yield from _each(found, _no_disk, f"{CONTAINER}.resources.requests", "disk", DISK)
    yield from _each(found, _many_cpus, f"{CONTAINER}.resources.requests.cpu", "cpus-per-gpu", MANY)


EVICTED = (
    "{groups}: a cluster autoscaler may remove a node while it works. Annotate the pods with "
    + " and ".join(f'{name}: "{value}"' for name, value in STAY.items())
)
DISK = (
    "{groups}: ephemeral-storage is not requested, though volumes of the node's disk are mounted: "
    "the pod may come to a node without room, and is evicted when its disk is full"
)
MANY = (
    f"{{groups}}: more than {CPUS_PER_GPU} CPUs for each GPU: several families of nodes have 12, "
    f"less what the system takes, and such a pod never fits them"
)
CONTAINER = "spec.containers[0]"


def _no_gpus(path: str, group: Group) -> Faults:
    """Without a number of GPUs, `ray start` counts all that it sees on the machine."""
    given = group.resources.get("GPU", group.ray_start_params.get("num-gpus"))
    asked = group.ray.resources
    if GPU in {*asked.limits, *asked.requests} or given is not None:
        return
    yield (
        f"{path}.rayStartParams.num-gpus",
        "stray-gpus",
        "is missing, and the pod asks for no GPU: on a node with GPUs Ray may count and use "
        'those of other pods; set "0"',
    )


def _replicas(found: RayObject) -> Faults:
    """Applying the file again sets the number back, and removes the nodes above it."""
    given = [group.group_name for _, group in found.workers if group.replicas is not None]
    if given:
        yield (
            f"{found.at}.workerGroupSpecs",
            "replicas",
            f"{', '.join(given)}: the autoscaler writes `replicas`, and applying the file again "
            f"sets it back; leave it out (minReplicas is the start)",
        )


def _open_to_all_work(found: RayObject) -> Faults:
    """For work without GPUs Ray's autoscaler only prefers other groups; a label excludes these."""
    given = [
        group.group_name
        for _, group in found.workers
        if number_of(group.ray.resources.limits.get(GPU, 0)) > 0
        and any(group.labels.get(name) != value.lstrip("!") for name, value in NO_GPU_NODES.items())
    ]
    if given:
        label = ", ".join(f'{name}: "{value.lstrip("!")}"' for name, value in NO_GPU_NODES.items())
        yield (
            f"{found.at}.workerGroupSpecs",
            "gpu-label",
            f"{', '.join(given)}: without the label {label}, steps without GPUs start such nodes "
            f"when the other groups are full; add it to the group's `labels`",
        )


def _autoscaler_log(path: str, head: Group) -> Faults:
    """KubeRay gives the autoscaler its own volume unless the head's has this name (P:862-870)."""
    mounted = next((m.name for m in head.ray.volume_mounts if m.mount_path == LOGS_PATH), LOGS)
    if mounted != LOGS:
        yield (
            f"{path}.template.spec.volumes[{mounted}]",
            "autoscaler-log",
            f"is mounted at {LOGS_PATH} under another name than {LOGS}, so the autoscaler's log is "
            f"not in the head's folder, nor in the dashboard; name the volume {LOGS}",
        )


def _each(
    found: RayObject, is_wrong: Callable[[Group], bool], place: str, rule: str, text: str
) -> Faults:
    """Report a rule once, with all groups that violate it."""
    wrong = [(path, group) for path, group in found.groups if is_wrong(group)]
    if wrong:
        names = [getattr(group, "group_name", "head") for _, group in wrong]
        yield f"{wrong[0][0]}.template.{place}", rule, text.format(groups=", ".join(names))


def _may_be_evicted(group: Group) -> bool:
    return not STAY.items() <= group.template.metadata.annotations.items()


def _no_disk(group: Group) -> bool:
    volumes = {
        v.name for v in group.template.spec.volumes if v.empty_dir and not v.empty_dir.medium
    }
    has_some = any(mount.name in volumes for mount in group.ray.volume_mounts)
    return has_some and "ephemeral-storage" not in group.ray.resources.requests


def _many_cpus(group: Group) -> bool:
    asked = group.ray.resources
    cpus = number_of(asked.requests.get("cpu", asked.limits.get("cpu", 0)))
    gpus = number_of(asked.limits.get(GPU, 0))
    return gpus > 0 and cpus > CPUS_PER_GPU * gpus
