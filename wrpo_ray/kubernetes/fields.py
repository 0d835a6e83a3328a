"""Each field of an object by the grammar of its value: types, quantities, names, labels, ports.

An object is walked from top to bottom; a field is known by its key and those above it. What is
null is left out for Kubernetes. Not covered: fields without a form here, which KubeRay's schemas
(`--crds`) have, and objects of other groups, of which only metadata is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wrpo_ray.kubernetes.grammar import (
    BOOLEAN,
    BYTES,
    COUNT,
    DATA_KEY,
    DNS_1035,
    DNS_LABEL,
    ENV_NAME,
    GO_TIME,
    INT32,
    JSON_RESOURCES,
    KEY,
    LABEL_VALUE,
    LIST,
    MAP,
    NOT_EMPTY,
    NUMBER,
    PATH_SEGMENT,
    PORT,
    PORT_NAME,
    PORT_NUMBER,
    PORT_TEXT,
    PROMETHEUS_TIME,
    QUANTITY,
    QUOTED_RESOURCES,
    SUBDOMAIN,
    TEXT,
    TOLERATION,
    WHOLE_QUANTITY,
    Form,
    integer,
    one_of,
    or_empty,
)
from wrpo_ray.kubernetes.manifests import LAUNCHER, Manifest, Problem
from wrpo_ray.kubernetes.objects import SPECS, path_text

Path = tuple[str | int, ...]

KNOWN_GROUPS = ("", "apps", "batch", "networking.k8s.io", "policy", "ray.io", "kueue.x-k8s.io")
"""API groups whose fields have the meanings below."""
LISTS_OF_MAPS = "containers initContainers env envFrom volumeMounts volumes tolerations ports"
LISTS_OF_MAPS += " imagePullSecrets volumeClaimTemplates ingress egress from to workerGroupSpecs"
LISTS_OF_MAPS += " deletionRules resourceGroups flavors"
LISTS_OF_TEXTS = "command args add drop"
MAPS = "metadata labels annotations limits requests emptyDir template matchLabels nodeSelector spec"
MAPS += " securityContext podSelector namespaceSelector secretKeyRef configMapKeyRef secretRef"
MAPS += (
    " configMapRef persistentVolumeClaim secret configMap valueFrom headGroupSpec rayStartParams"
)
MAPS += " rayClusterSpec rayClusterConfig autoscalerOptions authOptions submitterPodTemplate"
MAPS += " submitterConfig capabilities seccompProfile readinessProbe livenessProbe startupProbe"
MAPS += " tcpSocket httpGet preemption selector clusterSelector"
TEXTS = "apiVersion kind rayVersion entrypoint serveConfigV2 runtimeEnvYAML mountPath subPath"
FLAGS = "enableInTreeAutoscaling suspend shutdownAfterJobFinishes optional runAsNonRoot readOnly"
FLAGS += " allowPrivilegeEscalation readOnlyRootFilesystem automountServiceAccountToken hostNetwork"
FLAGS += " excludeHeadPodFromServeSvc"
COUNTS = "replicas numOfHosts minReplicas maxReplicas runAsUser runAsGroup fsGroup"
NAMES = "claimName secretName clusterQueue"
NAMES_OR_NONE = "serviceAccountName storageClassName priorityClassName"
SELECTORS = "matchLabels nodeSelector clusterSelector"
PORTS = "containerPort hostPort nodePort"
SECONDS = "terminationGracePeriodSeconds idleTimeoutSeconds initialDelaySeconds timeoutSeconds"
SECONDS += " preRunningDeadlineSeconds rayClusterDeletionDelaySeconds"
SECONDS += " serviceUnhealthySecondThreshold deploymentUnhealthySecondThreshold"
ANY_SECONDS = "activeDeadlineSeconds ttlSecondsAfterFinished ttlSeconds tolerationSeconds"
RAY_PORTS = "port dashboard-port ray-client-server-port node-manager-port object-manager-port"
RAY_PORTS += " metrics-export-port dashboard-agent-listen-port min-worker-port max-worker-port"
MONITOR_LISTS = "podMetricsEndpoints endpoints relabelings metricRelabelings"


def _each(keys: str, form: Form, *above: str) -> dict[tuple[str, ...], Form]:
    return {(*above, name): form for name in keys.split()}


def _lists(keys: str, item: Form) -> dict[tuple[str, ...], Form]:
    items: dict[tuple[str, ...], Form] = {(name, "[]"): item for name in keys.split()}
    return _each(keys, LIST) | items


FREE_MAPS = (("csi", "volumeAttributes"), ("flexVolume", "options"))
"""Of a driver's own words."""
MODE = one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
FORMS: dict[tuple[str, ...], Form] = {
    **_lists(LISTS_OF_MAPS, MAP),
    **_lists(LISTS_OF_TEXTS, TEXT),
    **_lists("accessModes", MODE),
    **_lists("policyTypes", one_of("Ingress", "Egress")),
    **_lists("coveredResources", KEY),
    **_each(MAPS, MAP),
    **_each(TEXTS, TEXT),
    **_each(FLAGS, BOOLEAN),
    **_each(COUNTS, integer(-INT32, INT32)),
    **_each(PORTS, PORT_NUMBER),
    **_each(SECONDS, integer(0)),
    **_each(ANY_SECONDS, integer(-INT32, INT32)),
    **_each(NAMES, SUBDOMAIN),
    **_each(NAMES_OR_NONE, or_empty(SUBDOMAIN)),
    **{(*path, "*"): TEXT for path in FREE_MAPS},
    **dict.fromkeys(FREE_MAPS, MAP),
    ("image",): NOT_EMPTY,
    ("groupName",): DNS_LABEL,
    ("serviceName",): DNS_1035,
    ("metadata", "name"): SUBDOMAIN,
    ("metadata", "generateName"): TEXT,
    ("metadata", "namespace"): DNS_LABEL,
    ("labels", "*"): LABEL_VALUE,
    ("annotations", "*"): TEXT,
    ("annotations", "ray.io/initializing-timeout"): GO_TIME,
    **{(name, "*"): LABEL_VALUE for name in SELECTORS.split()},
    ("containers", "[]", "name"): DNS_LABEL,
    ("initContainers", "[]", "name"): DNS_LABEL,
    ("volumes", "[]", "name"): DNS_LABEL,
    ("volumeMounts", "[]", "name"): DNS_LABEL,
    ("env", "[]", "name"): ENV_NAME,
    ("ports", "[]", "name"): DNS_LABEL,  # of a service
    **{(name, "[]", "ports", "[]", "name"): PORT_NAME for name in ("containers", "initContainers")},
    ("ports", "[]", "port"): PORT,
    ("ports", "[]", "targetPort"): PORT,
    ("ports", "[]", "protocol"): one_of("TCP", "UDP", "SCTP"),
    ("tcpSocket", "port"): PORT,
    ("httpGet", "port"): PORT,
    ("secretKeyRef", "key"): DATA_KEY,
    ("configMapKeyRef", "key"): DATA_KEY,
    **{(ref, "name"): SUBDOMAIN for ref in ("secretKeyRef", "configMapKeyRef", "configMap")},
    **{(ref, "name"): SUBDOMAIN for ref in ("secretRef", "configMapRef")},
    ("imagePullSecrets", "[]", "name"): SUBDOMAIN,
    ("imagePullPolicy",): one_of("Always", "IfNotPresent", "Never"),
    ("restartPolicy",): one_of("Always", "OnFailure", "Never"),
    ("emptyDir", "medium"): one_of("", "Memory", "HugePages", "HugePages-2Mi", "HugePages-1Gi"),
    ("emptyDir", "sizeLimit"): QUANTITY,
    ("resources", "limits", "*"): QUANTITY,
    ("resources", "requests", "*"): QUANTITY,
    ("capacity", "*"): QUANTITY,
    ("tolerations", "[]"): TOLERATION,
    ("tolerations", "[]", "key"): or_empty(KEY),
    ("tolerations", "[]", "operator"): one_of("Exists", "Equal", "Lt", "Gt"),
    ("tolerations", "[]", "effect"): one_of("", "NoSchedule", "PreferNoSchedule", "NoExecute"),
    ("fsGroupChangePolicy",): one_of("OnRootMismatch", "Always"),
    ("seccompProfile", "type"): one_of("RuntimeDefault", "Unconfined", "Localhost"),
    ("env", "[]", "value"): TEXT,
    ("spec", "resources"): MAP,
    # Ray
    **{(name, "[]", "resources"): MAP for name in ("containers", "workerGroupSpecs")},
    ("autoscalerOptions", "resources"): MAP,
    ("headGroupSpec", "resources"): MAP,
    ("workerGroupSpecs", "[]", "resources", "*"): QUANTITY,
    ("headGroupSpec", "resources", "*"): QUANTITY,
    **_each("num-cpus num-gpus", COUNT, "rayStartParams"),
    **_each("memory object-store-memory", BYTES, "rayStartParams"),
    **_each(RAY_PORTS, PORT_TEXT, "rayStartParams"),
    ("rayStartParams", "resources"): QUOTED_RESOURCES,
    ("rayStartParams", "*"): TEXT,
    ("spec", "entrypointNumCpus"): NUMBER,
    ("spec", "entrypointNumGpus"): NUMBER,
    ("spec", "entrypointResources"): JSON_RESOURCES,
    ("upscalingMode",): one_of("Default", "Aggressive", "Conservative"),
    ("submitterConfig", "backoffLimit"): integer(0),
    # Kueue
    **_each("nominalQuota borrowingLimit lendingLimit", QUANTITY),
    ("flavors", "[]", "name"): SUBDOMAIN,
    ("flavors", "[]", "resources"): LIST,
    ("flavors", "[]", "resources", "[]"): MAP,
    ("withinClusterQueue",): one_of("Never", "LowerPriority", "LowerOrNewerEqualPriority"),
}
"""Forms by the end of a field's path; `*` is any key, `[]` any item. The longest end counts."""
MONITORS: dict[tuple[str, ...], Form] = {
    **_lists(MONITOR_LISTS, MAP),
    **_lists("sourceLabels", TEXT),
    ("targetLabel",): TEXT,
    ("spec",): MAP,
    ("selector",): MAP,
    ("podMetricsEndpoints", "[]", "port"): PORT_NAME,
    ("endpoints", "[]", "port"): PORT_NAME,
    ("interval",): PROMETHEUS_TIME,
    ("scrapeTimeout",): PROMETHEUS_TIME,
    ("matchLabels",): MAP,
    ("matchLabels", "*"): LABEL_VALUE,
}
"""Those of Prometheus' monitors."""
METADATA = {path: form for path, form in FORMS.items() if "metadata" in path}
METADATA |= {path: FORMS[path] for path in (("labels",), ("labels", "*"), ("annotations",))}
METADATA |= {("annotations", "*"): TEXT, ("kind",): TEXT, ("apiVersion",): TEXT}
"""Those of objects of other groups, at their top."""
TOP = ("apiVersion", "kind", "metadata")
MONITOR_KINDS = ("PodMonitor", "ServiceMonitor")
KEYED = ("labels", "annotations", "limits", "requests", *SELECTORS.split())
"""Mappings whose keys have a form."""


def check(manifest: Manifest) -> Iterator[Problem]:
    """Each field whose type or form Kubernetes would refuse."""
    if manifest.kind == LAUNCHER:
        return
    group = manifest.api_version.rpartition("/")[0]
    is_known = group in KNOWN_GROUPS or _is_monitor(manifest, group)
    body = {k: v for k, v in manifest.body.items() if is_known or k in TOP}
    for path, rule, text in _walk(body, (), _forms_of(manifest, group)):
        yield Problem(manifest, path_text(path), rule, text)


def _is_monitor(manifest: Manifest, group: str) -> bool:
    return group == "monitoring.coreos.com" and manifest.kind in MONITOR_KINDS


def _forms_of(manifest: Manifest, group: str) -> dict[tuple[str, ...], Form]:
    name = ("metadata", "name")
    if _is_monitor(manifest, group):
        return METADATA | MONITORS
    if group not in KNOWN_GROUPS:
        return METADATA | ({name: PATH_SEGMENT} if group == "rbac.authorization.k8s.io" else {})
    own: dict[tuple[str, ...], Form] = {}
    if manifest.kind in ("ConfigMap", "Secret"):
        maps = ("data", "stringData", "binaryData")
        return METADATA | {(k,): MAP for k in maps} | {(k, "*"): TEXT for k in maps}
    if manifest.kind == "LimitRange":
        own = {("spec", "limits"): LIST, ("spec", "limits", "[]"): MAP}
    if manifest.kind in SPECS:  # `rules` are stricter about their names
        own = {name: TEXT}
    if manifest.kind == "Service":
        own = {name: DNS_1035, ("spec", "selector", "*"): LABEL_VALUE}
    if manifest.kind == "Namespace":
        own = {name: DNS_LABEL}
    if manifest.kind == "WorkloadPriorityClass":
        own = {("value",): integer(-INT32)}
    return FORMS | own


def _walk(
    value: Any, path: Path, forms: dict[tuple[str, ...], Form]
) -> Iterator[tuple[Path, str, str]]:
    """(path, rule, what is wrong) of a value and all below it; nothing below a wrong one."""
    if value is None and not isinstance(path[-1], int):
        return
    form = _form(path, forms)
    if form and (wrong := form.wrong(value)):
        yield path, form.rule, wrong
        return
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    is_keyed = bool(path) and path[-1] in KEYED and isinstance(value, dict) and form is MAP
    for name, part in items:
        if is_keyed and (wrong := KEY.wrong(name)):
            yield (*path, name), KEY.rule, wrong
        else:
            yield from _walk(part, (*path, name), forms)


def _form(path: Path, forms: dict[tuple[str, ...], Form]) -> Form | None:
    """That of the longest end of a path; of two as long the one that names the last key."""
    ends = tuple("[]" if isinstance(part, int) else part for part in path)
    for length in (5, 4, 3, 2, 1):
        end = ends[-length:]
        if len(end) == length and (found := forms.get(end) or forms.get((*end[:-1], "*"))):
            return WHOLE_QUANTITY if found is QUANTITY and _is_device(path) else found
    return None


def _is_device(path: Path) -> bool:
    name = str(path[-1])
    return len(path) > 1 and path[-2] in ("limits", "requests") and "/" in name
