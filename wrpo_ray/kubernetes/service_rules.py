"""RayServices that KubeRay's operator rejects, or that lose requests when they change.

Source: KubeRay 1.7.0, ray-operator/controllers/ray: utils/validation.go (V) and
rayservice_controller.go (S).
"""

import re
from contextlib import suppress
from typing import Any

from wrpo_ray.config import serving
from wrpo_ray.errors import UserError
from wrpo_ray.kubernetes.manifests import document_in, mapping
from wrpo_ray.kubernetes.ray_objects import Faults, RayObject, Service, UpgradeStrategy
from wrpo_ray.kubernetes.serve_config import FIELD, own_applications

UPGRADES = (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade")
INITIALIZING = "ray.io/initializing-timeout"
DURATION = r"([0-9]+|([0-9]+(\.[0-9]+)?(h|m|s|ms|us|ns))+)"
"""Seconds, or a duration of Go such as 1h30m (V:651-678)."""
DELETION_SECONDS = 60
"""The operator's default time from the switch of traffic to the old cluster's end (S:48)."""
SERVE_PORT = 8000
"""Serve's port by default, and the one that the operator expects (utils/constant.go:110)."""
MARGIN = 30
"""Seconds for a request's way in and for the end of its replica, above an answer's longest time."""


def faults(found: RayObject, service: Service) -> Faults:
    """Yield the problems of a RayService."""
    if service.upgrade_strategy:
        yield from _upgrade(found, service, service.upgrade_strategy)
    for check in (_metadata, _unused, _answers, _surge, _serve_port):
        yield from check(found, service)


def _metadata(found: RayObject, service: Service) -> Faults:
    field = f"metadata.annotations.{INITIALIZING}"
    given = found.manifest.annotations.get(INITIALIZING)
    if given and not (re.fullmatch(DURATION, str(given)) and re.search("[1-9]", str(given))):
        text = f"is {given!r}; write a duration such as 30m, or seconds"
        yield field, "initializing-timeout", text
    elif given:
        yield (
            field,
            "ends-for-good",
            f"a service without a healthy replica after {given} has failed for good: its clusters "
            f"are deleted, no change starts it again, and it has to be deleted and made anew. It "
            f"holds for the first start only; leave it out where images or models may take longer",
        )  # constant.go:71-82, S:184-195, 800-802
    if (
        (service.ray_cluster_config.head_group_spec.head_service or {})
        .get("metadata", {})
        .get("name")
    ):
        text = "cannot be set for a RayService, whose two clusters would share it"  # V:689-691
        yield f"{found.at}.headGroupSpec.headService.metadata.name", "upgrade", text


def _unused(_: RayObject, service: Service) -> Faults:
    unused = {
        "serviceUnhealthySecondThreshold": service.service_unhealthy_second_threshold,
        "deploymentUnhealthySecondThreshold": service.deployment_unhealthy_second_threshold,
    }
    for name, value in unused.items():
        if value is not None:
            text = "the operator no longer reads it; leave it out"  # rayservice_types.go:94-99
            yield f"spec.{name}", "deprecated", text


def _answers(found: RayObject, service: Service) -> Faults:
    """Running answers end when the old cluster is deleted, or a pod's grace is over."""
    given, longest = service.ray_cluster_deletion_delay_seconds, _longest_answer(service)
    if given is not None and given < 0:  # V:702-705
        text = f"is {given}; it is a number of seconds, 0 or more"
        yield "spec.rayClusterDeletionDelaySeconds", "upgrade", text
        return
    if longest is None:
        return
    least = round(longest + MARGIN)
    if (DELETION_SECONDS if given is None else given) < least:  # S:1266-1273
        yield (
            "spec.rayClusterDeletionDelaySeconds",
            "answers-cut",
            f"is {given if given is not None else f'{DELETION_SECONDS} by default'}: an upgrade "
            f"deletes the old cluster then, and an answer may take {longest:g} s (`timeout`); "
            f"set {least} or more",
        )
    for path, group in found.workers:
        grace = group.template.spec.termination_grace_period_seconds
        if grace < least:
            yield (
                f"{path}.template.spec.terminationGracePeriodSeconds",
                "answers-cut",
                f"is {grace}: a pod that has to leave its node is killed then, and an answer may "
                f"take {longest:g} s (`timeout`); set {least} or more",
            )


def _longest_answer(service: Service) -> float | None:
    """Return the longest time of an answer; None without an application of this project."""
    longest = []
    with suppress(UserError):  # reported by `serve_config.read`
        own = own_applications(_config(service))
        longest = [serving(arguments).timeout for _, arguments in own]
    return max(longest, default=None)


def _config(service: Service) -> dict[str, Any]:
    """Return the Serve config; an empty one where `serve_config.read` reports it."""
    given = mapping(document_in(service.serve_config_v2))
    applications = given.get("applications")
    is_list = isinstance(applications, list) and all(isinstance(a, dict) for a in applications)
    return given if is_list else {}


def _surge(_: RayObject, service: Service) -> Faults:
    """A change of serveConfigV2 alone is applied in place, without a new cluster (S:1351-1437).

    Serve then replaces replicas; without a surge it stops the old ones first.
    """
    given = _config(service)
    own = {number for number, _ in own_applications(given)}
    for number, app in enumerate(given.get("applications", [])):
        for deployment in app.get("deployments") or []:
            surge = deployment.get("max_surge_percent", 100 if number in own else 0)
            if not surge:
                yield (
                    f"{FIELD}.applications[{number}].deployments[{deployment.get('name')}]"
                    f".max_surge_percent",
                    "surge",
                    "is 0: a changed model or code stops a replica before the next one answers, "
                    "and one replica is an outage of minutes; set 100",
                )


def _serve_port(found: RayObject, service: Service) -> Faults:
    """The operator asks nodes and sends clients to the container's port `serve` (S:2092)."""
    port = mapping(_config(service).get("http_options")).get("port", SERVE_PORT)
    for path, group in found.groups:
        named = [each.container_port for each in group.ray.ports if each.name == "serve"]
        asked = named[0] if named else SERVE_PORT
        if type(port) is int and asked != port:  # another value is a fault of its own
            yield (
                f"{path}.template.spec.containers[0].ports[serve]",
                "serve-port",
                f"is {asked}, and Serve listens at http_options.port {port}: the operator never "
                f"finds it ready; make both equal",
            )


def _upgrade(found: RayObject, service: Service, strategy: UpgradeStrategy) -> Faults:
    path = "spec.upgradeStrategy"
    if strategy.type not in UPGRADES:
        text = f"is {strategy.type!r}; known: {', '.join(filter(None, UPGRADES))}"
        yield f"{path}.type", "upgrade", text
    if strategy.type != "NewClusterWithIncrementalUpgrade":
        return
    if not service.ray_cluster_config.enable_in_tree_autoscaling:
        text = "an incremental upgrade needs the autoscaler"
        yield f"{found.at}.enableInTreeAutoscaling", "upgrade", text
    options = strategy.cluster_upgrade_options or {}
    if not options.get("gatewayClassName"):  # V:722-746
        text = "an incremental upgrade needs clusterUpgradeOptions with a gatewayClassName"
        yield f"{path}.clusterUpgradeOptions", "upgrade", text
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    if options and not (0 <= (step if step is not None else -1) <= surge <= 100):
        text = "needs 0 <= stepSizePercent <= maxSurgePercent <= 100"
        yield f"{path}.clusterUpgradeOptions.stepSizePercent", "upgrade", text
    if options and (options.get("intervalSeconds") or 0) <= 0:
        text = "is missing or 0; it is the number of seconds between two steps"
        yield f"{path}.clusterUpgradeOptions.intervalSeconds", "upgrade", text
