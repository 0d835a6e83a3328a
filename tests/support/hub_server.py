"""A server of the test's own that speaks as much of the hub's API as its client asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """A model: the files of each commit, and the commits that branches and tags are at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit and move a branch to it."""
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name], self.refs[ref] = files, name
        return name


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    """{(method, path): how often}."""
    tokens: set[str | None] = field(default_factory=set)
    """The Authorization headers seen."""
    pause: float = 0.0
    """Seconds between pieces of a large file."""
    spoil: str = ""
    """A file that arrives with a byte changed."""
    url: str = ""

    def add(self, repo: str, folder: Path, **more: bytes) -> str:
        """A commit with a folder's files, and `more`; returns its name."""
        files = {p.name: p.read_bytes() for p in folder.iterdir()} | more
        return self.repos.setdefault(repo, Repo()).commit(files)

    def downloads(self, ending: str = "") -> Counter[str]:
        """{file: how often it was downloaded}."""
        found: Counter[str] = Counter()
        for (method, path), count in self.asked.items():
            if method == "GET" and (match := FILE.fullmatch(path)) and path.endswith(ending):
                found[match[3]] += count
        return found


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked[self.command, path] += 1
        self.hub.tokens.add(self.headers.get("Authorization"))
        if match := API.fullmatch(path):
            self._api(match[1], match[2], match[3] or "main")
        elif match := FILE.fullmatch(path):
            self._file(*match.groups())
        else:
            self._refuse(404, "EntryNotFound")

    def _api(self, name: str, kind: str | None, revision: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound")
        if kind == "tree":
            tree = [_entry(path, data) for path, data in repo.commits[commit].items()]
            return self._send(json.dumps(tree).encode())
        return self._send(json.dumps({"id": name, "sha": commit, "siblings": []}).encode())

    def _file(self, name: str, commit: str, path: str) -> None:
        repo = self.hub.repos[name]
        if repo.is_gated and self.headers.get("Authorization") != "Bearer hf_granted":
            return self._refuse(403, "GatedRepo")
        data = repo.commits[commit].get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{_etag(path, data)}"', "X-Repo-Commit": commit}
        if path == self.hub.spoil and self.command == "GET":
            data = data[:-1] + bytes([data[-1] ^ 1])
        return self._send(data, headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def _send(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in ((headers or {}) | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        size = max(1, len(data) // 20)
        for start in range(0, len(data), size):
            if self.hub.pause and len(data) > 10_000:
                time.sleep(self.hub.pause)
            try:
                self.wfile.write(data[start : start + size])
            except OSError:  # the client was killed
                self.close_connection = True
                return


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _etag(path: str, data: bytes) -> str:
    if _is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _etag(path, data)[:40]}
    if _is_large(path):
        entry["lfs"] = {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}
    return entry
