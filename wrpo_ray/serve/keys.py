"""API keys: their hashes in a file or in the environment, their owners, and limits of each key.

A key has 256 random bits and cannot be guessed, so one round of SHA-256 is enough. The key itself
is in no file, log or message.
"""

import hashlib
import hmac
import logging
import math
import re
import secrets
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from wrpo_ray.errors import UserError
from wrpo_ray.serve.errors import ClientError
from wrpo_ray.text.files import BOM, read_text

ENVIRONMENT = "WRPO_SERVE_KEYS"
CHECK_INTERVAL = 5.0
"""Seconds between checks of the key file; a revoked key is rejected after at most this time."""
LOG = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Key:
    """The hash of a key, its owner and when it expires."""

    name: str
    digest: bytes
    expires: float | None = None
    """Seconds since the epoch; None for never."""


def new_key(name: str) -> tuple[str, str]:
    """Return a new key, and its line for the key file."""
    key = f"wrpo-{secrets.token_urlsafe(32)}"
    return key, f"{name} {hashlib.sha256(key.encode()).hexdigest()}"


def parse(text: str, where: str) -> tuple[Key, ...]:
    """Return the keys of a text with `NAME SHA256 [EXPIRES]` a line; `#` begins a comment.

    Raises:
        UserError: a line has another form, a name has two keys, or there is no key.
    """
    lines = [line.partition("#")[0].split() for line in text.removeprefix(BOM).splitlines()]
    keys = [_key(words, f"{where}: line {i}") for i, words in enumerate(lines, 1) if words]
    if not keys:
        raise UserError(f"{where}: no keys; `wrpo serve --new-key NAME` makes one")
    names = [key.name for key in keys]
    for name in {n for n in names if names.count(n) > 1}:
        raise UserError(f"{where}: the name {name!r} is given twice; each key has its own")
    return tuple(keys)


def _key(words: list[str], where: str) -> Key:
    if len(words) not in (2, 3) or not re.fullmatch("[0-9a-fA-F]{64}", words[1]):
        # The line is not shown: it may hold a key by mistake.
        raise UserError(f"{where}: write NAME SHA256 [EXPIRES], the hash as 64 hex digits")
    expires = None
    if len(words) == 3:
        try:
            day = datetime.fromisoformat(words[2])
        except ValueError:
            raise UserError(f"{where}: {words[2]!r} is no day or time in ISO 8601") from None
        expires = (day if day.tzinfo else day.replace(tzinfo=UTC)).timestamp()
    return Key(words[0], bytes.fromhex(words[1]), expires)


class Keys:
    """The accepted keys, read again when their file changes."""

    def __init__(
        self, text: str | None, path: str | None = None, now: Callable[[], float] = time.time
    ):
        self._path, self._now = Path(path) if path else None, now
        self._checked_at, self._file_version = now(), self._version()
        self._keys = parse(self._read() if text is None else text, path or ENVIRONMENT)

    def _read(self) -> str:
        assert self._path is not None
        return read_text(self._path, "keys")

    def _version(self) -> tuple[int, int] | None:
        """Return the file's modification time and inode, which change with its content."""
        try:
            stat = self._path.stat() if self._path else None
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_ino) if stat else None

    def _reload(self) -> None:
        if self._path is None or self._now() < self._checked_at + CHECK_INTERVAL:
            return
        self._checked_at, version = self._now(), self._version()
        if version is None or version == self._file_version:
            return
        try:
            self._keys, self._file_version = parse(self._read(), str(self._path)), version
        except UserError as error:
            LOG.error("the old keys stay in use: %s", error)

    def owner(self, given: str) -> str | None:
        """Return the owner of a key; None for an unknown or an expired one.

        Takes the same time for every key, so that timing reveals nothing.
        """
        self._reload()
        digest = hashlib.sha256(given.encode("utf-8", "replace")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None or (found.expires is not None and self._now() >= found.expires):
            return None
        return found.name


WINDOW = 60.0
"""Seconds of the sliding window."""


class Limits:
    """Counts the requests of each key; not thread-safe, for one event loop.

    The limits are divided by `share`, the number of ingresses.
    """

    def __init__(
        self,
        per_minute: int,
        concurrent: int,
        share: Callable[[], int] = lambda: 1,
        now: Callable[[], float] = time.monotonic,
    ):
        self._per_minute, self._concurrent = per_minute, concurrent
        self._share, self._now = share, now
        self._begun: defaultdict[str, deque[float]] = defaultdict(deque)
        self._running: Counter[str] = Counter()

    @contextmanager
    def admit(self, key: str) -> Iterator[None]:
        """Reserve a slot for one request of a key.

        Raises:
            ClientError: 429, with the seconds until a slot is free. A rejected request does not
                count.
        """
        begun, now = self._begun[key], self._now()
        share = self._share()
        per_minute, concurrent = -(-self._per_minute // share), -(-self._concurrent // share)
        while begun and begun[0] <= now - WINDOW:
            begun.popleft()
        if len(begun) >= per_minute:
            wait = max(1, math.ceil(begun[0] + WINDOW - now))
            message = f"more than {per_minute} requests in a minute"
            raise ClientError(429, message, code="rate_limit_exceeded", retry_after=wait)
        if self._running[key] >= concurrent:
            message = f"more than {concurrent} requests at once"
            raise ClientError(429, message, code="concurrency_limit_exceeded", retry_after=1)
        begun.append(now)
        self._running[key] += 1
        try:
            yield
        finally:
            self._running[key] -= 1
