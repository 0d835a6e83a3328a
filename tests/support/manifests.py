"""Rendered overlays, and Ray objects as kustomize would make them, for the tests of manifests."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.shared_data import CRDS
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
FUSION = CLUSTER / "overlays" / "job" / "fusion.yaml"
Body = dict[str, Any]


@cache
def kubectl() -> str:
    """The kubectl of this environment, or else the one on PATH; skips the test without one."""
    found = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip("kubectl is not installed; requirements-dev.txt has it")
    command = [found, "version", "--client", "--output=json"]
    version = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    minor = int(re.match(r"\d+", version["clientVersion"]["minor"]).group())
    if minor < 27:
        pytest.skip(f"kubectl is 1.{minor}; the overlays need 1.27")
    return found


@cache
def rendered(overlay: str) -> str:
    """The output of `kubectl kustomize` for an overlay; skips the test without kubectl."""
    command = [kubectl(), "kustomize", str(CLUSTER / overlay)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def crds() -> Schemas:
    """KubeRay's schemas; skips the test where they are absent."""
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's schemas are not in {CRDS}; WRPO_TEST_DATA may name their place")
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
    served = copy.deepcopy(cluster["spec"])
    groups = served["workerGroupSpecs"]
    served["workerGroupSpecs"] = [g for g in groups if g["groupName"] == "serve"]
    service["spec"]["rayClusterConfig"] = served
    for body in (cluster, job, service):
        wanted = body["metadata"]["annotations"]
        wanted["wrpo-ray/external"] += " PersistentVolumeClaim/wrpo-cache"
    return {body["kind"]: body for body in (cluster, job, service)}
