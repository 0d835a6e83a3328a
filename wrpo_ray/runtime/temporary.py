"""Temporary folders with short paths, for a Ray and engines that start on this machine.

They lay sockets in them, whose paths may have 107 bytes (AF_UNIX). Files stay where the user wants
them: what is too long is reached through a link with a short path.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from wrpo_ray.errors import UserError

VARIABLES = ("RAY_TMPDIR", "TMPDIR", "TEMP", "TMP")
"""That name a temporary folder: the first two for Ray, the last three for Python."""
SOCKET = "/ray/session_2026-11-29_12-00-00_123456_4194304/sockets/plasma_store"
"""What Ray puts after it, at the most."""
MAX_PATH_BYTES = 107 - len(SOCKET)
"""Bytes of a folder's path."""
PLACES = ("/tmp", "/var/tmp", "/dev/shm")
"""Where a link may lie."""


def shorten_temporary_folders() -> None:
    """Make what the environment names as temporary folders usable for sockets.

    Links are removed when the process ends.

    Raises:
        UserError: one cannot be written, or there is no place for a link.
    """
    for_ray = next((name for name in VARIABLES[:2] if os.environ.get(name)), None)
    if for_ray:
        _check_writable(for_ray, os.environ[for_ray])
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if os.path.isdir(value):  # else Python passes over it
            os.environ[name] = _short(name, Path(value).absolute())
    tempfile.tempdir = None  # Python looks again


def _check_writable(name: str, value: str) -> None:
    try:
        os.makedirs(value, exist_ok=True)
        with tempfile.TemporaryFile(dir=value):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"{name}: {value} cannot be used for temporary files ({why}); set it to a folder that "
            f"can be written"
        ) from None


def _short(name: str, folder: Path) -> str:
    """A short path that leads to the folder: its own, or that of a link."""
    if len(os.fsencode(folder)) <= MAX_PATH_BYTES:
        return str(folder)
    for place in PLACES:
        with suppress(OSError):
            own = tempfile.mkdtemp(prefix="w-", dir=place)  # nobody else can write in it
            atexit.register(shutil.rmtree, own, ignore_errors=True)  # removes links, not files
            link = Path(own) / "t"
            link.symlink_to(folder)
            return str(link)
    raise UserError(
        f"{name}: {folder} has {len(os.fsencode(folder))} bytes, and Ray's sockets leave room for "
        f"{MAX_PATH_BYTES}; set RAY_TMPDIR and TMPDIR to a folder with a shorter path"
    )
