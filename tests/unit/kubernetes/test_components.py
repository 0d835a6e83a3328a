"""Every component with the overlays that it is for: accepted, strict, and nothing is lost by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.manifests import (
    CLUSTER,
    COMPONENTS,
    OVERLAYS,
    ROOT,
    Body,
    crds,
    objects,
    overlays_of,
    rendered,
    run_of,
)

from wrpo_ray.kubernetes.check import check
from wrpo_ray.text.documents import FAST_LOADER

PAIRS = [(overlay, component) for component in COMPONENTS for overlay in overlays_of(component)]


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Paths of what is there before and not after."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from (
                lost(value, after[key], f"{path}.{key}") if key in after else (f"{path}.{key}",)
            )
    elif isinstance(before, list) and isinstance(after, list):
        if len(after) < len(before):
            yield f"{path}[{len(after)}]"
        for number, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from lost(old, new, f"{path}[{number}]")


def test_there_are_components_for_what_the_guide_tells():
    assert len(COMPONENTS) >= 12
    guide = (ROOT / "docs" / "guides" / "kubernetes.md").read_text()
    assert not [name for name in COMPONENTS if f"`{name}`" not in guide]


@pytest.mark.parametrize(("overlay", "component"), PAIRS)
def test_an_overlay_with_a_component_has_no_problem(overlay: str, component: str, tmp_path: Path):
    file = tmp_path / "rendered.yaml"
    file.write_text(rendered(overlay, component))
    assert check([str(file)], run_of(overlay), crds()).problems == []


@pytest.mark.parametrize(("overlay", "component"), PAIRS)
def test_a_component_adds_and_takes_nothing_away(overlay: str, component: str):
    before, after = objects(overlay), objects(overlay, component)
    assert list(lost(before, after)) == []
    assert before != after
    assert not [kind for kind, _ in after if kind == "PodTemplate"], "a source of values is left"


def test_all_components_of_an_overlay_go_together(tmp_path: Path):
    for overlay in OVERLAYS:
        fitting = [name for name in COMPONENTS if overlay in overlays_of(name)]
        if not fitting:
            continue
        whole = objects(overlay, *fitting)
        for name in fitting:
            assert list(lost(objects(overlay, name), whole)) == [], name


def test_a_kustomization_with_anchors_renders_what_it_says():
    """Kustomize loses fields of merges in merges (`<<`), once a component changes a list there."""
    written = yaml.load((CLUSTER / "raycluster" / "cluster.yaml").read_text(), FAST_LOADER)
    assert objects("raycluster")[("RayCluster", "wrpo")]["spec"] == written["spec"]
    served = written["spec"]["workerGroupSpecs"].pop()
    assert served["groupName"] == "serve"
    job = objects("overlays/job")[("RayJob", "fusion")]["spec"]["rayClusterSpec"]
    assert list(lost(written["spec"], job)) == []


NAMES = {
    "serviceAccountName": "ServiceAccount",
    "claimName": "PersistentVolumeClaim",
    "priorityClassName": "PriorityClass",
    "serviceName": "Service",
    "redisAddress": "Service",
    "clusterQueue": "ClusterQueue",
    "topologyName": "Topology",
    "kueue.x-k8s.io/queue-name": "LocalQueue",
    "kueue.x-k8s.io/priority-class": "WorkloadPriorityClass",
}
"""Fields that name an object, and its kind."""


def references(value: Any) -> Iterator[tuple[str, str]]:
    """Kind and name of each object that a value names."""
    for part in value if isinstance(value, list) else ():
        yield from references(part)
    for key, part in value.items() if isinstance(value, dict) else ():
        if key in NAMES and isinstance(part, str):
            yield NAMES[key], part.partition(":")[0]
        elif key in ("configMap", "configMapRef"):
            yield "ConfigMap", part["name"]
        elif key == "flavors":
            yield from (("ResourceFlavor", flavor["name"]) for flavor in part)
        yield from references(part)


def whole(overlay: str, **own: str) -> dict[tuple[str, str], Body]:
    """The objects of an overlay with all components for it, as a reader's own folder changes it."""
    fitting = [name for name in COMPONENTS if overlay in overlays_of(name)]
    bodies = yaml.load_all(rendered(overlay, *fitting, **own), FAST_LOADER)
    return {(body["kind"], body["metadata"]["name"]): body for body in bodies}


def without_object(found: dict[tuple[str, str], Body]) -> set[tuple[str, str]]:
    """What is named in objects and is not among them; a ConfigMap may be left out altogether."""
    missing = {named for body in found.values() for named in references(body)} - set(found)
    maps = [name for kind, name in found if kind == "ConfigMap"]
    return {
        (kind, name)
        for kind, name in missing
        if kind != "ConfigMap" or any(there.startswith(name) for there in maps)
    }


def pods(value: Any) -> Iterator[Body]:
    """Each pod template in a value."""
    for part in value if isinstance(value, list) else ():
        yield from pods(part)
    for key, part in value.items() if isinstance(value, dict) else ():
        if key == "template" and "containers" in part.get("spec", ()):
            yield part
        else:
            yield from pods(part)


def budgets_without_pods(found: dict[tuple[str, str], Body]) -> list[str]:
    """The budgets whose label of the cluster no pod has."""
    label = "wrpo-ray/cluster"
    has = {pod["metadata"].get("labels", {}).get(label) for pod in pods(list(found.values()))}
    budgets = [body for (kind, _), body in found.items() if kind == "PodDisruptionBudget"]
    return [
        body["metadata"]["name"]
        for body in budgets
        if body["spec"]["selector"]["matchLabels"][label] not in has
    ]


def test_what_pods_name_is_followed_in_every_kind_of_ray_object():
    config = yaml.safe_load((CLUSTER / "base" / "names.yaml").read_text())["nameReference"]
    listed = {part["kind"]: {spec["path"] for spec in part["fieldSpecs"]} for part in config}
    for kind, field in (
        ("ConfigMap", "volumes/configMap/name"),
        ("PersistentVolumeClaim", "volumes/persistentVolumeClaim/claimName"),
        ("ServiceAccount", "serviceAccountName"),
        ("PriorityClass", "priorityClassName"),
    ):
        for cluster in ("spec", "spec/rayClusterSpec", "spec/rayClusterConfig"):
            for group in ("headGroupSpec", "workerGroupSpecs"):
                assert f"{cluster}/{group}/template/spec/{field}" in listed[kind]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_name_in_an_object_is_that_of_another(overlay: str):
    found = whole(overlay)
    assert without_object(found) == set()
    assert budgets_without_pods(found) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_team_has_everything_in_its_namespace(overlay: str):
    found = whole(overlay, namespace="team-a")
    wide = ("Namespace", "PriorityClass")
    inside = {
        body["metadata"]["namespace"] for (kind, _), body in found.items() if kind not in wide
    }
    assert inside == {"team-a"}
    assert {name for kind, name in found if kind in ("Namespace", "ClusterQueue")} <= {"team-a"}
    text = yaml.safe_dump(list(found.values()))
    assert "metadata.name: wrpo\n" not in text, "a selector of the namespace is left"
    assert without_object(found) == set()


def test_a_team_s_queue_admits_its_namespace_alone():
    found = whole("overlays/kueue", namespace="team-a")
    queue = found[("ClusterQueue", "team-a")]["spec"]
    own = {"kubernetes.io/metadata.name": "team-a"}
    assert queue["namespaceSelector"] == {"matchLabels": own}
    assert found[("LocalQueue", "fusion")]["spec"]["clusterQueue"] == "team-a"


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o != "overlays/serve-redis"])
def test_a_suffix_reaches_every_name(overlay: str):
    """Of serve-redis it does not: an address with a port is no name to kustomize."""
    found = whole(overlay, suffix="-b")
    named = [name for kind, name in found if kind not in ("Namespace", "ConfigMap")]
    assert all(name.endswith("-b") for name in named)
    assert without_object(found) == set()
    assert budgets_without_pods(found) == []
    clusters = {
        pod["metadata"].get("labels", {}).get("wrpo-ray/cluster") for pod in pods([*found.values()])
    }
    assert all(name is None or name.endswith("-b") for name in clusters)


@pytest.mark.parametrize(
    ("overlay", "kind"),
    [
        ("overlays/job", "RayJob"),
        ("overlays/kueue", "RayJob"),
        ("overlays/serve", "RayService"),
        ("overlays/serve-redis", "RayService"),
        ("overlays/demo", "RayJob"),
    ],
)
def test_a_second_run_or_model_shares_all_but_its_budget(overlay: str, kind: str):
    first, second = whole(overlay), whole(overlay, named="other")
    assert without_object(second) == set()
    assert budgets_without_pods(second) == []
    assert set(second) - set(first) == {(kind, "other"), ("PodDisruptionBudget", "other")}
    both = {
        pod["metadata"].get("labels", {}).get("wrpo-ray/cluster")
        for pod in pods([*second.values()])
    }
    assert both <= {None, "other"}
    ours = [body for key, body in second.items() if key in first and body != first[key]]
    assert {body["kind"] for body in ours} <= {"PodDisruptionBudget"}  # that of serve-twice


def groups(body: Body) -> dict[str, Body]:
    """The worker groups of a Ray object by name."""
    spec = body["spec"]
    spec = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def test_only_generation_is_on_spot_nodes_and_the_head_on_others():
    job = objects("overlays/job", "spot-generation", "on-demand-head")[("RayJob", "fusion")]
    for name, group in groups(job).items():
        assert ("nodeSelector" in group["template"]["spec"]) == name.startswith("generate-")
        keys = {
            toleration["key"] for toleration in group["template"]["spec"].get("tolerations", ())
        }
        assert ("nvidia.com/gpu" in keys) == (name != "cpu"), "the component replaces the list"
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}


def test_what_is_served_goes_before_runs():
    served = objects("overlays/serve", "priorities")
    run = objects("overlays/job", "priorities")[("RayJob", "fusion")]
    assert run["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["priorityClassName"]
    names = {g["template"]["spec"]["priorityClassName"] for g in groups(run).values()}
    (high,) = {
        group["template"]["spec"]["priorityClassName"]
        for group in groups(served[("RayService", "fused")]).values()
    }
    (low,) = names
    values = {name: served[("PriorityClass", name)] for name in (high, low)}
    assert values[high]["value"] > values[low]["value"]
    assert values[low]["preemptionPolicy"] == "Never"


def test_two_serving_nodes_are_apart_and_one_may_leave_at_a_time():
    found = objects("overlays/serve", "serve-twice")
    group = groups(found[("RayService", "fused")])["serve"]
    assert group["minReplicas"] == 2
    spread = group["template"]["spec"]["topologySpreadConstraints"]
    labels = {"ray.io/group": group["groupName"]}
    assert {c["topologyKey"] for c in spread} == {
        "kubernetes.io/hostname", "topology.kubernetes.io/zone"
    }  # fmt: skip
    assert all(c["labelSelector"]["matchLabels"] == labels for c in spread)
    budget = found[("PodDisruptionBudget", "serve-workers")]["spec"]
    labels["wrpo-ray/cluster"] = "fused"
    assert budget == {"minAvailable": 1, "selector": {"matchLabels": labels}}
    assert group["template"]["metadata"]["labels"] == {"wrpo-ray/cluster": "fused"}


def test_fast_networks_are_for_groups_whose_nodes_talk_to_each_other():
    for component, name in (
        ("efa", "vpc.amazonaws.com/efa"),
        ("rdma", "rdma/rdma_shared_device_a"),
    ):
        job = objects("overlays/job", component)[("RayJob", "fusion")]
        having = {
            group["groupName"]
            for group in groups(job).values()
            if name in group["template"]["spec"]["containers"][0]["resources"]["limits"]
        }
        assert having == {"generate-2x8gpu", "train"}


def test_the_topology_of_kueue_has_the_levels_that_groups_ask_for():
    found = objects("overlays/kueue", "kueue-topology")
    flavor = found[("ResourceFlavor", "wrpo")]["spec"]
    topology = found[("Topology", flavor["topologyName"])]["spec"]
    levels = {level["nodeLabel"] for level in topology["levels"]}
    assert flavor["nodeLabels"], "Kueue refuses a topology without them"
    asked = {
        value
        for group in groups(found[("RayJob", "fusion")]).values()
        for key, value in group["template"]["metadata"]["annotations"].items()
        if key.startswith("kueue.x-k8s.io/podset-")
    }
    assert len(asked) == 2
    assert asked <= levels


def test_only_one_pod_is_root_and_it_may_change_owners_alone():
    pod = objects("raycluster", "cache-owner")[("Job", "cache-owner")]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 0
    (container,) = pod["containers"]
    assert container["command"] == ["chown", "1000:1000", "/cache"]
    capabilities = {"drop": ["ALL"], "add": ["CHOWN"]}  # the level `baseline` allows it
    assert container["securityContext"]["capabilities"] == capabilities
    ray = objects("raycluster")[("RayCluster", "wrpo")]["spec"]["headGroupSpec"]["template"]["spec"]
    user = ray["securityContext"]
    assert f"{user['runAsUser']}:{user['runAsGroup']}" in container["command"]
