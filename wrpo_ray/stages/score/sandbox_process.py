"""Script that sandboxes one untrusted program, runs its tests, and exits with the result.

`sandbox` starts it as `python -I -S sandbox_process.py` for each answer, with a marshalled task on
stdin; it imports little, so that it starts fast.
It starts a supervisor, process 1 of its own namespaces, which starts the program. When the
supervisor exits, the kernel kills every process that the program left. The program runs as another
user, in an empty root folder with Python and the system's libraries, read only, and a small `/tmp`
in memory.

The exit code is PASSED, NOT_PASSED, BAD_TESTS or FAILED; the last two write the reason to stderr.
"""

import ctypes
import fcntl
import marshal
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

PASSED, NOT_PASSED, BAD_TESTS, FAILED = 10, 11, 12, 13  # not 0, 1, 2: exit codes of a broken Python

PROCESSES, FILES, FILE_BYTES, DISK = 8, 64, 2**24, "size=64m,nr_inodes=4096"
NOBODY = 65534
FIRST_USER = 2_000_000_000
"""Users from here on own no files; each run has its own, so that limits per user are per run."""
SPEC, TOKEN = 3, 4
"""The program's file descriptors: the code to run, and the pipe for the completion token."""

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE, RELATIME = (
    0x1, 0x2, 0x4, 0x20, 0x1000, 0x4000, 0x40000, 0x200000,
)  # fmt: skip
SET_PDEATHSIG, SET_NO_NEW_PRIVS = 1, 38

RUNNER = f"""
def main():
    import builtins, marshal, os, sys
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
"""The code of the program's process. Only a run that reaches its end writes the token; one that
exits early does not. Builtins that the answer changed are restored before the tests."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Run the program that stdin describes and return the exit code."""
    task = marshal.load(sys.stdin.buffer)  # nosec B302 # of the process that started this one
    try:
        compile(task["tests"], "tests", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return _exit_code(BAD_TESTS, error)
    try:
        return PASSED if _passes(task) else NOT_PASSED
    except OSError as error:
        return _exit_code(FAILED, error)


def _exit_code(code: int, error: Exception) -> int:
    print(error, file=sys.stderr)
    return code


def _passes(task: dict[str, Any]) -> bool:
    """Whether the tests run to their end in time.

    Raises:
        OSError: the sandbox could not be set up.
    """
    token = os.urandom(16)
    user = _other_user()
    if task["isolated"]:
        _enter_namespaces(task, user)
    finished, finish = os.pipe()
    failed, failures = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        os.setpgid(0, 0)
        _call_and_exit(lambda: _supervise(task, user, token, finish, failures), failures)
    for end in (finish, failures):
        os.close(end)
    try:
        _wait_until_exit(supervisor, task["timeout"])
    finally:
        _kill_all(supervisor, user, task["isolated"])
    if reason := os.read(failed, 4096):
        raise OSError(reason.decode())
    os.set_blocking(finished, False)
    try:
        return os.read(finished, len(token)) == token
    except BlockingIOError:  # a process that escaped still holds the other end
        return False


def _wait_until_exit(supervisor: int, seconds: float) -> None:
    watch = select.poll()
    watch.register(os.pidfd_open(supervisor), select.POLLIN)
    watch.poll(seconds * 1000)


def _kill_all(supervisor: int, user: int | None, isolated: bool) -> None:
    """Kill the supervisor and its namespaces; without those, its process group and its user's."""
    os.killpg(supervisor, signal.SIGKILL)  # it waits to be reaped, so the id is its own
    os.waitpid(supervisor, 0)
    if isolated or user is None:
        return
    killer = os.fork()
    if killer == 0:
        _become(user)
        os.kill(-1, signal.SIGKILL)  # all processes of this user, which are the run's
        os._exit(0)
    os.waitpid(killer, 0)


# --- the supervisor --------------------------------------------------------------------------


def _supervise(
    task: dict[str, Any], user: int | None, token: bytes, finish: int, failures: int
) -> None:
    """Isolate this process, start the program, and exit with it."""
    task["nothing"] = os.open(os.devnull, os.O_RDWR)
    if task["isolated"]:
        _build_root(task["root"], task["python"], task["prefix"])
        os.chroot(task["root"])
    os.chdir("/tmp" if task["isolated"] else task["root"])  # nosec B108 # the sandbox's own
    if user is not None:
        _become(user)
    _check(libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")  # with the script
    _check(libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    program = os.fork()
    if program == 0:
        _call_and_exit(lambda: _become_program(task, token, finish), failures)
    os.close(failures)
    while os.wait()[0] != program:
        pass  # reap an orphan of the program


def _become_program(task: dict[str, Any], token: bytes, finish: int) -> NoReturn:
    spec = os.memfd_create("spec")
    os.write(spec, marshal.dumps((task["program"], task["tests"], token)))
    os.lseek(spec, 0, os.SEEK_SET)
    given = [task["nothing"]] * 3 + [spec, finish]
    apart = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FILES) for fd in given]
    for number, fd in enumerate(apart):
        os.dup2(fd, number)
    for name, limit in {
        resource.RLIMIT_CPU: int(task["timeout"]) + 1,
        resource.RLIMIT_AS: task["memory"],
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(name, (limit, limit))
    # its arguments are constants
    os.execve(task["python"], [task["python"], "-I", "-S", "-c", RUNNER], {})  # nosec B606


def _call_and_exit(what: Callable[[], None], failures: int) -> NoReturn:
    """Call it and exit this process; an error is written to `failures`, which an exec closes."""
    try:
        what()
    except BaseException as error:  # nothing may leave this process
        os.write(failures, f"{type(error).__name__}: {error}".encode()[:4096])
    os._exit(0)


# --- isolation -------------------------------------------------------------------------------


def _other_user() -> int | None:
    """Return a user id for this run alone, if this is root; else None."""
    return FIRST_USER + os.getpid() if os.geteuid() == 0 else None


def _become(user: int) -> None:
    os.setgroups([])
    try:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:  # a container that knows fewer users
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _enter_namespaces(task: dict[str, Any], user: int | None) -> None:
    """Leave the machine's network, mounts and, for children, its processes."""
    outside = os.geteuid(), os.getegid()
    spaces = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    _check(libc.unshare(spaces | (NEWUSER if user is None else 0)), "unshare")
    if user is None:  # in a user namespace it may do what follows, as the user that it was
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {outside[0]} 1"),
            ("gid_map", f"{NOBODY} {outside[1]} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def _build_root(root: str, python: str, prefix: str) -> None:
    """Mount a folder in memory at `root`, and in it what Python needs, read only."""
    _mount(None, "/", None, REC | PRIVATE)
    _mount("tmpfs", root, "tmpfs", NOSUID | NODEV, f"{DISK},mode=755")
    done: list[str] = []
    for path in (prefix, os.path.dirname(python), "/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        if os.path.lexists(path) and not any(path.startswith(f"{d}/") or path == d for d in done):
            _bind(root, path)
            done.append(path)
    for file in ("/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"):
        if os.path.exists(file):
            _bind(root, file)
    os.mkdir(f"{root}/tmp")  # nosec B108 # the sandbox's own
    os.chmod(f"{root}/tmp", 0o1777)  # nosec B103, B108 # the sandbox's own


def _bind(root: str, path: str) -> None:
    """Make a folder, file or link of the machine visible under `root`, read only."""
    there = root + path
    os.makedirs(os.path.dirname(there), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), there)
        return
    if os.path.isdir(path):
        os.mkdir(there)
    else:
        open(there, "x").close()
    _mount(path, there, None, BIND | REC)
    if not path.startswith("/dev/"):
        # Flags that the mount has may not be taken from it in a user namespace.
        kept = os.statvfs(there).f_flag & 0xF
        _mount(None, there, None, BIND | REMOUNT | RDONLY | RELATIME | NOSUID | NODEV | kept)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    names = [name.encode() if name else None for name in (source, target, kind, data)]
    _check(libc.mount(*names[:3], ctypes.c_ulong(flags), names[3]), f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main())
