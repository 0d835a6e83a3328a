"""A lease on the output folder prevents two runs from writing to it at once.

Each run that wants the folder writes a file of its own, `lease-<session>.json`, and holds the
folder once a listing shows no other. A file is there before its writer lists the folder, so of two
runs at most one lists its own alone: there is nothing to compare and swap, and any store will do
whose listings show what was written before them (local and network disks, S3, GCS, Azure). Of runs
that start at once the lowest session wins; a file is only ever deleted by its own run, or once that
run is dead.

A run is dead if its process has ended, as only a process of the same kernel and PID namespace can
tell, or if its file has not changed for `EXPIRES` seconds by the clock of the run that watches.
Not covered: stores whose listings are behind; a write of the output that a store completes after
its run was taken for dead.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any, Self

from wrpo_ray.errors import BrokenFileError, LeaseError, UserError
from wrpo_ray.storage.folder import Folder

PREFIX = "lease-"
BEAT = 5.0
"""Seconds between heartbeats."""
EXPIRES = 30.0
"""Seconds without a heartbeat after which a lease may be taken."""
Record = dict[str, Any]


class Lease:
    """The lease, held within a `with` block.

    Raises:
        LeaseError: another run holds the folder.
    """

    def __init__(self, folder: Folder, session: str, beat: float = BEAT, expires: float = EXPIRES):
        self.folder, self.session, self.beat, self.expires = folder, session, beat, expires
        self.name = file_name(session)
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._guard = threading.Thread(target=self._watch, daemon=True)
        self._once = threading.Lock()
        self._is_deaf = False
        """Whether the process ignores SIGINT but for the loss of the lease."""
        self._count = 0
        self._beaten = _now()

    def __enter__(self) -> Self:
        try:
            self._write(is_held=False)
            self._await_turn()
            self._write(is_held=True)
        except BaseException as error:
            self.folder.delete(self.name)
            if isinstance(error, FileNotFoundError):
                raise self._taken() from None
            raise
        self._is_deaf = self._listen()
        self._thread.start()
        self._guard.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._guard.join()
        if not self.lost:  # else a heartbeat may hang
            self._thread.join()
        if self._is_deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.lost:
            raise self._taken()
        self.folder.delete(self.name)

    def _taken(self) -> LeaseError:
        return LeaseError(
            f"output: {self.folder} was taken over by another run, or could not be reached for "
            f"{self.expires:g} s; this run ends"
        )

    # --- taking it -----------------------------------------------------------------------

    def _await_turn(self) -> None:
        """Wait until no other run wants the folder, which are those that stand back or are dead.

        Raises:
            LeaseError: one of them holds it, or comes first.
        """
        seen: dict[str, tuple[Record | None, float]] = {}
        started, pause = _now(), 0.01
        while (names := _names(self.folder)) != [self.name]:
            if self.name not in names:
                raise self._taken()
            for name in names:
                if name != self.name:
                    self._meet(name, seen, is_late=_now() - started > 2 * self.expires)
            time.sleep(pause)
            pause = min(2 * pause, self.beat, self.expires / 10)
            self._write(is_held=False)

    def _meet(self, name: str, seen: dict[str, tuple[Record | None, float]], is_late: bool) -> None:
        """Compare another run's file with what was `seen` of it; delete it if that run is dead."""
        record = self._read(name)
        before, since = seen.setdefault(name, (record, _now()))
        lives = is_alive(record) if record else None
        if lives is None and record != before:
            lives = True
        if lives is None and _now() - since > self.expires:
            lives = False
        if lives is False:
            self.folder.delete(name)
        elif lives and (is_late or name < self.name or (record or {}).get("held")):
            raise LeaseError(
                f"output: {self.folder} is in use by a run on {_who(record)}; wait for it, stop "
                f"it, or set another `output`"
            )

    # --- keeping it ----------------------------------------------------------------------

    def _keep(self) -> None:
        while not self._stop.wait(self.beat):
            if self.lost or not self._beat():
                self._lose()
                return

    def _watch(self) -> None:
        """Notice a heartbeat whose write hangs, before another run may take the lease.

        It reads and writes nothing, so it cannot hang itself.
        """
        pause = min(self.beat, self.expires / 6)
        while not self._stop.wait(pause):
            if _now() - self._beaten > self.expires - pause:
                self._lose()
                return

    def _listen(self) -> bool:
        """Let a loss interrupt a process that ignores SIGINT, as a shell's background jobs do.

        Returns whether it does. Any other SIGINT stays without effect.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            return False
        signal.signal(signal.SIGINT, self._interrupt)
        return True

    def _interrupt(self, *_: object) -> None:
        if self.lost:
            raise KeyboardInterrupt

    def _lose(self) -> None:
        """Interrupt the main thread, once."""
        with self._once:
            if not self.lost:
                self.lost = True
                main = threading.main_thread().ident
                signal.pthread_kill(main or 0, signal.SIGINT)  # it may wait in a call of the system

    def _beat(self) -> bool:
        """Write a heartbeat; return whether the lease is still held."""
        is_in_time = _now() - self._beaten <= self.expires
        try:
            if not is_in_time or self.name not in _names(self.folder):
                return False
            self._write(is_held=True)
        except (FileNotFoundError, LeaseError):
            return False
        except OSError:  # the store fails for a moment
            return is_in_time
        return True

    def _write(self, *, is_held: bool) -> None:
        """Write the file; on a disk it stays in place, where no listing can miss it.

        Raises:
            FileNotFoundError: it was deleted from the disk.
            LeaseError: it comes so late that another run may have deleted it.
        """
        record = {
            "session": self.session,
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "held": is_held,
            "beat": self._count,
        }
        started, is_first, self._count = _now(), self._count == 0, self._count + 1
        if self.folder.is_remote or is_first:
            self.folder.write_json(self.name, record)
        else:
            with open(Path(self.folder.path) / self.name, "r+b", buffering=0) as file:
                file.write(json.dumps(record).encode().ljust(os.fstat(file.fileno()).st_size))
        if not is_first and _now() - self._beaten > self.expires:
            self.folder.delete(self.name)
            raise self._taken()
        self._beaten = started

    def _read(self, name: str) -> Record | None:
        try:
            return _record(self.folder, name)
        except (OSError, UserError):
            return None


def file_name(session: str) -> str:
    """The name of a session's file in the folder."""
    return f"{PREFIX}{session}.json"


def _names(folder: Folder) -> list[str]:
    return [name for name in folder.files(suffix=".json") if name.startswith(PREFIX)]


def _who(record: Record | None) -> str:
    return f"{record['host']} (process {record['pid']})" if record else "another host"


def read(folder: Folder) -> Record:
    """The lease of a folder: of several, one whose run is not known to be dead.

    `name` is the file's name.

    Raises:
        FileNotFoundError: no run holds it.
        BrokenFileError: the file holds no lease.
    """
    names, found = _names(folder), list[Record]()
    for name in names:
        try:
            found.append(_record(folder, name) | {"name": name})
        except FileNotFoundError:  # its run has just ended
            continue
        except BrokenFileError:
            if len(names) == 1:
                raise
    if not found:
        raise FileNotFoundError(f"{folder}: no lease")
    return min(found, key=lambda record: (is_alive(record) is False, not record["held"]))


def _record(folder: Folder, name: str) -> Record:
    return folder.read_record(
        name, session=str, host=str, machine=str, pid=int, started=(int, float), held=bool
    )


def is_alive(held: Record) -> bool | None:
    """Whether a lease's process runs; None where this process cannot tell."""
    if held["machine"] != machine():
        return None
    try:
        return bool(_start_time(held["pid"]) == held["started"])
    except ProcessLookupError:
        return False
    except OSError:
        return None


@cache
def machine() -> str:
    """This kernel, since its boot, and this PID namespace: a process id means nothing elsewhere.

    A host's name would not do: a container may have it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # nobody's: heartbeats decide


def _start_time(pid: int) -> int:
    """Clock ticks from the boot to a process's start: they and its id are no other process's.

    Raises:
        ProcessLookupError: there is none, or it has ended and waits for its parent.
        OSError: it is another user's, and hidden.
    """
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass  # another user's
    except OverflowError:
        raise ProcessLookupError(pid) from None
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return int(fields[19])


def _now() -> float:
    """Seconds of a clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
