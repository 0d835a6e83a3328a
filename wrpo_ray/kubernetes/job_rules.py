"""RayJobs that KubeRay's operator rejects, or whose run would end at an event that others survive.

Source: KubeRay 1.7.0, ray-operator/controllers/ray: utils/validation.go (V), rayjob_controller.go
(J), utils/constant.go (C).
"""

from collections.abc import Sequence
from typing import Any

import yaml

from wrpo_ray.kubernetes.manifests import described
from wrpo_ray.kubernetes.ray_objects import DeletionRule, Faults, Job, RayObject, value_of
from wrpo_ray.text.documents import describe_yaml_error, read_document

STATUS_CHECK, STATUS_CHECK_SECONDS = "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", 300
"""The operator's variable for the time without an answer from the head, and its default (C:289)."""
OPERATOR_ENV = "wrpo-ray/operator-env"
"""Annotation: the `NAME=VALUE` that the operator was installed with, separated by spaces."""
TAINTS = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
HEAD_AWAY = 120
"""The most seconds that a pod of a lost node may be waited for: with the 50 s until the node counts
as lost, and those to start the next try, less than `STATUS_CHECK_SECONDS`."""
START, START_SECONDS = "RAY_JOB_START_TIMEOUT_SECONDS", 900
"""The head's variable for the time that a driver waits for a node, and its default
(ray/dashboard/consts.py:65, modules/job/job_manager.py:154)."""
STOP, STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S", 3
"""The job's variable for the time from SIGTERM to SIGKILL, and its default
(ray/dashboard/modules/job/job_supervisor.py:66, 408-414)."""
OF_CLUSTER = ("DeleteCluster", "DeleteWorkers")
"""Policies that delete what a job with a clusterSelector does not own."""


def faults(found: RayObject, job: Job) -> Faults:
    """Yield the problems of a RayJob."""
    for check in (_job, _job_modes, _clean_up, _lost_head, _driver_start):
        yield from check(found, job)
    yield from _runtime_env(job)


def _job(_: RayObject, job: Job) -> Faults:
    if not job.ray_cluster_spec and not job.cluster_selector:
        text = "is missing; give it, or clusterSelector for a cluster that is there"
        yield "spec.rayClusterSpec", "no-cluster", text
    if job.cluster_selector and not job.cluster_selector.get("ray.io/cluster"):
        text = "names no cluster; write {ray.io/cluster: NAME}"
        yield "spec.clusterSelector", "no-cluster", text
    if not job.entrypoint.strip() and not _submits_itself(job):
        text = "is missing; it is the command to run"
        yield "spec.entrypoint", "entrypoint", text
    if job.active_deadline_seconds is not None and job.active_deadline_seconds <= 0:
        text = f"is {job.active_deadline_seconds}; it is a number of seconds above 0"
        yield "spec.activeDeadlineSeconds", "deadline", text
    if job.pre_running_deadline_seconds is not None and job.pre_running_deadline_seconds <= 0:
        text = f"is {job.pre_running_deadline_seconds}; it is a number of seconds above 0"
        yield "spec.preRunningDeadlineSeconds", "deadline", text
    if job.cluster_selector and job.backoff_limit > 0:  # V:575-577
        text = "cannot be with clusterSelector: a try has a new cluster; set 0"
        yield "spec.backoffLimit", "backoff", text
    if job.backoff_limit < 0:
        text = f"is {job.backoff_limit}; it is a number of further tries, 0 or more"
        yield "spec.backoffLimit", "backoff", text
    if job.suspend and (not job.shutdown_after_job_finishes or job.cluster_selector):
        text = "needs shutdownAfterJobFinishes: true, and a cluster of the job's own"
        yield "spec.suspend", "suspended-job", text


def _submits_itself(job: Job) -> bool:
    """Whether the user submits the job, or the submitter's own command does (J, B: as given)."""
    submitter = job.submitter_pod_template
    containers = submitter.spec.containers if submitter else []
    return job.submission_mode == "InteractiveMode" or bool(containers and containers[0].command)


def _job_modes(found: RayObject, job: Job) -> Faults:
    if job.submission_mode == "InteractiveMode" and job.backoff_limit > 0:
        text = "cannot be with submissionMode: InteractiveMode"
        yield "spec.backoffLimit", "backoff", text
    if job.submission_mode != "SidecarMode":
        return
    unfit = {
        "submitterPodTemplate": job.submitter_pod_template,
        "submitterConfig": job.submitter_config,
        "clusterSelector": job.cluster_selector or None,
    }
    for name, value in unfit.items():
        if value is not None:
            text = "cannot be with submissionMode: SidecarMode, which submits from the head's pod"
            yield f"spec.{name}", "sidecar-mode", text
    head = job.ray_cluster_spec and job.ray_cluster_spec.head_group_spec
    if head and head.template.spec.restart_policy not in ("", "Never"):
        text = "SidecarMode needs Never, or nothing"
        place = f"{found.at}.headGroupSpec.template.spec.restartPolicy"
        yield place, "sidecar-mode", text


def _clean_up(found: RayObject, job: Job) -> Faults:
    if job.ttl_seconds_after_finished < 0:
        text = f"is {job.ttl_seconds_after_finished}; it is a number of seconds, 0 or more"
        yield "spec.ttlSecondsAfterFinished", "clean-up", text
    if job.ttl_seconds_after_finished > 0 and not job.shutdown_after_job_finishes:
        text = "needs shutdownAfterJobFinishes: true"
        yield "spec.ttlSecondsAfterFinished", "clean-up", text
    strategy = job.deletion_strategy
    if not strategy:
        return
    path, rules = "spec.deletionStrategy", strategy.deletion_rules
    older = [p for p in (strategy.on_success, strategy.on_failure) if p is not None]
    if rules and job.shutdown_after_job_finishes:
        text = "and shutdownAfterJobFinishes: two ways to clean up; keep one"
        yield f"{path}.deletionRules", "both-clean-ups", text
    if rules and older:
        text = "and onSuccess or onFailure: two ways to clean up; keep one"
        yield f"{path}.deletionRules", "both-clean-ups", text
    if not rules and len(older) < 2:
        text = "needs deletionRules, or both onSuccess and onFailure"
        yield path, "clean-up", text
    policies = [rule.policy for rule in rules] + [str(p.get("policy")) for p in older]
    if "DeleteWorkers" in policies and found.cluster and found.cluster.enable_in_tree_autoscaling:
        text = "DeleteWorkers cannot be with the autoscaler; use DeleteCluster"
        yield path, "clean-up", text
    if job.cluster_selector and set(policies) & set(OF_CLUSTER):  # V:815-818, 947-954
        text = "a job with clusterSelector does not own the cluster: use DeleteSelf or DeleteNone"
        yield path, "clean-up", text
    if len(older) == 2:
        yield from _older_clean_up(job, older)
    yield from _deletion_order(rules)


def _older_clean_up(job: Job, older: Sequence[dict[str, Any]]) -> Faults:
    """The form before deletionRules (V:927-966)."""
    path, policies = "spec.deletionStrategy", [policy.get("policy") for policy in older]
    if None in policies or (job.shutdown_after_job_finishes and "DeleteNone" in policies):
        text = "needs a policy in each, and no DeleteNone with shutdownAfterJobFinishes"
        yield path, "clean-up", text
    text = "onSuccess and onFailure go away; write deletionRules"  # rayjob_types.go:92-116
    yield path, "deprecated", text


def _lost_head(found: RayObject, job: Job) -> Faults:
    """A head that does not answer for 300 s ends the RayJob for good (J:543-552, 1336-1354).

    Kubernetes gives up pods of a lost node after 300 s of its own. In SidecarMode the operator then
    sees that the head is missing and starts the next try (J:1086-1093); in other modes it makes
    another head, whose first answer has to come within the 300 s as well.
    """
    cluster = job.ray_cluster_spec
    if cluster is None or _waits_longer(found):
        return
    remedy = (
        f"or install the operator with more seconds in {STATUS_CHECK}, and name them in the "
        f"annotation {OPERATOR_ENV}: {STATUS_CHECK}=SECONDS"
    )
    pod = cluster.head_group_spec.template.spec
    seconds = {t.key: t.toleration_seconds for t in pod.tolerations}
    left = {key for key, n in seconds.items() if n is not None and n <= HEAD_AWAY}
    if not left.issuperset(TAINTS):
        yield (
            f"{found.at}.headGroupSpec.template.spec.tolerations",
            "lost-head",
            f"a head on a lost node is waited for 300 s, and {STATUS_CHECK_SECONDS} s without an "
            f"answer fail the job for good: backoffLimit does not count. Give the head "
            f"tolerations of {' and '.join(TAINTS)} with tolerationSeconds up to {HEAD_AWAY}; "
            f"{remedy}",
        )
    elif job.submission_mode != "SidecarMode":
        yield (
            "spec.submissionMode",
            "slow-head",
            f"is {job.submission_mode}: a lost head has to be back in {STATUS_CHECK_SECONDS} s, "
            f"its image too, or the job has failed for good. In SidecarMode the next try begins; "
            f"{remedy}",
        )


def _waits_longer(found: RayObject) -> bool:
    """Whether the operator is declared to wait longer for a head's answer than by default."""
    words = str(found.manifest.annotations.get(OPERATOR_ENV, "")).split()
    given = next((w.partition("=")[2] for w in words if w.startswith(f"{STATUS_CHECK}=")), "")
    return given.isdecimal() and int(given) > STATUS_CHECK_SECONDS


def _driver_start(found: RayObject, job: Job) -> Faults:
    """A driver that is to run on a worker waits until its node is there; 15 minutes by default."""
    asks = job.entrypoint_num_cpus or job.entrypoint_num_gpus or job.entrypoint_resources
    if not asks or not job.ray_cluster_spec:
        return
    env = job.ray_cluster_spec.head_group_spec.ray.env
    given = value_of(env, START)
    if given is None and any(variable.name == START for variable in env):
        return  # its value comes from elsewhere
    if given is None or not given.isdecimal() or int(given) <= START_SECONDS:
        yield (
            f"{found.at}.headGroupSpec.template.spec.containers[0].env[{START}]",
            "driver-start",
            f"is {given or 'missing'}: Ray fails the job if no node for its driver is there in "
            f"{START_SECONDS} s, and nodes and images take longer; set more seconds",
        )


def _deletion_order(rules: Sequence[DeletionRule]) -> Faults:
    """For one status, workers are deleted before the cluster, and the cluster before the job."""
    order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
    by_status: dict[tuple[str | None, str | None], list[tuple[int, int]]] = {}
    for rule in rules:
        when = rule.condition
        if (when.job_status is None) == (when.job_deployment_status is None):
            text = "a condition has either jobStatus or jobDeploymentStatus"
            yield "spec.deletionStrategy.deletionRules", "clean-up", text
        if rule.policy in order:
            key = when.job_status, when.job_deployment_status
            by_status.setdefault(key, []).append((order.index(rule.policy), when.ttl_seconds))
    for (status, _), steps in by_status.items():
        seconds = [ttl for _, ttl in sorted(steps)]
        if seconds != sorted(seconds) or len({place for place, _ in steps}) < len(steps):
            text = f"{status}: each policy once, with ttlSeconds rising from workers to the job"
            yield "spec.deletionStrategy.deletionRules", "clean-up", text


def _runtime_env(job: Job) -> Faults:
    if not job.runtime_env:
        yield from _stop_wait({})
        return
    field = "spec.runtimeEnvYAML"
    try:
        given = read_document(job.runtime_env)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = f"is not valid YAML: {describe_yaml_error(error)}"
        yield field, "runtime-env", text
        return
    yield from _runtime_env_keys(field, given)


def _runtime_env_keys(field: str, given: Any) -> Faults:
    from ray.runtime_env import RuntimeEnv

    given = {} if given is None else given  # a comment alone
    try:
        RuntimeEnv(**{name: value for name, value in given.items() if not _is_file(name, value)})
    except Exception as error:  # its checks do not validate all input
        yield field, "runtime-env", f"Ray refuses it: {described(error)}"
        return
    for name in sorted(set(given) - set(RuntimeEnv.known_fields)):
        yield f"{field}.{name}", "runtime-env", "Ray has no such key"
    yield from _stop_wait(given.get("env_vars") or {})


def _is_file(name: str, value: Any) -> bool:
    """Whether a part of a runtime environment is a file, which is where the job is submitted."""
    return name in ("conda", "pip", "uv") and isinstance(value, str)


def _stop_wait(variables: dict[str, Any]) -> Faults:
    """A deleted RayJob's driver is stopped by Ray (J:112-130), with a job's own waiting time."""
    if STOP not in variables:
        yield (
            "spec.runtimeEnvYAML.env_vars",
            "stop-wait",
            f"has no {STOP}: a run that is deleted has {STOP_SECONDS} s to close its files; write "
            f'{STOP}: "30"',
        )
