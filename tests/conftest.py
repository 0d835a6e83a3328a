"""Shared surroundings: a HOME of the tests' own, Ray without tokens, one zoo for all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_HOME = tempfile.TemporaryDirectory(prefix="wrpo-home-")

# Before ray, vllm or transformers are imported by any test: nothing goes to the user's HOME,
# nothing is fetched, and engines share two cores.
os.environ |= {
    "HOME": _HOME.name,
    "WRPO_CACHE": f"{_HOME.name}/wrpo-cache",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT / "tests" / "ray"),  # workers import actors that tests define
}
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The demo's tiny models, trained once and kept in .cache (some minutes the first time)."""
    from wrpo_ray.zoo.build import build_zoo

    folder = ROOT / ".cache" / "zoo"
    build_zoo(folder)
    return folder


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of the module's own on this machine."""
    from wrpo_ray.config import ClusterConfig
    from wrpo_ray.core import cluster
    from wrpo_ray.core.storage import Folder

    with tempfile.TemporaryDirectory(prefix="wrpo-ray-") as folder:
        cluster.connect(ClusterConfig(num_cpus=4), Folder(folder), "tests")
        yield
        cluster.disconnect()
