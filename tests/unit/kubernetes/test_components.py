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


def test_a_team_has_everything_in_its_namespace():
    text = rendered("overlays/serve-redis", "quota", namespace="team-a")
    bodies = list(yaml.load_all(text, FAST_LOADER))
    scoped = [b for b in bodies if b["kind"] not in ("Namespace", "PriorityClass")]
    assert {b["metadata"]["namespace"] for b in scoped} == {"team-a"}
    assert [b["metadata"]["name"] for b in bodies if b["kind"] == "Namespace"] == ["team-a"]
    kinds = {b["kind"] for b in bodies}
    assert {"ResourceQuota", "LimitRange", "RayService", "NetworkPolicy"} <= kinds


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
    assert budget == {"minAvailable": 1, "selector": {"matchLabels": labels}}


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
