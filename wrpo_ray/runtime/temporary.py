"""Temporary folders with short paths, for Ray and engines on this machine.

Ray and vLLM create sockets in them, whose paths may have 107 bytes (AF_UNIX). A folder with a
longer path is used through a symbolic link with a short path.
"""

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from wrpo_ray.errors import UserError

VARIABLES = ("RAY_TMPDIR", "TMPDIR", "TEMP", "TMP")
"""Environment variables of temporary folders: the first two for Ray, the last three for Python."""
SOCKET = "/ray/session_2026-11-29_12-00-00_123456_4194304/sockets/plasma_store"
"""The longest path that Ray appends to the folder."""
MAX_PATH_BYTES = 107 - len(SOCKET)
"""Bytes that a folder's path may have."""
PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # nosec B108 # for mkdtemp
"""Folders for links."""


def shorten_temporary_folders() -> None:
    """Replace long paths of temporary folders in the environment by short links.

    Links are removed when the process ends.

    Raises:
        UserError: a folder cannot be written, or a link cannot be created.
    """
    for_ray = next((name for name in VARIABLES[:2] if os.environ.get(name)), None)
    if for_ray:
        _check_writable(for_ray, os.environ[for_ray])
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if os.path.isdir(value):  # Python ignores others
            os.environ[name] = _short(name, Path(value).absolute())
    tempfile.tempdir = None  # Python reads the environment again


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
    """A short path of the folder: its own, or a link."""
    if len(os.fsencode(folder)) <= MAX_PATH_BYTES:
        return str(folder)
    for place in PLACES:
        with suppress(OSError):
            own = tempfile.mkdtemp(prefix="w-", dir=place)  # for this user only
            atexit.register(shutil.rmtree, own, ignore_errors=True)  # removes links, not files
            link = Path(own) / "t"
            link.symlink_to(folder)
            return str(link)
    raise UserError(
        f"{name}: {folder} has {len(os.fsencode(folder))} bytes, and Ray's sockets leave room for "
        f"{MAX_PATH_BYTES}; set RAY_TMPDIR and TMPDIR to a folder with a shorter path"
    )
