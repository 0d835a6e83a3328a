"""The Ray cluster: connecting, checking where data lies, ending orphans, room, tasks."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from wrpo_ray import errors
from wrpo_ray.addresses import shown
from wrpo_ray.config import Actors, ClusterConfig
from wrpo_ray.core.cache import LIMIT
from wrpo_ray.core.progress import log
from wrpo_ray.core.records import digest
from wrpo_ray.core.storage import TEMPORARY, Folder
from wrpo_ray.core.temporary import shorten_temporary_folders
from wrpo_ray.core.vllm import with_root_cause
from wrpo_ray.errors import UserError, WrpoError

OUTPUT, SESSION = "WRPO_OUTPUT", "WRPO_SESSION"
"""Environment of every process that works for a run: which output, and which driver."""
UNDERSTOOD = ("Progress bars disabled",)
"""Warnings of Ray Data, by their beginnings, that tell a user nothing: progress is told here."""
MOST_TASKS = 1024
"""Tasks under way at once: more than most clusters have CPUs."""


class ClosedError(WrpoError):
    """The connection to Ray is closed, or is another one: the run has come to its end."""


class _Connection:
    """Whether threads may call Ray: in the midst of a call they must not lose it.

    Ray waits for a minute then, and ends the process.
    """

    def __init__(self) -> None:
        self._calls, self._changed, self._is_closed = 0, threading.Condition(), False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Calls of Ray that end within seconds.

        Raises:
            ClosedError: the connection was closed.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError("the connection to Ray was closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def open(self) -> None:
        """It is there."""
        self._is_closed = False

    def close(self, seconds: float) -> None:
        """No more calls; those under way are waited for so long."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._calls, seconds)


CONNECTION = _Connection()


def connect(cluster: ClusterConfig, root: Folder, session: str) -> None:
    """Connect to the cluster, or start Ray on this machine, and mark the run's processes."""
    # Ray's C++ core writes warnings to stderr that say nothing to a user; errors still rise.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # After a failure a thread that still waits for Ray Data must not start a Ray of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray

    marks = {OUTPUT: mark(root), SESSION: session, "PYTHONPATH": _python_path()}
    if cluster.cache_gb is not None:
        marks[LIMIT] = str(cluster.cache_gb)
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        check_answers(address)
        try:
            with keeping_sigterm():
                ray.init(address=address, runtime_env={"env_vars": marks}, **quiet)
        except ConnectionError as error:
            raise UserError(f"cluster.address: {shown(f'{address}: {error}')}") from None
    else:
        shorten_temporary_folders()
        os.environ |= marks
        with keeping_sigterm():
            ray.init(address="local", num_cpus=cluster.num_cpus, include_dashboard=False, **quiet)
    _quiet_ray_data()
    CONNECTION.open()


def _quiet_ray_data() -> None:
    """Leave out what Ray Data tells in passing; other warnings and errors reach the terminal."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logger = logging.getLogger("ray.data")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        handler.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(UNDERSTOOD)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Ray puts handlers of its own for SIGTERM that end the process with another exit code."""
    ours = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)


def mark(root: Folder) -> str:
    """What the processes of an output's runs are known by, however its path was written."""
    return digest(root.absolute().uri.rstrip("/"))


def check_answers(address: str) -> None:
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
            f"cluster.address: nothing answers at {shown(address)} ({error}); start the cluster, "
            f"or correct the address (RAY_ADDRESS)"
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
    """Results of a call on each node; one that was lost just now, and is still listed, has none."""
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


@dataclass(frozen=True)
class Pool:
    """Actors of one kind."""

    what: str
    """Its name in messages."""
    actors: Actors
    env: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    """Calls that an actor has in hand at once."""
    parts: int = 1
    """Workers, one for each GPU, that an actor starts itself; 1 is the actor alone."""

    @property
    def needs(self) -> dict[str, float]:
        """Resources of one actor with its parts."""
        actors = self.actors
        needs = {"CPU": actors.num_cpus, "GPU": actors.num_gpus * self.parts}
        return needs | {name: n * self.parts for name, n in actors.resources.items()}

    @property
    def bundles(self) -> list[dict[str, float]]:
        """A placement group for one actor and its parts."""
        gpus = {"GPU": self.actors.num_gpus} if self.actors.num_gpus else {}
        return [{"CPU": self.actors.num_cpus}, *[gpus | self.actors.resources] * self.parts]


def map_tasks(
    what: str, rows: Iterator[dict[str, Any]], function: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Map rows by tasks of one CPU, where there is nothing to load; results come as they finish.

    Workers that Ray has started already take them, on as many CPUs as the cluster has. Rows of a
    lost node are tried again on others.

    Raises:
        WrpoError: as raised by the function, or one that names `what` and the cause.
    """
    import ray

    task = ray.remote(num_cpus=1)(guarded).options(name=what)
    shared = ray.put(function)
    under_way: list[Any] = []
    try:
        for row in rows:
            under_way.append(task.remote(what, shared, row))
            if len(under_way) == MOST_TASKS:
                yield _result(under_way)
        while under_way:
            yield _result(under_way)
    except ray.exceptions.RayError as error:
        raise readable(error, what) from error
    finally:
        for left in under_way:
            ray.cancel(left)


def _result(under_way: list[Any]) -> dict[str, Any]:
    """The result of a task that has finished, which is taken from the list."""
    import ray

    (done,), under_way[:] = ray.wait(under_way)
    result = ray.get(done)
    if "error" in result:
        raise own_error(result)
    return result


def side_by_side(calls: list[Callable[[], None]], most: int | None = None) -> None:
    """Make each call in a thread, `most` at once; the first error is raised at once.

    After it, or after Ctrl-C, nobody waits for the others: they end with the connection to Ray.
    """
    threads = ThreadPoolExecutor(min(len(calls), most or len(calls)))
    try:
        for done in as_completed([threads.submit(call) for call in calls]):
            done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def fit_together(pools: list[Pool]) -> bool:
    """Whether the cluster as it is has room for one actor of each pool at once.

    What others hold for good, such as the driver of a submitted job its CPU, is no room: actors
    that wait for each other's results could wait forever.
    """
    import ray

    need = Counter[str]()
    for pool in pools:
        need.update(pool.needs)

    def fits(have: dict[str, float]) -> bool:
        return all(n <= have.get(name, 0) for name, n in need.items())

    # what earlier actors and tasks held is free a moment after they ended
    deadline = time.monotonic() + 5
    while fits(ray.cluster_resources()) and time.monotonic() < deadline:
        if fits(ray.available_resources()):
            return True
        time.sleep(0.2)
    return False


def room_for(needs: dict[str, float]) -> int:
    """How many that `need` so much the cluster has room for as it is; 1 if for none yet."""
    import ray

    have = ray.cluster_resources()
    fitting = [int(have.get(name, 0) // n) for name, n in needs.items() if n]
    return max(1, min(fitting, default=1))


def check_room(what: str, count: int, kind: str, needs: dict[str, float]) -> None:
    """Refuse what a Ray of this machine can never place; a cluster may still grow.

    Raises:
        UserError: `count` workers, each of which `needs` so much, do not fit.
    """
    import ray

    have = ray.cluster_resources()
    need = {name: count * n for name, n in needs.items()}
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


def guarded(
    what: str, function: Callable[[dict[str, Any]], dict[str, Any]], row: dict[str, Any]
) -> dict[str, Any]:
    """The function's result, or what went wrong, for `own_error`."""
    try:
        return function(row)
    except Exception as error:  # whatever it is, the driver tells it
        own = error if isinstance(error, WrpoError) else readable(with_root_cause(error), what)
        return {
            "error": type(own).__name__,
            "message": str(own),
            "trace": traceback.format_exc(),
        }


def own_error(result: dict[str, Any]) -> WrpoError:
    """The error that a result of `guarded` tells of."""
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

    CONNECTION.close(5)
    logging.getLogger("ray").setLevel(logging.CRITICAL + 1)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
    ray.shutdown()
