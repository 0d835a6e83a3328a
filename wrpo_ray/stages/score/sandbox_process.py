"""Script that sandboxes one untrusted program, runs its tests, and exits with the result.

`sandbox` starts it for each answer, with a marshalled task on stdin; it imports little, so that it
starts fast. It starts the program in namespaces, by bubblewrap or by a supervisor of its own that
is process 1 of them; when that process ends, the kernel kills every process that the program left.
The program runs as another user, in an empty root folder with Python and the system's libraries,
read only, and a small `/tmp` in memory. The script watches it and kills it at its limits.

The exit code is PASSED, NOT_PASSED, BAD_TESTS or FAILED; stderr has the reason of all but PASSED,
where there is one.
"""

import fcntl
import marshal
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from wrpo_ray.stages.score import sandbox_isolation as isolation
from wrpo_ray.stages.score.sandbox_watch import Limits, MemoryGroup, Run, end_all, watch

PASSED, NOT_PASSED, BAD_TESTS, FAILED = 10, 11, 12, 13  # not 0, 1, 2: exit codes of a broken Python

PROCESSES, FILES, FILE_BYTES = 8, 64, 2**24
SPEC, TOKEN = 3, 4
"""The program's file descriptors: the code to run, and the pipe to say how far it came."""
STARTED = b"+"
COUNTED_BY_NAMESPACE = 5, 14
"""The Linux that counts a user's processes in each user namespace by itself."""

RUNNER = f"""
def main():
    import builtins, marshal, os, sys
    os.write({TOKEN}, {STARTED!r})
    os.dup2(1, 2)
    with open({SPEC}, "rb") as spec:
        program, tests, token = marshal.load(spec)
    tests = compile(tests, "tests", "exec")
    answer = sys.modules["answer"] = type(sys)("answer")
    names, run, finish, ends = vars(answer), exec, os.write, (sys.settrace, sys.setprofile)
    own = dict(vars(builtins))
    run(compile(program, "answer", "exec"), names)
    for end in ends:
        end(None)
    names["__builtins__"] = builtins
    vars(builtins).update(own)
    run(tests, names)
    finish({TOKEN}, token)
main()
"""
"""The code of the program's process. Its first word tells that the sandbox works. Only a run that
reaches its end writes the token. Builtins that the answer changed are restored before the tests."""


def main() -> int:
    """Run the program that stdin describes and return the exit code."""
    task = marshal.load(sys.stdin.buffer)  # nosec B302 # of the process that started this one
    try:
        compile(task["tests"], "tests", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return _exit_code(BAD_TESTS, error)
    try:
        is_passed, reason = _run(task)
    except OSError as error:
        return _exit_code(FAILED, error)
    return PASSED if is_passed else _exit_code(NOT_PASSED, reason)


def _exit_code(code: int, reason: object) -> int:
    print(reason, file=sys.stderr)
    return code


def _run(task: dict[str, Any]) -> tuple[bool, str]:
    """Whether the tests run to their end within the limits; which limit was exceeded, if one was.

    Raises:
        OSError: the sandbox could not be set up, or could not hold the run apart from others.
    """
    group = MemoryGroup(task["memory"])
    try:
        return _run_in(group, task)
    finally:
        group.remove()


def _run_in(group: MemoryGroup, task: dict[str, Any]) -> tuple[bool, str]:
    token, user = os.urandom(16), isolation.own_user()
    if user is None and os.geteuid() == 0 and not task["isolated"]:
        raise OSError("this user namespace has no user to spare for the run")
    isolation.adopt_orphans()
    isolation.leave_keyring()
    if task["isolated"]:
        spaces = isolation.OWN_MOUNTS if task["bubblewrap"] else isolation.ALL
        isolation.enter_namespaces(task["root"], user, spaces)
    reached, reach = os.pipe()
    errors = os.memfd_create("errors")
    spec = os.memfd_create("spec")
    os.write(spec, marshal.dumps((task["program"], task["tests"], token)))
    os.lseek(spec, 0, os.SEEK_SET)
    nothing = os.open(os.devnull, os.O_RDWR)
    fds = [nothing, nothing, errors, spec, reach]
    first = os.fork()
    if first == 0:
        os.setpgid(0, 0)
        _call_and_exit(lambda: _start(group, task, user, fds), errors)
    os.close(reach)
    own = 1 + ((2 if task["bubblewrap"] else 1) if task["isolated"] else 0)
    limits = Limits(task["timeout"], task["memory"], PROCESSES)
    disk = f"{task['root']}/tmp" if task["isolated"] else None  # nosec B108
    try:
        reason = watch(Run(first, own, reached, disk, group), limits)
    finally:
        end_all()
    os.set_blocking(reached, False)
    told = os.read(reached, len(STARTED + token))
    if not told.startswith(STARTED):
        error = os.pread(errors, 4096, 0).decode(errors="replace")
        raise OSError(error or f"the program's Python did not start; {reason}")
    return told == STARTED + token and not reason, reason


# --- the first process of the run --------------------------------------------------------------


def _start(group: MemoryGroup, task: dict[str, Any], user: int | None, fds: list[int]) -> None:
    """Become the program, or start it and wait for its end."""
    group.enter()
    if task["bubblewrap"]:
        _become_bubblewrap(task, user, fds)
    if task["isolated"]:
        isolation.build_root(task["root"], task["python"], task["prefix"])
    else:
        os.chdir(task["root"])
    if user is not None:
        isolation.become(user)
    isolation.die_with_parent()
    if not task["isolated"]:
        _become_program(task, user, fds)
    program = os.fork()
    if program == 0:
        _call_and_exit(lambda: _become_program(task, user, fds), fds[2])
    while os.wait()[0] != program:
        pass  # reap an orphan of the program


def _become_program(task: dict[str, Any], user: int | None, fds: list[int]) -> NoReturn:
    _keep(fds)
    _limit(task)
    if most := _most_processes(task, user):
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    isolation.filter_calls()
    os.execve(task["python"], [task["python"], "-I", "-S", "-c", RUNNER], {})


def _become_bubblewrap(task: dict[str, Any], user: int | None, fds: list[int]) -> NoReturn:
    calls = os.memfd_create("calls")
    os.write(calls, isolation.call_filter())
    os.lseek(calls, 0, os.SEEK_SET)
    _keep([*fds, calls])
    _limit(task)
    command = isolation.bubblewrap(task, user, len(fds))
    prepare = "import os, resource\nos.environ.clear()\n"
    if user is not None:
        prepare += f"os.setgroups([]); os.setresgid(*[{user}] * 3); os.setresuid(*[{user}] * 3)\n"
    if most := _most_processes(task, user):
        prepare += f"resource.setrlimit(resource.RLIMIT_NPROC, ({most}, {most}))\n"
    os.execve(command[0], [*command, task["python"], "-I", "-S", "-c", prepare + RUNNER], {})


def _keep(fds: list[int]) -> None:
    """Number these descriptors from 0; all others close when the program starts."""
    apart = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FILES) for fd in fds]
    for number, fd in enumerate(apart):
        os.dup2(fd, number)


def _limit(task: dict[str, Any]) -> None:
    for name, limit in {
        resource.RLIMIT_CPU: int(task["timeout"]) + 1,
        resource.RLIMIT_AS: task["memory"],
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(name, (limit, limit))


def _most_processes(task: dict[str, Any], user: int | None) -> int | None:
    """The kernel's limit for the run; None where it would count processes that are not the run's.

    The sandbox's own process is counted too. The watch holds the limit everywhere.
    """
    version = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    is_counted_apart = task["isolated"] and version >= COUNTED_BY_NAMESPACE
    return PROCESSES + task["isolated"] if user is not None or is_counted_apart else None


def _call_and_exit(what: Callable[[], None], errors: int) -> NoReturn:
    """Call it and exit this process; an error is written to file `errors`."""
    try:
        what()
    except BaseException as error:  # nothing may leave this process
        os.write(errors, f"{type(error).__name__}: {error}".encode()[:4096])
    os._exit(0)
