"""What the rendered objects promise once the operator, Kubernetes and Ray's autoscaler act on them.

Sources: docs/adr/0021-operator.md.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.manifests import (
    CLUSTER,
    COMPONENTS,
    OVERLAYS,
    Body,
    objects,
    overlays_of,
)

from wrpo_ray import config
from wrpo_ray.errors import UserError

CHANGEABLE = {"RayJob", "RayService", "RayCluster", "ConfigMap", "PodDisruptionBudget"}
OPERATORS_TIMEOUT = 300  # RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS, utils/constant.go:290
NODE_MONITOR_GRACE = 50  # of Kubernetes' node controller, until a silent node is unreachable


def cluster_of(body: Body) -> Body:
    spec = body["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def ray_bodies() -> Iterator[tuple[str, Body]]:
    """Every rendered Ray object with its overlay."""
    for overlay in OVERLAYS:
        for (kind, _), body in objects(overlay).items():
            if kind in ("RayCluster", "RayJob", "RayService"):
                yield overlay, body


def groups_of(body: Body) -> list[tuple[str, Body]]:
    """The head's group and the workers', by name."""
    cluster = cluster_of(body)
    workers = [(group["groupName"], group) for group in cluster["workerGroupSpecs"]]
    return [("head", cluster["headGroupSpec"]), *workers]


def pod(group: Body) -> Body:
    return group["template"]["spec"]


# --- one after another -----------------------------------------------------------------------


def test_a_switch_between_overlays_changes_no_field_that_cannot_be_changed():
    """Objects of a name are equal in all overlays, but for kinds whose fields may be changed."""
    seen: dict[tuple[str, str], Body] = {}
    for overlay, component in [(o, "") for o in (*OVERLAYS, "base")] + [
        (overlays_of(name)[0], name) for name in COMPONENTS
    ]:
        found = objects(overlay, component) if component else objects(overlay)
        for key, body in found.items():
            if key[0] not in CHANGEABLE and not (component and key[0] == "ResourceFlavor"):
                assert seen.setdefault(key, body) == body, key


def test_the_base_has_no_volume_and_the_demo_has_its_own():
    assert "PersistentVolumeClaim" not in {kind for kind, _ in objects("base")}
    claims = {o: {n for k, n in objects(o) if k == "PersistentVolumeClaim"} for o in OVERLAYS}
    assert claims["overlays/demo"] == {"wrpo-demo"}
    assert claims["overlays/job"] == claims["overlays/serve"] == {"wrpo-cache"}
    for overlay, body in ray_bodies():
        for _, group in groups_of(body):
            named = {
                volume["persistentVolumeClaim"]["claimName"]
                for volume in pod(group)["volumes"]
                if "persistentVolumeClaim" in volume
            }
            assert named == claims[overlay]


def test_a_changed_config_is_a_changed_object_and_nobody_else_sets_replicas():
    for overlay, body in ray_bodies():
        maps = {name for kind, name in objects(overlay) if kind == "ConfigMap"}
        assert all(re.fullmatch(r"wrpo-[a-z]+-[a-z0-9]{10}", name) for name in maps), maps
        text = yaml.safe_dump(body)
        assert all(name in text for name in maps)
        assert not [g for _, g in groups_of(body) if "replicas" in g], "the autoscaler's field"


# --- lost heads, waits, ends -----------------------------------------------------------------


def test_a_lost_head_of_a_run_is_a_failed_try():
    """In SidecarMode a head that is gone counts for backoffLimit: rayjob_controller.go:1086.

    It has to be gone before the operator's checks of the job have failed for 300 seconds, after
    which it gives up for good (rayjob_controller.go:543).
    """
    for overlay in ("overlays/job", "overlays/kueue"):
        job = objects(overlay)[("RayJob", "fusion")]["spec"]
        assert job["submissionMode"] == "SidecarMode"
        assert job["backoffLimit"] >= 3
        assert not {"submitterPodTemplate", "submitterConfig"} & set(job)
        head = pod(job["rayClusterSpec"]["headGroupSpec"])
        waits = {t["key"]: t["tolerationSeconds"] for t in head["tolerations"]}
        for state in ("unreachable", "not-ready"):
            stays = waits[f"node.kubernetes.io/{state}"]
            grace = head.get("terminationGracePeriodSeconds", 30)
            assert NODE_MONITOR_GRACE + stays + grace < OPERATORS_TIMEOUT / 2


def test_a_driver_may_wait_for_its_node_longer_than_for_a_head():
    for _, body in ray_bodies():
        head = pod(groups_of(body)[0][1])["containers"][0]
        env = {variable["name"]: variable["value"] for variable in head["env"]}
        waits = int(env["RAY_JOB_START_TIMEOUT_SECONDS"])
        assert waits > 900, "Ray's default"
        assert waits >= body["spec"].get("preRunningDeadlineSeconds", 0)


def test_a_stopped_run_has_its_time():
    for _, body in ray_bodies():
        if body["kind"] == "RayJob":
            given = yaml.safe_load(body["spec"]["runtimeEnvYAML"])
            assert given["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "30"


@pytest.mark.parametrize("overlay", ["overlays/serve", "overlays/serve-redis"])
def test_a_slow_start_ends_no_service_and_answers_outlive_their_nodes(overlay: str):
    body = objects(overlay)[("RayService", "fused")]
    assert "ray.io/initializing-timeout" not in body["metadata"]["annotations"], "it is final"
    spec = body["spec"]
    unused = {"serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"}
    assert not unused & set(spec)
    (app,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    longest = config.serving(app["args"]).timeout + 30
    assert spec["rayClusterDeletionDelaySeconds"] > longest
    (served,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert pod(served)["terminationGracePeriodSeconds"] > longest


def test_pods_start_without_their_secrets_so_that_the_program_says_what_is_missing():
    from wrpo_ray.serve.check import checked

    for _, body in ray_bodies():
        for _, group in groups_of(body):
            container = pod(group)["containers"][0]
            secrets = [e["secretRef"] for e in container.get("envFrom", ()) if "secretRef" in e]
            secrets += [v["secret"] for v in pod(group)["volumes"] if "secret" in v]
            assert all(secret["optional"] for secret in secrets)
    service = objects("overlays/serve")[("RayService", "fused")]["spec"]
    (app,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    with pytest.raises(UserError, match=r"/etc/wrpo-keys/keys"):
        checked(config.serving(app["args"]))


# --- nodes -----------------------------------------------------------------------------------


def test_shapes_fit_common_nodes_and_ask_for_their_disk():
    for overlay, body in ray_bodies():
        for name, group in groups_of(body):
            asked = pod(group)["containers"][0]["resources"]["requests"]
            gpus = int(asked.get("nvidia.com/gpu", 0))
            if gpus:
                assert int(asked["cpu"]) <= 10 * gpus, name
            if overlay != "overlays/demo":
                assert asked["ephemeral-storage"], name


def test_a_pod_without_gpus_takes_none():
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert re.search(r"^ENV .*\bNVIDIA_VISIBLE_DEVICES=void\b", dockerfile, re.MULTILINE)
    assert re.search(r"^ENV .*\bLD_LIBRARY_PATH=/usr/local/nvidia/lib64\b", dockerfile, re.M)
    launcher = yaml.safe_load((CLUSTER / "launcher.yaml").read_text())
    assert "--env NVIDIA_VISIBLE_DEVICES=all" in launcher["docker"]["run_options"]
    for _, body in ray_bodies():
        for name, group in groups_of(body):
            has = "nvidia.com/gpu" in pod(group)["containers"][0]["resources"].get("limits", {})
            told = group["rayStartParams"].get("num-gpus")
            assert told == (None if has else "0"), name


def test_nodes_stay_while_pods_of_ray_are_on_them():
    for overlay, body in ray_bodies():
        for _, group in groups_of(body):
            annotations = group["template"]["metadata"]["annotations"]
            assert annotations["karpenter.sh/do-not-disrupt"] == "true"
            assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
        head = groups_of(body)[0][1]["template"]["metadata"]["labels"]
        labels = head | {"ray.io/node-type": "head"}  # which the operator adds
        budgets = [b["spec"] for (k, _), b in objects(overlay).items() if k.endswith("Budget")]
        assert len(budgets) == 1
        assert budgets[0]["selector"]["matchLabels"].items() <= labels.items()
        assert budgets[0]["minAvailable"] == 1


def test_heads_of_two_overlays_have_budgets_of_their_own():
    found = {}
    for overlay in ("raycluster", "overlays/job", "overlays/serve", "overlays/demo"):
        for (kind, name), body in objects(overlay).items():
            if kind == "PodDisruptionBudget":
                found[name] = body["spec"]["selector"]["matchLabels"]["wrpo-ray/cluster"]
    assert found == {"ray-heads": "wrpo", "fusion": "fusion", "fused": "fused", "demo": "demo"}


def test_a_node_leaves_its_cluster_before_its_pod_is_killed():
    from wrpo_ray.runtime import leaving

    for _, body in ray_bodies():
        _, *workers = groups_of(body)
        for name, group in workers:
            *python, module, seconds = pod(group)["containers"][0]["lifecycle"]["preStop"]["exec"][
                "command"
            ]
            assert (python, module) == (["python", "-m"], leaving.__name__)
            assert int(seconds) + 15 < pod(group)["terminationGracePeriodSeconds"], name


def test_the_autoscalers_log_is_where_the_dashboard_looks():
    """The operator mounts the volume `ray-logs` into the autoscaler's container (pod.go:847)."""
    for _, body in ray_bodies():
        head = pod(groups_of(body)[0][1])
        (mount,) = [
            m for m in head["containers"][0]["volumeMounts"] if m["mountPath"] == "/tmp/ray"
        ]
        assert mount["name"] == "ray-logs"
        assert "ray-logs" in {volume["name"] for volume in head["volumes"]}


def test_the_queue_has_quota_for_all_that_pods_request():
    found = objects("overlays/kueue")
    (resources,) = found[("ClusterQueue", "wrpo")]["spec"]["resourceGroups"]
    job = found[("RayJob", "fusion")]
    assert len(job["spec"]["rayClusterSpec"]["workerGroupSpecs"]) == 7
    for _, group in groups_of(job):
        asked = pod(group)["containers"][0]["resources"]["requests"]
        assert set(asked) <= set(resources["coveredResources"])


def test_monitors_have_the_label_of_prometheus_release():
    found = [b for (k, _), b in objects("dashboards").items() if k == "PodMonitor"]
    assert len(found) == 2
    assert {monitor["metadata"]["labels"]["release"] for monitor in found} == {"prometheus"}


# --- who may connect to whom -----------------------------------------------------------------

OPERATORS_LABELS = {"app.kubernetes.io/created-by": "kuberay-operator"}
NODE = OPERATORS_LABELS | {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "kuberay"}
HEAD, WORKER = NODE | {"ray.io/node-type": "head"}, NODE | {"ray.io/node-type": "worker"}
CLEAN_UP = NODE | {"ray.io/node-type": "redis-cleanup"}
REDIS = {"app.kubernetes.io/name": "wrpo-redis"}
MODELS = {"app.kubernetes.io/name": "wrpo-models"}
STRANGER = {"app": "any"}
OWN, MINIO = "wrpo", "minio"
Place = dict[str, Any]


def selects(selector: Body, labels: dict[str, str]) -> bool:
    """Kubernetes' label selector."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for each in selector.get("matchExpressions", ()):
        is_in = labels.get(each["key"]) in each["values"]
        if is_in != (each["operator"] == "In"):
            return False
    return True


def matches(peer: Body, to: Place) -> bool:
    if "ipBlock" in peer:
        return peer["ipBlock"]["cidr"] == f"{to.get('address')}/32"
    if "labels" not in to:
        return False
    names = {"kubernetes.io/metadata.name": to.get("namespace", OWN)}
    if "namespaceSelector" in peer:
        is_there = selects(peer["namespaceSelector"], names)
    else:
        is_there = to.get("namespace", OWN) == OWN
    return is_there and selects(peer.get("podSelector", {}), to["labels"])


def allowed(policies: list[Body], one: dict[str, str], other: Place, port: int, way: str) -> bool:
    """Whether policies let a pod connect (way Egress) or be connected to (Ingress)."""
    chosen = [p for p in policies if selects(p["podSelector"], one) and way in p["policyTypes"]]
    rules = [rule for policy in chosen for rule in policy.get(way.lower(), ())]
    return not chosen or any(
        (not (peers := rule.get("to") or rule.get("from")) or any(matches(p, other) for p in peers))
        and (not rule.get("ports") or port in {each["port"] for each in rule["ports"]})
        for rule in rules
    )


def connects(overlay: str, source: dict[str, str], to: Place, port: int, *components: str) -> bool:
    """Whether a pod of the namespace reaches a place, by the policies of an overlay."""
    found = objects(overlay, *components).items()
    policies = [body["spec"] for (kind, _), body in found if kind == "NetworkPolicy"]
    if not allowed(policies, source, to, port, "Egress"):
        return False
    if "labels" not in to or to.get("namespace", OWN) != OWN:
        return True
    return allowed(policies, to["labels"], {"labels": source}, port, "Ingress")


def test_redis_is_open_to_heads_and_to_their_clean_up_alone():
    for source, expected in ((HEAD, True), (CLEAN_UP, True), (WORKER, False), (STRANGER, False)):
        assert connects("overlays/serve-redis", source, {"labels": REDIS}, 6379) == expected


def test_nodes_of_ray_reach_each_other_and_others_do_not():
    for source, to, port, expected in (
        (HEAD, WORKER, 31337, True),
        (WORKER, HEAD, 6379, True),
        (OPERATORS_LABELS, HEAD, 8265, True),  # a pod that submits
        (OPERATORS_LABELS, HEAD, 6379, False),
        (STRANGER, HEAD, 8265, False),
        (MODELS, HEAD, 8265, False),
        (WORKER, STRANGER, 80, False),
    ):
        assert connects("overlays/job", source, {"labels": to}, port) == expected, (source, to)


def test_every_pod_reaches_names_and_the_world_by_tls_only():
    names: Place = {"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}
    for source in (HEAD, WORKER, MODELS, CLEAN_UP):
        assert connects("overlays/serve-redis", source, names, 53)
        assert connects("overlays/serve-redis", source, {"address": "192.0.2.1"}, 443)
        assert not connects("overlays/serve-redis", source, {"address": "192.0.2.1"}, 80)
    assert not connects("overlays/serve-redis", REDIS, {"address": "192.0.2.1"}, 443)


@pytest.mark.parametrize(
    ("component", "to", "port"),
    [
        ("egress-workload-identity", {"address": "169.254.169.254"}, 80),
        ("egress-workload-identity", {"address": "169.254.170.23"}, 80),
        ("egress-workload-identity", {"address": "169.254.169.252"}, 988),
        ("egress-node-local-dns", {"address": "169.254.20.10"}, 53),
        ("egress-object-store", {"namespace": MINIO, "labels": {"app": "minio"}}, 9000),
    ],
)
def test_a_component_opens_what_the_base_closes(component: str, to: Place, port: int):
    for source in (HEAD, WORKER, MODELS):
        assert not connects("overlays/job", source, to, port)
        assert connects("overlays/job", source, to, port, component)
    assert not connects("overlays/serve-redis", REDIS, to, port, component)


# --- models ----------------------------------------------------------------------------------


def download(folder: Path, hf: str) -> subprocess.CompletedProcess[str]:
    """Run the command of the Job that downloads models, with a program in the hub's place."""
    job = objects("overlays/models")[("Job", "models")]["spec"]["template"]["spec"]
    (container,) = job["containers"]
    models = next(b for (k, _), b in objects("overlays/models").items() if k == "ConfigMap")
    (folder / "models.txt").write_text(models["data"]["models.txt"])
    (folder / "hf").write_text(f"#!/bin/sh\n{hf}\n")
    (folder / "hf").chmod(0o755)
    places = {"/etc/wrpo-models": str(folder), "/cache": str(folder / "cache")}
    command = container["command"]
    for place, own in places.items():
        assert place in {mount["mountPath"] for mount in container["volumeMounts"]}
        command = [part.replace(place, own) for part in command]
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_models_are_downloaded_to_where_the_run_reads_them(tmp_path: Path):
    done = download(tmp_path, f'echo "$@" >> {tmp_path}/calls; cat > /dev/null')
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    folders = {call[call.index("--local-dir") + 1] for call in calls}
    job = next(b for (k, _), b in objects("overlays/job").items() if k == "ConfigMap")
    read = set(re.findall(r"/cache/models/\S+", job["data"]["fusion.yaml"]))
    assert {folder.removeprefix(str(tmp_path)) for folder in folders} == read
    assert all(call[0] == "download" and "--revision" in call for call in calls)


def test_a_model_that_cannot_be_downloaded_fails_the_job(tmp_path: Path):
    done = download(tmp_path, 'case "$2" in google/*) exit 7;; esac')
    assert done.returncode == 7
