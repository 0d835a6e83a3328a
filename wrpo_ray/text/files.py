"""Text files that a user names: UTF-8, with or without a byte-order mark."""

import codecs
from pathlib import Path

from wrpo_ray.errors import UserError

BOM = "\ufeff"
"""The byte-order mark that editors on Windows write before a text."""
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path, what: str) -> str:
    """Return the text of a local file with newlines as line ends, without a byte-order mark.

    `what` is the config key or the option that names the file.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what}: {path}: cannot be read: {error.strerror or error}") from None
    return decode(data, f"{what}: {path}")


def decode(data: bytes, what: str) -> str:
    """Return the text of a file's bytes, as `read_text` does; `what` begins error messages.

    Raises:
        UserError: the bytes are not UTF-8.
    """
    if is_utf16(data):
        raise UserError(f"{what}: cannot be read: it is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what}: cannot be read: it is no UTF-8 at byte {error.start}; save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_utf16(data: bytes) -> bool:
    """Whether bytes begin like UTF-16: with a mark, or with a zero in a pair of bytes."""
    start = data[:4]
    return b"\0" in start[2:] if start[:2] in UTF16 else len(start) > 1 and 0 in start[:2]
