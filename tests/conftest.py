"""Shared surroundings: a HOME of the tests' own, Ray without tokens, one zoo for all."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "ray", ROOT / "tests"))),
    # workers import actors that tests define, and what these use
}
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The demo's tiny models, trained once and kept in .cache (some minutes the first time)."""
    from wrpo_ray.zoo.build import build_zoo

    folder = ROOT / ".cache" / "zoo"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "zoo.lock").open("w") as lock:  # tests run in two processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_zoo(folder)
    return folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An S3 server of the tests' own, with one bucket: the address of a folder in it."""
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        _wait_for(f"http://127.0.0.1:{port}/moto-api/")
        import boto3

        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="wrpo")
        yield f"s3://wrpo/run?endpoint_override=127.0.0.1:{port}&scheme=http"
        server.terminate()


def _wait_for(url: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(url)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of the module's own on this machine."""
    from wrpo_ray.config import ClusterConfig
    from wrpo_ray.runtime import cluster
    from wrpo_ray.storage.folder import Folder

    with tempfile.TemporaryDirectory(prefix="wrpo-ray-") as folder:
        cluster.connect(ClusterConfig(num_cpus=4, cache_gb=20), Folder(folder), "tests")
        yield
        cluster.disconnect()


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium; tests that use it are skipped where it is not installed."""
    program = shutil.which("chromium") or pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
