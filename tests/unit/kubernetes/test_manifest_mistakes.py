"""Seeded mistakes: each alone in objects that are right otherwise, and each caught by its name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.edits import Edit, add, at, both, drop, put
from support.manifests import FUSION, Body, crds, ray_objects

from wrpo_ray import cli, config
from wrpo_ray.config import loader
from wrpo_ray.kubernetes.capacity import misfit, node_types
from wrpo_ray.kubernetes.check import check
from wrpo_ray.kubernetes.manifests import Manifest
from wrpo_ray.kubernetes.ray_objects import RayObject, typed
from wrpo_ray.kubernetes.resource_requests import Request, of_config
from wrpo_ray.stages.generate import stage as generate
from wrpo_ray.stages.score import stage as score

ONE = "spec.workerGroupSpecs[generate-1gpu]"
TRAIN = "spec.workerGroupSpecs[train]"
RAY = "template.spec.containers[0]"
GPU = "nvidia.com/gpu"
RULES = {"condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}, "policy": "DeleteCluster"}


def with_submitter(field: str, value: Any, mode: str = "K8sJobMode") -> Edit:
    """A pod that submits, with a field of its container."""

    def edit(body: Body) -> None:
        container = {"name": "submitter", "image": "wrpo-ray:0.1.0-gpu", field: value}
        body["spec"]["submissionMode"] = mode
        body["spec"]["submitterPodTemplate"] = {"spec": {"containers": [container]}}

    return edit


def queued(body: Body) -> None:
    body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "fusion"}
    del body["spec"]["rayClusterSpec"]["workerGroupSpecs"][6:]


MISTAKES: dict[str, tuple[str, Edit, str, str]] = {
    # what: (kind, edit, field, rule)
    "unknown kind": ("RayJob", put("kind", "RayJobs"), "kind", "kind"),
    "old version": ("RayJob", put("apiVersion", "ray.io/v1alpha1"), "apiVersion", "kind"),
    "no kind": ("RayJob", drop("kind"), "kind", "kind"),
    "name too long": (
        "RayJob", put("metadata.name", "f" * 48), "metadata.name", "name-length"
    ),
    "service name too long": (
        "RayService", put("metadata.name", "f" * 48), "metadata.name", "name-length"
    ),
    "name with a dot": ("RayJob", put("metadata.name", "run.1"), "metadata.name", "name-form"),
    "head with CPUs": (
        "RayCluster", put("spec.headGroupSpec.rayStartParams.num-cpus", "4"),
        "spec.headGroupSpec.rayStartParams.num-cpus", "head-cpus",
    ),
    "head that does not say": (
        "RayCluster", drop("spec.headGroupSpec.rayStartParams.num-cpus"),
        "spec.headGroupSpec.rayStartParams.num-cpus", "head-cpus",
    ),
    "restartPolicy Always": (
        "RayCluster", put(f"{ONE}.template.spec.restartPolicy", "Always"),
        f"{ONE}.template.spec.restartPolicy", "restart-policy",
    ),
    "missing maxReplicas": (
        "RayCluster", drop(f"{ONE}.maxReplicas"), f"{ONE}.maxReplicas", "min-max-replicas"
    ),
    "missing minReplicas": (
        "RayCluster", drop(f"{ONE}.minReplicas"), f"{ONE}.minReplicas", "min-max-replicas"
    ),
    "minReplicas above maxReplicas": (
        "RayCluster", put(f"{ONE}.minReplicas", 33), f"{ONE}.minReplicas", "replicas-range"
    ),
    "replicas above maxReplicas": (
        "RayCluster", put(f"{ONE}.replicas", 33), f"{ONE}.replicas", "replicas-range"
    ),
    "numOfHosts of 0": (
        "RayCluster", put("spec.workerGroupSpecs[cpu].numOfHosts", 0),
        "spec.workerGroupSpecs[cpu].numOfHosts", "replicas-range",
    ),
    "two groups of a name": (
        "RayCluster",
        lambda b: at(b, "spec.workerGroupSpecs").append(at(b, "spec.workerGroupSpecs[cpu]")),
        "spec.workerGroupSpecs[cpu].groupName", "group-name",
    ),
    "suspended group with the autoscaler": (
        "RayCluster", put(f"{ONE}.suspend", True), f"{ONE}.suspend", "suspended-group"
    ),
    "CPUs told twice": (
        "RayCluster", put(f"{ONE}.rayStartParams", {"num-cpus": "14"}),
        f"{ONE}.resources", "resources-twice",
    ),
    "labels as a parameter": (
        "RayCluster", put("spec.workerGroupSpecs[cpu].rayStartParams.labels", "a=b"),
        "spec.workerGroupSpecs[cpu].rayStartParams.labels", "labels",
    ),
    "group without a container": (
        "RayCluster", put("spec.headGroupSpec.template.spec.containers", []),
        "spec.headGroupSpec.template.spec.containers", "no-container",
    ),
    "version skew of Ray": (
        "RayCluster", put("spec.rayVersion", "2.59.0"), "spec.rayVersion", "ray-version"
    ),
    "version skew of an image": (
        "RayCluster", put(f"{TRAIN}.{RAY}.image", "wrpo-ray:0.0.9-gpu"),
        f"{TRAIN}.{RAY}.image", "image-version",
    ),
    "Ray's own image of another version": (
        "RayCluster", put(f"{TRAIN}.{RAY}.image", "rayproject/ray:2.59.0-gpu"),
        f"{TRAIN}.{RAY}.image", "image-version",
    ),
    "image without a version": (
        "RayCluster", put(f"{TRAIN}.{RAY}.image", "wrpo-ray:latest"),
        f"{TRAIN}.{RAY}.image", "image-version",
    ),
    "CPU image on GPUs": (
        "RayCluster", put(f"{TRAIN}.{RAY}.image", "wrpo-ray:0.1.0-cpu"),
        f"{TRAIN}.{RAY}.image", "image-version",
    ),
    "submitter of another version": (
        "RayJob", with_submitter("image", "wrpo-ray:0.2.0-gpu"),
        "spec.submitterPodTemplate.spec.containers[0].image", "image-version",
    ),
    "GPU request without a limit": (
        "RayCluster", lambda b: at(b, f"{ONE}.{RAY}.resources.limits").pop(GPU),
        f"{ONE}.{RAY}.resources.limits.{GPU}", "gpu-limits",
    ),
    "GPU count that Ray is told wrongly": (
        "RayCluster", put(f"{ONE}.resources", {"GPU": "2", "generate-1gpu": "2"}),
        f"{ONE}.resources.GPU", "gpu-count",
    ),
    "no shared memory": (
        "RayCluster", lambda b: at(b, f"{TRAIN}.{RAY}.volumeMounts").pop(0),
        f"{TRAIN}.template.spec.volumes", "shared-memory",
    ),
    "shared memory on a disk": (
        "RayCluster", drop(f"{TRAIN}.template.spec.volumes[shm].emptyDir.medium"),
        f"{TRAIN}.template.spec.volumes", "shared-memory",
    ),
    "shared memory below Ray's share": (
        "RayCluster", put(f"{TRAIN}.template.spec.volumes[shm].emptyDir.sizeLimit", "64Gi"),
        f"{TRAIN}.template.spec.volumes[shm].emptyDir.sizeLimit", "shared-memory",
    ),
    "Secret that is nowhere": (
        "RayCluster",
        both(
            put("metadata.annotations.wrpo-ray/external", "PersistentVolumeClaim/wrpo-cache"),
            drop(f"spec.headGroupSpec.{RAY}.envFrom[0].secretRef.optional"),
        ),
        "spec.headGroupSpec.template.spec.containers[0].envFrom[0].secretRef.name", "reference",
    ),
    "volume claim that is nowhere": (
        "RayCluster",
        put(f"{ONE}.template.spec.volumes[cache].persistentVolumeClaim.claimName", "cash"),
        "spec.workerGroupSpecs[1].template.spec.volumes[2].persistentVolumeClaim.claimName",
        "reference",
    ),
    "token with an old Ray": (
        "RayCluster", put("spec.rayVersion", "2.51.1"), "spec.authOptions.mode", "auth-version"
    ),
    "idle timeout without v2": (
        "RayCluster", put("spec.autoscalerOptions.version", "v1"),
        f"{ONE}.idleTimeoutSeconds", "idle-timeout-v2",
    ),
    "autoscaler that is off": (
        "RayCluster", put("spec.enableInTreeAutoscaling", False),
        "spec.enableInTreeAutoscaling", "autoscaling-off",
    ),
    "autoscaler v2 told twice": (
        "RayCluster",
        add(f"spec.headGroupSpec.{RAY}.env", {"name": "RAY_enable_autoscaler_v2", "value": "1"}),
        "spec.autoscalerOptions.version", "autoscaler-twice",
    ),
    "Redis in the environment": (
        "RayService",
        add(f"spec.rayClusterConfig.headGroupSpec.{RAY}.env",
            {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
        f"spec.rayClusterConfig.headGroupSpec.{RAY}.env[RAY_REDIS_ADDRESS]", "redis",
    ),
    "both clean-up policies": (
        "RayJob", put("spec.deletionStrategy", {"deletionRules": [RULES]}),
        "spec.deletionStrategy.deletionRules", "both-clean-ups",
    ),
    "both forms of a deletion strategy": (
        "RayJob",
        both(
            put("spec.shutdownAfterJobFinishes", False), put("spec.ttlSecondsAfterFinished", 0),
            put("spec.deletionStrategy", {
                "deletionRules": [RULES],
                "onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteSelf"},
            }),
        ),
        "spec.deletionStrategy.deletionRules", "both-clean-ups",
    ),
    "deletion in the wrong order": (
        "RayJob",
        both(
            put("spec.shutdownAfterJobFinishes", False), put("spec.ttlSecondsAfterFinished", 0),
            put("spec.deletionStrategy", {"deletionRules": [
                RULES,
                {"condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 10}, "policy": "DeleteSelf"},
            ]}),
        ),
        "spec.deletionStrategy.deletionRules", "clean-up",
    ),
    "clean-up time without clean-up": (
        "RayJob", put("spec.shutdownAfterJobFinishes", False),
        "spec.ttlSecondsAfterFinished", "clean-up",
    ),
    "SidecarMode with a submitter": (
        "RayJob", with_submitter("env", [], "SidecarMode"),
        "spec.submitterPodTemplate", "sidecar-mode",
    ),
    "tries in InteractiveMode": (
        "RayJob", put("spec.submissionMode", "InteractiveMode"), "spec.backoffLimit", "backoff"
    ),
    "negative tries": ("RayJob", put("spec.backoffLimit", -1), "spec.backoffLimit", "backoff"),
    "deadline of 0": (
        "RayJob", put("spec.activeDeadlineSeconds", 0), "spec.activeDeadlineSeconds", "deadline"
    ),
    "no command": ("RayJob", put("spec.entrypoint", " "), "spec.entrypoint", "entrypoint"),
    "no cluster": ("RayJob", drop("spec.rayClusterSpec"), "spec.rayClusterSpec", "no-cluster"),
    "runtime_env with a misspelt key": (
        "RayJob", put("spec.runtimeEnvYAML", "env_var: {A: b}"),
        "spec.runtimeEnvYAML.env_var", "runtime-env",
    ),
    "runtime_env that is no YAML": (
        "RayJob", put("spec.runtimeEnvYAML", "{a: "), "spec.runtimeEnvYAML", "runtime-env"
    ),
    "unknown upgrade": (
        "RayService", put("spec.upgradeStrategy.type", "Rolling"),
        "spec.upgradeStrategy.type", "upgrade",
    ),
    "incremental upgrade without a gateway": (
        "RayService", put("spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade"),
        "spec.upgradeStrategy.clusterUpgradeOptions", "upgrade",
    ),
    "misspelt key of Serve": (
        "RayService",
        put("spec.serveConfigV2", "applications: [{import_path: 'a:b', route_prefx: /}]"),
        "spec.serveConfigV2.applications[0].route_prefx", "serve-config",
    ),
    "Serve config of a wrong type": (
        "RayService", put("spec.serveConfigV2", "applications: 3"),
        "spec.serveConfigV2.applications", "serve-config",
    ),
    "queued with an autoscaler that Kueue does not know of": (
        "RayJob", queued, "spec.rayClusterSpec.enableInTreeAutoscaling", "queue"
    ),
    "replicas as text": (
        "RayCluster", put(f"{ONE}.replicas", "two"),
        "spec.workerGroupSpecs[1].replicas", "number",
    ),
    "resources that Ray cannot read": (
        "RayCluster",
        both(
            put("spec.workerGroupSpecs[cpu].rayStartParams", {}),
            put("spec.workerGroupSpecs[cpu].resources", {"CPU": "many", "GPU": "0"}),
        ),
        "spec.workerGroupSpecs[0].resources.CPU", "quantity",
    ),
    "memory with a unit that Kubernetes does not know": (
        "RayCluster", put(f"{ONE}.{RAY}.resources.limits.memory", "16GB"),
        f"spec.workerGroupSpecs[1].{RAY}.resources.limits.memory", "quantity",
    ),
    "half a GPU": (
        "RayCluster", put(f"{ONE}.{RAY}.resources.limits", {GPU: "500m"}),
        f"spec.workerGroupSpecs[1].{RAY}.resources.limits.{GPU}", "quantity",
    ),
    "label with a space": (
        "RayCluster", put(f"{ONE}.labels", {"role": "a b"}),
        "spec.workerGroupSpecs[1].labels.role", "label",
    ),
    "port name too long": (
        "RayCluster", put(f"spec.headGroupSpec.{RAY}.ports[0].name", "a-name-of-sixteen"),
        f"spec.headGroupSpec.{RAY}.ports[0].name", "port",
    ),
    "memory of Ray with a unit": (
        "RayCluster", put("spec.workerGroupSpecs[cpu].rayStartParams.memory", "16Gi"),
        "spec.workerGroupSpecs[0].rayStartParams.memory", "quantity",
    ),
    "driver's resources that are no JSON": (
        "RayJob", put("spec.entrypointResources", "{cpu: 1}"),
        "spec.entrypointResources", "resources",
    ),
    "number in the environment": (
        "RayJob", with_submitter("env", [{"name": "A", "value": 1}]),
        "spec.submitterPodTemplate.spec.containers[0].env[0].value", "wrong-type",
    ),
    "driver that fits no group": (
        "RayJob", put("spec.entrypointNumCpus", 500), "", "no-room"
    ),
    "served model that fits no group": (
        "RayService",
        put("spec.serveConfigV2",
            "applications: [{import_path: 'wrpo_ray.serve.app:build', args: {models: [{"
            "name: fused, model: m, actors: {num_gpus: 1, resources: {h200: 1}}}]}}]"),
        "", "no-room",
    ),
    "served model with a wrong field": (
        "RayService",
        put("spec.serveConfigV2",
            "applications: [{import_path: 'wrpo_ray.serve.app:build', "
            "args: {models: [{name: fused, model: m, actors: {gpus: 1}}]}}]"),
        "spec.serveConfigV2.applications[0].args", "serve-config",
    ),
    "deployment that fits no group": (
        "RayService",
        put("spec.serveConfigV2",
            "applications: [{import_path: 'a:b', deployments: [{name: m, "
            "max_surge_percent: 100, ray_actor_options: {num_gpus: 9}}]}]"),
        "", "no-room",
    ),
}  # fmt: skip
ALSO = {
    "token with an old Ray": {"ray-version"},
    "autoscaler that is off": {"idle-timeout-v2"},
}
"""What else a mistake rightly brings up."""


def problems(folder: Path, body: Body, **options: Any) -> set[tuple[str, str]]:
    """(field, rule) of each problem of one object."""
    file = folder / "object.yaml"
    file.write_text(json.dumps(body))
    found = check([str(file)], **options).problems
    for problem in found:  # in words: the file, the object, the field
        assert str(problem).startswith(f"{file}: ")
        assert problem.field in str(problem)
        assert problem.text
    return {(problem.field, problem.rule) for problem in found}


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_without_a_mistake_there_is_no_problem(kind: str, tmp_path: Path):
    assert problems(tmp_path, ray_objects()[kind]) == set()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught_by_its_name(name: str, tmp_path: Path):
    kind, edit, field, rule = MISTAKES[name]
    body = ray_objects()[kind]
    edit(body)
    found = problems(tmp_path, body)
    assert (field, rule) in found
    assert {r for _, r in found} <= {rule} | ALSO.get(name, set())


# --- by KubeRay's schemas --------------------------------------------------------------------

BY_SCHEMA: dict[str, tuple[str, Edit, str, str]] = {
    "typo in a field": (
        "RayCluster", put("spec.enableIntreeAutoscaling", True),
        "spec.enableIntreeAutoscaling", "unknown-field",
    ),
    "typo deep in a pod": (
        "RayService",
        lambda b: b["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"].update(
            {"tolerationz": []}
        ),
        "spec.rayClusterConfig.headGroupSpec.template.spec.tolerationz", "unknown-field",
    ),
    "number as text": (
        "RayJob", put("spec.backoffLimit", "5"), "spec.backoffLimit", "wrong-type"
    ),
    "list for a mapping": (
        "RayCluster", put(f"{ONE}.rayStartParams", ["num-cpus"]),
        "spec.workerGroupSpecs[1].rayStartParams", "wrong-type",
    ),
    "word that is none of those known": (
        "RayCluster", put("spec.gcsFaultToleranceOptions", {"backend": "etcd"}),
        "spec.gcsFaultToleranceOptions.backend", "wrong-value",
    ),
    "head without a template": (
        "RayCluster", drop("spec.headGroupSpec.template"),
        "spec.headGroupSpec.template", "missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_SCHEMA)
def test_a_mistake_is_caught_by_the_schema(name: str, tmp_path: Path):
    kind, edit, field, rule = BY_SCHEMA[name]
    body = ray_objects()[kind]
    edit(body)
    found = problems(tmp_path, body, schemas=crds())
    assert (field, rule) in found


def test_a_typo_is_told_with_the_nearest_field(tmp_path: Path):
    body = ray_objects()["RayCluster"]
    at(body, ONE)["maxReplica"] = 3
    (tmp_path / "c.yaml").write_text(json.dumps(body))
    (problem,) = check([str(tmp_path / "c.yaml")], None, crds()).problems
    assert problem.text == "unknown field; did you mean 'maxReplicas'?"


# --- by a config -----------------------------------------------------------------------------


def with_job(tmp_path: Path, body: Body, *overrides: str) -> set[tuple[str, str]]:
    """(step, rule) of each problem of an object and the fusion job with some overrides."""
    (tmp_path / "c.yaml").write_text(json.dumps(body))
    found = check([str(tmp_path / "c.yaml")], config.load(FUSION, overrides)).problems
    return {(problem.text.partition(":")[0], problem.rule) for problem in found}


@pytest.mark.parametrize(
    ("override", "step", "rule"),
    [
        ("sources.0.actors.num_gpus=2", "generate qwen", "no-room"),
        ("sources.0.actors.resources={h200: 1}", "generate qwen", "no-room"),
        ("sources.0.actors.num_cpus=15", "generate qwen", "no-room"),
        ("sources.0.actors={min: 33, max: 33, num_gpus: 1, resources: {generate-1gpu: 1}}",
         "generate qwen", "no-room"),
        ("sources.2.tensor_parallel=8", "generate llama-70b", "parts-apart"),
        ("sources.3.pipeline_parallel=4", "generate deepseek", "parts-apart"),
        ("reward.actors={min: 9, max: 9, num_gpus: 1, resources: {reward: 1}}",
         "score with reward", "no-room"),
        ("sft={workers: 65, num_gpus: 1, resources: {train: 1}}", "sft", "no-room"),
        ("wrpo.reference.actors.num_cpus=113", "wrpo's reference", "no-room"),
    ],
)  # fmt: skip
def test_a_step_that_fits_no_group_is_told_by_name(
    tmp_path: Path, override: str, step: str, rule: str
):
    assert with_job(tmp_path, ray_objects()["RayCluster"], override) == {(step, rule)}


@pytest.mark.parametrize(("hosts", "rule"), [(1, "parts-apart"), (3, "parts-left-over")])
def test_hosts_of_a_replica_have_to_match_an_engines_parts(tmp_path: Path, hosts: int, rule: str):
    body = ray_objects()["RayCluster"]
    at(body, "spec.workerGroupSpecs[generate-2x8gpu]")["numOfHosts"] = hosts
    assert with_job(tmp_path, body) == {("generate deepseek", rule)}


def test_the_remedy_for_parts_names_the_number_of_hosts(tmp_path: Path):
    body = ray_objects()["RayCluster"]
    at(body, "spec.workerGroupSpecs[generate-2x8gpu]")["numOfHosts"] = 1
    (tmp_path / "c.yaml").write_text(json.dumps(body))
    (problem,) = check([str(tmp_path / "c.yaml")], config.load(FUSION)).problems
    assert problem.text.endswith("generate-2x8gpu has room for 8: set its numOfHosts to 2")


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 4))
def test_actors_fit_as_many_nodes_as_they_fill(gpus: int, count: int, nodes: int):
    # A node of 8 GPUs has room for floor(8 / gpus) actors, so `count` of them take so many nodes.
    found = typed(Manifest("test", with_most(ray_objects()["RayCluster"], "generate-8gpu", nodes)))
    assert isinstance(found, RayObject)
    types = node_types(found, found.cluster)
    request = Request("actors", ({"GPU": gpus, "generate-8gpu": gpus},), count)
    needed = -(-count // (8 // gpus))
    wanted = {"generate-8gpu": needed} if needed <= nodes else None
    assert types.nodes_for(request) == wanted
    assert (misfit(types, request) is None) == (wanted is not None)


def with_most(body: Body, group: str, replicas: int) -> Body:
    at(body, f"spec.workerGroupSpecs[{group}]")["maxReplicas"] = replicas
    return body


# --- files and the command -------------------------------------------------------------------


def test_files_that_are_no_manifests_are_told(tmp_path: Path):
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    found = check([str(tmp_path)]).problems
    assert [(Path(p.where).name, p.rule) for p in found] == [
        ("broken.yaml", "yaml"),
        ("list.yaml", "yaml"),
    ]


def test_a_list_is_opened(tmp_path: Path):
    wrong = ray_objects()["RayJob"]
    wrong["spec"]["backoffLimit"] = -1
    items = {"kind": "List", "apiVersion": "v1", "items": [ray_objects()["RayCluster"], wrong]}
    assert problems(tmp_path, items) == {("spec.backoffLimit", "backoff")}


def test_references_are_found_among_all_files(tmp_path: Path):
    body = ray_objects()["RayCluster"]
    body["metadata"]["annotations"] = {}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "wrpo-cache"},
    }
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "wrpo-credentials"}}
    accounts = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": f"wrpo-{name}"}}
        for name in ("head", "worker")
    ]
    others = "\n---\n".join(map(json.dumps, [claim, secret, *accounts]))
    (tmp_path / "cluster.yaml").write_text(json.dumps(body))
    (tmp_path / "others.yaml").write_text(others)
    assert check([str(tmp_path)]).problems == []


def test_the_command_tells_each_problem_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    body = ray_objects()["RayJob"]
    body["spec"]["backoffLimit"] = -1
    body["metadata"]["name"] = "f" * 48
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(body))
    assert cli.main(["cluster", "check", str(file)]) == 2
    name, backoff = capsys.readouterr().err.splitlines()
    assert name == (
        f"wrpo: error: {file}: RayJob/{'f' * 48}: metadata.name: has 48 characters; KubeRay allows "
        f"47 for a RayJob [name-length]"
    )
    assert backoff.endswith(
        "spec.backoffLimit: is -1; it is a number of further tries, 0 or more [backoff]"
    )


def test_the_command_reads_stdin_and_tells_where_steps_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = json.dumps(ray_objects()["RayCluster"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert cli.main(["cluster", "check", "-", "--job", str(FUSION)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "stdin: RayCluster/wrpo: generate llama-70b: 1 x generate-4gpu" in lines
    assert lines[-1] == "1 objects: no problem found"


def test_a_kustomization_without_kubectl_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "kustomization.yaml").write_text("resources: []\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["cluster", "check", str(tmp_path)]) == 2
    assert "kubectl, which is not here" in capsys.readouterr().err


def sections_with_actors(kind: type[config.Section], path: str = "") -> set[str]:
    """Where a config has a pool of actors, by the types of its fields."""
    found = {path} if "actors" in kind.model_fields else set()
    for name, field in kind.model_fields.items():
        for inner in loader._sections_in(field.annotation):
            if inner is not kind:
                found |= sections_with_actors(inner, f"{path}.{name}".removeprefix("."))
    return found


def test_every_section_of_a_config_that_starts_actors_is_asked_about():
    """Each asks for a resource named like its place, which no other has."""
    tree = yaml.safe_load(FUSION.read_text())
    tree["evaluate"] = {
        "prompts": {"path": "p.jsonl"},
        "models": [{"name": "other", "model": "m"}],
        "judge": {"name": "judge", "model": "m"},
    }
    tree["evaluate"]["prompts"]["columns"] = {"reference": "r", "group": "g"}
    tree["prompts"]["columns"] = {"reference": "r", "group": "g"}
    tree["reward"]["by_group"] = {"maths": {"verifier": "number"}}
    tree["wrpo"] = tree.get("wrpo", {}) | {"reference": {}}
    places = sections_with_actors(config.Config)
    assert places >= {"sources", "target", "reward.by_group", "evaluate.models", "evaluate.judge"}
    for place in places:
        section = tree
        for key in place.split("."):
            section = section[key][0] if isinstance(section[key], list) else section[key]
            section = section["maths"] if key == "by_group" else section
        section["actors"] = {"num_cpus": 1, "resources": {place: 1}}
    asked = {name for r in of_config(config.Config(**tree)) for b in r.bundles for name in b}
    assert places <= asked


def test_a_judge_on_vllm_and_further_models_that_fit_no_group_are_told(tmp_path: Path):
    other = "{name: other, model: m, actors: {num_gpus: 9}}"
    judge = "{name: judge, model: m, actors: {num_cpus: 500}}"
    found = with_job(
        tmp_path,
        ray_objects()["RayCluster"],
        f"evaluate={{prompts: {{path: p}}, models: [{other}], judge: {judge}}}",
    )
    assert found == {("generate other", "no-room"), ("generate judge", "no-room")}


def test_the_reward_of_a_served_model_is_asked_about(tmp_path: Path):
    body = ray_objects()["RayService"]
    serve = yaml.safe_load(body["spec"]["serveConfigV2"])
    reward = {"name": "helpful", "model": "r", "actors": {"num_gpus": 9}}
    serve["applications"][0]["args"]["reward"] = reward
    body["spec"]["serveConfigV2"] = yaml.safe_dump(serve)
    (tmp_path / "c.yaml").write_text(json.dumps(body))
    (problem,) = check([str(tmp_path / "c.yaml")]).problems
    assert problem.text.startswith("serve helpful: asks for")


def test_requests_are_those_of_the_stages_pools():
    """What is checked is what the stages ask Ray for."""
    fusion = config.load(FUSION)
    asked = {request.what: request for request in of_config(fusion)}
    for model in [*fusion.sources, fusion.target]:
        pool = generate.pool_of(model)
        total: dict[str, float] = {}
        for bundle in asked[pool.what].bundles:
            total = {n: total.get(n, 0) + bundle.get(n, 0) for n in {*total, *bundle}}
        assert total == {n: v for n, v in pool.needs.items() if v}
        assert asked[pool.what].count == pool.actors.min
    reward = score.pool_of(fusion.reward)
    assert asked[reward.what].bundles == (reward.needs,)
