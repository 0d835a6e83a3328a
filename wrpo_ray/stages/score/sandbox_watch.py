"""Watch an untrusted program with all that it started: memory, processes, time; and end it all.

`sandbox_process` calls this; it imports little, so that it starts fast.
"""

import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Iterable
from typing import NamedTuple

PAGE, TICKS = resource.getpagesize(), os.sysconf("SC_CLK_TCK")
SHORTEST_TICK, FIRST_TICK, LONGEST_TICK, GROWTH = 0.001, 0.01, 0.05, 2**32
"""Seconds between two looks, and the bytes a second by which a program may be feared to grow."""
PATIENCE = 20
"""A run that waited for a core is given up after so many times its limit."""
GIVE_UP = 10.0
"""Seconds in which what is left of a run has to be ended."""


class BusyError(OSError):
    """The machine is too busy to tell whether the program is too slow."""


class Task(NamedTuple):
    """A process, as /proc shows it."""

    parent: int
    threads: int
    """None if it has ended and is not waited for yet."""
    pages: int
    """Resident pages, shared ones in full."""
    cpu: float
    """Seconds of CPU of it, and of its children that it waited for."""
    can_run: bool
    """Whether one of its threads runs, or waits for a core."""


class Clock:
    """The seconds that a program has spent: those of CPU, and those in which none of it could run.

    So waiting for a core does not count.
    """

    def __init__(self) -> None:
        self.last, self.could_run, self.could_not, self.cpu = time.monotonic(), 0.0, 0.0, 0.0

    def look(self, program: "dict[int, Task]") -> None:
        """Count the time since the last look, as what the program is about now."""
        now = time.monotonic()
        if any(task.can_run for task in program.values()):
            self.could_run += now - self.last
        else:
            self.could_not += now - self.last
        self.cpu = max(self.cpu, sum(task.cpu for task in program.values()))
        self.last = now

    @property
    def passed(self) -> float:
        """All seconds."""
        return self.could_run + self.could_not

    @property
    def spent(self) -> float:
        """Seconds that count."""
        return self.could_not + min(self.could_run, self.cpu)


class Limits(NamedTuple):
    """Limits of a program, together with all that it started."""

    seconds: float
    memory: int
    processes: int
    """Processes and threads."""


# --- a cgroup --------------------------------------------------------------------------------


class MemoryGroup:
    """A cgroup that bounds the memory of a run exactly, where this process may make one."""

    def __init__(self, memory: int):
        self.path: str | None = None
        self.events = ""
        for parent, events, limits in _parents(memory):
            path = f"{parent}/wrpo-sandbox-{os.getpid()}"
            try:
                os.mkdir(path)
            except OSError:
                continue
            try:
                for name, value in limits.items():
                    _write(f"{path}/{name}", value)
            except OSError:  # no memory controller
                os.rmdir(path)
                continue
            self.path, self.events = path, f"{path}/{events}"
            return

    def enter(self) -> None:
        """Put this process, and all that it will start, into the group."""
        if self.path:
            _write(f"{self.path}/cgroup.procs", "0")

    def has_killed(self) -> bool:
        """Whether the kernel killed a process of the group for its memory."""
        if not self.path:
            return False
        with open(self.events) as lines:
            return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in lines)

    def remove(self) -> None:
        """Remove the group, once its processes have ended; the kernel may take a moment more."""
        give_up = time.monotonic() + GIVE_UP
        while self.path:
            try:
                os.rmdir(self.path)
                self.path = None
            except OSError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.001)


def _parents(memory: int) -> list[tuple[str, str, dict[str, str]]]:
    """The folders of this process's cgroups, versions 1 and 2, their counts, and their limits."""
    found = []
    with open("/proc/self/cgroup") as lines:
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == "memory":
                limits = {"memory.limit_in_bytes": str(memory)}
                found.append((f"/sys/fs/cgroup/memory{path}", "memory.oom_control", limits))
            elif not controllers:  # only beside its own may be a group with processes
                limits = {"memory.max": str(memory), "memory.swap.max": "0"}
                parent = os.path.dirname(f"/sys/fs/cgroup{path}")
                found.append((parent, "memory.events", limits))
    return found


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# --- the watch -------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run to watch."""

    first: int
    """Its first process, a child of this one."""
    own: int
    """How many processes, from this one downwards, are the sandbox's; the others, the program's."""
    reached: int
    """The pipe in which the program's Python says that it has started."""
    disk: str | None
    """The program's folder, if it is in memory."""
    group: MemoryGroup


def watch(run: Run, limits: Limits) -> str:
    """Wait until the run ends or exceeds a limit; return which.

    Time begins when the program's Python has started, and is that in which the program ran or
    slept, not that in which it waited for a core.

    Raises:
        BusyError: it did not start, or waited for a core almost all the time.
    """
    ended, started = select.poll(), select.poll()
    ended.register(os.pidfd_open(run.first), select.POLLIN)
    started.register(run.reached, select.POLLIN)
    clock, has_started, pause = Clock(), False, FIRST_TICK
    while not ended.poll(pause * 1000):
        tasks = _descendants(os.getpid())  # with orphans, which this process adopts
        _reap(pid for pid in tasks if pid != run.first and tasks[pid].parent == os.getpid())
        program = {pid: tasks[pid] for pid in list(tasks)[run.own :]}
        if not has_started and started.poll(0):
            clock, has_started = Clock(), True
        clock.look(program)
        if has_started and clock.spent > limits.seconds:
            return f"time: more than {limits.seconds:g} s"
        if clock.passed > limits.seconds * PATIENCE + GIVE_UP:
            what = "the program waited for a core" if has_started else "Python did not start"
            raise BusyError(f"{what}: run fewer programs at a time")
        used = _used(program, limits, run.disk)
        if used > limits.memory or run.group.has_killed():
            return f"memory: {used >> 20} MiB of {limits.memory >> 20}"
        threads = sum(task.threads for task in program.values())
        if threads > limits.processes:
            return f"processes: {threads}, more than {limits.processes}"
        pause = min(max(SHORTEST_TICK, (limits.memory - used) / GROWTH), LONGEST_TICK)
    return f"memory: {limits.memory >> 20} MiB" if run.group.has_killed() else ""


def _used(program: dict[int, Task], limits: Limits, disk: str | None) -> int:
    """Bytes of the program's processes and files; more only where that is within the limit."""
    files = _bytes_of(disk) if disk else 0
    used = files + sum(task.pages for task in program.values()) * PAGE
    if used > limits.memory:  # what is shared was counted several times
        used = files + sum(_proportional(pid, task) for pid, task in program.items())
    return used


def _descendants(first: int) -> dict[int, Task]:
    """The process and its descendants, parents before children."""
    children: dict[int, list[int]] = {}
    tasks = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (fields := _fields(f"/proc/{name}/stat")):
            tasks[int(name)] = fields
            children.setdefault(int(fields[1]), []).append(int(name))
    found = [first] if first in tasks else []
    for pid in found:
        found += children.get(pid, ())
    return {pid: _task(pid, tasks[pid]) for pid in found}


def _fields(path: str) -> list[bytes]:
    """The fields of a process or thread from its state on; none if it has ended."""
    try:
        with open(path, "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def _task(pid: int, fields: list[bytes]) -> Task:
    threads, can_run = int(fields[17]), fields[0] == b"R"
    if fields[0] == b"Z":
        threads = 0
    elif threads > 1 and not can_run:
        with contextlib.suppress(OSError):
            names = os.listdir(f"/proc/{pid}/task")
            can_run = any(_fields(f"/proc/{pid}/task/{n}/stat")[:1] == [b"R"] for n in names)
    cpu = sum(map(int, fields[11:15])) / TICKS
    return Task(int(fields[1]), threads, int(fields[21]), cpu, can_run)


def _reap(children: Iterable[int]) -> None:
    for pid in children:
        os.waitpid(pid, os.WNOHANG)


def _bytes_of(disk: str) -> int:
    """Bytes in a folder that is a file system."""
    stat = os.statvfs(disk)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


def _proportional(pid: int, task: Task) -> int:
    """Bytes of a process; each of those that n processes share counts as 1/n."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            lines = dict(line.split(":", 1) for line in file.readlines()[1:])
        return (int(lines["Pss"].split()[0]) + int(lines["SwapPss"].split()[0])) * 1024
    except PermissionError:
        return task.pages * PAGE
    except (OSError, KeyError):  # it has ended
        return 0


# --- the end ---------------------------------------------------------------------------------


def end_all() -> None:
    """Kill all children of this process, which adopts their orphans, until none is left.

    A child that is not waited for yet keeps its id, so no other process is ever hit.

    Raises:
        OSError: they start new ones faster than this ends them.
    """
    give_up = time.monotonic() + GIVE_UP
    while time.monotonic() < give_up:
        for pid, task in _descendants(os.getpid()).items():
            if task.parent == os.getpid():
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)
    raise OSError("what the program started could not be ended")
