"""What KubeRay, Kueue and Ray do with an object, as rules: each limit is met, and then exceeded."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support.edits import Edit, at, both, drop, put
from support.manifests import FUSION, Body, ray_objects

from wrpo_ray import cli, config
from wrpo_ray.kubernetes.check import Report, check
from wrpo_ray.kubernetes.manifests import ADVICE

RAY = "template.spec.containers[0]"
HEAD = "spec.headGroupSpec"
GROUPS = "spec.workerGroupSpecs"
ONE = f"{GROUPS}[generate-1gpu]"
JOB, SERVICE = "spec.rayClusterSpec", "spec.rayClusterConfig"
SERVE = """
applications:
  - name: wrpo
    import_path: wrpo_ray.serve.app:build
    args: {timeout: 100, models: [{name: fused, model: m, actors: {num_gpus: 1}}]}
    deployments: [%s]
"""
SAVED = {"ttlSeconds": 60, "jobStatus": "SUCCEEDED"}


def nothing(_: Body) -> None:
    """The object as it is shipped."""


def note(name: str, value: str) -> Edit:
    return lambda body: body["metadata"].setdefault("annotations", {}).update({name: value})


def environment(head: str, *variables: dict[str, Any]) -> Edit:
    """Gives the head these variables alone."""
    return put(f"{head}.{RAY}.env", list(variables))


def mode(name: str) -> Edit:
    def edit(body: Body) -> None:
        spec = body["spec"]
        spec["submissionMode"] = name
        for field in ("submitterConfig", "submitterPodTemplate"):
            spec.pop(field, None)

    return edit


TOLERATIONS = "spec.rayClusterSpec.headGroupSpec.template.spec.tolerations"


def head_leaves(seconds: int | None) -> Edit:
    """A head on a lost node is waited for as long; as by default without a number."""
    keys = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
    given = [{"key": k, "effect": "NoExecute", "tolerationSeconds": seconds} for k in keys]
    return put(TOLERATIONS, [] if seconds is None else given)


def of_selector(**fields: Any) -> Edit:
    """Makes a RayJob run on a cluster that is there."""
    job = {"clusterSelector": {"ray.io/cluster": "wrpo"}, "backoffLimit": 0} | fields

    def edit(body: Body) -> None:
        del body["spec"]["rayClusterSpec"]
        body["spec"] |= {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0} | job

    return edit


def older(success: str | None, failure: str | None, shutdown: bool = False) -> Edit:
    policies = {"onSuccess": {"policy": success}, "onFailure": {"policy": failure}}
    given = {name: {} if p["policy"] is None else p for name, p in policies.items()}
    return lambda body: body["spec"].update(
        deletionStrategy=given, shutdownAfterJobFinishes=shutdown, ttlSecondsAfterFinished=0
    )


def groups(many: int) -> Edit:
    """A queued object with as many groups of one name each."""

    def edit(body: Body) -> None:
        body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "fusion"}
        note("kueue.x-k8s.io/elastic-job", "true")(body)
        cluster = at(body, JOB)
        first = cluster["workerGroupSpecs"][0]
        cluster["workerGroupSpecs"] = [first | {"groupName": f"g{n}"} for n in range(many)]

    return edit


def k8s_tokens(version: str = "2.60.0", **options: Any) -> Edit:
    given = {"mode": "token", "enableK8sTokenAuth": True} | options
    return both(put("spec.authOptions", given), put("spec.rayVersion", version))


def incremental(**options: Any) -> Edit:
    right = {"gatewayClassName": "g", "stepSizePercent": 10, "intervalSeconds": 5}
    strategy = {"type": "NewClusterWithIncrementalUpgrade"}
    return put("spec.upgradeStrategy", strategy | {"clusterUpgradeOptions": right | options})


UPGRADE = "spec.upgradeStrategy.clusterUpgradeOptions"
INITIALIZING = "ray.io/initializing-timeout"
START = f"{JOB}.headGroupSpec.{RAY}.env[RAY_JOB_START_TIMEOUT_SECONDS]"
REDIS = {"redisAddress": "redis:6379"}
ALL_DAY = {"name": "RAY_JOB_START_TIMEOUT_SECONDS", "value": "86400"}
STAY = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}

LIMITS: dict[str, tuple[str, Edit, Edit, str, str]] = {
    # what: (kind, an edit that keeps within the limit, one that does not, field, rule)
    "name of a cluster": (
        "RayCluster", put("metadata.name", "c" * 53), put("metadata.name", "c" * 54),
        "metadata.name", "name-length",
    ),
    "name of a repeated job": (
        "RayJob", both(put("kind", "RayCronJob"), put("metadata.name", "c" * 36)),
        both(put("kind", "RayCronJob"), put("metadata.name", "c" * 37)),
        "metadata.name", "name-length",
    ),
    "tries on a cluster that is there": (
        "RayJob", of_selector(), of_selector(backoffLimit=1), "spec.backoffLimit", "backoff",
    ),
    "deadline before the run": (
        "RayJob", put("spec.preRunningDeadlineSeconds", 1),
        put("spec.preRunningDeadlineSeconds", 0), "spec.preRunningDeadlineSeconds", "deadline",
    ),
    "deleting a cluster of others": (
        "RayJob",
        of_selector(deletionStrategy={"deletionRules": [{"policy": "DeleteSelf",
                                                         "condition": SAVED}]}),
        of_selector(deletionStrategy={"deletionRules": [{"policy": "DeleteCluster",
                                                         "condition": SAVED}]}),
        "spec.deletionStrategy", "clean-up",
    ),
    "older clean-up without a policy": (
        "RayJob", older("DeleteSelf", "DeleteNone"), older("DeleteSelf", None),
        "spec.deletionStrategy", "clean-up",
    ),
    "older clean-up that keeps what is shut down": (
        "RayJob", older("DeleteSelf", "DeleteSelf", True), older("DeleteSelf", "DeleteNone", True),
        "spec.deletionStrategy", "clean-up",
    ),
    "older clean-up": (
        "RayJob", nothing, older("DeleteSelf", "DeleteSelf"), "spec.deletionStrategy", "deprecated",
    ),
    "autoscaler v2 without the autoscaler": (
        "RayCluster",
        both(drop("spec.autoscalerOptions"), environment(HEAD,
             {"name": "RAY_enable_autoscaler_v2", "value": "1"})),
        both(drop("spec.autoscalerOptions"), put("spec.enableInTreeAutoscaling", False),
             environment(HEAD, {"name": "RAY_enable_autoscaler_v2", "value": "1"})),
        "spec.enableInTreeAutoscaling", "autoscaling-off",
    ),
    "idle time of the cluster": (
        "RayCluster", put("spec.autoscalerOptions.idleTimeoutSeconds", 0),
        put("spec.autoscalerOptions.idleTimeoutSeconds", -1),
        "spec.autoscalerOptions.idleTimeoutSeconds", "idle-timeout",
    ),
    "idle time of a group": (
        "RayCluster", put(f"{ONE}.idleTimeoutSeconds", 0), put(f"{ONE}.idleTimeoutSeconds", -1),
        f"{ONE}.idleTimeoutSeconds", "idle-timeout",
    ),
    "priority with an old Ray": (
        "RayCluster", put(f"{ONE}.priority", 1),
        both(put(f"{ONE}.priority", 1), put("spec.rayVersion", "2.55.0")),
        f"{ONE}.priority", "priority",
    ),
    "tokens of Kubernetes with an old Ray": (
        "RayCluster", k8s_tokens(), k8s_tokens("2.54.0"),
        "spec.authOptions.enableK8sTokenAuth", "auth",
    ),
    "tokens of Kubernetes and a Secret": (
        "RayCluster", k8s_tokens(), k8s_tokens(secretName="token"),
        "spec.authOptions.enableK8sTokenAuth", "auth",
    ),
    "tokens of Kubernetes in a job": (
        "RayJob", nothing, put(f"{JOB}.authOptions", {"mode": "token", "enableK8sTokenAuth": True}),
        f"{JOB}.authOptions.enableK8sTokenAuth", "auth",
    ),
    "Redis named twice": (
        "RayService", both(put(f"{SERVICE}.gcsFaultToleranceOptions", REDIS)),
        both(put(f"{SERVICE}.gcsFaultToleranceOptions", REDIS), note("ray.io/ft-enabled", "true")),
        "metadata.annotations.ray.io/ft-enabled", "redis",
    ),
    "field behind a gate": (
        "RayCluster", nothing, put("spec.networkPolicy", {}), "spec.networkPolicy", "feature-gate",
    ),
    "state in RocksDB": (
        "RayCluster", nothing, put("spec.gcsFaultToleranceOptions", {"backend": "rocksdb"}),
        "spec.gcsFaultToleranceOptions.backend", "feature-gate",
    ),
    "way of changing a cluster": (
        "RayCluster", put("spec.upgradeStrategy", {"type": "Recreate"}),
        put("spec.upgradeStrategy", {"type": "NewCluster"}), "spec.upgradeStrategy.type", "upgrade",
    ),
    "way of changing a job's cluster": (
        "RayJob", nothing, put(f"{JOB}.upgradeStrategy", {"type": "Recreate"}),
        f"{JOB}.upgradeStrategy.type", "upgrade",
    ),
    "lost head": (
        "RayJob", head_leaves(120), head_leaves(121), TOLERATIONS, "lost-head",
    ),
    "lost head that is waited for forever": (
        "RayJob", head_leaves(0),
        both(head_leaves(20), lambda body: at(body, TOLERATIONS)[0].pop("tolerationSeconds")),
        TOLERATIONS, "lost-head",
    ),
    "lost head with one toleration": (
        "RayJob", head_leaves(20), both(head_leaves(20), lambda body: at(body, TOLERATIONS).pop()),
        TOLERATIONS, "lost-head",
    ),
    "lost head, and an operator that waits": (
        "RayJob",
        both(head_leaves(None),
             note("wrpo-ray/operator-env", "A=b RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS=1800")),
        both(head_leaves(None),
             note("wrpo-ray/operator-env", "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS=300")),
        TOLERATIONS, "lost-head",
    ),
    "head that is back late": (
        "RayJob", both(head_leaves(20), mode("SidecarMode")),
        both(head_leaves(20), mode("K8sJobMode")), "spec.submissionMode", "slow-head",
    ),
    "driver's time to start": (
        "RayJob", environment(f"{JOB}.headGroupSpec", ALL_DAY),
        environment(f"{JOB}.headGroupSpec"), START, "driver-start",
    ),
    "driver's time to start, as by default": (
        "RayJob",
        both(put("spec.entrypointNumCpus", 0), environment(f"{JOB}.headGroupSpec")),
        both(put("spec.entrypointNumCpus", 1),
             environment(f"{JOB}.headGroupSpec", ALL_DAY | {"value": "900"})),
        START, "driver-start",
    ),
    "time to stop": (
        "RayJob", put("spec.runtimeEnvYAML", "env_vars: {RAY_JOB_STOP_WAIT_TIME_S: '30'}"),
        put("spec.runtimeEnvYAML", "env_vars: {A: b}"),
        "spec.runtimeEnvYAML.env_vars", "stop-wait",
    ),
    "time to become ready that is none": (
        "RayService", note(INITIALIZING, "1h30m"), note(INITIALIZING, "30 minutes"),
        f"metadata.annotations.{INITIALIZING}", "initializing-timeout",
    ),
    "no time to become ready": (
        "RayService", note(INITIALIZING, "90"), note(INITIALIZING, "0s"),
        f"metadata.annotations.{INITIALIZING}", "initializing-timeout",
    ),
    "time to become ready": (
        "RayService", lambda body: body["metadata"]["annotations"].pop(INITIALIZING, None),
        note(INITIALIZING, "30m"), f"metadata.annotations.{INITIALIZING}", "ends-for-good",
    ),
    "name of the head's Service": (
        "RayService", put(f"{SERVICE}.headGroupSpec.headService", {"metadata": {}}),
        put(f"{SERVICE}.headGroupSpec.headService", {"metadata": {"name": "mine"}}),
        f"{SERVICE}.headGroupSpec.headService.metadata.name", "upgrade",
    ),
    "field that is no longer read": (
        "RayService",
        lambda body: [body["spec"].pop(f"{n}UnhealthySecondThreshold", None)
                      for n in ("service", "deployment")],
        put("spec.serviceUnhealthySecondThreshold", 900),
        "spec.serviceUnhealthySecondThreshold", "deprecated",
    ),
    "delay below 0": (
        "RayService", put("spec.rayClusterDeletionDelaySeconds", 600),
        put("spec.rayClusterDeletionDelaySeconds", -1),
        "spec.rayClusterDeletionDelaySeconds", "upgrade",
    ),
    "delay below an answer": (
        "RayService",
        both(put("spec.serveConfigV2", SERVE % ""),
             put("spec.rayClusterDeletionDelaySeconds", 130)),
        both(put("spec.serveConfigV2", SERVE % ""),
             put("spec.rayClusterDeletionDelaySeconds", 129)),
        "spec.rayClusterDeletionDelaySeconds", "answers-cut",
    ),
    "delay by default": (
        "RayService",
        both(put("spec.serveConfigV2", (SERVE % "").replace("100", "30")),
             lambda body: body["spec"].pop("rayClusterDeletionDelaySeconds", None)),
        both(put("spec.serveConfigV2", (SERVE % "").replace("100", "31")),
             lambda body: body["spec"].pop("rayClusterDeletionDelaySeconds", None)),
        "spec.rayClusterDeletionDelaySeconds", "answers-cut",
    ),
    "grace below an answer": (
        "RayService",
        both(put("spec.serveConfigV2", SERVE % ""),
             put(f"{SERVICE}.workerGroupSpecs[serve].template.spec.terminationGracePeriodSeconds",
                 130)),
        both(put("spec.serveConfigV2", SERVE % ""),
             put(f"{SERVICE}.workerGroupSpecs[serve].template.spec.terminationGracePeriodSeconds",
                 129)),
        f"{SERVICE}.workerGroupSpecs[serve].template.spec.terminationGracePeriodSeconds",
        "answers-cut",
    ),
    "own deployment that stops before it starts": (
        "RayService", put("spec.serveConfigV2", SERVE % "{name: Reward}"),
        put("spec.serveConfigV2", SERVE % "{name: Reward, max_surge_percent: 0}"),
        "spec.serveConfigV2.applications[0].deployments[Reward].max_surge_percent", "surge",
    ),
    "other deployment that stops before it starts": (
        "RayService",
        put("spec.serveConfigV2", "applications: [{import_path: 'a:b', "
            "deployments: [{name: m, max_surge_percent: 50}]}]"),
        put("spec.serveConfigV2", "applications: [{import_path: 'a:b', deployments: [{name: m}]}]"),
        "spec.serveConfigV2.applications[0].deployments[m].max_surge_percent", "surge",
    ),
    "step of an upgrade": (
        "RayService", incremental(), incremental(maxSurgePercent=5),
        f"{UPGRADE}.stepSizePercent", "upgrade",
    ),
    "interval of an upgrade": (
        "RayService", incremental(), incremental(intervalSeconds=0),
        f"{UPGRADE}.intervalSeconds", "upgrade",
    ),
    "pod sets": (
        "RayJob", both(mode("K8sJobMode"), groups(16)), both(mode("K8sJobMode"), groups(17)),
        f"{JOB}.workerGroupSpecs", "queue",
    ),
    "pod sets without a submitter": (
        "RayJob", both(mode("SidecarMode"), groups(17)), both(mode("SidecarMode"), groups(18)),
        f"{JOB}.workerGroupSpecs", "queue",
    ),
    "pod sets of an older Kueue": (
        "RayJob", both(mode("K8sJobMode"), groups(6)), both(mode("K8sJobMode"), groups(7)),
        f"{JOB}.workerGroupSpecs", "queue-version",
    ),
    "group that is called head": (
        "RayJob", groups(1), both(groups(1), put(f"{JOB}.workerGroupSpecs[0].groupName", "head")),
        f"{JOB}.workerGroupSpecs[head].groupName", "queue",
    ),
    "queue and a cluster that is there": (
        "RayJob", groups(1),
        both(groups(1), put("spec.clusterSelector", {"ray.io/cluster": "wrpo"})),
        "spec.clusterSelector", "queue",
    ),
    "GPUs of other pods": (
        "RayCluster", put(f"{GROUPS}[cpu].rayStartParams", {"num-gpus": "0"}),
        put(f"{GROUPS}[cpu].rayStartParams", {}),
        f"{GROUPS}[cpu].rayStartParams.num-gpus", "stray-gpus",
    ),
    "GPUs of other pods, by resources": (
        "RayCluster",
        both(put(f"{GROUPS}[cpu].rayStartParams", {}), put(f"{GROUPS}[cpu].resources",
                                                           {"GPU": "0"})),
        both(put(f"{GROUPS}[cpu].rayStartParams", {}), put(f"{GROUPS}[cpu].resources", {"a": "1"})),
        f"{GROUPS}[cpu].rayStartParams.num-gpus", "stray-gpus",
    ),
}  # fmt: skip


def in_all(key: str, value: Any) -> Edit:
    """Sets a field of the pods of all groups, and of the head."""

    def edit(body: Body) -> None:
        for group in [at(body, HEAD), *at(body, GROUPS)]:
            *path, last = key.split(".")
            place = group
            for name in path:
                place = place[int(name)] if name.isdigit() else place.setdefault(name, {})
            place[last] = value

    return edit


def shaped(cpus: str) -> Edit:
    """Every group with GPUs asks for as many CPUs a GPU."""

    def edit(body: Body) -> None:
        for group in at(body, GROUPS):
            asked = group["template"]["spec"]["containers"][0]["resources"]
            gpus = asked["limits"].get("nvidia.com/gpu")
            for part in asked.values() if gpus else ():
                part["cpu"] = str(int(gpus) * int(cpus))

    return edit


def without_replicas(body: Body) -> None:
    for group in at(body, GROUPS):
        group.pop("replicas", None)


def logs(name: str) -> Edit:
    """The head's volume at /tmp/ray has this name."""

    def edit(body: Body) -> None:
        pod = at(body, HEAD)["template"]["spec"]
        mounts = pod["containers"][0]["volumeMounts"]
        mounts[:] = [m for m in mounts if m["mountPath"] != "/tmp/ray"]
        mounts.append({"name": name, "mountPath": "/tmp/ray"})

    return edit


DISK = {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "50Gi"}
LIMITS |= {
    "emptied nodes": (
        "RayCluster", in_all("template.metadata.annotations", STAY),
        both(in_all("template.metadata.annotations", STAY),
             put(f"{ONE}.template.metadata.annotations",
                 STAY | {"karpenter.sh/do-not-disrupt": "false"})),
        f"{ONE}.template.metadata.annotations", "evictions",
    ),
    "full disks": (
        "RayCluster", in_all("template.spec.containers.0.resources.requests", DISK),
        both(in_all("template.spec.containers.0.resources.requests", DISK),
             put(f"{ONE}.{RAY}.resources.requests", {"cpu": "1", "nvidia.com/gpu": 1})),
        f"{ONE}.{RAY}.resources.requests", "disk",
    ),
    "CPUs of a GPU": (
        "RayCluster", shaped("10"), shaped("11"),
        f"{ONE}.{RAY}.resources.requests.cpu", "cpus-per-gpu",
    ),
    "replicas that the autoscaler writes": (
        "RayCluster", without_replicas, both(without_replicas, put(f"{ONE}.replicas", 0)),
        GROUPS, "replicas",
    ),
    "work without GPUs": (
        "RayCluster", put(f"{ONE}.labels", {"wrpo-ray/gpu": "true", "other": "x"}),
        put(f"{ONE}.labels", {"wrpo-ray/gpu": "1"}), GROUPS, "gpu-label",
    ),
    "autoscaler's log": (
        "RayCluster", logs("ray-logs"), logs("logs"),
        f"{HEAD}.template.spec.volumes[logs]", "autoscaler-log",
    ),
    "secret in plain text": (
        "RayJob",
        put(f"{JOB}.headGroupSpec.{RAY}.env",
            [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k",
                                                                 "optional": True}}}]),
        put(f"{JOB}.headGroupSpec.{RAY}.env", [{"name": "HF_TOKEN", "value": "hf_x"}]),
        f"{JOB}.headGroupSpec.{RAY}.env[0].value", "plain-secret",
    ),
    "secret in a job's environment": (
        "RayJob", put("spec.runtimeEnvYAML", "env_vars: {VLLM_NO_USAGE_STATS: '1'}"),
        put("spec.runtimeEnvYAML", "env_vars: {AWS_SECRET_ACCESS_KEY: x}"),
        "spec.runtimeEnvYAML.env_vars.AWS_SECRET_ACCESS_KEY", "plain-secret",
    ),
}  # fmt: skip


def report(folder: Path, *bodies: Body) -> Report:
    (folder / "objects.yaml").write_text("\n---\n".join(map(json.dumps, bodies)))
    return check([str(folder / "objects.yaml")])


def found(folder: Path, body: Body) -> set[tuple[str, str]]:
    """(field, rule) of each problem and advice."""
    told = report(folder, body)
    return {(problem.field, problem.rule) for problem in (*told.problems, *told.advice)}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_told_when_it_is_exceeded(name: str, tmp_path: Path):
    kind, within, beyond, field, rule = LIMITS[name]
    right, wrong = ray_objects()[kind], ray_objects()[kind]
    within(right)
    beyond(wrong)
    assert (field, rule) not in found(tmp_path, right)
    assert (field, rule) in found(tmp_path, wrong)


@pytest.mark.parametrize(("most", "has_room"), [(2, True), (1, False)])
def test_a_changed_model_has_room_beside_the_old_one(most: int, has_room: bool, tmp_path: Path):
    body = ray_objects()["RayService"]
    put(f"{SERVICE}.workerGroupSpecs[serve].maxReplicas", most)(body)
    one = SERVE.replace("num_gpus: 1", "num_gpus: 1, resources: {serve: 1}") % ""
    put("spec.serveConfigV2", one)(body)
    told = report(tmp_path, body)
    assert ("surge-room" not in {p.rule for p in told.advice}) == has_room
    assert any(place.endswith("serve fused: 1 x serve") for place in told.places)


def test_every_rule_that_is_advice_is_tried():
    tried = {rule for *_, rule in LIMITS.values()}
    beside_others = {"surge-room", "quota-most", "storage-class"}  # and in test_check_rules.py
    assert tried >= ADVICE - beside_others


# --- several objects -----------------------------------------------------------------------------


def policy(name: str, labels: dict[str, str], direction: str, peer: dict[str, str]) -> Body:
    side = {"Egress": "to", "Ingress": "from"}[direction]
    rule = {side: [{"podSelector": {"matchLabels": peer}}], "ports": [{"port": 6379}]}
    spec = {
        "podSelector": {"matchLabels": labels},
        "policyTypes": [direction],
        direction.lower(): [rule],
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": spec,
    }


RAYS, OPERATORS = (
    {"ray.io/is-ray-node": "yes"},
    {"app.kubernetes.io/created-by": "kuberay-operator"},
)
STORE = {"app.kubernetes.io/name": "wrpo-redis"}
TO_HEADS = {"ray.io/node-type": "head"}
TO_CLEANUP = {"ray.io/node-type": "redis-cleanup"}


@pytest.mark.parametrize(
    ("way_out", "way_in", "closing"),
    [
        (TO_HEADS, OPERATORS, "ray"),  # heads alone may connect to Redis
        (TO_CLEANUP, OPERATORS, None),
        (RAYS, TO_HEADS, "redis"),  # Redis admits heads alone
        (RAYS, RAYS, None),
    ],
)
def test_the_job_that_cleans_up_redis_reaches_it(
    way_out: dict[str, str], way_in: dict[str, str], closing: str | None, tmp_path: Path
):
    body = ray_objects()["RayService"]
    at(body, SERVICE)["gcsFaultToleranceOptions"] = REDIS
    redis = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "redis"},
        "spec": {"selector": STORE},
    }
    told = report(
        tmp_path,
        body,
        redis,
        policy("ray", RAYS, "Egress", RAYS),
        policy("heads", way_out, "Egress", STORE),
        policy("redis", STORE, "Ingress", way_in),
    )
    texts = [p.text for p in told.problems if p.rule == "redis-clean-up"]
    assert [f"NetworkPolicy {closing!r}" in text for text in texts] == ([True] if closing else [])


@pytest.mark.parametrize(("port", "is_open"), [("6379", True), ("6380", False)])
def test_a_redis_outside_the_manifests_is_reached_by_its_port(
    port: str, is_open: bool, tmp_path: Path
):
    body = ray_objects()["RayService"]
    options = {"redisAddress": f"rediss://cache.example.com:{port}"}
    at(body, SERVICE)["gcsFaultToleranceOptions"] = options
    told = report(tmp_path, body, policy("ray", RAYS, "Egress", STORE))
    assert ("redis-clean-up" not in {p.rule for p in told.problems}) == is_open


@pytest.mark.parametrize(
    ("covered", "missing"),
    [({"cpu", "memory", "ephemeral-storage"}, set()), ({"cpu", "memory"}, {"ephemeral-storage"})],
)
def test_a_queue_has_quota_for_all_that_its_pods_ask_for(
    covered: set[str], missing: set[str], tmp_path: Path
):
    body = ray_objects()["RayJob"]
    groups(1)(body)
    version = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    local = {"metadata": {"name": "fusion"}, "spec": {"clusterQueue": "q"}}
    shared = {
        "metadata": {"name": "q"},
        "spec": {"resourceGroups": [{"coveredResources": sorted(covered)}]},
    }
    told = report(
        tmp_path,
        body,
        version | {"kind": "LocalQueue"} | local,
        version | {"kind": "ClusterQueue"} | shared,
    )
    texts = [p.text for p in told.problems if p.rule == "queue-quota"]
    assert len(texts) == (2 if missing else 0)  # head and group
    assert all(name in text for text in texts for name in missing)


def test_the_values_of_the_example_are_told(tmp_path: Path):
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "wrpo-credentials"}}
    coded = base64.b64encode(b"PLACEHOLDER").decode()
    told = report(
        tmp_path, secret | {"stringData": {"A": "PLACEHOLDER", "B": "x"}, "data": {"C": coded}}
    )
    assert {(p.field, p.rule) for p in told.problems} == {
        ("stringData.A", "placeholder"),
        ("data.C", "placeholder"),
    }


def test_advice_leaves_the_exit_code_0_and_what_is_needed_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    claim = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "c", "annotations": {"wrpo-ray/external": "Secret/a, Secret/b"}},
    }
    cluster = {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "ClusterQueue",
        "metadata": {"name": "q"},
    }
    (tmp_path / "c.yaml").write_text(f"{json.dumps(claim)}\n---\n{json.dumps(cluster)}")
    assert cli.main(["cluster", "check", str(tmp_path / "c.yaml")]) == 0
    *_, needs, last = capsys.readouterr().out.splitlines()
    assert needs == "has to exist before: Secret/a, Secret/b"
    assert last == "2 objects: no problem found"


def test_advice_is_said_and_does_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    body = ray_objects()["RayCluster"]
    for edit in (in_all("rayStartParams", {}), put(f"{HEAD}.rayStartParams", {"num-cpus": "0"})):
        edit(body)
    for group in [at(body, HEAD), at(body, f"{GROUPS}[cpu]")]:
        group["rayStartParams"] = group["rayStartParams"] | {"num-gpus": "0"}
    shaped("14")(body)
    (tmp_path / "c.yaml").write_text(json.dumps(body))
    assert cli.main(["cluster", "check", str(tmp_path / "c.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("advice: ") and line.endswith("[cpus-per-gpu]") for line in lines)
    assert lines[-1].endswith("no problem found")


@pytest.mark.parametrize(
    ("output", "entrypoint", "is_kept"),
    [
        ("s3://bucket/run", None, True),
        ("/cache/run", None, True),
        ("/cache", None, True),
        ("out/run", None, False),
        ("/scratch/run", None, False),  # an emptyDir
        ("/cachet/run", None, False),
        ("out/run", "sh -c 'cd /cache && wrpo fuse c.yaml --set output=/cache/run'", True),
        ("/cache/run", "wrpo fuse c.yaml --set output=/tmp/run", False),
        ("out/run", "wrpo fuse 'c.yaml", False),
    ],
)
def test_the_output_of_a_run_outlives_its_pods(
    tmp_path: Path, output: str, entrypoint: str | None, is_kept: bool
):
    body = ray_objects()["RayJob"]
    body["spec"]["entrypoint"] = entrypoint or body["spec"]["entrypoint"]
    (tmp_path / "job.yaml").write_text(json.dumps(body))
    run = config.load(FUSION).model_copy(update={"output": output})
    problems = check([str(tmp_path / "job.yaml")], run).problems
    assert [problem.rule for problem in problems] == ([] if is_kept else ["output"])


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("RayService", put("spec.upgradeStrategy", {"type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {"gatewayClassName": "x", "stepSizePercent": "10"}})),
        ("RayService", put("spec.serveConfigV2", "applications: [{deployments: [1]}]")),
        ("RayService", put("spec.serveConfigV2", "applications: [{deployments: 5}]")),
        ("RayService", put(f"{SERVICE}.gcsFaultToleranceOptions",
            {"redisAddress": "r:" + "6" * 5000})),
    ],
)  # fmt: skip
def test_a_value_that_no_rule_expects_is_a_problem_and_not_a_crash(
    tmp_path: Path, kind: str, edit: Edit
):
    body = ray_objects()[kind]
    edit(body)
    (tmp_path / "object.yaml").write_text(json.dumps(body))
    assert check([str(tmp_path / "object.yaml")]).problems


def test_null_is_as_good_as_absent(tmp_path: Path):
    body = ray_objects()["RayService"]
    head = body["spec"]["rayClusterConfig"]["headGroupSpec"]
    for field in ("metadata", "affinity"):
        head["template"].setdefault(field, None)
    head["headService"] = {"metadata": None}
    body["spec"]["upgradeStrategy"]["clusterUpgradeOptions"] = None
    (tmp_path / "object.yaml").write_text(json.dumps(body))
    assert check([str(tmp_path / "object.yaml")]).problems == []


@pytest.mark.parametrize(
    ("rule", "is_open"),
    [
        ({"to": [{"podSelector": {"matchLabels": STORE}}]}, True),
        ({"to": [{"namespaceSelector": {}}]}, True),
        ({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}, True),
        ({"ports": [{"port": 6000, "endPort": 7000}]}, True),
        ({"ports": [{"port": 6000, "endPort": 6378}]}, False),
        ({"ports": [{"port": "redis"}]}, True),
        ({"ports": [{"protocol": "UDP", "port": 6379}]}, False),
        ({"ports": [{"port": 443}]}, False),
        ({"to": [{"podSelector": {"matchLabels": TO_HEADS}}]}, False),
    ],
)
@pytest.mark.parametrize("names_types", [True, False])
def test_a_rule_of_any_form_is_read(
    rule: dict[str, Any], is_open: bool, names_types: bool, tmp_path: Path
):
    body = ray_objects()["RayService"]
    at(body, SERVICE)["gcsFaultToleranceOptions"] = REDIS
    redis = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "redis"}}
    out = policy("out", {}, "Egress", {})
    out["spec"] = {"podSelector": {}, "egress": [rule], "ingress": [{}]}
    if names_types:
        out["spec"]["policyTypes"] = ["Egress"]
    told = report(tmp_path, body, redis | {"spec": {"selector": STORE}}, out)
    assert ("redis-clean-up" not in {p.rule for p in told.problems}) == is_open
