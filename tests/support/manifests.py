"""Rendered overlays, and Ray objects as kustomize would make them, for the tests of manifests."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    "dashboards",
)
CRDS = ROOT.parent / "shared" / "kuberay-crds"
FUSION = CLUSTER / "overlays" / "job" / "fusion.yaml"
Body = dict[str, Any]


@cache
def _kubectl() -> str | None:
    """Why kustomize cannot be run; None where it can."""
    if not shutil.which("kubectl"):
        return "kubectl is not here"
    told = subprocess.run(
        ["kubectl", "version", "--client", "--output=json"], capture_output=True, text=True
    )
    version = json.loads(told.stdout)["clientVersion"] if told.returncode == 0 else {}
    minor = int(re.match(r"\d*", version.get("minor", "")).group() or 0)
    return None if minor >= 27 else f"kubectl is 1.{minor}; the overlays need 1.27"


@cache
def rendered(overlay: str) -> str:
    """What `kubectl kustomize` makes of an overlay; skips the test where it cannot be run."""
    reason = _kubectl()
    if reason:
        pytest.skip(reason)
    command = ["kubectl", "kustomize", str(CLUSTER / overlay)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def crds() -> Schemas:
    """KubeRay's schemas; skips the test where they are absent."""
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's schemas are not in {CRDS.relative_to(ROOT.parent)}")
    return Schemas(str(CRDS))


@cache
def _read(path: str) -> Body:
    return yaml.load((CLUSTER / path).read_text(), FAST_LOADER)


def ray_objects() -> dict[str, Body]:
    """RayCluster, RayJob and RayService by kind, made like the overlays, but without kubectl."""
    cluster, job, service = map(
        copy.deepcopy,
        map(
            _read,
            ("raycluster/cluster.yaml", "overlays/job/job.yaml", "overlays/serve/service.yaml"),
        ),
    )
    job["spec"]["rayClusterSpec"] = copy.deepcopy(cluster["spec"])
    service["spec"]["rayClusterConfig"] = copy.deepcopy(cluster["spec"])
    for body in (cluster, job, service):
        wanted = body["metadata"]["annotations"]
        wanted["wrpo-ray/external"] += " PersistentVolumeClaim/wrpo-cache"
    return {body["kind"]: body for body in (cluster, job, service)}
