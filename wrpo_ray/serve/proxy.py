"""HAProxy in front of the ingress on one machine: its environment, files and ports."""

import math
import os
import random
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.serve._private import replica

from wrpo_ray.config import ServeConfig
from wrpo_ray.serve.haproxy import CONNECTIONS, HEADERS_TIMEOUT, HOST, REQUESTS
from wrpo_ray.serve.headers import CALLBACK

PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
"""HAProxy instead of Ray Serve's own proxy (ADR 13)."""
ONE_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
}
"""No change of threads for each piece of an answer; none of our code blocks the loop."""
LOOPBACK = "127.0.0.1"
CLIENT_TIMEOUT = 30
"""Seconds without a byte from a client that has to send some, or that has to read an answer."""


@contextmanager
def local_proxy(host: str, settings: ServeConfig) -> Iterator[str]:
    """Set the environment of a Ray Serve that starts here; variables that are set stay.

    Its processes have normal priority and filter headers, and HAProxy gets its own files and ports.
    Yields the host for Ray Serve: loopback where HAProxy listens at `host`.
    """
    env = {"RAY_worker_niceness": "0", **CALLBACK} | ONE_LOOP
    with tempfile.TemporaryDirectory(
        prefix="wrpo-serve-",
        dir="/tmp",  # nosec B108 # of mkdtemp
        ignore_cleanup_errors=True,
    ) as folder:  # a short path, for HAProxy's sockets
        if sys.platform == "linux":  # where Ray brings HAProxy
            env |= PROXY | _haproxy(Path(folder), host, settings)
        os.environ |= env | {name: os.environ[name] for name in env if name in os.environ}
        is_behind = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and HOST in os.environ
        yield LOOPBACK if is_behind else host


def _haproxy(folder: Path, host: str, settings: ServeConfig) -> dict[str, str]:
    """Return the environment of HAProxy; it waits longer than `timeout` for an answer."""
    metrics, stats, fallback = _free_ports(3)
    longest = math.ceil(settings.timeout) + 15
    own = {
        "BINARY_PATH": Path(sysconfig.get_path("scripts"), "wrpo-haproxy"),
        "CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "SOCKET_PATH": folder / "admin.sock",
        "SERVER_STATE_BASE": folder,
        "SERVER_STATE_FILE": folder / "server-state",
        "METRICS_SOCKET_PATH": folder / "metrics.sock",
        "LOG_TARGET": folder / "nobody-listens.sock",  # else the syslog of the machine
        "METRICS_PORT": metrics,
        "STATS_PORT": stats,
        "NBTHREAD": max(1, min(4, (os.cpu_count() or 1) // 4)),
        "TIMEOUT_CLIENT_S": CLIENT_TIMEOUT,
        "TIMEOUT_SERVER_S": longest,
        "HARD_STOP_AFTER_S": longest,  # of an old one, after a change of ingresses
    }
    return {f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in own.items()} | {
        HOST: f"[{host}]" if ":" in host else host.replace("0.0.0.0", "*"),  # nosec B104
        CONNECTIONS: str(settings.connections),
        HEADERS_TIMEOUT: str(math.ceil(settings.read_timeout)),
        REQUESTS: str(2 * settings.requests_per_minute),  # the ingress refuses the second half
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        # HAProxy learns at once that an ingress ends.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def bind_to_loopback() -> None:
    """Let this replica's own server of Ray Serve listen at loopback, if all nodes are this one.

    It runs what it receives, for whoever reaches it, and Ray has no setting for its address. To be
    called while the replica is made.
    """
    if ray.util.get_node_ip_address() != LOOPBACK:
        return
    add = replica.add_port_to_grpc_server

    def add_at_loopback(server: Any, address: str) -> Any:
        return add(server, address.replace("[::]", LOOPBACK))

    replica.add_port_to_grpc_server = add_at_loopback


def _free_ports(count: int) -> list[int]:
    """Return free ports below the ephemeral range, so that they stay free."""
    with ExitStack() as held:
        free: list[int] = []
        for port in random.sample(range(20_000, 30_000), 1000):
            with suppress(OSError):
                held.enter_context(socket.create_server((LOOPBACK, port)))
                free.append(port)
            if len(free) == count:
                break
        return free
