"""A lease on the output folder prevents two runs from writing to it at once.

The holder writes a heartbeat. Another run on the same host checks whether the holder's process is
alive; on another host it watches the heartbeat for `EXPIRES` seconds by its own clock. Not
covered: object stores have no compare-and-swap here, so two runs that start within the same second
can both take the lease; reading it back makes that unlikely.
"""

import _thread
import os
import socket
import threading
import time
from typing import Any, Self

import psutil

from wrpo_ray.errors import LeaseError, UserError
from wrpo_ray.storage.folder import Folder

FILE = "lease.json"
BEAT = 5.0
"""Seconds between heartbeats."""
EXPIRES = 30.0
"""Seconds without a heartbeat after which a lease may be taken."""


class Lease:
    """The lease, held within a `with` block.

    Raises:
        LeaseError: another run holds the folder.
    """

    def __init__(self, folder: Folder, session: str, beat: float = BEAT, expires: float = EXPIRES):
        self.folder, self.session, self.beat, self.expires = folder, session, beat, expires
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        held = self._read()
        if held and not is_dead(held) and self._is_beating(held):
            raise LeaseError(
                f"output: {self.folder} is in use by a run on {held['host']} (process "
                f"{held['pid']}); wait for it, stop it, or set another `output`"
            )
        self._write(0)
        if (self._read() or {}).get("session") != self.session:
            raise LeaseError(f"output: {self.folder}: another run has just taken it")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.lost:
            raise LeaseError(
                f"output: {self.folder} was taken over by another run, or could not be reached for "
                f"{self.expires:g} s; this run ends"
            )
        self.folder.delete(FILE)

    def _is_beating(self, held: dict[str, Any]) -> bool:
        if held["host"] == socket.gethostname():
            return True  # `is_dead` has checked its process
        deadline = time.monotonic() + self.expires
        while time.monotonic() < deadline:
            time.sleep(min(self.beat, self.expires / 10))
            if self._read() != held:
                return True
        return False

    def _keep(self) -> None:
        count, beaten = 0, time.monotonic()
        while not self._stop.wait(self.beat):
            held = self._read()
            if held and held["session"] == self.session and self._beat(count := count + 1):
                beaten = time.monotonic()
            is_taken = held is not None and held["session"] != self.session
            if is_taken or time.monotonic() - beaten > self.expires:
                self.lost = True
                _thread.interrupt_main()
                return

    def _beat(self, count: int) -> bool:
        """Write a heartbeat; return False if the store fails for a moment."""
        try:
            self._write(count)
        except OSError:
            return False
        return True

    def _write(self, count: int) -> None:
        me = psutil.Process()
        self.folder.write_json(
            FILE,
            {
                "session": self.session,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": me.create_time(),
                "beat": count,
            },
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            return read(self.folder)
        except (OSError, UserError):
            return None


def read(folder: Folder) -> dict[str, Any]:
    """The lease of a folder.

    Raises:
        FileNotFoundError: no run holds it.
        BrokenFileError: the file holds no lease.
    """
    return folder.read_record(FILE, session=str, host=str, pid=int, started=(int, float))


def is_dead(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host and has ended."""
    if held["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(held["pid"])
        is_another = abs(process.create_time() - held["started"]) > 1
        return is_another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
