"""Programs that nobody has read, run with their tests: good ones, wrong ones and hostile ones."""

import functools
import os
import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.waiting import wait_until

from wrpo_ray.config import CodeConfig
from wrpo_ray.errors import UserError
from wrpo_ray.stages.score import sandbox as module
from wrpo_ray.stages.score.sandbox import BadTestsError, Sandbox, SandboxError

BOX = Sandbox(CodeConfig(timeout=50))
OWN = replace(BOX, bubblewrap=None)
QUICK = Sandbox(CodeConfig(timeout=0.5))
SYSTEM = Path("/usr/bin/python3")


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> None:
    try:
        BOX.checked()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("program", "tests", "passes"),
    [
        ("def add(a, b):\n    return a + b", "assert add(1, 2) == 3", True),
        ("def add(a, b):\n    return a - b", "assert add(1, 2) == 3", False),
        ("def add(a, b) return a", "assert add(1, 2) == 3", False),
        ("def odd(n): return n > 0 and even(n - 1)\ndef even(n): return n == 0 or odd(n - 1)",
         "def check(f):\n    assert f(7) and not f(8)\ncheck(odd)", True),
        ("import collections, decimal, json, math, re, ssl, sqlite3\nx = math.comb(5, 2)",
         "assert x == 10", True),
        ("import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int",
         "assert P(1).x == 1", True),
        ("x = 1\nif __name__ == '__main__':\n    x = int(input())", "assert x == 1", True),
        ("print('n' * 1000)\nx = 'ß\\ud800'", "assert x[0] == 'ß'", True),
        ("open('notes', 'w').write('a')", "assert open('notes').read() == 'a'", True),
        ("x = 1", "assert y == 1", False),
    ],
)  # fmt: skip
def test_a_program_passes_when_its_tests_come_to_their_end(program, tests, passes):
    assert BOX.passes(program, tests) is passes


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "def f():\n    raise SystemExit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
        "import os\nos.write(4, b'0' * 16)",
        "import os\nos.close(4)",
        "raise KeyboardInterrupt",
        "import builtins\nbuiltins.AssertionError = None\nbuiltins.exec = lambda *a: None",
        "import os\nos.write = os.read = print\n__builtins__ = {}",
        "import sys\ndef skip(frame, event, arg):\n    frame.f_lineno += 1\n    return skip\n"
        "sys.settrace(skip)\n"
        "while sys._getframe(0).f_back:\n    sys._getframe(0).f_back.f_trace = skip\n    break",
        "import builtins\nbuiltins.__build_class__ = builtins.__import__ = builtins.abs = id",
        "import sys, types\nsys.modules['answer'] = sys.modules['os'] = types.ModuleType('x')",
        "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()\n"
        "import time\ntime.sleep(0.2)",
    ],
)
def test_what_ends_before_the_tests_do_has_not_passed(program):
    tests = "import os\nfor n in range(3):\n    abs(n)\nassert f() == 1\n"
    assert not BOX.passes(program, tests)


@pytest.mark.parametrize(
    "program",
    [
        "import builtins\nbuiltins.len = builtins.abs = lambda x: 3",
        "import builtins\ndel builtins.sorted\n__builtins__ = {'sorted': None}",
    ],
)
def test_what_an_answer_did_to_builtins_is_undone_before_the_tests(program):
    assert BOX.passes(program, "assert sorted([2, 1]) == [1, 2] and len('ab') == 2")


HOSTILE = {
    "memory": "x = bytearray(10**9)",
    "recursion": "def f():\n    return f()\nf()",
    "file": "with open('big', 'wb') as big:\n    big.write(bytes(2**24 + 1))",
    "disk": "for n in 'abcdef':\n    with open(n, 'wb') as big:\n        big.write(bytes(2**24))",
    "inodes": "for n in range(5000):\n    open(str(n), 'w').close()",
    "elsewhere": "open('/usr/lib/x', 'w')",
    "python": "import os\nopen(os.__file__, 'a')",
    "files": "import os\nos.listdir('/home')",
    "passwords": "open('/etc/passwd')",
    "processes": "import os\nos.listdir('/proc')",
    "outside": "import os\nos.chroot('.')",
    "spaces": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000):\n    raise OSError",
    "user": "import os\nos.setuid(0)",
    "forks": "import os, time\nfor _ in range(9):\n    os.fork() or time.sleep(9)",
    "threads": "import threading, time\n"
    "for _ in range(9):\n    threading.Thread(target=time.sleep, args=[9], daemon=True).start()",
}


@pytest.mark.parametrize("box", [BOX, OWN], ids=["default", "own"])
@pytest.mark.parametrize("program", HOSTILE.values(), ids=list(HOSTILE))
def test_what_a_program_may_not_do_fails_in_it(box, program):
    assert not box.passes(f"{program}\ndone = True", "assert done")
    caught = f"try:\n    exec({program!r})\nexcept BaseException:\n    done = True"
    assert box.passes(caught, "assert done")


@pytest.mark.parametrize("bubblewrap", [True, False], ids=["default", "own"])
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "import os\nos.setsid()\nif os.fork() == 0:\n    os.setsid()\nwhile True: pass",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass",
        "import os\nwhile True:\n    os.write(4, b'x' * 4096)",
    ],
)
def test_a_program_is_ended_with_all_that_it_started(program, bubblewrap):
    box = QUICK if bubblewrap else replace(QUICK, bubblewrap=None)
    assert not box.passes(program, "assert False")
    none_left()


def none_left() -> None:
    """Check that none of the runs until now is left; those of others on this machine may be."""
    before = left()
    wait_until(lambda: not set(before) & set(left()))


def left() -> list[int]:
    """Processes that escaped the sandbox and still run."""
    return [
        p.pid
        for p in psutil.process_iter(["cmdline", "status"])
        if "type(sys)" in " ".join(p.info["cmdline"] or ()) and p.info["status"] != "zombie"
    ]


def test_what_was_left_in_the_background_ends_with_the_program():
    assert BOX.passes("import os, time\nx = os.fork()\nif not x: time.sleep(60)", "assert x")
    none_left()


def test_a_flood_of_output_goes_nowhere():
    program = "for _ in range(200):\n    print('x' * 10**6)\nimport sys\nsys.stderr.write('y')"
    assert BOX.passes(program, "assert True")


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\ndone = True"
        assert not BOX.passes(program, "assert done")
        names = "import socket\ndone = [n for _, n in socket.if_nameindex()]"
        assert BOX.passes(names, "assert set(done) <= {'lo'}")


def test_nothing_of_this_process_is_seen(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret-of-the-run")
    program = "import os\nenv, args, user = dict(os.environ), os.listdir('/tmp'), os.getuid()"
    assert BOX.passes(program, "assert set(env) <= {'LC_CTYPE'} and args == [] and user != 0")
    assert BOX.passes("import sys", "assert sys.stdin.read() == ''")
    fds = (
        "import os\ndef there(n):\n"
        "    try:\n        return os.fstat(n)\n    except OSError:\n        pass"
    )
    assert BOX.passes(fds, "assert [n for n in range(100) if there(n)] == [0, 1, 2, 4]")


def test_killing_its_parent_or_everything_does_the_program_no_good():
    kill = "import os\ntry:\n    os.kill(os.getppid(), 9)\nexcept OSError:\n    pass\nx = 1"
    assert BOX.passes(kill, "assert x == 1")
    kill = "import os\ntry:\n    os.kill(-1, 9)\nexcept OSError:\n    pass\nos.killpg(0, 9)"
    assert not BOX.passes(kill, "assert True")
    assert os.getppid() > 0


def test_no_folder_is_left_and_many_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    results: dict[int, bool] = {}

    def run(n: int) -> None:
        results[n] = BOX.passes(f"import os\nos.fork()\nx = {n}", f"assert x == {n % 3}")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: n < 3 for n in range(6)}
    assert list(tmp_path.iterdir()) == []


def test_tests_that_are_no_python_are_the_references_fault():
    with pytest.raises(BadTestsError, match="invalid syntax"):
        BOX.passes("x = 1", "assert x ==")
    with pytest.raises(BadTestsError):
        BOX.passes("x = 1", "\0")


def test_a_sandbox_that_cannot_be_made_is_not_the_answers_fault(tmp_path):
    with pytest.raises(SandboxError, match="No module named 'wrpo_ray'"):
        Sandbox(CodeConfig(), package=tmp_path).passes("x = 1", "assert x")
    with pytest.raises(UserError, match="isolation: limits"):
        Sandbox(CodeConfig(), python="/bin/false").checked()


def as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"user": 65534, "group": 65534, "extra_groups": []}
    monkeypatch.setattr(module.subprocess, "Popen", functools.partial(subprocess.Popen, **given))


needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not SYSTEM.exists(), reason="needs root and a Python for all users"
)


@needs_root
@pytest.mark.parametrize("isolation", ["namespaces", "limits"])
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_each_way_of_shutting_in(monkeypatch, isolation, user):
    """Root and another user, with namespaces and without."""
    if user == "nobody":
        as_nobody(monkeypatch)
    box, quick = (
        Sandbox(CodeConfig(timeout=seconds, isolation=isolation), str(SYSTEM.resolve()), "/usr")
        for seconds in (10, 0.7)
    )
    box.checked()
    program = "import os, math\nenv, user = dict(os.environ), os.getuid()"
    assert box.passes(program, "assert set(env) <= {'LC_CTYPE'} and user != 0")
    assert not box.passes("import sys\nsys.exit(0)", "assert True")
    assert not box.passes("x = bytearray(10**9)", "assert x")
    assert not box.passes(HOSTILE["file"], "assert True")
    assert not quick.passes("import os\nos.fork()\nwhile True: pass", "assert True")
    none_left()
    net = "import socket\nnames = [n for _, n in socket.if_nameindex()]"
    alone = box.passes(net, "assert set(names) <= {'lo'}")
    seen = box.passes("import os", "assert os.path.exists('/etc/passwd')")
    assert (alone, seen) == ((True, False) if isolation == "namespaces" else (False, True))


@needs_root
def test_a_python_that_other_users_cannot_run_is_told(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    python = hidden / "python3"
    python.write_bytes(SYSTEM.read_bytes())
    python.chmod(0o755)
    box = Sandbox(CodeConfig(isolation="limits"), str(python), "/usr")
    with pytest.raises(SandboxError, match="Permission denied"):
        box.passes("x = 1", "assert x")
