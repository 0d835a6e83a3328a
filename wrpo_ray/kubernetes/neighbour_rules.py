"""Objects beside Ray's: volume claims, places that were left as an example has them, and backends.

Names and ports of the Services that the operator makes: KubeRay 1.7.0, controllers/ray:
common/service.go:181-260, 437-450, utils/util.go (`NAME-head-svc`, `NAME-serve-svc`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from wrpo_ray.kubernetes.manifests import Manifest, Problem, document_in, mapping
from wrpo_ray.kubernetes.ray_objects import RAY_KINDS, path_text
from wrpo_ray.kubernetes.reference_rules import EXTERNAL, declared

EXAMPLE = re.compile(r"^[a-z][a-z0-9+.-]*://(your-|<|[A-Z]{3})")
"""An address as examples have them: `s3://your-bucket/run`, `gs://BUCKET/run`, `hdfs://<host>`."""
PLACEHOLDERS = {"ACCOUNT", "PROJECT", "POLICY", "fs-0123456789abcdef0", "nfs.example.com"}
"""What the guide writes for names of a cloud and of its storage."""
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": 8000, "metrics": 8080}
"""Ports of a Ray pod that the operator names where the manifest does not."""
SERVE, SERVE_PORT = "serve", 8000
Port = int | str


def check(manifest: Manifest, manifests: Sequence[Manifest]) -> Iterator[Problem]:
    """Yield the problems of an object of any kind."""
    for path, value in _addresses(manifest.body, ()):
        text = f"{value!r} is the example's; put your own in its place"
        yield Problem(manifest, path, "placeholder", text)
    if manifest.kind == "PersistentVolumeClaim":
        yield from _claim(manifest)
    beside = [one for one in manifests if one.is_beside(manifest)]
    if manifest.kind == "Service":
        yield from _targets(manifest, beside)
    for path, name, port in _backends(manifest.body.get("spec"), ("spec",)):
        yield from _backend(manifest, path, name, port, beside)


def _addresses(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Yield each example's address, also in a config inside a text."""
    if isinstance(value, str):
        if EXAMPLE.match(value) or PLACEHOLDERS & set(value.split(":")):
            yield path_text(path), value
        elif "\n" in value and "://" in value:
            inside = document_in(value)
            yield from _addresses(inside if isinstance(inside, dict | list) else None, path)
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _addresses(part, (*path, key))


def _claim(manifest: Manifest) -> Iterator[Problem]:
    spec = mapping(manifest.body.get("spec"))
    modes, is_bound = spec.get("accessModes") or [], spec.get("volumeName") or spec.get("selector")
    if "ReadWriteMany" in modes and "storageClassName" not in spec and not is_bound:
        text = (
            "is missing: the cluster's default class is taken, and most have volumes of one node, "
            "so that the claim waits forever; name a class that offers ReadWriteMany"
        )
        yield Problem(manifest, "spec.storageClassName", "storage-class", text)


# --- ports -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """The pods of an object: their labels, and the ports that they declare by number and name."""

    labels: dict[str, Any]
    ports: set[Port] = field(default_factory=set)


def _backend(
    manifest: Manifest, path: str, name: str, port: Port | None, beside: Sequence[Manifest]
) -> Iterator[Problem]:
    """Check a Service that an Ingress or a route names."""
    services = dict(_services(beside))
    known, external = services.get(name), f"Service/{name}"
    if services and name not in services and external not in declared(manifest):
        text = (
            f"no Service {name!r} is made by these manifests; they make {_names(services)}. Name "
            f"one of them, or one that is elsewhere in the annotation {EXTERNAL}: {external}"
        )
        yield Problem(manifest, path, "backend", text)
    elif known is not None and isinstance(port, str) and port.isdecimal():
        yield Problem(manifest, path, "backend", f"the port {port!r} is a text; write {port}")
    elif known is not None and port is not None and port not in known:
        text = f"the Service {name!r} has no port {port!r}; it has {_names(known)}"
        yield Problem(manifest, path, "backend", text)


def _services(manifests: Sequence[Manifest]) -> Iterator[tuple[str, set[Port] | None]]:
    """Yield each Service with the numbers and names of its ports, also those of the operator.

    The ports of an ExternalName are those of its host: None.
    """
    for manifest in manifests:
        spec = mapping(manifest.body.get("spec"))
        if manifest.kind == "Service":
            is_elsewhere = spec.get("type") == "ExternalName"
            yield manifest.name, None if is_elsewhere else _ports(spec.get("ports"), "port")
        if manifest.kind in ("RayCluster", "RayService"):
            cluster = spec if manifest.kind == "RayCluster" else spec.get("rayClusterConfig")
            head = mapping(mapping(cluster).get("headGroupSpec"))
            template = mapping(mapping(head.get("template")).get("spec"))
            first = mapping((template.get("containers") or [{}])[0])
            ports = _with_defaults(_ports(first.get("ports"), "containerPort"))
            yield _own_name(head.get("headService")) or f"{manifest.name}-head-svc", ports
            if manifest.kind == "RayService":
                named = [p for p in first.get("ports") or [] if _is_serve(p)]
                served = _ports(named, "containerPort") or {SERVE_PORT, SERVE}
                yield _own_name(spec.get("serveService")) or f"{manifest.name}-serve-svc", served


def _own_name(service: Any) -> str:
    """Return the name that an object gives the operator's Service; empty without one."""
    return str(mapping(mapping(service).get("metadata")).get("name") or "")


def _is_serve(port: Any) -> bool:
    name = str(mapping(port).get("name"))
    return name == SERVE or name.startswith(f"{SERVE}-")


def _with_defaults(ports: set[Port]) -> set[Port]:
    return ports | {part for name, n in PORTS.items() if name not in ports for part in (name, n)}


def _ports(given: Any, key: str) -> set[Port]:
    entries = [mapping(entry) for entry in given or []]
    return {e[k] for e in entries for k in (key, "name") if isinstance(e.get(k), int | str)}


def _targets(manifest: Manifest, beside: Sequence[Manifest]) -> Iterator[Problem]:
    """Check the names of ports of a Service; a number may be one that pods do not declare."""
    spec = mapping(manifest.body.get("spec"))
    selector = mapping(spec.get("selector"))
    templates = [one for m in beside for one in _templates(m.body, m.kind in RAY_KINDS)]
    chosen = [one for one in templates if selector and selector.items() <= one.labels.items()]
    declared = {port for template in chosen for port in template.ports}
    for number, entry in enumerate(map(mapping, spec.get("ports") or [])):
        target = entry.get("targetPort", entry.get("port"))
        if declared and isinstance(target, str) and target not in declared:
            text = f"is {target!r}, and the pods behind it have {_names(declared)}"
            yield Problem(manifest, f"spec.ports[{number}].targetPort", "backend", text)


def _templates(value: Any, is_ray: bool) -> Iterator[Template]:
    """Yield the templates of pods in an object."""
    if isinstance(value, list):
        for part in value:
            yield from _templates(part, is_ray)
    if not isinstance(value, dict):
        return
    template = mapping(value.get("template"))
    if containers := mapping(template.get("spec")).get("containers"):
        labels = dict(mapping(mapping(template.get("metadata")).get("labels")))
        ports = {p for c in containers for p in _ports(mapping(c).get("ports"), "containerPort")}
        if is_ray:
            kind = "worker" if "groupName" in value else "head"
            labels |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind}
            labels |= {"ray.io/group": value.get("groupName", "headgroup"), "ray.io/serve": "true"}
            labels |= {"app.kubernetes.io/created-by": "kuberay-operator"}
            labels |= {"app.kubernetes.io/name": "kuberay"}
        yield Template(labels, _with_defaults(ports) if is_ray else ports)
    for part in value.values():
        yield from _templates(part, is_ray)


def _backends(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str, Port | None]]:
    """Yield (path, Service, port) of the backends of an Ingress, and of a route of a Gateway."""
    for key, part in value.items() if isinstance(value, dict) else ():
        if key in ("backend", "defaultBackend") and (service := mapping(part).get("service")):
            port = mapping(mapping(service).get("port"))
            where = path_text((*path, key, "service"))
            yield where, str(service.get("name")), port.get("number", port.get("name"))
        elif key == "backendRefs" and isinstance(part, list):
            for number, one in enumerate(map(mapping, part)):
                is_service = one.get("kind", "Service") == "Service" and not one.get("group")
                if is_service and "namespace" not in one:
                    where = path_text((*path, key, number))
                    yield where, str(one.get("name")), one.get("port")
        else:
            yield from _backends(part, (*path, key))
    for number, part in enumerate(value) if isinstance(value, list) else ():
        yield from _backends(part, (*path, number))


def _names(ports: Any) -> str:
    return ", ".join(sorted(map(str, ports)))
