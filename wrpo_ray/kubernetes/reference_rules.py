"""Objects that others refer to: they are among the manifests, optional, or declared elsewhere."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from wrpo_ray.kubernetes.manifests import Manifest, Problem, mapping
from wrpo_ray.kubernetes.ray_objects import path_text

EXTERNAL = "wrpo-ray/external"
"""Annotation: `Kind/name` of objects that exist elsewhere, separated by spaces."""
REFERENCES = {
    "secretKeyRef": ("Secret", "name"),
    "secretRef": ("Secret", "name"),
    "secret": ("Secret", "secretName"),
    "authOptions": ("Secret", "secretName"),
    "imagePullSecrets": ("Secret", "name"),
    "configMapKeyRef": ("ConfigMap", "name"),
    "configMapRef": ("ConfigMap", "name"),
    "configMap": ("ConfigMap", "name"),
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
}
"""Key of a reference: (kind of the object, key of its name)."""
ACCOUNT = "serviceAccountName"


KEYED = {
    "secretKeyRef": "Secret",
    "configMapKeyRef": "ConfigMap",
    "secret": "Secret",
    "configMap": "ConfigMap",
}
"""Keys of references that may name keys of the object: itself by `key`, or a list of `items`."""
DATA = ("data", "stringData", "binaryData")
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
OF_CLUSTER = ("PriorityClass", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass")
"""Kinds without a namespace."""
BUILT_IN = "system-"
"""How the names of Kubernetes' own priority classes begin."""


def check(manifest: Manifest, manifests: Sequence[Manifest]) -> Iterator[Problem]:
    """Check that references of pods are among the manifests, optional, or declared external."""
    there = _there(manifest, manifests) | declared(manifest)
    for path, one, is_optional in _references(manifest.body.get("spec"), ("spec",)):
        if not is_optional and one not in there:
            kind, _, name = one.partition("/")
            yield Problem(
                manifest,
                path,
                "reference",
                f"{kind} {name!r} is not in these manifests; add it, or name it in the "
                f"annotation {EXTERNAL}: {one}",
            )
    yield from _check_keys(manifest, [one for one in manifests if one.is_beside(manifest)])


def _check_keys(manifest: Manifest, beside: Sequence[Manifest]) -> Iterator[Problem]:
    """Check the keys of references to objects that are among the manifests."""
    keys: dict[str, set[str]] = {}
    for one in beside:
        if one.kind in ("Secret", "ConfigMap"):
            own = {str(key) for part in DATA for key in mapping(one.body.get(part))}
            keys.setdefault(f"{one.kind}/{one.name}", set()).update(own)
    for path, wanted, key in _keys(manifest.body.get("spec"), ("spec",)):
        if wanted in keys and key not in keys[wanted]:
            kind, _, name = wanted.partition("/")
            close = difflib.get_close_matches(key, keys[wanted], n=1, cutoff=0.6)
            known = ", ".join(sorted(keys[wanted])) or "none"
            hint = f"did you mean {close[0]!r}?" if close else f"it has {known}"
            text = f"the {kind} {name!r} has no key {key!r}; {hint}"
            yield Problem(manifest, path, "reference-key", text)


def _keys(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str, str]]:
    """Yield (path, `Kind/name`, key) of each key of a reference that has to be there."""
    for number, part in enumerate(value) if isinstance(value, list) else ():
        yield from _keys(part, (*path, number))
    for name, part in value.items() if isinstance(value, dict) else ():
        here = (*path, name)
        if name in KEYED and isinstance(part, dict) and not part.get("optional"):
            one = f"{KEYED[name]}/{part.get('name') or part.get('secretName')}"
            if part.get("key"):
                yield path_text((*here, "key")), one, str(part["key"])
            items = part.get("items")
            for number, item in enumerate(items if isinstance(items, list) else ()):
                if key := mapping(item).get("key"):
                    yield path_text((*here, "items", number, "key")), one, str(key)
        yield from _keys(part, here)


def _there(manifest: Manifest, manifests: Sequence[Manifest]) -> set[str]:
    """Return the objects that a manifest can refer to, as `Kind/name`."""
    near = [m for m in manifests if m.kind in OF_CLUSTER or m.is_beside(manifest)]
    return {f"{m.kind}/{m.name}" for m in near}


def declared(manifest: Manifest) -> set[str]:
    """Return the objects that a manifest declares to exist elsewhere, as `Kind/name`."""
    return set(str(manifest.annotations.get(EXTERNAL, "")).replace(",", " ").split())


def external(manifests: Sequence[Manifest], is_optional: bool) -> dict[str, list[str]]:
    """Return the objects that exist elsewhere, as `Kind/name`, by namespace.

    They are either those that are declared and needed, or those that are used if they exist.
    """
    found: dict[str, set[str]] = {}
    for manifest in manifests:
        used: dict[str, bool] = {}
        for _, one, may_miss in _references(manifest.body.get("spec"), ("spec",)):
            used[one] = may_miss and used.get(one, True)
        used = dict.fromkeys(declared(manifest), False) | used
        wanted = {one for one, may_miss in used.items() if may_miss is is_optional}
        wanted |= set() if is_optional else set(_named(manifest))
        for one in wanted - _there(manifest, manifests):
            is_of_cluster = one.partition("/")[0] in OF_CLUSTER
            found.setdefault("" if is_of_cluster else manifest.namespace, set()).add(one)
    return {namespace: sorted(names) for namespace, names in sorted(found.items()) if names}


def _named(manifest: Manifest) -> Iterator[str]:
    """Yield the classes and queues that an object names, which others may have made."""
    spec, labels = mapping(manifest.body.get("spec")), manifest.labels
    for label, kind in ((QUEUE, "LocalQueue"), (PRIORITY, "WorkloadPriorityClass")):
        if name := labels.get(label):
            yield f"{kind}/{name}"
    if manifest.kind == "LocalQueue" and (name := spec.get("clusterQueue")):
        yield f"ClusterQueue/{name}"
    groups = spec.get("resourceGroups") if manifest.kind == "ClusterQueue" else []
    for group in map(mapping, groups if isinstance(groups, list) else []):
        flavors = group.get("flavors")
        for flavor in map(mapping, flavors if isinstance(flavors, list) else []):
            yield f"ResourceFlavor/{flavor.get('name')}"
    for name in _priority_classes(spec):
        if not name.startswith(BUILT_IN):
            yield f"PriorityClass/{name}"


def _priority_classes(value: Any) -> Iterator[str]:
    for part in value if isinstance(value, list) else ():
        yield from _priority_classes(part)
    for key, part in value.items() if isinstance(value, dict) else ():
        if key == "priorityClassName" and part and isinstance(part, str):
            yield part
        yield from _priority_classes(part)


def _references(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str, bool]]:
    """Yield (path, `Kind/name`, whether it is optional) of each reference below."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _references(item, (*path, number))
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        here = (*path, key)
        if key == ACCOUNT and isinstance(part, str) and part not in ("", "default"):
            yield path_text(here), f"ServiceAccount/{part}", False
        if key in REFERENCES:
            kind, name_key = REFERENCES[key]
            for item in part if isinstance(part, list) else [part]:
                if isinstance(item, dict) and key == "secret" and "name" in item:
                    name_key = "name"  # of a projected volume
                name = item.get(name_key) if isinstance(item, dict) else None
                if name:
                    yield path_text((*here, name_key)), f"{kind}/{name}", bool(item.get("optional"))
        yield from _references(part, here)
