"""The Ray cluster: connecting, checking where data lies, ending orphans, mapping over buckets."""

from __future__ import annotations

import logging
import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import psutil

from wrpo_ray import errors
from wrpo_ray.config import Actors, ClusterConfig
from wrpo_ray.core.records import digest
from wrpo_ray.core.run import log
from wrpo_ray.core.storage import TEMPORARY, Folder
from wrpo_ray.errors import UserError, WrpoError

OUTPUT, SESSION = "WRPO_OUTPUT", "WRPO_SESSION"
"""Environment of every process that works for a run: which output, and which driver."""


def connect(cluster: ClusterConfig, root: Folder, session: str) -> None:
    """Connect to the cluster, or start Ray on this machine, and mark the run's processes."""
    # Ray's C++ core writes warnings to stderr that say nothing to a user; errors still rise.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # After a failure a thread that still waits for Ray Data must not start a Ray of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray

    marks = {OUTPUT: mark(root), SESSION: session, "PYTHONPATH": _python_path()}
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        _check_answers(address)
        try:
            ray.init(address=address, runtime_env={"env_vars": marks}, **quiet)
        except ConnectionError as error:
            raise UserError(f"cluster.address: {address}: {error}") from None
    else:
        os.environ |= marks
        ray.init(address="local", num_cpus=cluster.num_cpus, include_dashboard=False, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def mark(root: Folder) -> str:
    """What the processes of an output's runs are known by, however its path was written."""
    return digest(root.absolute().uri.rstrip("/"))


def _check_answers(address: str) -> None:
    """Ray waits for minutes, and ends the process, where nothing listens.

    Raises:
        UserError: nothing does.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdigit():
        return  # such as `auto`
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"cluster.address: nothing answers at {address} ({error}); start the cluster, or "
            f"correct the address (RAY_ADDRESS)"
        ) from None


def _python_path() -> str:
    """The driver's folder first, so that functions named in the config are found by workers."""
    paths = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(p for p in paths if p))


def nodes() -> list[str]:
    """Ids of the live nodes."""
    import ray

    return [n["NodeID"] for n in ray.nodes() if n["Alive"]]


def _on_every_node(function: Callable[..., Any], *args: Any) -> list[Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

    task = ray.remote(num_cpus=0, max_retries=3)(function)
    return ray.get(
        [
            task.options(scheduling_strategy=Affinity(node, soft=False)).remote(*args)
            for node in nodes()
        ]
    )


def check_reachable(root: Folder) -> None:
    """Check that every node sees the output folder.

    Raises:
        UserError: the path is relative, or local to a node, on more than one node.
    """
    if root.is_remote or len(nodes()) == 1:
        return
    remedy = "use an object store (s3://...) or a folder that every node mounts"
    if root.is_relative:
        raise UserError(
            f"output: {root} is relative, on a cluster of {len(nodes())} nodes; {remedy}"
        )
    probe = f"{TEMPORARY}probe-{uuid.uuid4().hex[:8]}"
    root.write(probe, b"")
    try:
        blind = _on_every_node(_sees, root, probe).count(False)
    finally:
        root.delete(probe)
    if blind:
        raise UserError(f"output: {root} is not seen by {blind} of {len(nodes())} nodes; {remedy}")


def _sees(root: Folder, name: str) -> bool:
    return root.exists(name)


def end_orphans(root: Folder, session: str) -> None:
    """End what an earlier, dead driver of this output left running on any node.

    The lease has to be held: then every process marked with this output and another session
    is an orphan.
    """
    ended = sum(_on_every_node(_end_orphans, mark(root), session))
    if ended:
        log(f"ended {ended} processes that an interrupted run had left behind")


def _end_orphans(output: str, session: str) -> int:
    orphans = [p for p in psutil.process_iter() if _is_orphan(p, output, session)]
    for process in orphans:
        process.kill()
    deadline = time.monotonic() + 30
    while any(map(_runs, orphans)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(orphans)


def _runs(process: psutil.Process) -> bool:
    """Whether it still does; one that waits only for its parent to take notice does not."""
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


def map_rows(
    what: str,
    rows: list[dict[str, Any]],
    worker: type,
    arguments: dict[str, Any],
    actors: Actors,
    env: dict[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Map rows across a pool of `worker` actors on Ray Data; results come as they finish.

    A lost actor or node is replaced and its rows are tried again, so a worker has to commit
    its own results and pass over what is committed.

    Raises:
        WrpoError: as raised by the worker, or one that names `what` and the cause.
    """
    import ray
    from ray.data import ActorPoolStrategy

    check_room(what, min(actors.min, len(rows)), "actors", actors.num_cpus, actors.num_gpus)

    guarded = type(worker.__name__, (_Guarded,), {})  # under the name that dashboards show
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        guarded,
        fn_constructor_kwargs={"what": what, "worker": worker, "arguments": arguments},
        compute=ActorPoolStrategy(
            min_size=min(actors.min, len(rows)), max_size=min(actors.max, len(rows))
        ),
        num_cpus=actors.num_cpus,
        num_gpus=actors.num_gpus or None,
        runtime_env={"env_vars": env or {}},
    )
    try:
        for result in dataset.iter_rows():
            if "error" in result:
                raise _own_error(result)
            yield result
    except ray.exceptions.RayError as error:
        raise readable(error, what) from error


def check_room(what: str, count: int, kind: str, num_cpus: float, num_gpus: float) -> None:
    """Refuse what a Ray of this machine can never place; a cluster may still grow.

    Raises:
        UserError: `count` workers do not fit.
    """
    import ray

    have = ray.cluster_resources()
    need = {"CPU": count * num_cpus, "GPU": count * num_gpus}
    short = {name: n for name, n in need.items() if n > have.get(name, 0)}
    if not short:
        return
    name, wanted = next(iter(short.items()))
    lack = f"{count} {kind} need {wanted:g} {name}s and Ray has {have.get(name, 0):g}"
    if is_own_ray():
        raise UserError(f"{what}: {lack}; set fewer or less for each of them")
    log(f"{what}: {lack}; waiting for the cluster to grow")


def is_own_ray() -> bool:
    """Whether this process started the cluster, which then has this one node for good."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    return bool(node and node.head)


class _Guarded:
    """A worker whose errors are results: raised, they come wrapped in Ray's, with long traces."""

    def __init__(self, what: str, worker: type, arguments: dict[str, Any]):
        self.what, self.worker, self.arguments = what, worker, arguments

    @cached_property
    def _made(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return self.worker(**self.arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._made(row)
        except Exception as error:  # whatever it is, the driver tells it
            own = error if isinstance(error, WrpoError) else readable(error, self.what)
            return {
                "error": type(own).__name__,
                "message": str(own),
                "trace": traceback.format_exc(),
            }


def _own_error(result: dict[str, Any]) -> WrpoError:
    kind: type[WrpoError] = getattr(errors, result["error"])
    error = kind(result["message"])
    error.__cause__ = RuntimeError(result["trace"])  # shown with WRPO_DEBUG
    return error


def readable(error: BaseException, what: str) -> WrpoError:
    """The project's own error inside one of Ray's, or one line that names the first cause."""
    causes = list(_causes(error))
    own = next((cause for cause in causes if isinstance(cause, WrpoError)), None)
    if own is not None:
        return own
    text = " ".join(str(causes[-1]).split())[:500]
    return WrpoError(
        f"{what} failed: {type(causes[-1]).__name__}: {text}; put the cause right and run the same "
        f"command again, which goes on where this one stopped (WRPO_DEBUG=1 shows the whole trace)"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it wraps, outermost first."""
    while error is not None:
        yield error
        failures = list(getattr(error, "worker_failures", {}).values())
        inner = [getattr(error, "controller_failure", None), getattr(error, "_base_exc", None)]
        inner += [*failures, getattr(error, "cause", None), error.__cause__]
        error = next((e for e in inner if isinstance(e, BaseException)), None)


def thread_env(num_cpus: float) -> dict[str, str]:
    """Environment of a worker: as many threads as it has CPUs, at least one."""
    return {"OMP_NUM_THREADS": str(max(1, int(num_cpus)))}


def disconnect() -> None:
    """Leave the cluster; a Ray that `connect` started ends.

    What other threads still had under way ends with it, and has nothing more to tell.
    """
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL + 1)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
    ray.shutdown()
