"""Rendered overlays, and Ray objects as kustomize would make them, for the tests of manifests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from wrpo_ray import config
from wrpo_ray.config import Config
from wrpo_ray.kubernetes.schema import Schemas
from wrpo_ray.text.documents import FAST_LOADER

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
OVERLAYS = (
    "raycluster",
    "overlays/job",
    "overlays/kueue",
    "overlays/serve",
    "overlays/serve-redis",
    "overlays/demo",
    "overlays/models",
    "dashboards",
)
COMPONENTS = sorted(folder.name for folder in (CLUSTER / "components").iterdir())
FUSION = CLUSTER / "overlays" / "job" / "fusion.yaml"
FILLED = "output=s3://bucket/fusion", "prompts.path=s3://bucket/prompts.jsonl"
"""`--set` for FUSION, whose bucket is an example's; `rendered` has it filled in, too."""
RUNS = {
    "raycluster": (FUSION, FILLED),
    "overlays/job": (FUSION, FILLED),
    "overlays/kueue": (FUSION, FILLED),
    "overlays/demo": (ROOT / "jobs" / "demo.yaml", ()),
}
"""The config, and its `--set`, of each overlay with steps."""
BESIDE = (
    "ConfigMap/wrpo-fusion",
    "PersistentVolumeClaim/wrpo-cache",
    "ServiceAccount/wrpo-head",
    "ServiceAccount/wrpo-worker",
)
"""What the objects of `ray_objects` need of the overlays' other objects."""
Body = dict[str, Any]


def run_of(overlay: str) -> Config | None:
    """The config of an overlay with steps."""
    return config.load(*RUNS[overlay]) if overlay in RUNS else None


@cache
def kubectl() -> str:
    """The kubectl of this environment (requirements-dev.txt has it), or else the one on PATH."""
    found = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "kubectl is not installed"
    command = [found, "version", "--client", "--output=json"]
    version = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    minor = int(re.match(r"\d+", version["clientVersion"]["minor"]).group())
    assert minor >= 27, f"kubectl is 1.{minor}; the overlays need 1.27"
    return found


@cache
def overlays_of(component: str) -> tuple[str, ...]:
    """The overlays that a component is for, by the line `# With:` of its kustomization."""
    text = (CLUSTER / "components" / component / "kustomization.yaml").read_text()
    return tuple(re.search(r"^# With: (.+)$", text, re.MULTILINE)[1].split(", "))


@cache
def objects(overlay: str, *components: str) -> dict[tuple[str, str], Body]:
    """The rendered objects by kind and name."""
    bodies = yaml.load_all(rendered(overlay, *components), FAST_LOADER)
    return {(body["kind"], body["metadata"]["name"]): body for body in bodies}


@cache
def rendered(
    overlay: str, *components: str, namespace: str = "", suffix: str = "", named: str = ""
) -> str:
    """The output of `kubectl kustomize` for an overlay, as a reader's own folder changes it.

    A bucket is filled in.

    Args:
        overlay: A folder of cluster/.
        *components: Folders of cluster/components.
        namespace: Another namespace for all objects.
        suffix: Appended to the names of all objects.
        named: Another name for the RayJob or RayService.
    """
    rename = [{"op": "replace", "path": "/metadata/name", "value": named}]
    patch = {"target": {"kind": "RayJob|RayService"}, "patch": json.dumps(rename)}
    own = {
        "components": [f"../cluster/components/{name}" for name in components],
        "namespace": namespace,
        "nameSuffix": suffix,
        "patches": [patch] if named else [],
    }
    if not any(own.values()):
        return _kustomize(CLUSTER / overlay).replace("your-bucket", "bucket")
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        written = {"resources": [f"../cluster/{overlay}"], **{k: v for k, v in own.items() if v}}
        (Path(folder) / "kustomization.yaml").write_text(json.dumps(written))
        return _kustomize(Path(folder)).replace("your-bucket", "bucket")


def _kustomize(folder: Path) -> str:
    command = [kubectl(), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def crds() -> Schemas:
    """KubeRay's schemas of the package."""
    return Schemas()


@cache
def _read(path: str) -> str:
    text = (CLUSTER / path).read_text().replace("your-bucket", "bucket")
    return json.dumps(yaml.load(text, FAST_LOADER))


def ray_objects() -> dict[str, Body]:
    """RayCluster, RayJob and RayService by kind, made like the overlays, but without kubectl.

    No two fields are one object, as they are where YAML has an anchor.
    """
    paths = "raycluster/cluster.yaml", "overlays/job/job.yaml", "overlays/serve/service.yaml"
    cluster, job, service = (json.loads(_read(path)) for path in paths)
    job["spec"]["rayClusterSpec"] = json.loads(json.dumps(cluster["spec"]))
    served = json.loads(json.dumps(cluster["spec"]))
    groups = served["workerGroupSpecs"]
    served["workerGroupSpecs"] = [g for g in groups if g["groupName"] == "serve"]
    service["spec"]["rayClusterConfig"] = served
    for body in (cluster, job, service):
        wanted = body["metadata"]["annotations"]
        wanted["wrpo-ray/external"] += f" {' '.join(BESIDE)}"
    return {body["kind"]: body for body in (cluster, job, service)}
