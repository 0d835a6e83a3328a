"""A server of the test's own that speaks as much of the hub's API as its client asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
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

API = re.compile(
    r"/api/(?:models/|(datasets/))([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?"
)
FILE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CHECK = re.compile(r"/api/(?:models/|(datasets/))([^/]+/[^/]+)/auth-check.*")
WRITE = re.compile(r"/api/(?:models/|(datasets/))([^/]+/[^/]+)/(preupload|commit)/main")
LFS = re.compile(r"/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch")
RANGE = re.compile(r"bytes=(\d+)-(\d+)?")
WRITER = "Bearer hf_writer"
"""What may make and write repositories."""


@dataclass
class Repo:
    """A model: the files of each commit, and the commits that branches and tags are at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False
    is_others: bool = False
    """Whether nobody who asks may write it."""
    messages: list[str] = field(default_factory=list)
    """Messages of the commits that were uploaded."""

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
    objects: dict[str, bytes] = field(default_factory=dict)
    """{sha256: content} of large files that were uploaded."""
    broken_commits: int = 0
    """Commits to come that are refused."""
    tokens: set[str | None] = field(default_factory=set)
    """The Authorization headers seen."""
    sent: int = 0
    """Bytes of files that were sent, the end of what a client left unread not counted."""
    pause: float = 0.0
    """Seconds between pieces of a large file."""
    rate: float = 0.0
    """Bytes of files a second for all clients together; 0 is no limit."""
    line: threading.Lock = field(default_factory=threading.Lock)
    """Held by the client that is sent something while there is a rate."""
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

    def setup(self) -> None:
        super().setup()
        # A fixed size: else a socket takes megabytes that nobody reads, and `sent` counts them.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        path = self._note()
        self.hub.objects[path.removeprefix("/object/")] = self._body()
        self._send(b"")

    def do_POST(self) -> None:
        path, body = self._note(), self._body()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != WRITER:
            self._refuse(401, "")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif LFS.fullmatch(path):
            self._batch(json.loads(body)["objects"])
        elif (match := WRITE.fullmatch(path)) and match[3] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [("lfs" if _is_large(name) else "regular", name) for name in names]
            files = [{"path": n, "uploadMode": mode, "shouldIgnore": False} for mode, n in modes]
            self._json({"files": files})
        elif match:
            self._commit((match[1] or "") + match[2], [json.loads(x) for x in body.splitlines()])
        else:
            self._refuse(404, "EntryNotFound")

    def _create(self, wanted: dict[str, Any]) -> None:
        prefix = "datasets/" if wanted.get("type") == "dataset" else ""
        name = f"{prefix}{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.hub.repos else 200
        if wanted["organization"] == "others":
            return self._refuse(403, "")
        if status == 200:
            self.hub.repos[name] = Repo(is_private=wanted["visibility"] == "private")
            self.hub.repos[name].commit({})
        return self._json({"url": f"{self.hub.url}/{name}"}, status)

    def _batch(self, wanted: list[dict[str, Any]]) -> None:
        objects = [{"oid": o["oid"], "size": o["size"]} for o in wanted]
        for found in objects:
            if found["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/object/{found['oid']}"}
                found["actions"] = {"upload": upload}
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        if self.hub.broken_commits:
            self.hub.broken_commits -= 1
            return self._refuse(400, "")
        repo = self.hub.repos[name]
        files = dict(repo.commits[repo.refs["main"]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repo.commit(files)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return self._json({"commitOid": commit, "commitUrl": url})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def _note(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked[self.command, path] += 1
        self.hub.tokens.add(self.headers.get("Authorization"))
        return path

    def _answer(self) -> None:
        path = self._note()
        if match := CHECK.fullmatch(path):
            repo = self.hub.repos[(match[1] or "") + match[2]]
            self._refuse(403, "") if repo.is_others else self._json({})
        elif match := API.fullmatch(path):
            self._api((match[1] or "") + match[2], match[3], match[4] or "main", match[5] or "")
        elif match := FILE.fullmatch(path):
            self._file(*match.groups())
        else:
            self._refuse(404, "EntryNotFound")

    def _api(self, name: str, kind: str | None, revision: str, folder: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound")
        if kind == "tree":
            return self._tree(repo.commits[commit], folder)
        about = {"id": name, "sha": commit, "siblings": [], "private": repo.is_private}
        return self._send(json.dumps(about).encode())

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        start = f"{folder}/" if folder else ""
        under = {path: data for path, data in files.items() if path.startswith(start)}
        if not under:
            return self._refuse(404, "EntryNotFound")
        if "recursive=true" in self.path.lower():
            return self._json([_entry(path, data) for path, data in under.items()])
        names = {path.removeprefix(start).partition("/")[0]: None for path in under}
        direct = [
            _entry(path, files[path])
            if (path := start + name) in files
            else {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            for name in names
        ]
        return self._json(direct)

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
        if asked := RANGE.fullmatch(self.headers.get("Range", "")):
            return self._part(data, int(asked[1]), int(asked[2] or len(data) - 1), headers)
        return self._send(data, headers)

    def _part(self, data: bytes, start: int, last: int, headers: dict[str, str]) -> None:
        if start >= len(data):
            return self._refuse(416, "")
        part = data[start : last + 1]
        place = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        return self._send(part, headers | {"Content-Range": place}, 206)

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
            if self.hub.rate:
                with self.hub.line:
                    time.sleep(min(size, len(data) - start) / self.hub.rate)
            try:
                self.wfile.write(data[start : start + size])
            except OSError:  # the client was killed, or has read enough
                self.close_connection = True
                return
            if "/resolve/" in self.path:
                self.hub.sent += len(data[start : start + size])


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".parquet"))


def _etag(path: str, data: bytes) -> str:
    if _is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _etag(path, data)[:40]}
    if _is_large(path):
        entry["lfs"] = {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}
    return entry
