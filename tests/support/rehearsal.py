"""A rehearsal of KubeRay: the Ray nodes of a rendered object, as processes of this machine.

It reads objects as the operator and Ray do, with the defaults of the operator's schema (KubeRay
1.7, raycluster_types.go) and Ray's own reader of groups, and shares no code with `wrpo cluster
check`, so that each checks the other. Nodes have the resources of their groups as numbers only: a
node of eight GPUs is a process without one. Left out are memory, tokens, probes, policies and
images.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

from support.ray_head import RayHead

Body = dict[str, Any]
Objects = Mapping[tuple[str, str], Body]
CLUSTERS = {
    "RayCluster": "spec",
    "RayJob": "spec.rayClusterSpec",
    "RayService": "spec.rayClusterConfig",
}
GROUP_DEFAULTS = {"minReplicas": 0, "maxReplicas": 2**31 - 1, "numOfHosts": 1}
IMAGE = {"/usr/local/bin": str(Path(sys.executable).parent)}
"""Folders of the image, and where their files are here."""


class Rehearsal(RayHead):
    """The cluster of a RayCluster, RayJob or RayService, under Ray's autoscaler.

    `secrets` are those that a user makes by hand: {name: {key: text}}. `env` comes after that of
    the pods, for ports and files that the nodes of one machine would share.
    """

    def __init__(
        self,
        objects: Objects,
        kind: str,
        secrets: Mapping[str, Mapping[str, str]] | None = None,
        env: Mapping[str, str] | None = None,
        idle_seconds: float = 5,
    ):
        (self.body,) = (copy.deepcopy(body) for (k, _), body in objects.items() if k == kind)
        spec = self.body
        for part in CLUSTERS[kind].split("."):
            spec = spec[part]
        self.spec = spec
        spec["workerGroupSpecs"] = [GROUP_DEFAULTS | group for group in spec["workerGroupSpecs"]]
        pods = [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
        texts = {("Secret", name): data for name, data in (secrets or {}).items()}
        texts |= {key: body["data"] for key, body in objects.items() if key[0] == "ConfigMap"}
        self.volumes = tempfile.TemporaryDirectory(prefix="volumes-")
        self.places = dict(IMAGE)
        for pod in pods:
            self._mount(pod, texts)
        given = {n: self.local(text) for pod in pods for n, text in environment(pod, texts).items()}
        nodes = node_types(spec)
        head = nodes.pop("headgroup")
        for node in nodes.values():
            node["idle_timeout_s"] = idle_seconds
        super().__init__(head["resources"]["CPU"], nodes, idle_seconds, given | (env or {}))

    def _mount(self, pod: Body, texts: Mapping[tuple[str, str], Mapping[str, str]]) -> None:
        """Give each volume of a pod a folder, with the files of a ConfigMap or Secret."""
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in pod["containers"][0]["volumeMounts"]:
            folder = Path(self.volumes.name, mount["name"])
            folder.mkdir(exist_ok=True)
            self.places[mount["mountPath"]] = str(folder)
            volume = volumes[mount["name"]]
            source = ("ConfigMap", volume.get("configMap", {}).get("name"))
            if "secret" in volume:
                source = ("Secret", volume["secret"]["secretName"])
            for name, text in texts.get(source, {}).items():
                (folder / name).write_text(self.local(text))

    def local(self, text: str) -> str:
        """A text with the paths of pods as paths of this machine."""
        paths = "|".join(sorted(map(re.escape, self.places), key=len, reverse=True))
        return re.sub(rf"({paths})(?=[/\s\"']|$)", lambda found: self.places[found[1]], text)

    def __exit__(self, *of_what: object) -> None:
        super().__exit__(*of_what)
        self.volumes.cleanup()


def environment(pod: Body, texts: Mapping[tuple[str, str], Mapping[str, str]]) -> dict[str, str]:
    """The variables of a pod's Ray container.

    Raises:
        KeyError: a ConfigMap or Secret that has to exist does not.
    """
    container, env = pod["containers"][0], {}
    for source in container.get("envFrom", []):
        ((kind, of),) = source.items()
        key = ({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], of["name"])
        env |= texts.get(key, {}) if of.get("optional") else texts[key]
    return env | {v["name"]: v["value"] for v in container.get("env", []) if "value" in v}


def node_types(spec: Body) -> dict[str, Body]:
    """The types of nodes that Ray's autoscaler reads from a cluster, the head's among them."""
    types = autoscaling_config._generate_available_node_types_from_ray_cr_spec(spec)
    for node in types.values():
        node["resources"].pop("memory", None)  # this machine's
    return types


def submission(job: Rehearsal) -> dict[str, Any]:
    """What the operator's submitter gives to `ray job submit` (common/job.go)."""
    spec = job.body["spec"]
    return {
        "entrypoint": job.local(spec["entrypoint"]),
        "entrypoint_num_cpus": spec.get("entrypointNumCpus", 0),
        "runtime_env": yaml.safe_load(spec.get("runtimeEnvYAML", "{}")),
    }
