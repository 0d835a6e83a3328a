"""Runs beside each other, as root, as a plain user and in user namespaces: the same scores.

No run ends what is not its own, none uses more than its limits, and where a run cannot be held
apart, that is an error and not a score.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import user_namespace
from support.waiting import wait_until

from wrpo_ray.config import CodeConfig
from wrpo_ray.errors import UserError
from wrpo_ray.stages.score import sandbox as module
from wrpo_ray.stages.score import sandbox_isolation, sandbox_watch
from wrpo_ray.stages.score.sandbox import Sandbox, SandboxError

SYSTEM = Path("/usr/bin/python3")
PLAIN = 54_321
"""A user id that nobody has."""
ON = pytest.MonkeyPatch
popen = subprocess.Popen
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not SYSTEM.exists(), reason="needs root and a Python for all users"
)
BUBBLEWRAP = shutil.which("bwrap")
METHODS = ["bubblewrap", "own", "limits"]


def _in_user_namespace(users: int) -> Callable[..., Any]:
    helper = [sys.executable, "-I", "-S", user_namespace.__file__, str(users)]
    return lambda command, **more: popen([*helper, *command], **more)


USERS: dict[str, Callable[..., Any]] = {
    "root": popen,
    "plain": lambda command, **more: popen(
        command, user=PLAIN, group=PLAIN, extra_groups=[], **more
    ),
    "namespace": _in_user_namespace(65_536),
    "small-namespace": _in_user_namespace(1),
}
"""How the script of a run is started, by who runs it."""
INSIDE = {"root": 0, "plain": PLAIN, "namespace": 100_000, "small-namespace": 100_000}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """What isolates."""
    if request.param == "bubblewrap" and not BUBBLEWRAP:
        pytest.skip("bubblewrap is not installed")
    return str(request.param)


@pytest.fixture(params=list(USERS))
def user(request: pytest.FixtureRequest, monkeypatch: ON) -> str:
    """Who runs it."""
    monkeypatch.setattr(module.subprocess, "Popen", USERS[request.param])
    return str(request.param)


def sandbox(method: str, **more: Any) -> Sandbox:
    """A sandbox of one method, with a Python that each user can run."""
    isolation = "limits" if method == "limits" else "namespaces"
    return Sandbox(
        CodeConfig(**{"timeout": 50} | more, isolation=isolation),
        str(SYSTEM.resolve()),
        "/usr",
        bubblewrap=BUBBLEWRAP if method == "bubblewrap" else None,
    )


TWO_THREADS = """
import threading
import time
found = []
threads = [threading.Thread(target=found.append, args=[n]) for n in range(2)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
TWO_CHILDREN = """
import os
children = [os.fork() or os._exit(7) for _ in range(2)]
found = sorted(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) - 7 + n for n, c in
    enumerate(children))
"""
LEAVES_ONE = "import os, time\nfound = [0, 1]\nif not os.fork(): os.setsid(); time.sleep(10**6)"
ANSWERS = [TWO_THREADS, TWO_CHILDREN, LEAVES_ONE, "found = [1, 0]"] * 2
TESTS = "assert sorted(found) == [0, 1] and found != [1, 0]"
RIGHT = [True, True, True, False] * 2


@needs_root
def test_alone_and_eight_at_once_everyone_gets_the_same_scores(method: str, user: str) -> None:
    box = sandbox(method)
    if (method, user) == ("limits", "small-namespace"):
        with pytest.raises(SandboxError, match="no user to spare"):
            box.passes(ANSWERS[0], TESTS)
        return
    others = popen(["sleep", "600"], user=INSIDE[user], group=INSIDE[user], extra_groups=[])
    nobody = popen(["sleep", "600"], user=INSIDE[user] and 65_534, extra_groups=[])
    try:
        alone = [box.passes(answer, TESTS) for answer in ANSWERS[:4]]
        with ThreadPoolExecutor(8) as pool:
            at_once = list(pool.map(lambda answer: box.passes(answer, TESTS), ANSWERS))
        assert alone + at_once == RIGHT[:4] + RIGHT
        assert others.poll() is None
        assert nobody.poll() is None
        none_left()
    finally:
        for process in (others, nobody):
            process.kill()
            process.wait()


def none_left() -> None:
    """Check that none of the runs until now is left; those of others on this machine may be."""
    before = left()
    wait_until(lambda: not set(before) & set(left()))


def left() -> list[int]:
    """Processes that run an answer."""
    running = psutil.process_iter(["cmdline"])
    return [p.pid for p in running if "type(sys)" in " ".join(p.info["cmdline"] or ())]


@needs_root
def test_waiting_for_a_core_is_no_slowness(method: str) -> None:
    box = sandbox(method, timeout=2)
    busy = "import time\nwhile time.process_time() < 0.6: pass"
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: box.passes(busy, ""), range(8)))
    box = sandbox(method, timeout=0.5)
    assert box.run("import time\ntime.sleep(600)", "") == (False, "time: more than 0.5 s")
    assert box.run("while True: pass", "")[1] == "time: more than 0.5 s"


def test_a_machine_that_is_too_busy_is_an_error(monkeypatch: ON) -> None:
    waiting = sandbox_watch.Task(0, 1, 1, 0.0, can_run=True)
    monkeypatch.setattr(sandbox_watch, "_descendants", lambda pid: {0: waiting, 1: waiting})
    monkeypatch.setattr(sandbox_watch, "_reap", list)
    monkeypatch.setattr(sandbox_watch, "GIVE_UP", 0.1)
    limits = sandbox_watch.Limits(0.01, 2**50, 10**6)
    process, group = popen(["sleep", "600"]), sandbox_watch.MemoryGroup(limits.memory)
    try:
        for told, match in ((b"", "did not start"), (b"+", "for a core")):
            reached, reach = os.pipe()
            os.write(reach, told)
            with pytest.raises(sandbox_watch.BusyError, match=match):
                sandbox_watch.watch(sandbox_watch.Run(process.pid, 1, reached, None, group), limits)
    finally:
        group.remove()
        process.kill()
        process.wait()


HOLDERS = """
import os, time
def hold():
    held = []
    while len(held) < {each}:
        held.append(bytearray(b"x") * 2**20)
        time.sleep({pause})
    os.write(full, b"x")
    time.sleep(600)
here, full = os.pipe()
for _ in range(4):
    os.fork() or hold()
os.close(full)
said = b""
while len(said) < 4 and (more := os.read(here, 4)):
    said += more
"""


@needs_root
@pytest.mark.parametrize("user", ["root", "plain"], indirect=True)
def test_the_memory_of_all_processes_is_one_limit(method: str, user: str) -> None:
    box = sandbox(method, memory=128)
    peak = Peak()
    with peak:
        assert box.run(HOLDERS.format(each=90, pause=0.02), "")[1].startswith("memory: ")
    assert 100 < peak.mebibytes < 250, "of 360 that it asks for"
    assert box.passes(HOLDERS.format(each=15, pause=0), "assert said == b'xxxx'")
    shared = "import os\nbig = bytearray(b'x') * (60 * 2**20)\n" + HOLDERS.format(each=1, pause=0)
    assert box.passes(shared, "assert said == b'xxxx'"), "pages that five share count once"


@needs_root
@pytest.mark.parametrize("user", ["plain"], indirect=True)
def test_files_in_memory_count(method: str, user: str) -> None:
    if method == "limits":
        pytest.skip("its files are on the disk")
    program = "for n in 'abc':\n    open(n, 'wb').write(bytes(2**24 - 1))\nimport time\n"
    hold = "x = bytearray(b'x') * (40 * 2**20)\ntime.sleep({})"
    box = sandbox(method, memory=80)
    assert box.run(program + hold.format(600), "")[1].startswith("memory: ")
    assert box.run(program + "time.sleep(0.2)", "") == (True, "")


class Peak:
    """Counts the memory of all runs while it is entered, on its own, in MiB."""

    def __enter__(self) -> None:
        self.mebibytes, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._count)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()

    def _count(self) -> None:
        while not self.ended.wait(0.002):
            total = sum(map(_pss, left()))
            self.mebibytes = max(self.mebibytes, total / 1024)


def _pss(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


CALLS = {
    "memfd_create": "if libc.memfd_create(b'x', 0) < 0: raise OSError",
    "memfd": "os.memfd_create('x')",
    "shmget": "if libc.shmget(0, 2**20, 0o1600) < 0: raise OSError",
    "msgget": "if libc.msgget(0, 0o1600) < 0: raise OSError",
    "keys": "if libc.syscall(248, b'user', b'a', b'b', 1, -3) < 0: raise OSError",
    "session": "if libc.syscall(250, 0, -3, 1) < 0: raise OSError",
    "users": "if libc.syscall(250, 0, -4, 1) < 0: raise OSError",
    "vsock": "socket.socket(40, socket.SOCK_STREAM)",
    "crypto": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "ptrace": "if libc.ptrace(0, 0, 0, 0) < 0: raise OSError",
    "namespace": "if libc.unshare(0x10000000) < 0: raise OSError",
    "clone": "if libc.syscall(56, 0x10000011, 0, 0, 0, 0) < 0: raise OSError",
    "clone3": "if libc.syscall(435, bytes(64), 64) < 0 and ctypes.get_errno() == 38: raise OSError",
    "io_uring": "if libc.syscall(425, 1, bytes(120)) < 0: raise OSError",
    "x32": "if libc.syscall(0x40000000 + 39) < 0: raise OSError",
    "everyone": "os.kill(-1, 0)",
}


@needs_root
@pytest.mark.parametrize("user", ["root", "plain"], indirect=True)
def test_system_calls_that_reach_out_are_denied(method: str, user: str) -> None:
    box = sandbox(method)
    attempts = "\n".join(
        f"try:\n    {call}\n    done.append({name!r})\nexcept OSError:\n    pass"
        for name, call in CALLS.items()
    )
    program = "import ctypes, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\ndone = []\n"
    assert box.run(program + attempts, "assert done == [], done") == (True, "")
    others = "import socket, subprocess\npair = socket.socketpair()\nx = socket.socket()\n"
    more = "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()"
    assert box.passes(others + more, "assert subprocess.call(['/usr/bin/python3', '-c', '']) == 0")


def test_a_run_has_a_keyring_of_its_own() -> None:
    """Asked of the kernel in the script's place, since the filter lets no program ask."""
    syscall = sandbox_isolation.libc.syscall
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from wrpo_ray.stages.score import sandbox_isolation as i\n"
        "before = i.libc.syscall(250, 0, -3, 1)\ni.leave_keyring()\n"
        "print(before, i.libc.syscall(250, 0, -3, 1))"
    )
    ours = syscall(250, 0, ctypes.c_long(-3), 1)
    if ours < 0:
        pytest.skip("no keyrings here")
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        code,
        str(sandbox("own").package),
    ]
    before, after = map(int, subprocess.check_output(command).split())
    assert before == ours != after > 0


@needs_root
@pytest.mark.parametrize("user", ["plain"], indirect=True)
def test_what_flees_by_forking_is_caught(method: str, user: str) -> None:
    """Each process forks the next and ends, so that a look at /proc finds it gone."""
    flee = "import os\nif not os.fork():\n  for _ in range(50_000):\n    if os.fork(): os._exit(0)"
    assert sandbox(method).passes(flee, "assert True")
    for _ in range(20):  # each look may miss it
        assert not [pid for pid in left() if _user_of(pid) == PLAIN]


def _user_of(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def test_processes_beyond_the_limit_end_a_run_that_the_kernel_does_not_count(
    monkeypatch: ON,
) -> None:
    box = sandbox("limits")
    if os.geteuid() == 0:
        monkeypatch.setattr(module.subprocess, "Popen", USERS["plain"])
    many = "import os, time\nfor _ in range(8):\n    os.fork() or time.sleep(600)\ntime.sleep(600)"
    assert box.run(many, "") == (False, "processes: 9, more than 8")
    orphans = many.replace("os.fork() or", "os.fork() or os.fork() or")
    assert box.run(orphans, "")[1].startswith("processes: ")
    ended = (
        "import os, time\nfor _ in range(12):\n    child = os.fork()\n"
        "    if not child: os.fork(); os._exit(0)\n    os.waitpid(child, 0)\ntime.sleep(0.2)"
    )
    assert box.run(ended, "") == (True, ""), "orphans that ended count no more"


def test_secrets_and_limits_do_not_go_together(monkeypatch: ON) -> None:
    for name in filter(module.SECRET_NAME.search, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    with pytest.raises(UserError, match="OPENAI_API_KEY in this process's environment"):
        sandbox("limits").checked()
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(UserError, match="cannot sandbox"):
        Sandbox(CodeConfig(isolation="limits"), python="/bin/false").checked()


@pytest.mark.parametrize("program", ["/bin/false", "/bin/true", "/nonexistent"])
def test_without_a_bubblewrap_that_works_the_namespaces_are_ours(program: str) -> None:
    box = Sandbox(CodeConfig(), bubblewrap=program)
    with pytest.raises(SandboxError):
        box.passes("x = 1", "assert x")
    assert box.checked().bubblewrap is None


def test_a_user_is_reserved_while_its_run_lasts() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    user = sandbox_isolation.own_user()
    assert user is not None
    assert user > 2**30
    assert not sandbox_isolation._reserve(user)
    sandbox_isolation._reserved.pop().close()
    assert sandbox_isolation._reserve(user)
    sandbox_isolation._reserved.pop().close()
