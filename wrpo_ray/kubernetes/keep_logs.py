"""Sidecar that copies a pod's Ray logs to a folder that outlives the pod, until it is terminated.

`python -m wrpo_ray.kubernetes.keep_logs /tmp/ray FOLDER NAME` copies to FOLDER/NAME, on a disk or
in an object store (cluster/components/logs). Kubernetes ends a sidecar after the other containers,
so that the last round has their last lines.
"""

import signal
import sys
import threading
from pathlib import Path
from typing import Any

from wrpo_ray.runtime.progress import log
from wrpo_ray.storage.folder import Folder

EVERY = 30.0
"""Seconds between two rounds."""
TAIL = 20_000_000
"""Bytes of a file that are kept, its last ones: it is written anew whenever it grew."""


class LogKeeper:
    """Copies the logs of all of a node's Ray sessions."""

    def __init__(self, source: Path, to: Folder):
        self.source, self.to = source, to
        self._copied: dict[Path, tuple[int, int]] = {}
        """{file: (bytes, modification time) when it was copied}"""

    def copy_changed(self) -> None:
        """Copy each file that is new or has changed; what fails is tried again next time."""
        for file in sorted(self.source.glob("session_[0-9]*/logs/**/*")):
            try:
                if file.is_symlink() or not file.is_file():
                    continue
                seen = file.stat()
                state = seen.st_size, seen.st_mtime_ns
                if self._copied.get(file) != state:
                    self.to.write(str(file.relative_to(self.source)), _tail(file, seen.st_size))
                    self._copied[file] = state
            except (OSError, ValueError) as error:  # a name may be no text
                log(f"{str(file)!r} is not copied yet: {' '.join(str(error).split())}")


def _tail(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(max(0, size - TAIL))
        return stream.read(TAIL)


def main(source: str, folder: str, name: str) -> None:
    """Copy until SIGTERM, and once more then."""
    stop = threading.Event()

    def end(*_: Any) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, end)
    keeper = LogKeeper(Path(source), Folder(folder) / name)
    log(f"keeping the logs of {source} in {keeper.to}")
    while not stop.wait(EVERY):
        keeper.copy_changed()
    keeper.copy_changed()


if __name__ == "__main__":
    main(*sys.argv[1:])
