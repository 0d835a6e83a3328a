"""Mapping rows by Ray tasks, and calls that run side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from wrpo_ray.runtime.worker_errors import capture_error, restore_error, summarize_error

MAX_TASKS = 1024
"""Tasks under way at once: more than most clusters have CPUs."""


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

    task = ray.remote(num_cpus=1)(capture_error).options(name=what)
    shared = ray.put(function)
    under_way: list[Any] = []
    try:
        for row in rows:
            under_way.append(task.remote(what, shared, row))
            if len(under_way) == MAX_TASKS:
                yield _result(under_way)
        while under_way:
            yield _result(under_way)
    except ray.exceptions.RayError as error:
        raise summarize_error(error, what) from error
    finally:
        for left in under_way:
            ray.cancel(left)


def _result(under_way: list[Any]) -> dict[str, Any]:
    """The result of a task that has finished, which is taken from the list."""
    import ray

    (done,), under_way[:] = ray.wait(under_way)
    result = ray.get(done)
    if "error" in result:
        raise restore_error(result)
    return result


def run_in_threads(calls: list[Callable[[], None]], most: int | None = None) -> None:
    """Make each call in a thread, `most` at once; the first error is raised at once.

    After it, or after Ctrl-C, nobody waits for the others: they end with the connection to Ray.
    """
    threads = ThreadPoolExecutor(min(len(calls), most or len(calls)))
    try:
        for done in as_completed([threads.submit(call) for call in calls]):
            done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
