"""Tries of a run: how each one goes or ended, and what it logged, in files of the output.

A try is one driver that held the lease. `tries/0002.json` is its state, `tries/0002-000.log` and
further parts are its log. They outlive the driver's process, node and job. A killed driver leaves
the state `running`; whether it is, its lease tells. Not covered: what fails before the lease is
held, such as a config's error; logs of workers, which Ray writes.
"""

import os
import re
import socket
import threading
import time
import traceback
from typing import Any, Self

from wrpo_ray.errors import WrpoError
from wrpo_ray.runtime.lease import Lease
from wrpo_ray.runtime.progress import listeners, log
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.addresses import redact
from wrpo_ray.text.display import printable

FOLDER = "tries"
EVERY = 5.0
"""Seconds between two writes of the log."""
PART = 200_000
"""Characters after which the log goes on in a new file: object stores cannot append."""
REASON = 500
"""Characters of a failure's reason that are kept in the state."""
LOST = "the output was taken over by another run, or could not be reached"
RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"
Record = dict[str, Any]


class Try:
    """One try, within a `with` block that holds the lease; a store's faults do not end it."""

    def __init__(self, root: Folder, lease: Lease):
        self.folder, self.lease = root / FOLDER, lease
        self.record: Record = {
            "session": lease.session,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._lines: list[str] = []
        self._part = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        self.record |= {"number": _last_number(self.folder) + 1, "state": RUNNING}
        self.record |= {"started": time.time(), "ended": None, "reason": ""}
        self._write_state()
        listeners.append(self._note)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            is_ours = isinstance(error, WrpoError)
            shown = _text(error) if is_ours else "".join(traceback.format_exception(error))
            self._note(printable(redact(shown)))
        listeners.remove(self._note)
        self._stop.set()
        self._thread.join()
        self._write_log()
        state, reason = (FAILED, LOST) if self.lease.lost else _outcome(error)
        self.record |= {"state": state, "ended": time.time(), "reason": reason}
        self._write_state()

    @property
    def name(self) -> str:
        """Begins the names of its files; in the order of the tries."""
        return f"{self.record['number']:04}"

    def _write_state(self) -> None:
        try:
            self.folder.write_json(f"{self.name}.json", self.record)
        except OSError as fault:
            log(f"the state of the run could not be noted in {self.folder}: {fault}")

    def _note(self, line: str) -> None:
        self._lines.append(f"{time.strftime('%Y-%m-%d')} {line}\n")

    def _keep(self) -> None:
        while not self._stop.wait(EVERY):
            self._write_log()

    def _write_log(self) -> None:
        """Write the part of the log anew, if it grew."""
        count = len(self._lines)
        text = "".join(self._lines[:count])
        if not text or count == self._written:
            return
        try:
            self.folder.write(log_name(self.record["number"], self._part), text.encode())
        except OSError:  # the store fails for a moment
            return
        self._written = count
        if len(text) > PART:
            del self._lines[:count]
            self._part, self._written = self._part + 1, 0

    _written = 0
    """Lines of this part that are in its file."""


def log_name(number: int, part: int = 0) -> str:
    """The name of a part of a try's log, in `FOLDER`."""
    return f"{number:04}-{part:03}.log"


def last(root: Folder) -> Record | None:
    """The state of the last try; None before the first one.

    Raises:
        BrokenFileError: the file does not hold one.
    """
    number = _last_number(root / FOLDER)
    if not number:
        return None
    return (root / FOLDER).read_record(
        f"{number:04}.json", session=str, number=int, state=str, started=(int, float), reason=str,
        ended=(int, float, type(None)),
    )  # fmt: skip


def _last_number(folder: Folder) -> int:
    """The number of the last state; a name that no try has, such as `12.json`, is none."""
    names = (name.removesuffix(".json") for name in folder.files(suffix=".json"))
    return max(
        (int(name) for name in names if re.fullmatch("[0-9]{4}|[1-9][0-9]{4,8}", name)), default=0
    )


def _outcome(error: BaseException | None) -> tuple[str, str]:
    """(state, reason) of a try that ended with this error."""
    if error is None:
        return FINISHED, ""
    if isinstance(error, Exception):
        told = _text(error)
        told = told if isinstance(error, WrpoError) else f"{type(error).__name__}: {told}"
        return FAILED, printable(redact(" ".join(told.split())))[:REASON]
    return STOPPED, "interrupted" if isinstance(error, KeyboardInterrupt) else "terminated"


def _text(error: BaseException) -> str:
    """The message of an error, whose own `__str__` may fail."""
    try:
        return str(error)
    except Exception as fault:
        return f"its message cannot be shown ({type(fault).__name__})"
