"""HAProxy in front of the ingress on one machine: its environment, files and ports."""

import math
import os
import random
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from wrpo_ray.serve.headers import CALLBACK

PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
"""HAProxy instead of Ray Serve's own proxy (ADR 13)."""
HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")  # nosec B104 # compared with, not bound
"""Hosts with which HAProxy finds the ingress; it looks at 127.0.0.1."""


@contextmanager
def local_proxy(host: str, timeout: float) -> Iterator[None]:
    """Set the environment of a Ray Serve that starts here; variables that are set stay.

    Its processes have normal priority and filter headers, and HAProxy gets its own files and ports.
    """
    env = {"RAY_worker_niceness": "0", **CALLBACK}
    with tempfile.TemporaryDirectory(
        prefix="wrpo-serve-",
        dir="/tmp",  # nosec B108 # of mkdtemp
        ignore_cleanup_errors=True,
    ) as folder:  # a short path, for HAProxy's sockets
        if sys.platform == "linux" and host in HOSTS:  # where Ray brings HAProxy
            env |= PROXY | _haproxy(Path(folder), math.ceil(timeout) + 15)
        os.environ |= env | {name: os.environ[name] for name in env if name in os.environ}
        yield


def _haproxy(folder: Path, longest: int) -> dict[str, str]:
    """Return the environment of HAProxy; none of its timeouts is below `longest` seconds."""
    metrics, stats, fallback = _free_ports(3)
    own = {
        "CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "SOCKET_PATH": folder / "admin.sock",
        "SERVER_STATE_BASE": folder,
        "SERVER_STATE_FILE": folder / "server-state",
        "METRICS_SOCKET_PATH": folder / "metrics.sock",
        "LOG_TARGET": folder / "nobody-listens.sock",  # else the syslog of the machine
        "METRICS_PORT": metrics,
        "STATS_PORT": stats,
        "TIMEOUT_SERVER_S": longest,
        "HARD_STOP_AFTER_S": longest,  # of an old one, after a change of ingresses
    }
    return {f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in own.items()} | {
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        # HAProxy learns at once that an ingress ends.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def _free_ports(count: int) -> list[int]:
    """Return free ports below the ephemeral range, so that they stay free."""
    with ExitStack() as held:
        free: list[int] = []
        for port in random.sample(range(20_000, 30_000), 1000):
            with suppress(OSError):
                held.enter_context(socket.create_server(("", port)))
                free.append(port)
            if len(free) == count:
                break
        return free
