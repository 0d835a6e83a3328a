"""Map rows by Ray tasks, and run calls in threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any

from wrpo_ray.runtime.connection import CONNECTION, ClosedError
from wrpo_ray.runtime.placement import NO_GPU_NODES
from wrpo_ray.runtime.worker_errors import capture_error, restore_error, summarize_error

TICK = 1.0
"""Seconds of one wait for results."""
MAX_TASKS = 1024
"""Tasks submitted at once: more than most clusters have CPUs."""


def map_tasks(
    what: str, rows: Iterator[dict[str, Any]], function: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Map rows by tasks of one CPU each, for work without a model; yield results as they finish.

    Tasks run on all CPUs of the cluster but those of nodes for GPUs. Rows of a lost node are
    retried on others.

    Raises:
        WrpoError: as raised by the function, or one that names `what` and the cause.
    """
    import ray

    task = ray.remote(num_cpus=1, label_selector=NO_GPU_NODES)(capture_error).options(name=what)
    shared = ray.put(function)
    under_way: list[Any] = []
    try:
        for row in rows:
            with CONNECTION.in_use():
                under_way.append(task.remote(what, shared, row))
            if len(under_way) == MAX_TASKS:
                yield _result(under_way)
        while under_way:
            yield _result(under_way)
    except ray.exceptions.RayError as error:
        raise summarize_error(error, what) from error
    finally:
        with suppress(ClosedError), CONNECTION.in_use():  # a closed connection ended them
            for left in under_way:
                ray.cancel(left)


def _result(under_way: list[Any]) -> dict[str, Any]:
    """Wait for one task, remove it from the list, and return its result."""
    import ray

    done: list[Any] = []
    while not done:
        with CONNECTION.in_use():
            done, left = ray.wait(under_way, timeout=TICK)
    under_way[:] = left
    with CONNECTION.in_use():
        result: dict[str, Any] = ray.get(done[0])
    if "error" in result:
        raise restore_error(result)
    return result


def run_in_threads(calls: list[Callable[[], None]], most: int | None = None) -> None:
    """Run each call in a thread, at most `most` at once; raise the first error immediately.

    After an error or Ctrl-C the other calls are not awaited: they end with the connection to Ray.
    """
    threads = ThreadPoolExecutor(min(len(calls), most or len(calls)))
    try:
        for done in as_completed([threads.submit(call) for call in calls]):
            done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
