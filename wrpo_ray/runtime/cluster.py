"""The Ray cluster: connect, check that nodes see the output, kill orphaned processes."""

import logging
import os
import signal
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from wrpo_ray.config import ClusterConfig
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.connection import CONNECTION
from wrpo_ray.runtime.placement import NO_GPU_NODES
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.temporary import shorten_temporary_folders
from wrpo_ray.storage.cache import LIMIT_VARIABLE
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.publish import TEMPORARY_PREFIX
from wrpo_ray.text.addresses import redact

OUTPUT, SESSION = "WRPO_OUTPUT", "WRPO_SESSION"
"""Environment variables of every process of a run: its output, and its driver."""
IGNORED_WARNINGS = ("Progress bars disabled",)
"""Beginnings of Ray Data's warnings that are not shown: progress is reported here."""


def connect(cluster: ClusterConfig, root: Folder, session: str) -> None:
    """Connect to the cluster, or start Ray on this machine, and mark the run's processes."""
    # Ray's C++ core writes warnings to stderr that do not help a user; errors still rise.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # After a failure a thread that still waits for Ray Data must not start another Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray

    marks = {OUTPUT: output_mark(root), SESSION: session, "PYTHONPATH": _python_path()}
    if cluster.cache_gb is not None:
        marks[LIMIT_VARIABLE] = str(cluster.cache_gb)
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    is_here = not address or address == "local"
    protect_token(create=is_here)
    if address and not is_here:
        check_listening(address)
        try:
            with keeping_sigterm():
                ray.init(address=address, runtime_env={"env_vars": marks}, **quiet)
        except ConnectionError as error:
            raise UserError(f"cluster.address: {redact(f'{address}: {error}')}") from None
    else:
        shorten_temporary_folders()
        os.environ |= marks
        with keeping_sigterm():
            ray.init(address="local", num_cpus=cluster.num_cpus, include_dashboard=False, **quiet)
    _prepare_ray_data()
    CONNECTION.open()


def protect_token(*, create: bool) -> None:
    """Let this user alone read the file of Ray's token, with which anyone runs code on a cluster.

    A Ray that starts here makes one, with the mode that the umask leaves. `create` makes it first,
    empty, which Ray takes for none, and writes into.
    """
    is_needed = create and os.environ.get("RAY_AUTH_MODE") != "disabled"
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    with suppress(OSError):  # there is no HOME, or the file is someone else's
        if is_needed and "RAY_AUTH_TOKEN" not in os.environ:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_RDONLY, 0o600))
        os.chmod(file, stat.S_IMODE(file.stat().st_mode) & 0o600)


def _prepare_ray_data() -> None:
    """Keep Ray Data, and the nodes that it requests, off GPUs.

    Its progress bars and `IGNORED_WARNINGS` are hidden; other warnings stay.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.label_selector = NO_GPU_NODES
    logger = logging.getLogger("ray.data")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        handler.addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(IGNORED_WARNINGS)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Restore SIGTERM's handler at the end: Ray's own handler exits with another code."""
    ours = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)


def output_mark(root: Folder) -> str:
    """A hash that marks the processes of an output's runs; the same for every way to write it."""
    return digest(root.absolute().uri.rstrip("/"))


def check_listening(address: str) -> None:
    """Check that a server listens; without one, Ray waits for minutes and ends the process.

    Raises:
        UserError: the address refuses connections.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdigit():
        return  # no host:port, such as `auto`
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"cluster.address: nothing answers at {redact(address)} ({error}); start the cluster, "
            f"or correct the address (RAY_ADDRESS)"
        ) from None


def _python_path() -> str:
    """PYTHONPATH with the driver's folder first: workers import functions that a config names."""
    paths = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(p for p in paths if p))


def nodes() -> list[str]:
    """Ids of the nodes that are alive."""
    import ray

    return [n["NodeID"] for n in ray.nodes() if n["Alive"]]


def _on_every_node(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of a call on each node, but for nodes that were lost a moment ago."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

    task = ray.remote(num_cpus=0, max_retries=3)(function)
    asked = [
        task.options(scheduling_strategy=Affinity(node, soft=False)).remote(*args)
        for node in nodes()
    ]
    results = []
    for answer in asked:
        with suppress(ray.exceptions.TaskUnschedulableError):
            results.append(ray.get(answer))
    return results


def check_reachable(root: Folder) -> None:
    """Check that every node can read the output folder.

    Raises:
        UserError: on several nodes, the path is relative or on one node's own disk.
    """
    if root.is_remote or len(nodes()) == 1:
        return
    remedy = "use an object store (s3://...) or a folder that every node mounts"
    if root.is_relative:
        raise UserError(
            f"output: {root} is relative, on a cluster of {len(nodes())} nodes; {remedy}"
        )
    probe = f"{TEMPORARY_PREFIX}probe-{uuid.uuid4().hex[:8]}"
    root.write(probe, b"")
    try:
        blind = _on_every_node(Folder.exists, root, probe).count(False)
    finally:
        root.delete(probe)
    if blind:
        raise UserError(f"output: {root} is not seen by {blind} of {len(nodes())} nodes; {remedy}")


def kill_orphans(root: Folder, session: str) -> None:
    """Kill the processes that an earlier, dead driver of this output left on any node.

    The caller has to hold the lease: then every process that is marked with this output and
    another session is an orphan.
    """
    ended = sum(_on_every_node(_kill_local_orphans, output_mark(root), session))
    if ended:
        log(f"ended {ended} processes that an interrupted run had left behind")


def _kill_local_orphans(output: str, session: str) -> int:
    orphans = [p for p in psutil.process_iter() if _is_orphan(p, output, session)]
    for process in orphans:
        process.kill()
    deadline = time.monotonic() + 30
    while any(map(_is_running, orphans)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(orphans)


def _is_running(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_orphan(process: psutil.Process, output: str, session: str) -> bool:
    try:
        environ = process.environ()
    except psutil.Error:
        return False
    return environ.get(OUTPUT) == output and environ.get(SESSION, session) != session


def disconnect() -> None:
    """Leave the cluster; a Ray that `connect` started is shut down.

    Calls of other threads end with it; their errors are not logged.
    """
    import ray

    CONNECTION.close(5)
    logging.getLogger("ray").setLevel(logging.CRITICAL + 1)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
    ray.shutdown()
