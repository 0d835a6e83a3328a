"""API keys: their hashes in a file or in the environment, their owners, and limits of each key.

A key has 256 random bits and cannot be guessed, so one round of SHA-256 is enough. The key itself
is in no file, log or message.
"""

import hashlib
import hmac
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


def parse(text: str, where: str) -> tuple[tuple[Key, ...], list[str]]:
    """Return the keys of a text with `NAME SHA256 [EXPIRES]` a line, and what is wrong with it.

    `#` begins a comment. A line that is wrong is left out; the others hold.
    """
    keys: dict[str, Key] = {}
    problems = []
    for number, line in enumerate(text.removeprefix(BOM).splitlines(), 1):
        try:
            if words := line.partition("#")[0].split():
                key = _key(words)
                if key.name in keys:
                    raise UserError(f"the name {key.name!r} is given twice; each key has its own")
                keys[key.name] = key
        except UserError as error:
            problems.append(f"{where}: line {number}: {error}")
    if not keys:
        problems.append(f"{where}: no keys; `wrpo serve --new-key NAME` makes one")
    return tuple(keys.values()), problems


def _key(words: list[str]) -> Key:
    if len(words) not in (2, 3) or not re.fullmatch("[0-9a-fA-F]{64}", words[1]):
        # The line is not shown: it may hold a key by mistake.
        raise UserError("write NAME SHA256 [EXPIRES], the hash as 64 hex digits")
    expires = None
    if len(words) == 3:
        try:
            day = datetime.fromisoformat(words[2])
        except ValueError:
            raise UserError("EXPIRES is no day or time in ISO 8601") from None
        expires = (day if day.tzinfo else day.replace(tzinfo=UTC)).timestamp()
    return Key(words[0], bytes.fromhex(words[1]), expires)


class Keys:
    """The accepted keys, read again when their file changes.

    What is not in the file now is not accepted: a missing, unreadable or empty file admits nobody,
    and a wrong line none but its own key.
    """

    def __init__(
        self, text: str | None, path: str | None = None, now: Callable[[], float] = time.time
    ):
        self._path, self._now = Path(path) if text is None and path else None, now
        self._where = path or ENVIRONMENT
        self._text: str | None = None
        self._keys: tuple[Key, ...] = ()
        self.problems: list[str] = []
        """What is wrong with the lines now, for the operator; without their content."""
        self._listeners: list[Callable[[list[str]], None]] = []
        self._checked_at = now()
        self._take(text or "") if self._path is None else self._read(self._path)

    def listen(self, told: Callable[[list[str]], None]) -> None:
        """Call a function with the `problems`, now and each time that the file has changed."""
        self._listeners.append(told)
        told(self.problems)

    def check(self) -> None:
        """Read the file, unless that was done within `CHECK_INTERVAL`."""
        if self._path is not None and self._now() >= self._checked_at + CHECK_INTERVAL:
            self._checked_at = self._now()
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            self._take(read_text(path, "keys"))
        except UserError as error:
            self._take("", [f"{error}; nobody is admitted"])

    def _take(self, text: str, problems: list[str] | None = None) -> None:
        keys, found = parse(text, self._where)
        if (text, problems or found) == (self._text, self.problems):
            return
        self._text, self._keys, self.problems = text, keys, problems or found
        for told in self._listeners:
            told(self.problems)

    def owner(self, given: str) -> str | None:
        """Return the owner of a key; None for an unknown or an expired one.

        Takes the same time for every key, so that timing reveals nothing.
        """
        self.check()
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
