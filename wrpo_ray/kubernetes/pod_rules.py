"""Rules for pods that no schema knows: one Ray version, equal GPUs, shared memory, volumes."""

import difflib
import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from wrpo_ray import __version__
from wrpo_ray.kubernetes import node_rules
from wrpo_ray.kubernetes.manifests import Body, Manifest, Problem, mapping
from wrpo_ray.kubernetes.ray_objects import (
    GPU,
    Container,
    Faults,
    Group,
    RayObject,
    number_of,
    path_text,
)

IMAGE = "wrpo-ray"
"""Last part of the name of the project's image; its tag is VERSION-gpu or VERSION-cpu."""
OBJECT_STORE = 0.3
"""Ray's default share of a node's memory for its object store."""


def check(found: RayObject) -> Iterator[Problem]:
    """Yield the problems of an object's pods."""
    for field, rule, text in _faults(found):
        yield found.problem(field, rule, text)


def _faults(found: RayObject) -> Faults:
    if found.cluster:
        yield from _ray_version(found.at, found.cluster.ray_version)
    yield from _images(found)
    for path, group in found.groups:
        yield from _gpus(path, group)
        yield from _shared_memory(path, group)
    if found.cluster:
        yield from node_rules.faults(found, found.cluster)


# --- versions --------------------------------------------------------------------------------


def _ray_version(at: str, given: str) -> Faults:
    pinned = _ray_here()
    if given != pinned:
        text = f"is {given or 'missing'}; the image has Ray {pinned}, and both have to be equal"
        yield f"{at}.rayVersion", "ray-version", text


@cache
def _ray_here() -> str:
    return importlib.metadata.version("ray")


def _images(found: RayObject) -> Faults:
    for path, container in _containers(found):
        name, _, tag = container.image.rpartition("/")[2].partition("@")[0].partition(":")
        field = f"{path}.image"
        if not tag or tag == "latest":
            text = f"{container.image or 'no image'}: give a tag of one version, not the newest"
            yield field, "image-version", text
            continue
        expected = {IMAGE: __version__, "ray": _ray_here()}.get(name)
        if expected and tag.partition("-")[0] != expected:
            text = f"is {container.image}; this is version {expected}: all nodes have the same"
            yield field, "image-version", text
        if tag.endswith("-cpu") and GPU in container.resources.limits:
            text = f"is {container.image}, built without CUDA, and the container asks for GPUs"
            yield field, "image-version", text


def _containers(found: RayObject) -> Iterator[tuple[str, Container]]:
    """Yield the containers that run Ray, and the one that submits the job."""
    for path, group in found.groups:
        if group.template.spec.containers:
            yield f"{path}.template.spec.containers[0]", group.ray
    submitter = found.job and found.job.submitter_pod_template
    if submitter and submitter.spec.containers:
        yield "spec.submitterPodTemplate.spec.containers[0]", submitter.spec.containers[0]


# --- resources -------------------------------------------------------------------------------


def _gpus(path: str, group: Group) -> Faults:
    asked = group.ray.resources
    field = f"{path}.template.spec.containers[0].resources"
    for name in sorted(n for n in {*asked.requests, *asked.limits} if n.endswith("/gpu")):
        request, limit = asked.requests.get(name), asked.limits.get(name)
        if limit is None or (request is not None and number_of(request) != number_of(limit)):
            yield (
                f"{field}.limits.{name}",
                "gpu-limits",
                f"is {limit or 'missing'} and the request is {request}: GPUs are not shared, so "
                f"Kubernetes wants both equal",
            )
    has = number_of(asked.limits.get(GPU, 0))
    given = group.resources.get("GPU", group.ray_start_params.get("num-gpus"))
    if given is not None and number_of(given) != has:
        where = "resources.GPU" if "GPU" in group.resources else "rayStartParams.num-gpus"
        text = f"is {given}, and the container has {has:g}: Ray would count others than there are"
        yield f"{path}.{where}", "gpu-count", text


def _shared_memory(path: str, group: Group) -> Faults:
    """/dev/shm holds Ray's object store and the buffers that the GPUs of a node share."""
    if not group.template.spec.containers:
        return
    field = f"{path}.template.spec"
    place = "/dev/shm"  # nosec B108 # compared with
    mounted = next((m for m in group.ray.volume_mounts if m.mount_path == place), None)
    volumes = [v for v in group.template.spec.volumes if mounted and v.name == mounted.name]
    volume = volumes[0].empty_dir if volumes else None
    if volume is None or volume.medium != "Memory":
        text = "no emptyDir of medium Memory is mounted at /dev/shm, so it has 64 MB"
        yield f"{field}.volumes", "shared-memory", text
        return
    memory = group.ray.resources.limits.get("memory")
    if memory is None or volume.size_limit is None:
        return
    size, whole = number_of(volume.size_limit), number_of(memory)
    if size >= whole or size < OBJECT_STORE * whole:
        yield (
            f"{field}.volumes[{mounted.name if mounted else ''}].emptyDir.sizeLimit",
            "shared-memory",
            f"is {volume.size_limit} of {memory} memory; it counts as memory, and Ray takes "
            f"{OBJECT_STORE:.0%} for objects: set it between the two",
        )


# --- volumes ---------------------------------------------------------------------------------


def check_volumes(manifest: Manifest) -> Iterator[Problem]:
    """Yield the mounts and volumes of pods that Kubernetes rejects."""
    for path, pod in _pods(manifest.body, ()):
        volumes = [str(mapping(v).get("name")) for v in pod.get("volumes") or []]
        for name in _twice(volumes):
            text = f"{name!r} is the name of two volumes"
            yield _volume_problem(manifest, (*path, "volumes"), text)
        claims = mapping(manifest.body.get("spec")).get("volumeClaimTemplates") or []
        known = {*volumes, *(str(mapping(mapping(c).get("metadata")).get("name")) for c in claims)}
        for key in ("initContainers", "containers"):
            for number, container in enumerate(map(mapping, pod.get(key) or [])):
                mounts = [mapping(mount) for mount in container.get("volumeMounts") or []]
                for text in _mount_faults(mounts, known):
                    yield _volume_problem(manifest, (*path, key, number, "volumeMounts"), text)


def _volume_problem(manifest: Manifest, path: tuple[Any, ...], text: str) -> Problem:
    return Problem(manifest, path_text(path), "volumes", f"{text}: Kubernetes rejects the pod")


def _mount_faults(mounts: list[Body], volumes: set[str]) -> Iterator[str]:
    for name in sorted({str(mount.get("name")) for mount in mounts} - volumes):
        close = difflib.get_close_matches(name, volumes, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        yield f"the pod has no volume {name!r}{hint}"
    for place in _twice([str(mount.get("mountPath")).rstrip("/") for mount in mounts]):
        yield f"two volumes are mounted at {place}"


def _twice(names: list[str]) -> list[str]:
    return sorted(name for name, n in Counter(names).items() if n > 1)


def _pods(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Body]]:
    """Yield the specs of pods in an object, each with its path."""
    if isinstance(value, dict) and isinstance(value.get("containers"), list):
        yield path, value
        return
    for key, part in value.items() if isinstance(value, dict) else ():
        yield from _pods(part, (*path, key))
    for number, part in enumerate(value) if isinstance(value, list) else ():
        yield from _pods(part, (*path, number))
