"""What `wrpo cluster check` says of objects beside each other, and its remedies, line by line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.edits import Edit, at, put
from support.manifests import FUSION, Body, ray_objects

from wrpo_ray import cli, config
from wrpo_ray.kubernetes.check import Report, check

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
            "generate qwen: its 2 parts (tensor_parallel x pipeline_parallel) do not fit one replica "
            "of generate-1gpu; generate-4gpu has room: name it in `resources` in place of "
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
            [f"{part}.actors.resources={{h200: 1}}" for part in ("sources.0", "sources.1", "target")],
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
        "echo 'E1130 08:45:09.123456    1234 run.go:74] \"x\"' >&2; echo 'error: no [a] b' >&2; exit 1\n"
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cli.main(["cluster", "check", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.endswith('kubectl kustomize: old field "x" error: no [a] b\n')


# --- files -----------------------------------------------------------------------------------


def bomb(levels: int) -> str:
    """Aliases of ten aliases each."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(levels):
        lines.append(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]")
    return "kind: ConfigMap\napiVersion: v1\nmetadata: {name: c}\n" + "\n".join(lines)


@pytest.mark.parametrize("levels", [4, 5, 9, 200])
def test_aliases_that_stand_for_too_much_are_refused_at_once(levels: int, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(bomb(levels))
    started = time.process_time()
    (problem,) = check([str(tmp_path / "c.yaml")]).problems
    assert time.process_time() - started < 1
    assert problem.rule == "yaml"
    assert "values, and may for 50000; write" in problem.text


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
