"""Every manifest that is shipped: its check, Kubernetes' schemas, and what they promise."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from ray.runtime_env import RuntimeEnv
from support.manifests import (
    CLUSTER,
    COMPONENTS,
    FUSION,
    OVERLAYS,
    ROOT,
    crds,
    overlays_of,
    ray_objects,
    rendered,
    run_of,
)

from wrpo_ray import __version__, config
from wrpo_ray.config import Actors
from wrpo_ray.kubernetes.capacity import node_types
from wrpo_ray.kubernetes.check import Report, check
from wrpo_ray.kubernetes.manifests import Manifest
from wrpo_ray.kubernetes.ray_objects import GPU, RayObject, typed
from wrpo_ray.kubernetes.resource_requests import Request
from wrpo_ray.kubernetes.schema import Schemas
from wrpo_ray.runtime.metrics import COUNTERS, GAUGES
from wrpo_ray.runtime.placement import NO_GPU_NODES, Pool
from wrpo_ray.text.documents import FAST_LOADER


def checked(folder: Path, overlay: str, schemas: Schemas | None) -> Report:
    file = folder / "rendered.yaml"
    file.write_text(rendered(overlay))
    return check([str(file)], run_of(overlay), schemas)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_passes_the_check_without_the_schemas(overlay: str, tmp_path: Path):
    assert checked(tmp_path, overlay, None).problems == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_passes_the_check_with_the_schemas(overlay: str, tmp_path: Path):
    assert checked(tmp_path, overlay, crds()).problems == []


def test_kubernetes_schemas_accept_every_object_strictly(tmp_path: Path):
    files = [CLUSTER / "secrets.example.yaml"]
    for overlay in OVERLAYS:
        files.append(tmp_path / f"{overlay.replace('/', '-')}.yaml")
        files[-1].write_text(rendered(overlay))
    for component in COMPONENTS:
        files.append(tmp_path / f"with-{component}.yaml")
        files[-1].write_text(rendered(overlays_of(component)[0], component))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0, lines
    assert not [line for line in lines if line.startswith("ERROR")]
    # Kinds that it does not know are those that are checked elsewhere, or of other operators.
    unknown = {re.search(r"kind (\w+)", line)[1] for line in lines if line.startswith("WARN")}
    assert unknown <= {
        "RayCluster", "RayJob", "RayService", "PodMonitor",
        "ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass",
        "Topology",
    }  # fmt: skip


def test_a_pod_is_checked_by_kubernetes_schemas_inside_a_ray_object(tmp_path: Path):
    # KubeRay's schemas hold whole pods; a misspelt field far down is found without kubectl.
    body = ray_objects()["RayCluster"]
    container = body["spec"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]
    container["securityContext"] = {"allowPrivilegeEscalatoin": False}
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(body))
    (problem,) = check([str(file)], None, crds()).problems
    assert problem.rule == "unknown-field"
    assert "did you mean 'allowPrivilegeEscalation'?" in problem.text


def test_steps_go_to_the_groups_that_are_meant_for_them(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(json.dumps(ray_objects()["RayCluster"]))
    report = check([str(tmp_path / "c.yaml")], config.load(FUSION))
    places = dict(place.split(": ", 2)[2].rsplit(": ", 1) for place in report.places)
    assert places == {
        "steps without a model": "1 x cpu",
        "generate qwen": "1 x generate-1gpu",
        "generate gemma": "1 x generate-1gpu",
        "generate llama-70b": "1 x generate-4gpu",
        "generate deepseek": "2 x generate-2x8gpu",  # one engine of 16 parts on both nodes
        "generate llama-8b": "1 x generate-1gpu",
        "score with reward": "1 x reward",
        "sft": "1 x train",
        "wrpo": "1 x train",
        "wrpo's reference": "1 x train",
    }


def groups_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The worker groups anywhere in an object."""
    found = [group for spec in specs(body) for group in spec["workerGroupSpecs"]]
    assert found
    return found


def specs(body: Any) -> list[dict[str, Any]]:
    if not isinstance(body, dict):
        return []
    here = [body] if "workerGroupSpecs" in body else []
    return here + [spec for value in body.values() for spec in specs(value)]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_groups_with_gpus_and_no_others_keep_off_work_without(kind: str):
    for group in groups_of(ray_objects()[kind]):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        has_label = group.get("labels", {}).get("wrpo-ray/gpu") == "true"
        assert has_label is ("nvidia.com/gpu" in limits), group["groupName"]
    launcher = yaml.safe_load((CLUSTER / "launcher.yaml").read_text())["available_node_types"]
    for name, kind_of in launcher.items():
        has_label = kind_of.get("labels") == {"wrpo-ray/gpu": "true"}
        assert has_label is ("GPU" in kind_of["resources"]), name


def planned(bundle: dict[str, float], count: int, selector: dict[str, str]) -> dict[str, int]:
    """Nodes of each group that Ray's autoscaler starts on the empty cluster of the manifests."""
    found = typed_body(ray_objects()["RayCluster"])
    types = node_types(found, found.cluster)
    return types.nodes_for(Request("", (bundle,) * count, selector=selector)) or {}


def test_a_pool_starts_nodes_of_its_own_group_however_many_actors_it_asks_for():
    """By Ray's scheduler: what it would start for the same GPUs without the group's name."""
    engine = {"CPU": 1.0, "GPU": 1.0}
    named = Pool("", Actors(num_gpus=1, resources={"generate-1gpu": 1}))
    assert named.selector == {}
    for count in (1, 4, 16):
        assert planned(named.needs, count, {}) == {"generate-1gpu": count}
    assert planned(engine, 4, {}) == {"generate-4gpu": 1}


def test_tasks_of_a_cpu_each_start_no_gpus():
    """Twice as many as the cpu group has room for."""
    room = 16 * 14
    assert planned({"CPU": 1.0}, room, NO_GPU_NODES) == {"cpu": 16}
    assert planned({"CPU": 1.0}, 2 * room, {}).keys() > {"cpu"}
    assert Pool("", Actors()).selector == NO_GPU_NODES


def test_a_cluster_of_gpus_alone_has_no_room_for_the_other_steps(tmp_path: Path):
    body = ray_objects()["RayCluster"]
    del body["spec"]["workerGroupSpecs"][0]
    (tmp_path / "c.yaml").write_text(json.dumps(body))
    problems = check([str(tmp_path / "c.yaml")], config.load(FUSION)).problems
    assert [p.rule for p in problems] == ["no-room"]
    assert "steps without a model: asks for 1 CPU on one node without the label" in problems[0].text


# --- what they promise -----------------------------------------------------------------------


def pods(body: Any) -> list[dict[str, Any]]:
    """Every pod spec in an object."""
    if isinstance(body, list):
        return [pod for item in body for pod in pods(item)]
    if not isinstance(body, dict):
        return []
    here = [body] if "containers" in body else []
    return here + [pod for value in body.values() for pod in pods(value)]


@cache
def all_objects() -> list[dict[str, Any]]:
    return [body for o in OVERLAYS for body in yaml.load_all(rendered(o), FAST_LOADER)]


def test_every_pod_runs_without_root_and_without_more_privileges():
    found = [pod for body in all_objects() for pod in pods(body)]
    assert len(found) > 30
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_groups_start_at_zero_and_gpus_keep_others_away():
    views = [typed_body(body) for body in ray_objects().values()]
    for view in views:
        for _, group in view.workers:
            assert (group.min_replicas, group.replicas) == (0, None), "the autoscaler's own field"
            assert group.idle_timeout_seconds
    for body in ray_objects().values():
        for pod in pods(body):
            has_gpu = GPU in pod["containers"][0]["resources"].get("limits", {})
            keys = {toleration["key"] for toleration in pod.get("tolerations", ())}
            assert has_gpu == (GPU in keys)


def typed_body(body: dict[str, Any]) -> RayObject:
    view = typed(Manifest("test", body))
    assert isinstance(view, RayObject)
    return view


def test_a_group_has_one_unit_of_its_own_resource_for_each_gpu():
    for _, group in typed_body(ray_objects()["RayCluster"]).workers:
        gpus = group.ray.resources.limits.get("nvidia.com/gpu")
        assert group.resources == ({group.group_name: str(gpus)} if gpus else {})


def test_ray_is_closed_to_other_pods_and_asks_for_its_token():
    policies = [b for b in all_objects() if b["kind"] == "NetworkPolicy"]
    ray = next(p["spec"] for p in policies if p["metadata"]["name"] == "ray")
    assert ray["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    open_to_all = [rule for rule in ray["ingress"] if not rule.get("from")]
    assert not open_to_all
    others = next(p["spec"] for p in policies if p["metadata"]["name"] == "default")
    assert set(others["policyTypes"]) == {"Ingress", "Egress"}
    assert not others.get("ingress")
    assert not [rule for rule in others["egress"] if not rule.get("ports")]
    for body in ray_objects().values():
        assert typed_body(body).cluster.auth_options.mode == "token"


def test_a_pod_that_may_connect_is_named_with_its_namespace():
    """Labels of pods are free: a pod of any namespace can have the operator's."""
    policies = [b["spec"] for b in all_objects() if b["kind"] == "NetworkPolicy"]
    rules = [r for p in policies for r in (*p.get("ingress", ()), *p.get("egress", ()))]
    peers = [p for r in rules for p in (*r.get("from", ()), *r.get("to", ()))]
    others = [p["namespaceSelector"] for p in peers if "namespaceSelector" in p]
    assert len(others) >= 4
    assert all(selector.get("matchLabels") for selector in others), "not any namespace"


def environment(container: dict[str, Any]) -> dict[str, str]:
    """A container's variables, with those of the rendered ConfigMaps that it names."""
    maps = {b["metadata"]["name"]: b["data"] for b in all_objects() if b["kind"] == "ConfigMap"}
    named = [
        each["configMapRef"]["name"] for each in container["envFrom"] if "configMapRef" in each
    ]
    own = {variable["name"]: variable.get("value") for variable in container["env"]}
    return {key: value for name in named for key, value in maps[name].items()} | own


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_all_nodes_of_the_served_model_have_the_proxy_of_wrpo_serve():
    from wrpo_ray.serve.haproxy import CONNECTIONS, REQUESTS
    from wrpo_ray.serve.headers import CALLBACK
    from wrpo_ray.serve.proxy import CLIENT_TIMEOUT, PROXY

    services = [body for body in all_objects() if body["kind"] == "RayService"]
    assert len(services) >= 2
    for service in services:
        (app,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
        nodes = [pod["containers"][0] for pod in pods(service)]
        assert len(nodes) == 2
        for node in nodes:
            env = environment(node)
            assert (PROXY | CALLBACK).items() <= env.items()
            for name in ("HARD_STOP_AFTER_S", "TIMEOUT_SERVER_S"):
                longest = config.serving(app["args"]).timeout
                assert float(env[f"RAY_SERVE_HAPROXY_{name}"]) > longest
            assert env["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] == str(CLIENT_TIMEOUT)
            assert Path(env["RAY_SERVE_HAPROXY_BINARY_PATH"]).name in SCRIPTS
            assert int(env[CONNECTIONS]) > 0
            assert int(env[REQUESTS]) == 2 * config.serving(app["args"]).requests_per_minute


def test_no_secret_is_in_the_repository():
    for body in yaml.safe_load_all((CLUSTER / "secrets.example.yaml").read_text()):
        for value in body["stringData"].values():
            assert not re.sub(r'PLACEHOLDER[-A-Z0-9]*|[{}":, ]', "", value)
    assert not [b for b in all_objects() if b["kind"] == "Secret"]


def test_redis_gets_its_password_from_standard_input(tmp_path):
    """The manifest's own command, with a program in Redis' place that tells what it was given."""
    redis = next(
        pod["containers"][0] for body in all_objects() for pod in pods(body)
        if pod["containers"][0]["name"] == "redis"
    )  # fmt: skip
    stub = tmp_path / "redis-server"
    stub.write_text('#!/bin/sh\ntr "\\0" " " < /proc/$$/cmdline; echo; cat\n')
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REDIS_PASSWORD": "Xyzzy0Plugh"}
    done = subprocess.run(redis["command"], env=env, capture_output=True, text=True, check=True)
    line, *settings = done.stdout.splitlines()
    assert "Xyzzy0Plugh" not in line
    assert line.strip().endswith("redis-server -")
    assert settings == ["appendonly yes", "dir /data", "requirepass Xyzzy0Plugh"]


def test_versions_are_those_of_the_project():
    images = {c["image"] for body in all_objects() for pod in pods(body) for c in pod["containers"]}
    assert images == {f"wrpo-ray:{__version__}-gpu", f"wrpo-ray:{__version__}-cpu", "redis:8.2"}
    launcher = yaml.safe_load((CLUSTER / "launcher.yaml").read_text())
    assert launcher["docker"]["image"] in images
    cluster = typed_body(ray_objects()["RayCluster"]).cluster
    assert cluster.ray_version == importlib.metadata.version("ray")


# --- beside Kubernetes -----------------------------------------------------------------------


def test_the_launcher_file_is_one_that_ray_accepts_and_that_has_room():
    whole = config.load(FUSION)
    on_one_node = tuple(m for m in whole.sources if m.pipeline_parallel == 1)
    report = check(
        [str(CLUSTER / "launcher.yaml")], whole.model_copy(update={"sources": on_one_node})
    )
    assert report.problems == []
    assert any(place.endswith("sft: 1 x train") for place in report.places)


def test_the_launcher_file_with_a_misspelt_key_is_refused(tmp_path: Path):
    body = yaml.safe_load((CLUSTER / "launcher.yaml").read_text()) | {"max_wrokers": 3}
    (tmp_path / "launcher.yaml").write_text(json.dumps(body))
    (problem,) = check([str(tmp_path / "launcher.yaml")]).problems
    assert "max_wrokers" in problem.text


def test_the_runtime_env_is_one_that_ray_accepts():
    given = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    assert set(given) <= set(RuntimeEnv.known_fields)
    variables = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
    assert RuntimeEnv(**given)["env_vars"] == variables


def test_the_working_dir_of_a_job_is_small_and_has_the_code(tmp_path: Path):
    # By Ray's own packing of a working_dir, on a copy with what a used checkout has.
    from ray._private.runtime_env.packaging import _zip_files

    checkout = tmp_path / "checkout"
    for name in (".gitignore", ".rayignore", "jobs", "wrpo_ray", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        checkout.mkdir(exist_ok=True)
        copy(source, checkout / name)
    for folder in (".git", ".venv/bin", ".cache/zoo", "out/demo", "tests", "benchmarks", "docs"):
        (checkout / folder).mkdir(parents=True)
        (checkout / folder / "large").write_bytes(b"0" * 1000)
    _zip_files(str(checkout), [], str(tmp_path / "package.zip"), include_gitignore=True)
    packed = ZipFile(tmp_path / "package.zip").namelist()
    assert {"wrpo_ray/cli/entry.py", "jobs/demo.yaml", "jobs/runtime_env.yaml"} <= set(packed)
    assert not [name for name in packed if name.endswith(("large", ".pyc"))]


def test_the_dashboard_asks_for_metrics_that_are_exported():
    dashboard = json.loads((CLUSTER / "dashboards" / "wrpo.json").read_text())
    panels = [p for p in dashboard["panels"] if p["type"] != "row"]
    ids = [p["id"] for p in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    asked = {m for p in panels for t in p["targets"] for m in metrics(t["expr"])}
    own = {name for name in asked if name.startswith("ray_wrpo_")}
    assert {f"ray_wrpo_{name}_total" for name in ("rows", "tokens", "failures")} <= own
    assert own <= {f"ray_wrpo_{n}_total" for n in COUNTERS} | {f"ray_wrpo_{n}" for n in GAUGES}
    assert asked - own <= metrics_of_ray()


def metrics(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|autoscaler)_\w+(?=[{])", expression))


def metrics_of_ray() -> set[str]:
    """Those that Ray's own dashboards ask for."""
    from ray.dashboard.modules.metrics import dashboards

    files = Path(dashboards.__path__[0]).glob("*.py")
    return {m for f in files for m in re.findall(r"\b(?:ray|autoscaler)_\w+", f.read_text())}
