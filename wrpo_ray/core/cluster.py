"""The Ray cluster: connecting, checking where data lies, ending orphans, mapping over buckets."""

from __future__ import annotations

import asyncio
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
from functools import cached_property
from typing import Any

import psutil

from wrpo_ray import errors
from wrpo_ray.addresses import shown
from wrpo_ray.config import Actors, ClusterConfig
from wrpo_ray.core.cache import LIMIT
from wrpo_ray.core.progress import log
from wrpo_ray.core.records import digest
from wrpo_ray.core.steps import Step
from wrpo_ray.core.storage import TEMPORARY, Folder
from wrpo_ray.core.vllm import with_root_cause
from wrpo_ray.errors import UserError, WrpoError

OUTPUT, SESSION = "WRPO_OUTPUT", "WRPO_SESSION"
"""Environment of every process that works for a run: which output, and which driver."""
MOST_TASKS = 1024
"""Tasks under way at once: more than most clusters have CPUs."""


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
        os.environ |= marks
        with keeping_sigterm():
            ray.init(address="local", num_cpus=cluster.num_cpus, include_dashboard=False, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


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


def map_rows(
    pool: Pool,
    rows: list[dict[str, Any]],
    worker: type,
    arguments: dict[str, Any],
    feed: Feed | None = None,
) -> Iterator[dict[str, Any]]:
    """Map rows across a pool of `worker` actors on Ray Data; results come as they finish.

    Each result has `seconds`: how long the actor took since it started or had its last result;
    and `idle`: for how many of them it had no row.

    A lost actor or node is replaced and its rows are tried again, so a worker has to commit
    its own results and pass over what is committed. With a `feed` the rows are taken from it,
    as many as `rows` has, when they are there.

    Raises:
        WrpoError: as raised by the worker, or one that names the pool and the cause.
    """
    import ray
    from ray.data import ActorPoolStrategy

    least, most = (min(n, len(rows)) for n in (pool.actors.min, pool.actors.max))
    check_room(pool.what, least, "actors", pool.needs)
    if feed:
        dataset = feed.dataset(len(rows))
    else:
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    made = {"what": pool.what, "worker": worker, "arguments": arguments}
    try:
        with _placed(pool) as place:
            kind = _Apart if place else _Guarded
            results = dataset.map(
                type(pool.what, (kind,), {}),  # under the name that dashboards show
                fn_constructor_kwargs=made | place,
                compute=ActorPoolStrategy(
                    min_size=least,
                    max_size=most,
                    max_concurrent_calls_per_actor=pool.threads,
                    max_tasks_in_flight_per_actor=max(2, pool.threads),  # more would be hoarded
                    enable_true_multi_threading=pool.threads > 1,
                ),
                num_cpus=0 if place else pool.actors.num_cpus,
                num_gpus=None if place else pool.actors.num_gpus or None,
                resources=None if place else pool.actors.resources or None,
                runtime_env={"env_vars": pool.env},
            )
            results.set_name(pool.what)
            # Read ahead, as `iter_rows` does, a result would wait for the next one.
            for part in results.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                for result in part.to_pylist():
                    if "error" in result:
                        raise _own_error(result)
                    yield result
    except ray.exceptions.RayError as error:
        raise readable(error, pool.what) from error


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

    task = ray.remote(num_cpus=1)(_guarded).options(name=what)
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
        raise _own_error(result)
    return result


@contextmanager
def _placed(pool: Pool) -> Iterator[dict[str, Any]]:
    """Where actors with parts go: arguments of `_Apart`; none for actors without.

    The placement groups that they make are gone when the block ends, also by an error; Ray
    itself would keep them until the driver ends.
    """
    if pool.parts == 1:
        yield {}
        return
    part = ({"GPU": pool.actors.num_gpus} if pool.actors.num_gpus else {}) | pool.actors.resources
    group = f"{uuid.uuid4().hex}-"
    bundles = [{"CPU": pool.actors.num_cpus}, *[part] * pool.parts]
    try:
        yield {"bundles": bundles, "group": group, "threads": pool.threads}
    finally:
        _free(group)


def _free(group: str) -> None:
    """Remove the placement groups of this name, and wait until their resources are free."""
    from ray.util import get_placement_group, placement_group_table, remove_placement_group

    deadline = time.monotonic() + 60
    while True:
        found = [g for g in placement_group_table().values() if g["name"].startswith(group)]
        left = [g for g in found if g["state"] != "REMOVED"]
        if not left:
            return
        if time.monotonic() > deadline:
            raise WrpoError(f"{len(left)} placement groups could not be removed within 60 s")
        for entry in left:
            with suppress(ValueError):  # removed in the meantime
                remove_placement_group(get_placement_group(entry["name"]))
        time.sleep(0.1)


class Feed:
    """Rows for a pool that follows another one, in the order in which they become ready.

    `steps` are those that are followed; row {"job": i, "bucket": b} says that bucket b of the
    step number i can be read. The rows wait in an actor beside the driver.
    """

    def __init__(self, steps: list[Step]):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

        self._jobs = {step.key: job for job, step in enumerate(steps)}
        here = Affinity(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(_Board).options(
            num_cpus=0, max_concurrency=1000, scheduling_strategy=here
        )
        self._board = board.remote()

    def add(self, step: Step, bucket: int) -> None:
        """Tell that a bucket can be read; steps that nobody follows are passed over."""
        if step.key in self._jobs:
            self._board.add.remote({"job": self._jobs[step.key], "bucket": bucket})

    def dataset(self, count: int) -> Any:
        """A dataset of `count` rows of the feed, each as soon as it is there."""
        import ray

        numbers = ray.data.from_items(list(range(count)), override_num_blocks=count)
        return numbers.map(_next, fn_kwargs={"board": self._board}, num_cpus=0, concurrency=2)


class _Board:
    """An actor: rows by number, for those who wait for them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.changed = asyncio.Condition()

    async def add(self, row: dict[str, Any]) -> None:
        async with self.changed:
            self.rows.append(row)
            self.changed.notify_all()

    async def row(self, number: int) -> dict[str, Any]:
        """The row, when it is there; asked again, the same one."""
        async with self.changed:
            await self.changed.wait_for(lambda: number < len(self.rows))
        return self.rows[number]


def _next(row: dict[str, Any], board: Any) -> dict[str, Any]:
    import ray

    return ray.get(board.row.remote(row["item"]))


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


class _Guarded:
    """A worker whose errors are results: raised, they come wrapped in Ray's, with long traces."""

    def __init__(self, what: str, worker: type, arguments: dict[str, Any]):
        self.what, self.worker, self.arguments = what, worker, arguments
        self._making = threading.Lock()
        self._clock = _Clock()

    @cached_property
    def _made(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return self.worker(**self.arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.work(row)

    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        """The worker's result, or what went wrong."""
        self._clock.begin()
        return _guarded(self.what, self._work, row) | self._clock.end()

    def _work(self, row: dict[str, Any]) -> dict[str, Any]:
        with self._making:
            made = self._made
        return made(row)


class _Clock:
    """How long an actor held its place and how long it waited; threads call at once."""

    def __init__(self) -> None:
        self._lock, self._in_hand, self._idle = threading.Lock(), 0, 0.0
        self._told = self._ended = time.monotonic()

    def begin(self) -> None:
        """A row is taken in hand."""
        with self._lock:
            if not self._in_hand:
                self._idle += time.monotonic() - self._ended
            self._in_hand += 1

    def end(self) -> dict[str, float]:
        """A row is done: `seconds` since the last one was, each told once, `idle` among them."""
        with self._lock:
            self._in_hand -= 1
            self._ended = time.monotonic()
            told = {"seconds": self._ended - self._told, "idle": self._idle}
            self._told, self._idle = self._ended, 0.0
            return told


def _guarded(
    what: str, function: Callable[[dict[str, Any]], dict[str, Any]], row: dict[str, Any]
) -> dict[str, Any]:
    try:
        return function(row)
    except Exception as error:  # whatever it is, the driver tells it
        own = error if isinstance(error, WrpoError) else readable(with_root_cause(error), what)
        return {
            "error": type(own).__name__,
            "message": str(own),
            "trace": traceback.format_exc(),
        }


class _Apart:
    """An actor in place of a worker with parts, which it starts in a placement group.

    vLLM starts its own workers in the group that it finds itself in. The group is there when
    the constructor ends, so no row is given to a worker that has no place yet.
    """

    def __init__(
        self,
        what: str,
        worker: type,
        arguments: dict[str, Any],
        bundles: list[dict[str, float]],
        group: str,
        threads: int,
    ):
        import ray
        from ray.util import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

        place = placement_group(bundles, strategy="PACK", name=f"{group}{uuid.uuid4().hex}")
        while not place.wait(60):
            log(f"{what}: waiting for {len(bundles) - 1} workers' places")
        self.worker = (
            ray.remote(type(what, (_Guarded,), {}))
            .options(
                num_cpus=bundles[0]["CPU"],
                max_concurrency=threads,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=InGroup(place, 0, placement_group_capture_child_tasks=True),
            )
            .remote(what, worker, arguments)
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        return ray.get(self.worker.work.remote(row))


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
