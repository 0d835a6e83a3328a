"""Typed views of Ray's objects with the fields that rules read; other fields are ignored.

Names are KubeRay's in snake case: `min_replicas` is `minReplicas`. Values are not converted: "2" is
not an integer, as in Kubernetes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from wrpo_ray.kubernetes.manifests import Manifest, Problem

Quantity = int | float | str
Faults = Iterator[tuple[str, str, str]]
"""(field, rule, what is wrong and what to do)."""
GPU = "nvidia.com/gpu"
RAY_KINDS = {
    "RayCluster": "spec",
    "RayJob": "spec.rayClusterSpec",
    "RayService": "spec.rayClusterConfig",
}
"""Kinds that contain a Ray cluster, and its path."""
LONGEST_SHOWN = 80
"""Maximum characters of a value in a message."""


class View(BaseModel):
    """A part of an object with the fields that rules read."""

    model_config = ConfigDict(
        alias_generator=to_camel, extra="ignore", frozen=True, strict=True, populate_by_name=True
    )


class Resources(View):
    """The resources of a container."""

    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class EnvVar(View):
    """An environment variable; `reference_rules` reads `valueFrom`."""

    name: str
    value: str | None = None


def value_of(env: Sequence[EnvVar], name: str) -> str | None:
    """Return a variable's value; None if it is absent or comes from elsewhere."""
    return next((variable.value for variable in env if variable.name == name), None)


class Mount(View):
    """The mount of a volume."""

    name: str
    mount_path: str
    sub_path: str = ""
    sub_path_expr: str = ""


class ContainerPort(View):
    """A port that a container declares."""

    name: str = ""
    container_port: int


class Container(View):
    """A container; the first of a pod runs Ray."""

    name: str = ""
    image: str = ""
    command: list[str] = []
    ports: list[ContainerPort] = []
    restart_policy: str = ""
    env: list[EnvVar] = []
    resources: Resources = Resources()
    volume_mounts: list[Mount] = []


class EmptyDir(View):
    """A volume with the lifetime of its pod."""

    medium: str = ""
    size_limit: Quantity | None = None


class Volume(View):
    """A volume of a pod."""

    name: str
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: dict[str, Any] | None = None
    config_map: dict[str, Any] | None = None


class Toleration(View):
    """A toleration of a node's taint."""

    key: str = ""
    effect: str = ""
    toleration_seconds: int | None = None


class PodSpec(View):
    """A pod."""

    containers: list[Container] = []
    init_containers: list[Container] = []
    volumes: list[Volume] = []
    restart_policy: str = ""
    termination_grace_period_seconds: int = 30
    tolerations: list[Toleration] = []


class Metadata(View):
    """Labels and annotations of a pod."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Template(View):
    """A pod's template."""

    metadata: Metadata = Metadata()
    spec: PodSpec = PodSpec()


class Group(View):
    """The head group, or the common fields of head and worker groups."""

    ray_start_params: dict[str, str] = {}
    resources: dict[str, str] = {}
    labels: dict[str, str] = {}
    head_service: dict[str, Any] | None = None
    template: Template

    @property
    def ray(self) -> Container:
        """The container that runs Ray; an empty one if the pod has none."""
        containers = self.template.spec.containers
        return containers[0] if containers else Container()


class WorkerGroup(Group):
    """A group of worker pods with one template."""

    group_name: str
    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    num_of_hosts: int = 1
    idle_timeout_seconds: int | None = None
    suspend: bool = False
    priority: int = 0


class AutoscalerOptions(View):
    """Options of the autoscaler."""

    version: str | None = None
    resources: Resources | None = None
    env: list[EnvVar] = []
    idle_timeout_seconds: int | None = None


class AuthOptions(View):
    """Ray's authentication."""

    mode: Literal["disabled", "token"] = "token"
    secret_name: str | None = None
    enable_k8s_token_auth: bool = Field(False, alias="enableK8sTokenAuth")


class Cluster(View):
    """The spec of a Ray cluster, alone or inside a RayJob or RayService."""

    ray_version: str = ""
    auth_options: AuthOptions | None = None
    enable_in_tree_autoscaling: bool = False
    autoscaler_options: AutoscalerOptions | None = None
    gcs_fault_tolerance_options: dict[str, Any] | None = None
    network_policy: dict[str, Any] | None = None
    tls_options: dict[str, Any] | None = None
    history_server_options: dict[str, Any] | None = None
    upgrade_strategy: dict[str, Any] | None = None
    head_group_spec: Group
    worker_group_specs: list[WorkerGroup] = []

    @property
    def has_v2(self) -> bool:
        """Whether autoscaler v2 runs."""
        options = self.autoscaler_options
        return self.enable_in_tree_autoscaling and bool(options and options.version == "v2")


class Condition(View):
    """When a deletion rule applies."""

    job_status: str | None = None
    job_deployment_status: str | None = None
    ttl_seconds: int = 0


class DeletionRule(View):
    """The resources to delete, and the time to do so."""

    policy: str
    condition: Condition


class DeletionStrategy(View):
    """RayJob's rules for cleaning up."""

    deletion_rules: list[DeletionRule] = []
    on_success: dict[str, Any] | None = None
    on_failure: dict[str, Any] | None = None


class Job(View):
    """RayJob."""

    entrypoint: str = ""
    entrypoint_num_cpus: float = 0
    entrypoint_num_gpus: float = 0
    entrypoint_resources: str = ""
    submission_mode: str = "K8sJobMode"
    submitter_pod_template: Template | None = None
    submitter_config: dict[str, Any] | None = None
    cluster_selector: dict[str, str] = {}
    ray_cluster_spec: Cluster | None = None
    runtime_env: str = Field("", alias="runtimeEnvYAML")
    active_deadline_seconds: int | None = None
    pre_running_deadline_seconds: int | None = None
    backoff_limit: int = 0
    suspend: bool = False
    shutdown_after_job_finishes: bool = False
    ttl_seconds_after_finished: int = 0
    deletion_strategy: DeletionStrategy | None = None


class UpgradeStrategy(View):
    """How a changed RayService is rolled out."""

    type: str | None = None
    cluster_upgrade_options: dict[str, Any] | None = None


class Service(View):
    """RayService."""

    serve_config_v2: str = ""
    upgrade_strategy: UpgradeStrategy | None = None
    ray_cluster_deletion_delay_seconds: int | None = None
    service_unhealthy_second_threshold: int | None = None
    deployment_unhealthy_second_threshold: int | None = None
    ray_cluster_config: Cluster


SPECS: dict[str, type[Cluster | Job | Service]] = {
    "RayCluster": Cluster,
    "RayJob": Job,
    "RayService": Service,
}


@dataclass(frozen=True)
class RayObject:
    """A Ray object with its typed spec."""

    manifest: Manifest
    spec: Cluster | Job | Service

    @property
    def at(self) -> str:
        """The path of the cluster."""
        return RAY_KINDS[self.manifest.kind]

    @property
    def job(self) -> Job | None:
        """The spec, if the object is a RayJob."""
        return self.spec if isinstance(self.spec, Job) else None

    @property
    def service(self) -> Service | None:
        """The spec, if the object is a RayService."""
        return self.spec if isinstance(self.spec, Service) else None

    @property
    def cluster(self) -> Cluster | None:
        """The Ray cluster; None for a RayJob that runs on an existing one."""
        if isinstance(self.spec, Cluster):
            return self.spec
        if isinstance(self.spec, Service):
            return self.spec.ray_cluster_config
        return self.spec.ray_cluster_spec

    @property
    def workers(self) -> list[tuple[str, WorkerGroup]]:
        """Worker groups, each with its path."""
        groups = self.cluster.worker_group_specs if self.cluster else []
        return [(f"{self.at}.workerGroupSpecs[{group.group_name}]", group) for group in groups]

    @property
    def groups(self) -> Iterator[tuple[str, Group]]:
        """The head and the worker groups, each with its path."""
        if self.cluster:
            yield f"{self.at}.headGroupSpec", self.cluster.head_group_spec
            yield from self.workers

    def problem(self, field: str, rule: str, text: str) -> Problem:
        """Return a problem of this object."""
        return Problem(self.manifest, field, rule, text)


def typed(manifest: Manifest) -> RayObject | list[Problem]:
    """Return the manifest with its typed spec, or the problems of its types."""
    try:
        return RayObject(manifest, SPECS[manifest.kind].model_validate(manifest.body.get("spec")))
    except ValidationError as error:
        return [
            Problem(
                manifest,
                path_text(("spec", *e["loc"])),
                "missing" if e["type"] == "missing" else "wrong-type",
                "missing; it is required"
                if e["type"] == "missing"
                else f"{e['msg'][0].lower()}{e['msg'][1:]} (got {shown(e['input'])})",
            )
            for e in error.errors()
        ]


def number_of(quantity: Quantity) -> float:
    """Return a Kubernetes quantity as a number: "1500m" is 1.5, "2Gi" is 2147483648."""
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    return float(parse_quantity(quantity))


def shown(value: Any) -> str:
    """Return a value for a message, cut to `LONGEST_SHOWN`."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def path_text(path: Any) -> str:
    """Return a path of keys and numbers as text: `spec.containers[0].image`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")
