"""The file of Ray's token: whoever reads it runs code on the cluster."""

import os
import subprocess
import sys

import pytest

from wrpo_ray.runtime.cluster import protect_token

MAKE = """
import os
os.umask(0)
from wrpo_ray.runtime.cluster import protect_token
protect_token(create=True)
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
ensure_token_if_auth_enabled()
"""
"""What `ray.init` does first; its umask leaves every right."""


def test_ray_writes_its_token_for_this_user_alone(tmp_path):
    env = os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    env.pop("RAY_AUTH_TOKEN_PATH", None)
    subprocess.run([sys.executable, "-c", MAKE], env=env, check=True)
    file = tmp_path / ".ray" / "auth_token"
    assert len(file.read_text().strip()) >= 32
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("before", "after"), [(0o644, 0o600), (0o777, 0o600), (0o400, 0o400)])
def test_a_token_that_others_can_read_is_theirs_no_longer(tmp_path, monkeypatch, before, after):
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(before)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    protect_token(create=False)
    assert file.stat().st_mode & 0o777 == after
    assert file.read_text() == "secret"


def test_without_a_home_nothing_fails(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/proc/none/token")
    protect_token(create=True)


@pytest.mark.parametrize(
    ("create", "variables"),
    [(False, {}), (True, {"RAY_AUTH_MODE": "disabled"}), (True, {"RAY_AUTH_TOKEN": "x"})],
)
def test_no_file_is_made_where_ray_makes_none(tmp_path, monkeypatch, create, variables):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    protect_token(create=create)
    assert not list(tmp_path.iterdir())
