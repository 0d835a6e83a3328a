"""The lease on an output: of runs that start at once, or after a dead one, exactly one holds it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from support.waiting import LIMIT, wait_until

from wrpo_ray.errors import LeaseError
from wrpo_ray.runtime import lease
from wrpo_ray.runtime.lease import Lease, file_name
from wrpo_ray.storage.folder import Folder

STARTS = 4
SOAK = 200
HERE = {"host": "here", "machine": lease.machine(), "held": True, "beat": 3}
ELSEWHERE = {"host": "elsewhere", "machine": "another", "pid": 1, "started": 0, "held": True}
HOLD = """
import sys, time
from wrpo_ray.runtime.lease import Lease
from wrpo_ray.storage.folder import Folder
with Lease(Folder(sys.argv[1]), "holder", beat=0.1):
    print("held", flush=True)
    time.sleep(900)
"""


def files(folder: Folder) -> list[str]:
    return folder.files(suffix=".json")


# --- starts at once ----------------------------------------------------------------------------


def start(uri: str, rounds: int, index: int, together: Any, held: Any) -> None:
    """Try for the lease with the others in each round; `held` counts who got it."""
    for round_ in range(rounds):
        one = Lease(Folder(f"{uri}"), f"{round_}-{(index + round_) % STARTS}")
        together.wait()
        try:
            one.__enter__()
            held[round_ * STARTS + index] = 1
        except LeaseError:
            one = None
        together.wait()
        if one is not None:
            one.__exit__()


def holders(uri: str, rounds: int, *, in_threads: bool) -> list[int]:
    """How many of `STARTS` starts at once held the folder, for each round."""
    spawn = multiprocessing.get_context("spawn")
    held: Any = [0] * rounds * STARTS if in_threads else spawn.Array("i", rounds * STARTS)
    kind: Any = threading.Thread if in_threads else spawn.Process
    together: Barrier | threading.Barrier = (
        threading.Barrier(STARTS) if in_threads else spawn.Barrier(STARTS)
    )
    those = [kind(target=start, args=(uri, rounds, i, together, held)) for i in range(STARTS)]
    for one in those:
        one.start()
    for one in those:
        one.join(LIMIT)
    return [sum(held[i : i + STARTS]) for i in range(0, rounds * STARTS, STARTS)]


@pytest.mark.parametrize("in_threads", [True, False])
def test_of_four_starts_at_once_one_holds_a_folder(tmp_path, in_threads):
    assert holders(str(tmp_path), 20, in_threads=in_threads) == [1] * 20
    assert files(Folder(str(tmp_path))) == []


def test_of_four_starts_at_once_one_holds_a_place_in_a_store(bucket):
    uri = bucket.replace("run?", "starts?")
    assert holders(uri, 5, in_threads=False) == [1] * 5
    assert files(Folder(uri)) == []


@pytest.mark.soak
@pytest.mark.parametrize("in_threads", [True, False])
@pytest.mark.parametrize("place", ["disk", "store"])
def test_200_rounds_of_four_starts_at_once(tmp_path, bucket, place, in_threads):
    uri = str(tmp_path) if place == "disk" else bucket.replace("run?", f"soak-{in_threads}?")
    assert holders(uri, SOAK, in_threads=in_threads) == [1] * SOAK


def test_starts_at_once_after_a_dead_run_have_one_holder(tmp_path):
    """Two that find it dead must not delete each other's files in its place."""
    for round_ in range(10):
        left = {"session": "0", "pid": 2**22 + 1, "started": 0} | HERE
        Folder(str(tmp_path / str(round_))).write_json(file_name("0"), left)
        assert holders(str(tmp_path / str(round_)), 1, in_threads=True) == [1]


# --- dead or alive -----------------------------------------------------------------------------


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_two_runs_are_kept_apart_and_a_dead_one_is_followed_at_once(tmp_path):
    folder = Folder(str(tmp_path))
    with holder(tmp_path) as process:
        with pytest.raises(LeaseError, match=rf"in use by a run .* \(process {process.pid}\)"):
            Lease(folder, "second").__enter__()
        assert files(folder) == [file_name("holder")]
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Lease(folder, "second", expires=LIMIT):  # no heartbeat is waited for
            assert files(folder) == [file_name("second")]
    assert files(folder) == []


def test_a_run_that_another_pid_namespace_cannot_see_keeps_its_output(tmp_path):
    """As in a container with the host's name, where the run's process id is nobody's."""
    folder = Folder(str(tmp_path))
    command = (
        "import sys\nfrom wrpo_ray.errors import LeaseError\n"
        "from wrpo_ray.runtime.lease import Lease\nfrom wrpo_ray.storage.folder import Folder\n"
        "try: Lease(Folder(sys.argv[1]), 'second', expires=60).__enter__()\n"
        "except LeaseError as error: print(error)\n"
    )
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no PID namespaces")
    with holder(tmp_path):
        done = subprocess.run(
            [*apart, sys.executable, "-c", command, str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "is in use by a run on" in done.stdout, done.stderr
        assert files(folder) == [file_name("holder")]


def test_a_process_is_its_id_and_its_start_whatever_the_clock_says(monkeypatch):
    mine = HERE | {"session": "s", "pid": os.getpid(), "started": lease._start_time(os.getpid())}
    assert lease.is_alive(mine) is True
    assert lease.is_alive(mine | {"started": mine["started"] - 1}) is False
    assert lease.is_alive(mine | {"pid": 2**22 + 1}) is False
    assert lease.is_alive(mine | {"pid": 10**30}) is False
    assert lease.is_alive(mine | {"machine": "another"}) is None
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        stat = Path(f"/proc/{ended.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
        assert lease.is_alive(mine | {"pid": ended.pid}) is False


def test_a_hidden_process_is_not_taken_for_a_dead_one(monkeypatch):
    """Where /proc shows only one's own processes."""
    held = HERE | {"session": "s", "pid": 1, "started": 0}

    def is_hidden(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", is_hidden)
    assert lease.is_alive(held) is None


def test_a_lease_of_another_machine_is_taken_when_its_heart_stops(tmp_path):
    folder = Folder(str(tmp_path))
    folder.write_json(file_name("x"), ELSEWHERE | {"session": "x", "beat": 3})
    started = time.monotonic()
    with Lease(folder, "me", beat=0.1, expires=0.5):
        assert time.monotonic() - started > 0.4
        assert files(folder) == [file_name("me")]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"session": 3}', b"[" * 100_000])
def test_a_file_without_a_lease_counts_as_one_until_it_has_not_changed(tmp_path, content):
    folder = Folder(str(tmp_path))
    folder.write(file_name("x"), content)
    with Lease(folder, "me", beat=0.1, expires=1):
        assert files(folder) == [file_name("me")]


def test_a_beating_lease_of_another_machine_is_respected(tmp_path):
    folder, ended = Folder(str(tmp_path)), threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.01):
            record = ELSEWHERE | {"session": "x", "beat": (count := count + 1)}
            folder.write_json(file_name("x"), record)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        wait_until(lambda: files(folder))
        with pytest.raises(LeaseError, match="elsewhere"):
            Lease(folder, "me", beat=0.1, expires=LIMIT).__enter__()
    finally:
        ended.set()
        beating.join()
    assert files(folder) == [file_name("x")]


# --- keeping and leaving -----------------------------------------------------------------------


def test_a_run_deletes_only_its_own_lease(tmp_path):
    folder = Folder(str(tmp_path))

    def hold() -> None:
        with Lease(folder, "one", beat=0.02):
            folder.delete(file_name("one"))
            folder.write_json(file_name("two"), ELSEWHERE | {"session": "two", "beat": 1})
            time.sleep(60)  # which the lost lease ends

    with pytest.raises((LeaseError, KeyboardInterrupt)):
        hold()
    assert files(folder) == [file_name("two")]


@pytest.mark.parametrize("place", ["disk", "store"])
def test_a_heartbeat_does_not_bring_back_a_lease_that_was_taken(tmp_path, bucket, place):
    """A run that slept longer than its lease lasts finds it gone, and leaves it so."""
    folder = Folder(str(tmp_path) if place == "disk" else bucket.replace("run?", "slept?"))
    late = Lease(folder, "late", beat=LIMIT)
    late.__enter__()
    late._beaten -= late.expires + 1
    assert not late._beat()
    late._count, names = 5, lease._names(folder)  # the pause comes between the check and the write
    assert names == [file_name("late")]
    with pytest.raises(LeaseError, match="taken over"):
        late._write(is_held=True)
    assert files(folder) == []
    late.__exit__()


def test_a_lease_that_cannot_be_renewed_ends_the_run(tmp_path, monkeypatch):
    """Else another machine would take the folder while this run goes on."""
    one = Lease(Folder(str(tmp_path)), "one", beat=0.02, expires=0.2)

    def fail(*, is_held: bool) -> None:
        raise OSError("the store does not answer")

    def hold() -> None:
        with one:
            monkeypatch.setattr(one, "_write", fail)
            time.sleep(60)  # which the lost lease ends

    with pytest.raises((LeaseError, KeyboardInterrupt)):
        hold()
    assert one.lost


def test_a_lease_survives_a_moment_without_its_store(tmp_path, monkeypatch):
    with Lease(Folder(str(tmp_path)), "one", beat=0.02, expires=LIMIT) as one:
        write, calls = one._write, []

        def fail_twice(*, is_held: bool) -> None:
            calls.append(is_held)
            if len(calls) <= 2:
                raise OSError("the store does not answer")
            write(is_held=is_held)

        monkeypatch.setattr(one, "_write", fail_twice)
        wait_until(lambda: len(calls) > 3)
        assert not one.lost


def test_the_lease_that_is_shown_is_that_of_the_run_that_lives(tmp_path):
    folder = Folder(str(tmp_path))
    dead = {"session": "0", "pid": 2**22 + 1, "started": 0} | HERE
    with Lease(folder, "me"):
        folder.write_json(file_name("0"), dead)
        assert lease.read(folder)["session"] == "me"
        (tmp_path / file_name("1")).write_text(json.dumps({"session": "1"}))
        assert lease.read(folder)["session"] == "me"


def test_on_a_disk_a_heartbeat_leaves_the_file_in_its_place(tmp_path):
    """A listing could miss an entry that is replaced meanwhile; and none comes back deleted."""
    folder = Folder(str(tmp_path))
    with Lease(folder, "me", beat=LIMIT) as one:
        place = (tmp_path / one.name).stat().st_ino
        assert one._beat()
        assert (tmp_path / one.name).stat().st_ino == place
        assert lease.read(folder)["beat"] == 2
        folder.delete(one.name)
        with pytest.raises(FileNotFoundError):
            one._write(is_held=True)
        assert files(folder) == []


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_a_heartbeat_that_hangs_ends_the_run_before_another_may_take_the_output(tmp_path, handler):
    """In a process of its own, since the signal comes to a main thread.

    Shells start background jobs with SIGINT ignored: these end too, and by no other SIGINT.
    """
    code = (
        "import signal, threading, time\nfrom wrpo_ray.errors import LeaseError\n"
        "from wrpo_ray.runtime.lease import Lease, _now\n"
        "from wrpo_ray.storage.folder import Folder\n"
        "class Hanging(Lease):\n"
        "    hangs = False\n"
        "    def _write(self, *, is_held):\n"
        "        if self.hangs: threading.Event().wait()\n"
        "        super()._write(is_held=is_held)\n"
        f"before = signal.{handler}\n"
        "signal.signal(signal.SIGINT, before)\n"
        "try:\n"
        f"    with Hanging(Folder({str(tmp_path)!r}), 'one', beat=0.2, expires=3) as one:\n"
        "        if before == signal.SIG_IGN: signal.raise_signal(signal.SIGINT)\n"
        "        one.hangs = True\n"
        "        time.sleep(900)\n"
        "except LeaseError: print(_now() - one._beaten)\n"
        "assert signal.getsignal(signal.SIGINT) == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3.5, "and not after all of the 900 s"
