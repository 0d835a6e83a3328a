"""The headers of requests: those that the endpoint reads go on, no other reaches Ray Serve.

Ray Serve takes orders from headers: not to watch for clients that leave, another time limit, a
session, a request id for its logs; and a byte that is not UTF-8 makes it log the request with a
traceback. So this runs before it, in every process that accepts HTTP (`CALLBACK`).
"""

import re

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from wrpo_ray.serve.errors import ClientError

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "wrpo_ray.serve.headers:middlewares"}
"""The variable by which Ray Serve puts middlewares before its own code."""
DECLARED = frozenset(
    b"accept authorization connection content-encoding content-length content-type expect host "
    b"transfer-encoding user-agent".split()
)
"""Headers that go on; the others are dropped, as unknown fields of a body are."""
ODD = re.compile(rb"[^\t\x20-\x7e]")
"""Bytes that no header has that a client needs here."""


class DeclaredHeaders:
    """Passes on `DECLARED` headers, and answers HTTP 400 to a header with odd bytes."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        headers = scope.get("headers", [])
        if scope["type"] == "http" and any(ODD.search(n) or ODD.search(v) for n, v in headers):
            error = ClientError(400, "a header has bytes that are not printable ASCII")
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        kept = [(name, value) for name, value in headers if name.lower() in DECLARED]
        await self._app({**scope, "headers": kept}, receive, send)


def middlewares() -> list[Middleware]:
    """Return what Ray Serve puts before its own code."""
    return [Middleware(DeclaredHeaders)]
