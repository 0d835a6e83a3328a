"""State and log of each try, on a disk and in an object store, and how `wrpo status` tells them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from support.waiting import wait_until

from wrpo_ray.data.outline import Outline, StepOutline
from wrpo_ray.errors import BudgetError
from wrpo_ray.report.status import status
from wrpo_ray.runtime import tries
from wrpo_ray.runtime.lease import Lease
from wrpo_ray.runtime.progress import listeners, log
from wrpo_ray.runtime.tries import Try
from wrpo_ray.storage.folder import Folder

SELECT = StepOutline("select", "select", "key", "select", "manifest.json", "select")
DRIVER = """
import sys, time
from wrpo_ray.runtime.lease import Lease
from wrpo_ray.runtime import tries
from wrpo_ray.runtime.progress import log
from wrpo_ray.storage.folder import Folder
tries.EVERY = 0.01
root = Folder(sys.argv[1])
with Lease(root, "first", beat=0.1) as lease, tries.Try(root, lease):
    log("works")
    time.sleep(900)
"""


@pytest.fixture(params=["disk", "object store"])
def root(request: pytest.FixtureRequest, tmp_path) -> Folder:
    """An empty output."""
    if request.param == "disk":
        return Folder(str(tmp_path / "run"))
    return Folder(request.getfixturevalue("bucket")) / f"tries-{time.time_ns()}"


def told(root: Folder, now: float | None = None) -> str:
    return status(root, Outline("select", 4, {}, {}, (SELECT,)), now).last_try


def text(root: Folder, name: str) -> str:
    return (root / tries.FOLDER).read(name).decode()


def run(root: Folder, session: str, error: BaseException | None = None) -> None:
    """A try that logs a line, and ends."""
    with Lease(root, session) as lease, Try(root, lease):
        log(f"{session} works")
        if error:
            raise error


class UnspeakableError(Exception):
    """An error whose message cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no")


class OwnUnspeakableError(UnspeakableError, BudgetError):
    """The same, of this project's kinds."""


@pytest.mark.parametrize("kind", [UnspeakableError, OwnUnspeakableError])
def test_an_error_without_a_message_ends_the_try_too(tmp_path, kind):
    root = Folder(str(tmp_path / "run"))
    with pytest.raises(kind):
        run(root, "one", kind())
    record = tries.last(root)
    assert record["state"] == tries.FAILED
    assert "its message cannot be shown (RuntimeError)" in record["reason"]


@pytest.mark.parametrize(
    "name", ["12", "00012", "x", "0012-000", "\u0661\u0662\u0663\u0664", "9" * 5000]
)
def test_a_file_with_a_name_that_no_try_has_is_passed_over(tmp_path, name, monkeypatch):
    root = Folder(str(tmp_path / "run"))
    run(root, "one")
    files = Folder.files
    monkeypatch.setattr(Folder, "files", lambda *a, **k: [*files(*a, **k), f"{name}.json"])
    assert tries.last(root)["number"] == 1
    run(root, "two")
    assert tries.last(root)["number"] == 2


def test_credentials_of_an_error_are_not_kept(tmp_path):
    root = Folder(str(tmp_path / "run"))
    with pytest.raises(RuntimeError):
        run(
            root, "one", RuntimeError("401: Authorization: Bearer Xyzzy0Plugh HF_TOKEN=Xyzzy0Plugh")
        )
    assert "Xyzzy0Plugh" not in text(root, "0001.json") + text(root, tries.log_name(1))
    assert "401" in tries.last(root)["reason"]


def test_each_try_keeps_its_state_and_its_log(root):
    assert tries.last(root) is None
    with pytest.raises(BudgetError):
        run(root, "one", BudgetError("budget: 5 of 4 USD are spent"))
    assert told(root).startswith("try 1 failed, after 0:0")
    assert told(root).endswith(" ago: budget: 5 of 4 USD are spent")
    with pytest.raises(KeyboardInterrupt):
        run(root, "two", KeyboardInterrupt())
    assert told(root).startswith("try 2 stopped, after 0:0")
    run(root, "three")
    assert told(root).startswith("try 3 finished, after 0:0")
    assert (root / tries.FOLDER).files() == [
        f"{n:04}{end}" for n in (1, 2, 3) for end in ("-000.log", ".json")
    ]
    first = text(root, tries.log_name(1))
    assert first.splitlines()[0].endswith("  one works")
    assert first.splitlines()[1].endswith("budget: 5 of 4 USD are spent")
    assert "three works" not in first
    assert not listeners


def test_a_fault_of_the_code_is_kept_with_its_trace_and_without_secrets(root):
    with pytest.raises(ZeroDivisionError):
        run(root, "one", ZeroDivisionError("s3://KEY:SECRET@bucket/x"))
    assert ": ZeroDivisionError: s3://" in told(root)
    kept = text(root, tries.log_name(1)) + told(root)
    assert "Traceback" in kept
    assert "SECRET" not in kept


def test_a_killed_driver_is_told_as_lost_and_its_log_stays(root):
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, root.uri], env=environment)
    with driver:
        name = tries.log_name(1)
        wait_until(lambda: (root / tries.FOLDER).exists(name), driver)
        assert told(root).startswith("try 1 running, began 0:0")
        driver.send_signal(signal.SIGKILL)
    assert told(root).startswith("try 1 lost (its process or node ended without a word), began ")
    whole_run = status(root, Outline("select", 4, {}, {}, ()))  # no step is left
    assert whole_run.last_try.startswith("try 1 finished (lost after its last step), began 0:0")
    assert text(root, name).rstrip().endswith("works")
    run(root, "two")
    assert told(root).startswith("try 2 finished")
    assert tries.last(root)["session"] == "two"


def test_a_long_log_goes_on_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(tries, "EVERY", 0.001)
    monkeypatch.setattr(tries, "PART", 100)
    root = Folder(str(tmp_path))
    with Try(root, Lease(root, "one")):
        for number in range(6):
            log(f"line {number} {'x' * 60}")
            part = f" {number} "
            wait_until(lambda part=part: part in whole(root))
    parts = [name for name in (root / tries.FOLDER).files() if name.endswith(".log")]
    assert len(parts) == 3
    assert [line.split()[3] for line in whole(root).splitlines()] == list("012345")


def whole(root: Folder) -> str:
    folder = root / tries.FOLDER
    return "".join(text(root, name) for name in folder.files() if name.endswith(".log"))


def test_a_store_that_fails_does_not_end_a_try(tmp_path, monkeypatch, capsys):
    root = Folder(str(tmp_path))
    with Try(root, Lease(root, "one")):
        monkeypatch.setattr(Folder, "write", _fails)
        log("works")
    monkeypatch.undo()
    assert tries.last(root)["state"] == tries.RUNNING
    assert "the state of the run could not be noted" in capsys.readouterr().err


def test_a_store_that_fails_at_the_start_does_not_end_a_try(tmp_path, monkeypatch):
    root = Folder(str(tmp_path))
    monkeypatch.setattr(Folder, "write", _fails)
    with Try(root, Lease(root, "one")):
        monkeypatch.undo()
    assert tries.last(root)["state"] == tries.FINISHED


def test_a_lost_lease_is_the_reason_of_its_try(tmp_path):
    root = Folder(str(tmp_path))
    lease = Lease(root, "one")
    one = Try(root, lease)
    one.__enter__()
    lease.lost = True
    one.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # as its heartbeat interrupts it
    assert tries.last(root)["state"] == tries.FAILED
    assert tries.last(root)["reason"] == tries.LOST


def _fails(*_: object) -> None:
    raise OSError("the store is down")
