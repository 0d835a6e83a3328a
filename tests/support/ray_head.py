"""A Ray cluster of a test's own, started as an operator starts it and ended by its processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from support.waiting import LIMIT, wait_until

MARK, NODE = "WRPO_TEST_CLUSTER", "RAY_CLOUD_INSTANCE_ID"
"""Environment of each of a cluster's processes, and of those of one autoscaled node."""
HEAD_ID = "f" * 51 + "00000"


class RayHead:
    """`ray start --head --block` on ports, a HOME and a temporary folder of its own.

    With `node_types` Ray's autoscaler v2 starts and ends nodes, each a raylet on this machine:
    {name: {"resources": {...}, "max_workers": n}}.
    """

    def __init__(
        self,
        num_cpus: int,
        node_types: dict[str, dict[str, Any]] | None = None,
        idle_seconds: float = 5,
        env: Mapping[str, str] = MappingProxyType({}),
    ):
        # sockets lie in it, whose paths may have 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.name = uuid.uuid4().hex
        ports = free_ports(5)
        self.address, self.api = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
        options = {
            "port": ports[0],
            "dashboard-port": ports[1],
            "dashboard-agent-listen-port": ports[2],
            "ray-client-server-port": ports[3],
            "num-cpus": num_cpus,
            "object-store-memory": 500 * 2**20,
            "temp-dir": self.folder / "ray",
            "include-dashboard": "true",
            "include-log-monitor": "false",  # it reads all files ten times a second, for nobody
        }
        bin = Path(sys.executable).parent
        self.env = (
            os.environ
            | dict(env)
            | {
                MARK: self.name,
                "HOME": str(self.folder),
                "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",  # of the command in jobs
                "RAY_health_check_period_ms": "1000",  # a lost node is seen after 8 s, not 15
                "RAY_health_check_failure_threshold": "8",
            }
        )
        if node_types is not None:
            options["autoscaling-config"] = self._autoscaling(num_cpus, node_types, idle_seconds)
            self.env |= {
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "AUTOSCALER_METRIC_PORT": str(ports[4]),
                NODE: HEAD_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=subprocess.STDOUT
            )

    def _autoscaling(self, num_cpus: int, node_types: dict[str, Any], idle: float) -> Path:
        """The file that `--autoscaling-config` takes."""
        types = {name: {"node_config": {}} | kind for name, kind in node_types.items()}
        head = {"resources": {"CPU": num_cpus}, "node_config": {}, "max_workers": 0}
        commands = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        config = {f"{name}_commands": [] for name in commands} | {
            "cluster_name": "test",
            "cluster_synced_files": [],
            "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
            "idle_timeout_minutes": idle / 60,
            "upscaling_speed": 10,
            "provider": {
                # by its module: the wheel lacks the defaults of `fake_multinode`
                "type": "external",
                "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
                "launch_multiple": True,
                "head_node_id": HEAD_ID,
                "gcs_address": self.address,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {"ray.head.default": head} | types,
            "head_node_type": "ray.head.default",
        }
        path = self.folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        return path

    def __enter__(self) -> RayHead:
        try:
            wait_until(self._answers, self.process)
        except (AssertionError, TimeoutError):
            print((self.folder / "log").read_text())
            raise
        return self

    def _answers(self) -> bool:
        with suppress(OSError):
            host, port = self.api.removeprefix("http://").split(":")
            socket.create_connection((host, int(port)), timeout=1).close()
            return True
        return False

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # it drains first
        for process in marked(MARK, self.name):  # nodes of the autoscaler outlive their head
            with suppress(psutil.Error):
                process.kill()
        self.process.wait(LIMIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_node(self, num_cpus: int) -> None:
        """Another node, which stays for as long as the head does, with a folder of its own."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--address={self.address}", f"--num-cpus={num_cpus}"]
        command += [f"--temp-dir={self.folder / 'node'}", "--object-store-memory=500000000"]
        command += ["--include-log-monitor=false"]
        with (self.folder / "node.log").open("w") as log:
            subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)

    def kill_node(self, node: str) -> None:
        """An autoscaled node dies with all that runs on it."""
        for process in marked(NODE, node):
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.name:
                    process.kill()


def marked(name: str, value: str) -> list[psutil.Process]:
    """Processes with this in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(name) == value:
                found.append(process)
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]
