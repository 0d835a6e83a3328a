"""What `wrpo cluster check` says of objects beside each other, and its remedies, line by line."""

from __future__ import annotations

import json
import os
import time
from argparse import _SubParsersAction
from pathlib import Path
from typing import Any

import pytest
from support.edits import at
from support.manifests import FILLED, FUSION, Body, ray_objects, rendered

from wrpo_ray import cli, config
from wrpo_ray.cli.entry import make_parser
from wrpo_ray.kubernetes import capacity, job_config
from wrpo_ray.kubernetes.check import Report, check
from wrpo_ray.kubernetes.manifests import Manifest
from wrpo_ray.kubernetes.ray_objects import RayObject, typed
from wrpo_ray.kubernetes.resource_requests import Request
from wrpo_ray.kubernetes.schema import Schemas

TOKEN_ENV = "spec.headGroupSpec.template.spec.containers[0].env"


def report(folder: Path, *bodies: Body, job: config.Config | None = None) -> Report:
    (folder / "objects.yaml").write_text("\n---\n".join(map(json.dumps, bodies)))
    return check([str(folder / "objects.yaml")], job)


def texts(told: Report, rule: str) -> list[str]:
    """The texts of the problems and the advice of a rule."""
    return [p.text for p in (*told.problems, *told.advice) if p.rule == rule]


def made(kind: str, name: str, spec: Any = None, namespace: str = "", **fields: Any) -> Body:
    """An object of Kubernetes."""
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    body = {"apiVersion": "v1", "kind": kind, "metadata": metadata} | fields
    return body if spec is None else body | {"spec": spec}


# --- remedies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "rule", "text"),
    [
        (
            ["sources.0.tensor_parallel=2"],
            "parts-apart",
            "generate qwen: its 2 parts (tensor_parallel x pipeline_parallel) do not fit one "
            "replica of generate-1gpu; generate-4gpu has room: name it in `resources` in place of "
            "generate-1gpu",
        ),
        (
            ["sources.0.actors.num_gpus=2"],
            "no-room",
            "generate qwen: asks for 8 CPU, 2 GPU, 1 generate-1gpu on one node; generate-4gpu has "
            "room: name it in `resources` in place of generate-1gpu",
        ),
        (
            ["sources.0.actors.resources={generate-1gpuu: 1}"],
            "no-room",
            "generate qwen: asks for the resource 'generate-1gpuu', which no group has; did you "
            "mean 'generate-1gpu'?",
        ),
        (
            [f"{p}.actors.resources={{h200: 1}}" for p in ("sources.0", "sources.1", "target")],
            "no-room",
            "generate qwen, generate gemma, generate llama-8b: asks for the resource 'h200', which "
            "no group has; they have generate-1gpu, generate-2x8gpu, generate-4gpu, generate-8gpu, "
            "reward, serve, train",
        ),
        (
            ["sources.3.pipeline_parallel=4"],
            "parts-apart",
            "generate deepseek: its 32 parts (tensor_parallel x pipeline_parallel) do not fit one "
            "replica of any group; generate-2x8gpu has room for 16: set its numOfHosts to 4",
        ),
    ],
)  # fmt: skip
def test_a_step_without_room_is_told_the_group_that_has_some(
    overrides: list[str], rule: str, text: str, tmp_path: Path
):
    told = report(tmp_path, ray_objects()["RayCluster"], job=config.load(FUSION, overrides))
    assert [(p.rule, p.text) for p in told.problems] == [(rule, text)]


def test_what_has_to_exist_is_told_with_its_namespace_and_what_is_optional_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    body = ray_objects()["RayCluster"]
    body["metadata"]["namespace"] = "team"
    (tmp_path / "c.yaml").write_text(json.dumps(body))
    assert cli.main(["cluster", "check", str(tmp_path / "c.yaml")]) == 0
    *_, needs, optional, _ = capsys.readouterr().out.splitlines()
    assert needs == (
        "has to exist before in namespace team: PersistentVolumeClaim/wrpo-cache, "
        "ServiceAccount/wrpo-head, ServiceAccount/wrpo-worker"
    )
    assert optional == (
        "is used in namespace team if it exists: ConfigMap/wrpo-fusion, Secret/wrpo-credentials, "
        "Secret/wrpo-object-store"
    )


def test_an_error_of_kustomize_is_told_without_the_logs_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "kustomization.yaml").write_text("resources: []\n")
    stub = tmp_path / "kubectl"
    stub.write_text(
        "#!/bin/sh\necho 'W1130 08:45:08.123456    1234 warnings.go:70] old field' >&2\n"
        "echo 'E1130 08:45:09.123456    1234 run.go:74] \"x\"' >&2\n"
        "echo 'error: no [a] b' >&2; exit 1\n"
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cli.main(["cluster", "check", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.endswith('kubectl kustomize: old field "x" error: no [a] b\n')


PARTS = ({"CPU": 1.0}, *[{"GPU": 1.0, "generate-8gpu": 1.0}] * 4)


@pytest.mark.parametrize(
    ("bundles", "count"),
    [(({"CPU": 8.0, "GPU": 1.0},), n) for n in (65, 99, 210)]
    + [(({"CPU": 4.0},), 131), (PARTS, 14), (PARTS, 16), (PARTS, 17)],
)
def test_many_requests_are_counted_as_rays_scheduler_would(bundles: tuple[Any, ...], count: int):
    body = ray_objects()["RayCluster"]
    for group in at(body, "spec.workerGroupSpecs"):
        group |= {"minReplicas": 1, "replicas": 1, "maxReplicas": 8}
    found = typed(Manifest("c", body))
    assert isinstance(found, RayObject)
    types = capacity.node_types(found, found.cluster)
    for kind in types.config["available_node_types"].values():
        kind["min_workers"] = 0
    request = Request("a", bundles, count)
    assert types.nodes_for(request) == capacity._scheduled(types.config, request)


@pytest.mark.parametrize(("least", "engines"), [(2**31 - 1, 1), (100_000, 64), (0, 5000)])
def test_thousands_of_nodes_are_counted_in_seconds(least: int, engines: int, tmp_path: Path):
    body = ray_objects()["RayCluster"]
    group = at(body, "spec.workerGroupSpecs")[2]
    assert group["groupName"] == "generate-4gpu"
    group |= {"minReplicas": least, "replicas": least, "maxReplicas": max(least, 5000)}
    changes = {"tensor_parallel": 4, "actors": {"min": engines, "max": engines, "num_cpus": 8,
        "num_gpus": 1, "resources": {"generate-4gpu": 1}}}  # fmt: skip
    job = config.load(FUSION, [f"sources.0.{k}={json.dumps(v)}" for k, v in changes.items()])
    started = time.process_time()
    told = report(tmp_path, body, job=job)
    assert time.process_time() - started < 10
    assert told.problems == []
    (place,) = [place for place in told.places if "generate qwen" in place]
    assert f"{max(least, engines)} x generate-4gpu" in place


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.yaml": ""}, "a.yaml: has no object, so there is nothing to check"),
        ({"a.yaml": "---\n# none\n---\nnull\n"}, "has no object, so there is nothing to check"),
        ({"a.yaml": "kind: List\napiVersion: v1\nitems: []"}, "has no object"),
        ({}, "no .yaml, .yml or .json file is in this folder"),
        ({"a.txt": "kind: Namespace"}, "no .yaml, .yml or .json file is in this folder"),
        ({"a.yaml": "{}", "job/kustomization.yaml": "", "b/c/Kustomization": ""}, "/b/c, "),
        ({"a.yml": "{", "b.yaml": "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}"}, "a.yml"),
        ({"a.json": "{"}, "a.json"),
        ({"kustomization.yml": "resources: [none.yaml]"}, "kubectl"),
        ({"Kustomization": "resources: [none.yaml]"}, "kubectl"),
    ],
)
def test_nothing_is_passed_over_silently(
    files: dict[str, str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    one = tmp_path / next(iter(files)) if list(files) == ["a.yaml"] else tmp_path
    assert cli.main(["cluster", "check", str(one)]) == 2
    assert told in capsys.readouterr().err


def test_an_empty_stream_is_nothing_to_check(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["cluster", "check", os.devnull]) == 2
    assert "has no object" in capsys.readouterr().err


def bomb(levels: int) -> str:
    """Aliases of ten aliases each."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(levels):
        lines.append(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]")
    return "kind: ConfigMap\napiVersion: v1\nmetadata: {name: c}\n" + "\n".join(lines)


@pytest.mark.parametrize("levels", [4, 5, 9, 300])
def test_aliases_that_stand_for_too_much_are_refused_at_once(levels: int, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(bomb(levels))
    started = time.process_time()
    (problem,) = check([str(tmp_path / "c.yaml")]).problems
    assert time.process_time() - started < 1
    assert problem.rule == "yaml"
    assert "more than 50000 values; write out" in problem.text


def test_aliases_of_common_size_are_read(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(bomb(2))
    assert check([str(tmp_path / "c.yaml")]).problems == []


def test_aliases_are_bounded_in_configs_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.yaml").write_text(bomb(9))
    assert cli.main(["fuse", str(tmp_path / "c.yaml")]) == 2
    assert "its aliases stand for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "is_plain"),
    [("$(OTHER)", False), ("Bearer $(A.b-C)", False), ("$$(OTHER)", True), ("$OTHER", True),
     ("plugh", True)],
)  # fmt: skip
def test_a_reference_to_another_variable_is_no_secret(value: str, is_plain: bool, tmp_path: Path):
    body = ray_objects()["RayCluster"]
    at(body, TOKEN_ENV).append({"name": "HF_TOKEN", "value": value})
    assert bool(texts(report(tmp_path, body), "plain-secret")) == is_plain


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("pip: requirements.txt", True),
        ("uv: requirements.txt\nconda: environment.yml", True),
        ("# none", True),
        ("pip: [1]", False),
        ("working_dir: 5", False),
        ("- pip", False),
    ],
)
def test_a_runtime_environment_names_files_of_the_submitter(
    text: str, is_right: bool, tmp_path: Path
):
    body = ray_objects()["RayJob"]
    body["spec"]["runtimeEnvYAML"] = text
    assert bool(texts(report(tmp_path, body), "runtime-env")) != is_right


@pytest.mark.parametrize(("command", "is_right"), [(["run-it"], True), ([], False)])
def test_a_submitter_with_a_command_needs_no_entrypoint(
    command: list[str], is_right: bool, tmp_path: Path
):
    body = ray_objects()["RayJob"]
    container = {"name": "submitter", "image": "wrpo-ray:0.1.0-gpu", "command": command}
    body["spec"] |= {"entrypoint": "", "submissionMode": "K8sJobMode"}
    body["spec"]["submitterPodTemplate"] = {"spec": {"containers": [container]}}
    assert bool(texts(report(tmp_path, body), "entrypoint")) != is_right


@pytest.mark.parametrize("value", [12345678, ["hunter2"], {"a": "hunter2"}, 1.5, True])
def test_no_message_has_the_value_of_a_secret(value: Any, tmp_path: Path):
    secret = made("Secret", "s", data={"A": value}, stringData={"B": value})
    body = ray_objects()["RayCluster"]
    head = at(body, "spec.headGroupSpec")
    head["rayStartParams"]["redis-password"] = value
    at(body, TOKEN_ENV).append({"name": "DB_PASSWORD", "value": value})
    at(body, "spec")["gcsFaultToleranceOptions"] = {"redisPassword": {"value": value}}
    head["template"]["spec"]["initContainers"] = [
        {"name": "a", "image": "a:1", "env": {"HF_TOKEN": value}}
    ]
    (tmp_path / "c.yaml").write_text(f"{json.dumps(secret)}\n---\n{json.dumps(body)}")
    told = check([str(tmp_path / "c.yaml")], None, Schemas()).problems
    assert len(told) >= 6
    assert not [problem for problem in told if str(value) in str(problem)], told
    assert sum("a value that is not shown" in problem.text for problem in told) >= 5


# --- namespaces ------------------------------------------------------------------------------

CLOSED = {"podSelector": {}, "policyTypes": ["Egress"]}


@pytest.mark.parametrize(("namespace", "is_ours"), [("team", True), ("", True), ("other", False)])
def test_a_policy_of_another_namespace_closes_nothing(
    namespace: str, is_ours: bool, tmp_path: Path
):
    body = ray_objects()["RayService"]
    body["metadata"]["namespace"] = "team"
    at(body, "spec.rayClusterConfig")["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379"}
    redis = made("Service", "redis", {"selector": {"app": "redis"}}, "team")
    told = report(tmp_path, body, redis, made("NetworkPolicy", "n", CLOSED, namespace))
    assert bool(texts(told, "redis-clean-up")) == is_ours


@pytest.mark.parametrize(
    ("address", "is_open"), [("redis.store:6379", False), ("redis.team.svc.cluster.local", True)]
)
def test_the_policies_of_the_namespace_of_redis_count_for_it(
    address: str, is_open: bool, tmp_path: Path
):
    body = ray_objects()["RayService"]
    body["metadata"]["namespace"] = "team"
    at(body, "spec.rayClusterConfig")["gcsFaultToleranceOptions"] = {"redisAddress": address}
    told = report(
        tmp_path,
        body,
        *(made("Service", "redis", {"selector": {"app": "redis"}}, n) for n in ("store", "team")),
        made("NetworkPolicy", "n", {"podSelector": {}, "policyTypes": ["Ingress"]}, "store"),
    )
    assert bool(texts(told, "redis-clean-up")) != is_open


# --- quotas ----------------------------------------------------------------------------------


def quota(namespace: str = "team", **hard: str) -> Body:
    """A quota; `requests_cpu` is `requests.cpu`."""
    names = {name.replace("_", ".", 1).replace("_", "/"): n for name, n in hard.items()}
    return made("ResourceQuota", "team", {"hard": names}, namespace)


def small(**most: int) -> Body:
    """A RayCluster with these groups at most: a head of 4.5 CPUs, `cpu` of 14, 2 hosts of 80."""
    body = ray_objects()["RayCluster"]
    body["metadata"]["namespace"] = "team"
    groups = at(body, "spec.workerGroupSpecs")
    groups[:] = [
        g | {"maxReplicas": most[g["groupName"]]} for g in groups if g["groupName"] in most
    ]
    return body


@pytest.mark.parametrize(
    ("most", "hard", "rules"),
    [
        ({"cpu": 2}, {"requests_cpu": "32500m"}, []),
        ({"cpu": 2}, {"requests_cpu": "32"}, ["quota-most"]),
        ({"cpu": 2}, {"cpu": "18"}, ["quota", "quota-most"]),
        ({"cpu": 2}, {"cpu": "4"}, ["quota"]),
        ({"cpu": 2}, {"pods": "3"}, []),
        ({"cpu": 2}, {"count/pods": "2"}, ["quota-most"]),
        ({"generate-2x8gpu": 1}, {"requests_nvidia.com_gpu": "16"}, []),
        ({"generate-2x8gpu": 1}, {"requests_nvidia.com_gpu": "15"}, ["quota", "quota-most"]),
        ({"generate-2x8gpu": 2}, {"requests_nvidia.com_gpu": "16"}, ["quota-most"]),
        ({"cpu": 1}, {"requests_memory": "73Gi"}, []),
        ({"cpu": 1}, {"requests_memory": "72Gi"}, ["quota", "quota-most"]),
        ({"cpu": 1}, {"requests_storage": "1", "services": "0", "limits_nvidia.com_gpu": "0"}, []),
    ],
)  # fmt: skip
def test_the_pods_of_all_groups_fit_the_quota_of_their_namespace(
    most: dict[str, int], hard: dict[str, str], rules: list[str], tmp_path: Path
):
    told = report(tmp_path, small(**most), quota(**hard))
    assert [p.rule for p in (*told.problems, *told.advice)] == rules
    assert report(tmp_path, small(**most), quota("other", **hard)).advice == []


@pytest.mark.parametrize(
    ("hard", "text"),
    [
        ({"requests.storage": "2Ti"}, None),
        ({"requests.storage": "1Ti"}, "is 1Ti, and these manifests need 1,536Gi"),
        ({"persistentvolumeclaims": "2"}, None),
        ({"persistentvolumeclaims": 1}, "is 1, and these manifests need 2"),
        ({"count/rayjobs.ray.io": "0"}, "is 0, and these manifests need 1"),
        ({"count/rayclusters.ray.io": "2"}, None),
        ({"count/rayclusters.ray.io": "1"}, "is 1, and these manifests need 2"),
        (["cpu"], "is ['cpu'], a list; it has to be a mapping"),
        ({"requests.cpu": "lots"}, "is 'lots', which is no quantity"),
    ],
)
def test_a_quota_has_room_for_the_objects(hard: Any, text: str | None, tmp_path: Path):
    claim = {"resources": {"requests": {"storage": "768Gi"}}, "accessModes": ["ReadWriteOnce"]}
    claims = [made("PersistentVolumeClaim", name, claim) for name in "ab"]
    job, service = ray_objects()["RayJob"], ray_objects()["RayService"]
    quotas = made("ResourceQuota", "q", {"hard": hard})
    found = [p for p in report(tmp_path, job, service, quotas, *claims).problems if p.field]
    assert [text in p.text for p in found] == ([True] if text else []), found


@pytest.mark.parametrize(
    ("inits", "cpus"),
    [
        ([], "4500m"),
        ([("3", "")], "4500m"),  # it ends before the others start
        ([("9", "")], "9"),
        ([("1", "Always")], "5500m"),  # it goes on
        ([("1", "Always"), ("9", "")], "10"),
        ([("9", ""), ("1", "Always")], "9"),
    ],
)
def test_init_containers_and_sidecars_count(
    inits: list[tuple[str, str]], cpus: str, tmp_path: Path
):
    body = small()
    at(body, "spec.headGroupSpec.template.spec")["initContainers"] = [
        {"name": f"c{n}", "image": "a:1", "resources": {"requests": {"cpu": c}}}
        | ({"restartPolicy": policy} if policy else {})
        for n, (c, policy) in enumerate(inits)
    ]
    assert texts(report(tmp_path, body, quota(requests_cpu=cpus)), "quota") == []
    less = f"{float(cpus.rstrip('m')) * (1 if 'm' in cpus else 1000) - 1:g}m"
    assert "never starts" in texts(report(tmp_path, body, quota(requests_cpu=less)), "quota")[0]


@pytest.mark.parametrize(("mode", "cpus"), [("SidecarMode", 5), ("K8sJobMode", 5)])
def test_what_submits_a_job_counts(mode: str, cpus: int, tmp_path: Path):
    body = ray_objects()["RayJob"]
    body["metadata"]["namespace"] = "team"
    body["spec"]["submissionMode"] = mode
    at(body, "spec.rayClusterSpec.workerGroupSpecs")[1:] = []
    at(body, "spec.rayClusterSpec.workerGroupSpecs")[0]["maxReplicas"] = 1
    assert texts(report(tmp_path, body, quota(cpu=str(cpus + 14))), "quota") == []
    assert texts(report(tmp_path, body, quota(cpu=f"{cpus + 14}000m")), "quota") == []
    assert len(texts(report(tmp_path, body, quota(cpu=f"{cpus + 13}999m")), "quota")) == 1


def test_a_container_names_what_its_quota_counts(tmp_path: Path):
    limits = made("LimitRange", "l", {"limits": [{"type": "Container", "default": {"cpu": "1"}}]})
    without = report(tmp_path, small(), quota(limits_cpu="99"))
    assert ["'ray'" in text for text in texts(without, "quota")] == [True]
    assert texts(report(tmp_path, small(), quota(limits_cpu="99"), limits), "quota") == []


# --- accounts, queues, claims, places --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beside", "is_there"),
    [
        ("wrpo-head", [], True),  # declared
        ("default", [], True),
        ("mine", [], False),
        ("mine", [made("ServiceAccount", "mine")], True),
        ("mine", [made("ServiceAccount", "mine", namespace="other")], False),
    ],
)
def test_a_service_account_is_there(name: str, beside: list[Body], is_there: bool, tmp_path: Path):
    body = ray_objects()["RayCluster"]
    body["metadata"]["namespace"] = "team"
    at(body, "spec.headGroupSpec.template.spec")["serviceAccountName"] = name
    told = texts(report(tmp_path, body, *beside), "reference")
    assert [f"ServiceAccount {name!r}" in text for text in told] == ([] if is_there else [True])


NAME = "kubernetes.io/metadata.name"


@pytest.mark.parametrize(
    ("selector", "local", "labels", "rules"),
    [
        ({"matchLabels": {NAME: "team"}}, "team", None, []),
        ({}, "team", None, []),
        (None, "team", None, ["queue-namespace"]),
        ({"matchLabels": {NAME: "other"}}, "team", None, ["queue-namespace"]),
        (
            {"matchExpressions": [{"key": NAME, "operator": "In", "values": ["team"]}]},
            "team",
            None,
            [],
        ),
        ({"matchLabels": {"a": "b"}}, "team", None, []),  # labels that are elsewhere
        ({"matchLabels": {"a": "b"}}, "team", {"a": "b"}, []),
        ({"matchLabels": {"a": "b"}}, "team", {"a": "c"}, ["queue-namespace"]),
        ({"matchLabels": {NAME: "other"}}, "other", None, ["queue"]),
    ],
)  # fmt: skip
def test_a_queue_admits_the_namespace_of_its_runs(
    selector: Any, local: str, labels: dict[str, str] | None, rules: list[str], tmp_path: Path
):
    body = ray_objects()["RayJob"]
    body["metadata"] |= {"namespace": "team", "labels": {"kueue.x-k8s.io/queue-name": "q"}}
    body["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] = "true"
    named = {} if selector is None else {"namespaceSelector": selector}
    covered = ["cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"]
    queue = named | {"resourceGroups": [{"coveredResources": covered}]}
    version = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    space = made("Namespace", "team")
    space["metadata"]["labels"] = labels
    told = report(
        tmp_path,
        body,
        made("LocalQueue", "q", {"clusterQueue": "c"}, local, **version),
        made("ClusterQueue", "c", queue, **version),
        *([space] if labels else []),
    )
    assert [p.rule for p in told.problems] == rules


def test_a_queue_of_that_name_in_another_namespace_is_not_ours(tmp_path: Path):
    """Its ClusterQueue covers nothing; that of our own covers all."""
    body = ray_objects()["RayJob"]
    body["metadata"] |= {"namespace": "team", "labels": {"kueue.x-k8s.io/queue-name": "q"}}
    body["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] = "true"
    covered = ["cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"]
    full = {"namespaceSelector": {}, "resourceGroups": [{"coveredResources": covered}]}
    version = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    told = report(
        tmp_path,
        body,
        made("LocalQueue", "q", {"clusterQueue": "none"}, "other", **version),
        made("LocalQueue", "q", {"clusterQueue": "full"}, "team", **version),
        made("ClusterQueue", "none", {"namespaceSelector": {}}, **version),
        made("ClusterQueue", "full", full, **version),
    )
    assert told.problems == []


@pytest.mark.parametrize(
    ("spec", "is_told"),
    [
        ({"accessModes": ["ReadWriteMany"]}, True),
        ({"accessModes": ["ReadWriteOnce"]}, False),
        ({"accessModes": ["ReadWriteMany"], "storageClassName": "efs"}, False),
        ({"accessModes": ["ReadWriteMany"], "storageClassName": ""}, False),
        ({"accessModes": ["ReadWriteMany"], "volumeName": "pv"}, False),
    ],
)
def test_a_shared_claim_names_its_class(spec: Body, is_told: bool, tmp_path: Path):
    told = report(tmp_path, made("PersistentVolumeClaim", "c", spec))
    assert bool(texts(told, "storage-class")) == is_told
    assert told.problems == []


@pytest.mark.parametrize(
    ("value", "is_told"),
    [
        ("s3://your-bucket/run", True),
        ("gs://BUCKET/run", True),
        ("hdfs://<host>/run", True),
        ("a: 1\noutput: s3://your-bucket/run", True),
        ("a: 1\n# s3://your-bucket/run", False),
        ("s3://yours/run", False),
        ("https://US-east.example.com", False),
        ("see s3://your-bucket", False),
        ("fs-0123456789abcdef0", True),
        ("nfs.example.com", True),
        ("arn:aws:iam::ACCOUNT:role/wrpo", True),
        ("a CLASS of its own", False),
    ],
)
def test_an_address_of_the_example_is_told(value: str, is_told: bool, tmp_path: Path):
    told = report(tmp_path, made("ConfigMap", "c", data={"c.yaml": value}))
    fields = [p.field for p in told.problems if p.rule == "placeholder"]
    assert fields == ([f"data.c.yaml{'.output' if 'output' in value else ''}"] if is_told else [])


@pytest.mark.parametrize("overlay", ["overlays/job", "overlays/serve"])
def test_the_buckets_of_the_overlays_have_to_be_filled_in(overlay: str, tmp_path: Path):
    text = rendered(overlay).replace("s3://bucket", "s3://your-bucket")
    (tmp_path / "c.yaml").write_text(text)
    assert {p.rule for p in check([str(tmp_path / "c.yaml")]).problems} == {"placeholder"}


@pytest.mark.parametrize(
    ("key", "more", "told"),
    [
        (
            "volumeMounts",
            {"name": "cachee", "mountPath": "/n"},
            "no volume 'cachee'; did you mean ",
        ),
        ("volumeMounts", {"name": "zzz", "mountPath": "/n"}, "the pod has no volume 'zzz':"),
        (
            "volumeMounts",
            {"name": "cache", "mountPath": "/cache/"},
            "two volumes are mounted at /c",
        ),
        ("volumeMounts", {"name": "cache", "mountPath": "/n"}, None),
        ("volumes", {"name": "cache", "emptyDir": {}}, "'cache' is the name of two volumes"),
        ("volumes", {"name": "other", "emptyDir": {}}, None),
    ],
)
@pytest.mark.parametrize("kind", ["RayCluster", "StatefulSet"])
def test_the_volumes_of_a_pod_are_those_that_are_mounted(
    key: str, more: Body, told: str | None, kind: str, tmp_path: Path
):
    mounts = [{"name": "cache", "mountPath": "/cache"}, {"name": "claim", "mountPath": "/claim"}]
    pod: Body = {"volumes": [{"name": "cache", "emptyDir": {}}]}
    pod["containers"] = [{"name": "a", "image": "a:1", "volumeMounts": mounts}]
    claims = [{"metadata": {"name": "claim"}, "spec": {}}]
    spec = {"template": {"spec": pod}, "volumeClaimTemplates": claims}
    body = made(kind, "redis", spec, apiVersion="apps/v1")
    if kind == "RayCluster":
        body = ray_objects()[kind]
        pod = at(body, "spec.headGroupSpec.template.spec")
    (pod if key == "volumes" else pod["containers"][0])[key].append(more)
    found = texts(report(tmp_path, body), "volumes")
    assert [told in one for one in found] == ([True] if told else []), found


KEY = {"name": "s", "key": "nope"}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": KEY}}]}, "Secret 's' has no key 'no"),
        ({"env": [{"name": "A", "valueFrom": {"configMapKeyRef": KEY}}]}, "ConfigMap 's' has no k"),
        ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": KEY | {"optional": True}}}]}, None),
        ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": KEY | {"key": "a"}}}]}, None),
        ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": KEY | {"key": "b"}}}]}, None),
        ({"volume": {"secret": {"secretName": "s", "items": [KEY]}}}, "Secret 's' has no key"),
        ({"volume": {"configMap": {"name": "s", "items": [KEY]}}}, "has no key 'nope'; it has a"),
        ({"volume": {"projected": {"sources": [{"secret": {"name": "nope"}}]}}}, "Secret 'nope'"),
        ({"volume": {"projected": {"sources": [{"secret": {"name": "s"}}]}}}, None),
        ({"volume": {"projected": {"sources": [{"secret": {"name": "n", "optional": True}}]}}},
         None),
    ],
)  # fmt: skip
def test_a_reference_and_its_key_are_there(more: Body, told: str | None, tmp_path: Path):
    body = ray_objects()["RayCluster"]
    pod = at(body, "spec.headGroupSpec.template.spec")
    pod["containers"][0]["env"] += more.get("env", [])
    pod["volumes"] += [{"name": "more"} | more["volume"]] if "volume" in more else []
    secret = made("Secret", "s", data={"a": ""}, stringData={"b": ""})
    found = report(tmp_path, body, secret, made("ConfigMap", "s", data={"a": ""})).problems
    assert [told in problem.text for problem in found] == ([True] if told else []), found


def test_classes_and_queues_that_are_not_there_have_to_exist_before(tmp_path: Path):
    version = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    flavors = {"resourceGroups": [{"coveredResources": ["cpu"], "flavors": [{"name": "f"}]}]}
    body = ray_objects()["RayJob"]
    names = {"queue-name": "q", "priority-class": "w"}
    body["metadata"] |= {"labels": {f"kueue.x-k8s.io/{k}": v for k, v in names.items()}}
    body["metadata"] |= {"namespace": "team"}
    pods = at(body, "spec.rayClusterSpec.workerGroupSpecs")
    for group, name in zip(pods, ("p", "system-node-critical"), strict=False):
        group["template"]["spec"]["priorityClassName"] = name
    needs = report(tmp_path, body).needs
    assert "LocalQueue/q" in needs["team"]
    assert needs[""] == ["PriorityClass/p", "WorkloadPriorityClass/w"]
    local = made("LocalQueue", "q", {"clusterQueue": "c"}, "team", **version)
    assert report(tmp_path, local).needs == {"": ["ClusterQueue/c"]}
    queue = made("ClusterQueue", "c", flavors, **version)
    assert report(tmp_path, local, queue).needs == {"": ["ResourceFlavor/f"]}
    assert report(tmp_path, local, queue, made("ResourceFlavor", "f", **version)).needs == {}


def test_a_cause_in_many_fields_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    body = ray_objects()["RayCluster"]
    body["metadata"]["annotations"]["wrpo-ray/external"] = ""
    (tmp_path / "c.yaml").write_text(json.dumps(body))
    assert cli.main(["cluster", "check", str(tmp_path / "c.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "'wrpo-cache' is not in" in line]) == 1
    assert any("claimName and 8 more fields: " in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("RayJob", "runtimeEnvYAML", "- pip"),
        ("RayJob", "runtimeEnvYAML", "pip: [1]"),
        ("RayService", "serveConfigV2", "applications: [{name: a, import_path: 'a:b', "
         "deployments: [3, x]}]"),
        ("RayService", "serveConfigV2", "applications: {a: 1}"),
    ],
)  # fmt: skip
def test_no_text_of_python_is_told(kind: str, field: str, value: str, tmp_path: Path):
    body = ray_objects()[kind]
    body["spec"][field] = value
    found = report(tmp_path, body).problems
    words = ("object has no", "unhashable", "validation error", "not subscriptable", "argument")
    assert found
    assert not [p for p in found if any(word in p.text for word in words)], found


# --- ports -----------------------------------------------------------------------------------


def served(port: int, declared: int) -> Body:
    body = ray_objects()["RayService"]
    body["spec"]["serveConfigV2"] = body["spec"]["serveConfigV2"].replace("8000", str(port))
    spec = body["spec"]["rayClusterConfig"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for each in group["template"]["spec"]["containers"][0]["ports"]:
            if each["name"] == "serve":
                each["containerPort"] = declared
    return body


@pytest.mark.parametrize(
    ("port", "declared", "wrong"),
    [(8000, 8000, 0), (9000, 9000, 0), (9000, 8000, 2), (8000, 9000, 2)],
)  # fmt: skip
def test_serve_listens_where_the_operator_asks(
    port: int, declared: int, wrong: int, tmp_path: Path
):
    assert len(texts(report(tmp_path, served(port, declared)), "serve-port")) == wrong


def backend(service: str, **port: Any) -> Body:
    path = {"path": "/", "backend": {"service": {"name": service, "port": port}}}
    return made("Ingress", "i", {"rules": [{"http": {"paths": [path]}}]})


@pytest.mark.parametrize(
    ("ingress", "is_right"),
    [
        (backend("fused-serve-svc", number=8000), True),
        (backend("fused-serve-svc", name="serve"), True),
        (backend("fused-serve-svc", number=80), False),
        (backend("fused-head-svc", number=8265), True),
        (backend("fused-svc", number=8000), False),
        (backend("own", number=80), True),
        (backend("own", name="http"), True),
        (backend("own", number=8000), False),
        (made("Ingress", "i", {"defaultBackend": backend("own", number=81)["spec"]["rules"][0][
            "http"]["paths"][0]["backend"]}), False),
        (made("HTTPRoute", "r", {"rules": [{"backendRefs": [{"name": "own", "port": 80}]}]}), True),
        (made("HTTPRoute", "r", {"rules": [{"backendRefs": [{"name": "own", "port": 8}]}]}), False),
    ],
)  # fmt: skip
def test_a_backend_is_a_port_of_a_service(ingress: Body, is_right: bool, tmp_path: Path):
    own = {"selector": {"a": "b"}, "ports": [{"name": "http", "port": 80}]}
    told = report(tmp_path, ray_objects()["RayService"], made("Service", "own", own), ingress)
    assert len(texts(told, "backend")) == (0 if is_right else 1)


def test_a_backend_may_be_elsewhere_or_have_a_name_of_its_own(tmp_path: Path):
    service = ray_objects()["RayService"]
    missing = backend("gateway", number=80)
    (text,) = texts(report(tmp_path, service, missing), "backend")
    assert text.endswith("the annotation wrpo-ray/external: Service/gateway")
    missing["metadata"]["annotations"] = {"wrpo-ray/external": "Service/gateway"}
    assert report(tmp_path, service, missing).problems == []
    service["spec"]["serveService"] = {"metadata": {"name": "custom"}}
    assert report(tmp_path, service, backend("custom", number=8000)).problems == []
    cluster = ray_objects()["RayCluster"]
    at(cluster, "spec.headGroupSpec")["headService"] = {"metadata": {"name": "head"}}
    assert texts(report(tmp_path, cluster, backend("head", number=8265)), "backend") == []
    assert len(texts(report(tmp_path, service, backend("custom", number=1)), "backend")) == 1
    assert len(texts(report(tmp_path, service, backend("fused-serve-svc")), "backend")) == 1
    outside = made("Service", "out", {"type": "ExternalName", "externalName": "a.example.org"})
    assert report(tmp_path, service, outside, backend("out", number=443)).problems == []
    pool = {"name": "pool", "port": 1, "group": "inference.networking.k8s.io"}
    route = made("HTTPRoute", "r", {"rules": [{"backendRefs": [pool]}]})
    assert report(tmp_path, service, route).problems == []
    quoted = texts(report(tmp_path, service, backend("custom", number="8000")), "backend")
    assert quoted == ["the port '8000' is a text; write 8000"]


def test_backends_elsewhere_are_not_judged(tmp_path: Path):
    assert report(tmp_path, backend("other", number=80)).problems == []


@pytest.mark.parametrize(
    ("selector", "port", "is_right"),
    [
        ({"ray.io/serve": "true"}, {"port": 80, "targetPort": 8000}, True),
        ({"ray.io/serve": "true"}, {"port": 80, "targetPort": "serve"}, True),
        ({"ray.io/serve": "true"}, {"port": 80}, True),  # pods need not declare a number
        ({"ray.io/serve": "true"}, {"port": 80, "targetPort": "web"}, False),
        ({"ray.io/node-type": "head"}, {"port": 8265}, True),
        ({"app": "redis"}, {"port": 1, "targetPort": 6379}, True),
        ({"app": "redis"}, {"port": 6380}, True),
        ({"app": "redis"}, {"port": 1, "targetPort": "redis"}, False),
        ({"app": "elsewhere"}, {"port": 1, "targetPort": "redis"}, True),
    ],
)
def test_a_service_asks_a_port_of_its_pods(
    selector: Body, port: Body, is_right: bool, tmp_path: Path
):
    container = {"name": "redis", "ports": [{"containerPort": 6379}]}
    template = {"metadata": {"labels": {"app": "redis"}}, "spec": {"containers": [container]}}
    told = report(
        tmp_path,
        ray_objects()["RayService"],
        made("Deployment", "redis", {"template": template}, apiVersion="apps/v1"),
        made("Service", "s", {"selector": selector, "ports": [port]}),
    )
    assert len(texts(told, "backend")) == (0 if is_right else 1)


# --- the config of a run ---------------------------------------------------------------------


def run_with(text: str | None, key: str = "fusion.yaml", entrypoint: str = "") -> list[Body]:
    """A RayJob, and the ConfigMap that it mounts."""
    body = ray_objects()["RayJob"]
    notes = body["metadata"]["annotations"]
    notes["wrpo-ray/external"] = notes["wrpo-ray/external"].replace("ConfigMap/wrpo-fusion ", "")
    body["spec"]["entrypoint"] = entrypoint or body["spec"]["entrypoint"]
    return [body] if text is None else [body, made("ConfigMap", "wrpo-fusion", data={key: text})]


GOOD = FUSION.read_text().replace("your-bucket", "bucket")


@pytest.mark.parametrize(
    ("bodies", "text"),
    [
        (run_with(GOOD), None),
        (run_with(None), "its ConfigMap 'wrpo-fusion' is not in these manifests"),
        (run_with(GOOD, "fusion.yml"), "no file 'fusion.yaml'; did you mean 'fusion.yml'?"),
        (run_with(GOOD, "x"), "no file 'fusion.yaml'; it has x"),
        (run_with(GOOD, entrypoint="wrpo fuse /etc/other/f.yaml"), "is on no volume that"),
        (run_with(GOOD, entrypoint="wrpo fuse /tmp/ray/f.yaml"), "is on an emptyDir"),
        (run_with(GOOD, entrypoint="wrpo fuse /cache/f.yaml"), None),
        (run_with(GOOD, entrypoint="wrpo fuse /opt/wrpo/jobs/demo.yaml"), None),
        (run_with(GOOD, entrypoint="wrpo fuse jobs/demo.yaml"), None),
        (run_with(GOOD, entrypoint="python mine.py"), None),
        (run_with(GOOD + "\nwrpoo: 1"), "/etc/wrpo/fusion.yaml: wrpoo: unknown key"),
        (run_with("a: ["), "not valid YAML"),
        (run_with(GOOD, entrypoint="wrpo fuse /etc/wrpo/fusion.yaml --set seed=x"), "seed: "),
        (run_with(GOOD, entrypoint="sh -c 'cd /x && exec wrpo sft --set=seed=x "
                  "/etc/wrpo/fusion.yaml; ls'"), "seed: "),
        (run_with(GOOD, entrypoint="wrpo fuse /etc/wrpo/fusion.yaml && wrpo status --set "
                  "seed=x"), None),
        (run_with(GOOD, "k"), "has no file 'fusion.yaml'; it has k"),
        (run_with(GOOD, entrypoint="python -m wrpo_ray fuse /etc/wrpo/no.yaml"), "no file 'no.ya"),
        (run_with(GOOD, entrypoint="wrpo plan /etc/wrpo/fusion.yaml && /b/wrpo fuse "
                  "/etc/wrpo/no.yaml"), "no file 'no.yaml'"),
        (run_with(GOOD, entrypoint="A=1 wrpo fuze /etc/wrpo/fusion.yaml"), "did you mean 'fuse'?"),
        (run_with(GOOD, entrypoint="sh -c 'cd x; wrpo fuze'"), "no command 'fuze'"),
        (run_with(GOOD, entrypoint="cd wrpo && echo wrpo rocks; wrpo $X; wrpo --version"), None),
    ],
)  # fmt: skip
def test_the_config_that_is_mounted_is_there_and_valid(
    bodies: list[Body], text: str | None, tmp_path: Path
):
    told = texts(report(tmp_path, *bodies), "job-config")
    assert [text in one for one in told] == ([True] if text else []), told


def test_the_commands_are_those_of_the_parser():
    (commands,) = (a for a in make_parser()._actions if isinstance(a, _SubParsersAction))
    assert job_config.COMMANDS.split() == list(commands.choices)


@pytest.mark.parametrize(
    ("entrypoint", "is_kept"),
    [
        ("cp x output=/tmp/y && wrpo fuse {}", True),
        ("wrpo fuse {} --set output=/tmp/y", False),
        ("wrpo fuse {} --set=output=/tmp/y", False),
        ("wrpo fuse {} --set output=/cache/y", True),
    ],
)
def test_the_output_of_a_run_is_that_of_its_command(entrypoint: str, is_kept: bool, tmp_path: Path):
    bodies = run_with(GOOD, entrypoint=entrypoint.format("/etc/wrpo/fusion.yaml"))
    assert (texts(report(tmp_path, *bodies), "output") == []) == is_kept


def test_two_runs_have_two_names_and_two_outputs(tmp_path: Path):
    job, files = run_with(GOOD)
    other = json.loads(json.dumps(job))
    other["metadata"]["name"] = "other"
    (text,) = texts(report(tmp_path, job, other, files), "output")
    assert text.startswith("writes to 's3://bucket/fusion', as RayJob/fusion does")
    other["spec"]["entrypoint"] += " --set output=s3://bucket/other"
    assert report(tmp_path, job, other, files).problems == []
    other["metadata"]["name"] = "fusion"
    assert [p.rule for p in report(tmp_path, job, other, files).problems] == ["twice"]
    assert [p.rule for p in report(tmp_path, files, files).problems] == ["twice"]
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(json.dumps(files))
    assert check([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]).problems == []


@pytest.mark.parametrize(
    ("field", "text", "is_plain"),
    [
        ("spec", "HF_TOKEN=hf_abc wrpo fuse x", True),
        ("spec", "sh -c 'export HF_TOKEN=\"hf_abc\"; wrpo fuse x'", True),
        ("spec", "HF_TOKEN=$TOKEN wrpo fuse x", False),
        ("spec", 'HF_TOKEN="$(cat /run/token)" wrpo fuse x', False),
        ("args", ["--redis-password=hunter2"], True),
        ("args", ["--max-tokens=5", "--password=$(PASSWORD)"], False),
    ],
)
def test_a_secret_in_a_command_is_plain(field: str, text: Any, is_plain: bool, tmp_path: Path):
    body = ray_objects()["RayJob"]
    if field == "spec":
        body["spec"]["entrypoint"] = text
    else:
        at(body, "spec.rayClusterSpec.headGroupSpec.template.spec.containers")[0][field] = text
    told = texts(report(tmp_path, body), "plain-secret")
    assert bool(told) == is_plain
    assert "hf_abc" not in str(told)


def test_the_steps_of_the_mounted_config_have_to_fit(tmp_path: Path):
    text = GOOD.replace("generate-4gpu: 1", "generate-5gpu: 1")
    told = report(tmp_path, *run_with(text))
    assert [p.rule for p in told.problems] == ["no-room"]
    assert any(": sft: 1 x train" in place for place in told.places)


def test_a_wrong_key_of_items_is_named(tmp_path: Path):
    bodies = run_with(GOOD)
    for group in bodies[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        volumes = group["template"]["spec"]["volumes"]
        items = [{"key": "nope", "path": "fusion.yaml"}]
        next(v for v in volumes if v["name"] == "fusion")["configMap"]["items"] = items
    (text,) = texts(report(tmp_path, *bodies), "job-config")
    assert "`items` names the key 'nope', which the ConfigMap 'wrpo-fusion' does not have" in text


def test_a_key_may_have_another_path_or_be_mounted_alone(tmp_path: Path):
    for edit in (
        lambda volume, mount: volume["configMap"].update(
            items=[{"key": "k", "path": "fusion.yaml"}]
        ),
        lambda _, mount: mount.update(mountPath="/etc/wrpo/fusion.yaml", subPath="k"),
    ):
        bodies = run_with("a: 1", "k")
        spec = bodies[0]["spec"]["rayClusterSpec"]
        for group in spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            volume = next(v for v in pod["volumes"] if v["name"] == "fusion")
            mounts = pod["containers"][0]["volumeMounts"]
            edit(volume, next(m for m in mounts if m["name"] == "fusion"))
        told = texts(report(tmp_path, *bodies), "job-config")
        assert any("a: unknown key" in text for text in told), told


def test_a_mount_of_a_strange_form_is_a_problem_and_not_a_crash(tmp_path: Path):
    bodies = run_with(GOOD)
    for group in bodies[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        volumes = group["template"]["spec"]["volumes"]
        next(v for v in volumes if v["name"] == "fusion")["configMap"]["items"] = 5
    assert report(tmp_path, *bodies).problems


def test_a_job_that_is_not_the_mounted_one_is_told(tmp_path: Path):
    other = config.load(FUSION, [*FILLED, "seed=7", "wrpo.beta=0.5"])
    (problem,) = report(tmp_path, *run_with(GOOD), job=other).problems
    assert problem.rule == "job-config"
    assert "(they differ in seed, wrpo)" in problem.text
    assert report(tmp_path, *run_with(GOOD), job=config.load(FUSION, FILLED)).problems == []


def test_a_job_that_nothing_runs_is_told(tmp_path: Path):
    told = report(tmp_path, ray_objects()["RayService"], job=config.load(FUSION))
    assert [(str(p.where), p.rule) for p in told.problems] == [("--job", "job-unused")]
    both = [ray_objects()["RayService"], ray_objects()["RayCluster"]]
    assert report(tmp_path, *both, job=config.load(FUSION)).problems == []
