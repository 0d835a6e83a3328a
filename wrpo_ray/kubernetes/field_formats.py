"""Checks every field of a manifest against its format.

A field is identified by its key and the keys above it. Null counts as absent, as in Kubernetes.
Not covered: fields without a format here, which KubeRay's schemas have, and objects of
other API groups, of which only the metadata is checked.
"""

from collections.abc import Iterator
from typing import Any

from wrpo_ray.kubernetes import formats as f
from wrpo_ray.kubernetes import secret_rules
from wrpo_ray.kubernetes.formats import Format, integer, one_of, or_empty
from wrpo_ray.kubernetes.manifests import LAUNCHER, Manifest, Problem
from wrpo_ray.kubernetes.ray_objects import SPECS, path_text

Path = tuple[str | int, ...]

KNOWN_GROUPS = ("", "apps", "batch", "networking.k8s.io", "policy", "ray.io", "kueue.x-k8s.io")
"""API groups whose fields have the formats below."""
LISTS_OF_MAPS = "containers initContainers env envFrom volumeMounts volumes tolerations ports"
LISTS_OF_MAPS += " imagePullSecrets volumeClaimTemplates ingress egress from to workerGroupSpecs"
LISTS_OF_MAPS += " deletionRules resourceGroups flavors matchExpressions"
LISTS_OF_TEXTS = "command args add drop"
MAPS = "metadata labels annotations limits requests emptyDir template matchLabels nodeSelector spec"
MAPS += " securityContext podSelector namespaceSelector secretKeyRef configMapKeyRef secretRef"
MAPS += " configMapRef persistentVolumeClaim secret configMap valueFrom headGroupSpec"
MAPS += " rayStartParams"
MAPS += " rayClusterSpec rayClusterConfig autoscalerOptions authOptions submitterPodTemplate"
MAPS += " submitterConfig capabilities seccompProfile readinessProbe livenessProbe startupProbe"
MAPS += " lifecycle preStop postStart exec tcpSocket httpGet preemption selector clusterSelector"
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


def _each(keys: str, expected: Format, *above: str) -> dict[tuple[str, ...], Format]:
    return {(*above, name): expected for name in keys.split()}


def _lists(keys: str, item: Format) -> dict[tuple[str, ...], Format]:
    items: dict[tuple[str, ...], Format] = {(name, "[]"): item for name in keys.split()}
    return _each(keys, f.LIST) | items


FREE_MAPS = (("csi", "volumeAttributes"), ("flexVolume", "options"))
"""Maps with any keys, defined by a storage driver."""
MODE = one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
FORMATS: dict[tuple[str, ...], Format] = {
    **_lists(LISTS_OF_MAPS, f.MAP),
    **_lists(LISTS_OF_TEXTS, f.TEXT),
    **_lists("accessModes", MODE),
    **_lists("policyTypes", one_of("Ingress", "Egress")),
    **_lists("coveredResources", f.KEY),
    ("matchExpressions", "[]", "key"): f.KEY,
    ("matchExpressions", "[]", "operator"): one_of("In", "NotIn", "Exists", "DoesNotExist"),
    ("matchExpressions", "[]", "values"): f.LIST,
    ("matchExpressions", "[]", "values", "[]"): f.LABEL_VALUE,
    **_each(MAPS, f.MAP),
    **_each(TEXTS, f.TEXT),
    **_each(FLAGS, f.BOOLEAN),
    **_each(COUNTS, integer(-f.INT32, f.INT32)),
    **_each(PORTS, f.PORT_NUMBER),
    **_each(SECONDS, integer(0)),
    **_each(ANY_SECONDS, integer(-f.INT32, f.INT32)),
    **_each(NAMES, f.SUBDOMAIN),
    **_each(NAMES_OR_NONE, or_empty(f.SUBDOMAIN)),
    **{(*path, "*"): f.TEXT for path in FREE_MAPS},
    **dict.fromkeys(FREE_MAPS, f.MAP),
    ("image",): f.NOT_EMPTY,
    ("volumes", "[]", "image"): f.MAP,
    ("volumes", "[]", "image", "reference"): f.NOT_EMPTY,
    ("volumes", "[]", "image", "pullPolicy"): one_of("Always", "IfNotPresent", "Never"),
    ("groupName",): f.DNS_LABEL,
    ("serviceName",): f.DNS_1035,
    ("metadata", "name"): f.SUBDOMAIN,
    ("metadata", "generateName"): f.TEXT,
    ("metadata", "namespace"): f.DNS_LABEL,
    ("labels", "*"): f.LABEL_VALUE,
    ("annotations", "*"): f.TEXT,
    ("annotations", "ray.io/initializing-timeout"): f.GO_TIME,
    **{(name, "*"): f.LABEL_VALUE for name in SELECTORS.split()},
    ("containers", "[]", "name"): f.DNS_LABEL,
    ("initContainers", "[]", "name"): f.DNS_LABEL,
    ("volumes", "[]", "name"): f.DNS_LABEL,
    ("volumeMounts", "[]", "name"): f.DNS_LABEL,
    ("env", "[]", "name"): f.ENV_NAME,
    ("ports", "[]", "name"): f.DNS_LABEL,  # of a service
    **{
        (name, "[]", "ports", "[]", "name"): f.PORT_NAME
        for name in ("containers", "initContainers")
    },
    ("ports", "[]", "port"): f.PORT,
    ("ports", "[]", "targetPort"): f.PORT,
    ("ports", "[]", "protocol"): one_of("TCP", "UDP", "SCTP"),
    ("tcpSocket", "port"): f.PORT,
    ("httpGet", "port"): f.PORT,
    ("secretKeyRef", "key"): f.DATA_KEY,
    ("configMapKeyRef", "key"): f.DATA_KEY,
    **{(ref, "name"): f.SUBDOMAIN for ref in ("secretKeyRef", "configMapKeyRef", "configMap")},
    **{(ref, "name"): f.SUBDOMAIN for ref in ("secretRef", "configMapRef")},
    ("imagePullSecrets", "[]", "name"): f.SUBDOMAIN,
    ("imagePullPolicy",): one_of("Always", "IfNotPresent", "Never"),
    ("restartPolicy",): one_of("Always", "OnFailure", "Never"),
    ("emptyDir", "medium"): one_of("", "Memory", "HugePages", "HugePages-2Mi", "HugePages-1Gi"),
    ("emptyDir", "sizeLimit"): f.QUANTITY,
    ("resources", "limits", "*"): f.QUANTITY,
    ("resources", "requests", "*"): f.QUANTITY,
    ("capacity", "*"): f.QUANTITY,
    ("tolerations", "[]"): f.TOLERATION,
    ("tolerations", "[]", "key"): or_empty(f.KEY),
    ("tolerations", "[]", "operator"): one_of("Exists", "Equal", "Lt", "Gt"),
    ("tolerations", "[]", "effect"): one_of("", "NoSchedule", "PreferNoSchedule", "NoExecute"),
    ("fsGroupChangePolicy",): one_of("OnRootMismatch", "Always"),
    ("seccompProfile", "type"): one_of("RuntimeDefault", "Unconfined", "Localhost"),
    ("env", "[]", "value"): f.TEXT,
    ("spec", "resources"): f.MAP,
    # Ray
    **{(name, "[]", "resources"): f.MAP for name in ("containers", "workerGroupSpecs")},
    ("autoscalerOptions", "resources"): f.MAP,
    ("headGroupSpec", "resources"): f.MAP,
    ("workerGroupSpecs", "[]", "resources", "*"): f.QUANTITY,
    ("headGroupSpec", "resources", "*"): f.QUANTITY,
    **_each("num-cpus num-gpus", f.COUNT, "rayStartParams"),
    **_each("memory object-store-memory", f.BYTES, "rayStartParams"),
    **_each(RAY_PORTS, f.PORT_TEXT, "rayStartParams"),
    ("rayStartParams", "resources"): f.QUOTED_RESOURCES,
    ("rayStartParams", "*"): f.TEXT,
    ("spec", "entrypointNumCpus"): f.NUMBER,
    ("spec", "entrypointNumGpus"): f.NUMBER,
    ("spec", "entrypointResources"): f.JSON_RESOURCES,
    ("upscalingMode",): one_of("Default", "Aggressive", "Conservative"),
    ("submitterConfig", "backoffLimit"): integer(0),
    # Kueue
    **_each("nominalQuota borrowingLimit lendingLimit", f.QUANTITY),
    ("flavors", "[]", "name"): f.SUBDOMAIN,
    ("flavors", "[]", "resources"): f.LIST,
    ("flavors", "[]", "resources", "[]"): f.MAP,
    ("withinClusterQueue",): one_of("Never", "LowerPriority", "LowerOrNewerEqualPriority"),
}
"""Formats by the end of a field's path; `*` is any key, `[]` any item. The longest end wins."""
MONITORS: dict[tuple[str, ...], Format] = {
    **_lists(MONITOR_LISTS, f.MAP),
    **_lists("sourceLabels", f.TEXT),
    ("targetLabel",): f.TEXT,
    ("spec",): f.MAP,
    ("selector",): f.MAP,
    ("podMetricsEndpoints", "[]", "port"): f.PORT_NAME,
    ("endpoints", "[]", "port"): f.PORT_NAME,
    ("interval",): f.PROMETHEUS_TIME,
    ("scrapeTimeout",): f.PROMETHEUS_TIME,
    ("matchLabels",): f.MAP,
    ("matchLabels", "*"): f.LABEL_VALUE,
}
"""Formats of Prometheus' monitors."""
METADATA = {path: expected for path, expected in FORMATS.items() if "metadata" in path}
METADATA |= {path: FORMATS[path] for path in (("labels",), ("labels", "*"), ("annotations",))}
METADATA |= {("annotations", "*"): f.TEXT, ("kind",): f.TEXT, ("apiVersion",): f.TEXT}
"""Formats at the top of objects of other groups."""
TOP = ("apiVersion", "kind", "metadata")
MONITOR_KINDS = ("PodMonitor", "ServiceMonitor")
KEYED = ("labels", "annotations", "limits", "requests", *SELECTORS.split())
"""Mappings whose keys have a format."""


def check(manifest: Manifest) -> Iterator[Problem]:
    """Yield each field whose type or format Kubernetes would reject."""
    if manifest.kind == LAUNCHER:
        return
    group = manifest.api_version.rpartition("/")[0]
    is_known = group in KNOWN_GROUPS or _is_monitor(manifest, group)
    body = {k: v for k, v in manifest.body.items() if is_known or k in TOP}
    for path, rule, value, text in _walk(body, (), _formats_of(manifest, group)):
        hidden = secret_rules.hide(manifest, path, value, text)
        yield Problem(manifest, path_text(path), rule, hidden)


def _is_monitor(manifest: Manifest, group: str) -> bool:
    return group == "monitoring.coreos.com" and manifest.kind in MONITOR_KINDS


def _formats_of(manifest: Manifest, group: str) -> dict[tuple[str, ...], Format]:
    name = ("metadata", "name")
    if _is_monitor(manifest, group):
        return METADATA | MONITORS
    if group not in KNOWN_GROUPS:
        return METADATA | ({name: f.PATH_SEGMENT} if group == "rbac.authorization.k8s.io" else {})
    own: dict[tuple[str, ...], Format] = {}
    if manifest.kind in ("ConfigMap", "Secret"):
        maps = ("data", "stringData", "binaryData")
        return METADATA | {(k,): f.MAP for k in maps} | {(k, "*"): f.TEXT for k in maps}
    if manifest.kind == "ResourceQuota":
        own = {("spec", "hard"): f.MAP, ("hard", "*"): f.QUANTITY}
    if manifest.kind == "LimitRange":
        own = {("spec", "limits"): f.LIST, ("spec", "limits", "[]"): f.MAP}
    if manifest.kind in SPECS:  # `rules` are stricter about their names
        own = {name: f.TEXT}
    if manifest.kind == "Service":
        own = {name: f.DNS_1035, ("spec", "selector", "*"): f.LABEL_VALUE}
    if manifest.kind == "Namespace":
        own = {name: f.DNS_LABEL}
    if manifest.kind == "WorkloadPriorityClass":
        own = {("value",): integer(-f.INT32)}
    return FORMATS | own


def _walk(
    value: Any, path: Path, formats: dict[tuple[str, ...], Format]
) -> Iterator[tuple[Path, str, Any, str]]:
    """Yield (path, rule, value, problem) for a value and all below; nothing below a wrong one."""
    if value is None and not isinstance(path[-1], int):
        return
    expected = _format(path, formats)
    if expected and (wrong := expected.wrong(value)):
        yield path, expected.rule, value, wrong
        return
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    is_keyed = bool(path) and path[-1] in KEYED and isinstance(value, dict) and expected is f.MAP
    for name, part in items:
        if is_keyed and (wrong := f.KEY.wrong(name)):
            yield (*path, name), f.KEY.rule, part, wrong
        else:
            yield from _walk(part, (*path, name), formats)


def _format(path: Path, formats: dict[tuple[str, ...], Format]) -> Format | None:
    """Return the format of the longest matching end of a path; a named key goes before `*`."""
    ends = tuple("[]" if isinstance(part, int) else part for part in path)
    for length in (5, 4, 3, 2, 1):
        end = ends[-length:]
        if len(end) == length and (found := formats.get(end) or formats.get((*end[:-1], "*"))):
            return f.WHOLE_QUANTITY if found is f.QUANTITY and _is_device(path) else found
    return None


def _is_device(path: Path) -> bool:
    name = str(path[-1])
    return len(path) > 1 and path[-2] in ("limits", "requests") and "/" in name
