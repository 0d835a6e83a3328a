"""A secret in an address is refused, in every field and command, and never shown."""

from __future__ import annotations

import http.server
import json
import pickle
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.config_fields import fields

from wrpo_ray import config
from wrpo_ray.cli import entry
from wrpo_ray.cli.entry import main
from wrpo_ray.config import loader
from wrpo_ray.errors import UserError
from wrpo_ray.runtime.cluster import check_listening
from wrpo_ray.runtime.progress import log
from wrpo_ray.runtime.submission import Submission
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step
from wrpo_ray.text.addresses import Address, address_problem, redact, without_secrets

CANARY = "Xyzzy0Plugh"
SECRETS = [
    f"s3://KEY:{CANARY}@bucket/run",
    f"s3://{CANARY}@bucket/run",
    f"s3://KEY:{CANARY}",
    f"s3://KEY:ab/{CANARY}+c/d@bucket/run",
    f"s3://KEY:ab?{CANARY}@bucket/run",
    f"s3://KEY:{CANARY}@bucket/part 1#?.jsonl",
    f"s3://KEY:123/{CANARY}@bucket/run",
    f"s3://bucket/run?access_key=KEY&secret_key={CANARY}",
    f"s3://bucket/run?region=r&session_token={CANARY}",
    f"s3://bucket/run?secret_key=a/{CANARY}&region=r",
    f"s3://bucket/run?secret_key={CANARY}?region=r",
    f"s3://bucket/run?X-Amz-Credential={CANARY}&X-Amz-Signature={CANARY}",
    f"s3://bucket/run?secret-key={CANARY}",
    f"s3://bucket/run?AWS.Secret={CANARY}",
    f"s3://bucket/run? secret_key ={CANARY}",
    f"s3://bucket/run?endpoint_override=http://u:{CANARY}@host:1",
    f"gs://{CANARY}@bucket/run",
    f"abfs://container:{CANARY}@account.dfs.core.windows.net/run",
    f"abfss://container@account.dfs.core.windows.net/run?client_secret={CANARY}",
    f"hdfs://user:{CANARY}@host:8020/run",
    f"https://user:{CANARY}@host/v1",
    f"https://host/v1?key={CANARY}",
    f"ray://user:{CANARY}@host:10001",
    f"S3://KEY:{CANARY}@bucket/run",
    f"s3:///KEY:{CANARY}@bucket/run",
    f"s3://///{CANARY}@bucket/run",
    f"hdfs:///user:{CANARY}@host/run",
    f"s3:/KEY:{CANARY}@bucket/run",
    f"s3:KEY:ab/{CANARY}@bucket",
    f"//KEY:{CANARY}@bucket/run",
    f" s3://KEY:{CANARY}@bucket/run",
    f"\ufeffs3://KEY:{CANARY}@bucket/run",
    f"'s3://KEY:{CANARY}@bucket/run'",
    f'"s3://bucket/run?secret_key={CANARY}"',
    f"<https://user:{CANARY}@host/v1>",
    f"-s3://KEY:{CANARY}@bucket/run",
]
TEXTS = [f for f in fields() if f.kinds <= {str, type(None)} and "tuple" not in str(f.annotation)]
TREES: dict[str, Any] = {
    "fuse": {
        "output": "out",
        "prompts": {"path": "p"},
        "sources": [
            {"name": "a", "model": "m", "chat_template": "t", "revision": "r"},
            {"name": "b", "model": "m", "endpoint": {"url": "https://h/v1"}},
        ],
        "target": {"name": "t", "model": "m"},
        "reward": {"judge": {"model": "j", "endpoint": {"url": "https://h"}, "template": "t"}},
        "evaluate": {
            "prompts": {"path": "p"},
            "models": [{"name": "c", "model": "m"}],
            "judge": {"name": "j", "model": "m"},
            "pairwise": {"template": "t"},
            "benchmarks": {n: {"path": "p"} for n in ("alpaca_eval", "arena_hard", "mt_bench")},
        },
        "cluster": {"address": "host:6379"},
    },
    "import": {"output": "out", "import": {"path": "p"}, "target": {"name": "t", "model": "m"}},
    "study": {
        "output": "out",
        "cases": {"c": {"config": "c.yaml"}},
        "variants": {"v": {"model": "fused"}},
    },
    "serve": {
        "models": [{"name": "a", "model": "m", "adapters": {"x": "folder"}}],
        "reward": {"model": "m"},
        "keys": "keys",
    },
}
NAMES = {"name", "model_name"}
"""Not addresses, but names of the user's own."""


def addresses(tree: Any, path: str = "") -> list[str]:
    """Paths of the texts in a tree, as `--set` has them."""
    if not isinstance(tree, dict | list):
        return [] if path.rpartition(".")[2] in NAMES else [path]
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [p for key, part in inside for p in addresses(part, f"{path}.{key}".lstrip("."))]


def command(kind: str, file: Path) -> list[str]:
    known = {"import": ["fuse", str(file)], "serve": ["serve", "--config", str(file)]}
    return known.get(kind, [kind, str(file)])


@pytest.fixture(autouse=True, scope="module")
def one_parser() -> Iterator[None]:
    """Build the parser of all commands once: most of the time of a refused command goes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "make_parser", cache(entry.make_parser))
        yield


def test_there_are_addresses_everywhere():
    assert {"Config.output", "PromptsConfig.path", "ImportConfig.path", "ModelConfig.model"} < set(
        map(str, TEXTS)
    )
    assert {"EndpointConfig.url", "ClusterConfig.address", "ServeConfig.keys"} < set(
        map(str, TEXTS)
    )
    assert {"ServedModel.adapters", "CaseConfig.config", "JudgeConfig.template"} < set(
        map(str, TEXTS)
    )


@pytest.mark.parametrize("field", fields(), ids=str)
def test_no_field_shows_a_secret(field):
    for secret in SECRETS:
        for value in (secret, [secret], {"x": [secret]}, {secret: 1}):
            told = field.problems(value)
            assert not any(CANARY in line for line in told), told
            assert all(len(line.splitlines()) == 1 for line in told)
        if field in TEXTS:
            assert field.problems(secret)


@pytest.mark.parametrize(
    ("kind", "path"), [(kind, path) for kind, tree in TREES.items() for path in addresses(tree)]
)
def test_a_secret_in_an_address_of_a_config_is_refused(kind, path, tmp_path, capfd, monkeypatch):
    """In the file and by --set, with a traceback too; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WRPO_DEBUG", "1")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(TREES[kind]))
    for secret in SECRETS[::4]:
        changed = json.loads(json.dumps(TREES[kind]))
        loader._put(changed, path, secret, "")
        (tmp_path / "secret.yaml").write_text(yaml.safe_dump(changed))
        for given in (
            command(kind, tmp_path / "secret.yaml"),
            [*command(kind, file), f"--set={path}={json.dumps(secret)}"],
        ):
            assert main(given) == 2
            out, err = capfd.readouterr()
            assert CANARY not in out + err
            assert f"{path.rpartition('.')[0] if path.endswith('.x') else path}: " in err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["c.yaml", "secret.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["fuse", "SECRET"],
        ["status", "SECRET"],
        ["report", "SECRET"],
        ["report", "out", "--to", "SECRET"],
        ["report", "--compare", "SECRET", "SECRET"],
        ["export", "c.yaml", "--to", "SECRET"],
        ["export", "c.yaml", "--format", "model", "--to", "SECRET"],
        ["serve", "SECRET"],
        ["serve", "name=SECRET"],
        ["plan", "SECRET"],
        ["study", "SECRET"],
        ["serve", "--config", "SECRET"],
        ["submit", "c.yaml", "--address", "SECRET"],
        ["submit", "c.yaml", "--set", "output=SECRET"],
        ["cluster", "check", "SECRET"],
        ["cluster", "check", "broken.yaml", "--job", "SECRET"],
        ["cluster", "check", "c.yaml", "--crds", "SECRET"],
        ["fetch", "mt_bench", "SECRET"],
        ["zoo", "SECRET"],
        ["fuse", "c.yaml", "--set", "SECRET"],
        ["fuse", "c.yaml", "--set", "output=SECRET"],
        ["fuse", "c.yaml", "--set", "output=[SECRET"],
        ["fuse", "c.yaml", "--set", "output: [SECRET]=1"],
        ["SECRET"],
        ["SECRET", "fuse"],
        ["fuse", "c.yaml", "SECRET"],
        ["fuse", "c.yaml", "--strange=SECRET"],
        ["plan", "c.yaml", "--until", "SECRET"],
        ["plan", "c.yaml", "--gpus=SECRET"],
        ["export", "c.yaml", "--to", "x", "--dtype", "SECRET"],
        ["fetch", "SECRET", "x"],
        ["cluster", "SECRET"],
        ["fuse", "broken.yaml"],
        ["fuse", "twice.yaml"],
        ["fuse", "strange.yaml"],
        ["cluster", "check", "broken.yaml"],
        ["cluster", "check", "twice.yaml"],
    ],
    ids=" ".join,
)
def test_no_command_shows_a_secret(arguments, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WRPO_DEBUG", "1")
    for number, secret in enumerate(SECRETS):
        Path("c.yaml").write_text(yaml.safe_dump(TREES["fuse"]))
        Path("broken.yaml").write_text(f"a: 1\noutput: '{secret}'\n  b: [")
        Path("twice.yaml").write_text(
            f"output: '{secret}'\noutput: '{secret}'\n'{secret}': 1\n'{secret}': 2"
        )
        Path("strange.yaml").write_text(
            f"outptu: '{secret}'\n'{secret}': '{secret}'\nseed: '{secret}'\n"
        )
        with pytest.raises(SystemExit, match="2"):  # the parser raises it itself
            sys.exit(main([a.replace("SECRET", secret) for a in arguments]))
        out, err = capfd.readouterr()
        assert CANARY not in out + err, number
        assert "error: " in err


@pytest.mark.parametrize("secret", SECRETS)
def test_no_part_of_the_system_shows_a_secret(secret, tmp_path, capfd):
    assert address_problem(secret)
    assert CANARY not in address_problem(secret)
    assert CANARY not in str(Address.of(secret))
    assert CANARY not in redact(f"cannot open '{secret}': no") + redact(f"<{secret}>, {secret}")
    with pytest.raises(UserError) as caught:
        Folder(secret)
    assert CANARY not in str(caught.value)
    tree = {"engine": {"download_dir": secret, "more": [secret]}}
    assert CANARY not in json.dumps(without_secrets(tree))
    root = Folder(str(tmp_path))
    Step("generate", tree).finish(root, {}, 0.0)
    assert CANARY not in (next(tmp_path.glob("*/manifest.json"))).read_text()
    log(f"reading {secret}")
    if "host" in secret:
        with pytest.raises(UserError) as caught:
            check_listening(secret.replace("host", "127.0.0.1").partition("/v1")[0] + ":1")
        assert CANARY not in str(caught.value)
    assert CANARY not in "".join(capfd.readouterr())


class Refusing(http.server.BaseHTTPRequestHandler):
    """A store that refuses everything."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_POST = do_HEAD  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def refusing(monkeypatch) -> Iterator[str]:
    """The address of a folder in a store that takes none of the credentials."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        yield f"s3://bucket/run?endpoint_override={host}&scheme=http&region=r"
        server.shutdown()


@pytest.mark.parametrize(
    "arguments",
    [
        "fuse c.yaml",
        "fuse c.yaml --dry-run",
        "plan c.yaml",
        "failures c.yaml",
        "export c.yaml --to x",
        "export c.yaml --to x --format model",
        "status STORE",
        "status c.yaml",
        "report STORE",
        "report c.yaml",
        "report --compare STORE STORE",
        "serve name=STORE",
    ],
)
def test_a_store_that_refuses_is_told_in_lines(arguments, refusing, tmp_path, capfd, monkeypatch):
    """By every command, before any work; neither a trace nor what opens the store is shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WRPO_SERVE_KEYS", f"me {'0' * 64}")
    tree = {"output": refusing, "prompts": {"path": refusing}, "reward": {"model": refusing}}
    tree |= {"sources": [{"name": "a", "model": refusing}], "target": None}
    Path("c.yaml").write_text(yaml.safe_dump(tree))
    assert main(arguments.replace("STORE", refusing).split()) == 2
    out, err = capfd.readouterr()
    assert all(line.startswith("wrpo: error: ") for line in err.splitlines())
    assert "ACCESS_DENIED" in err
    assert CANARY not in out + err
    assert "endpoint_override" not in out + err


def test_an_option_is_named_only_if_it_is_like_one():
    assert "'access_key'" in address_problem("s3://b/run?access_key=x")
    assert CANARY not in address_problem(f"s3://b/run?{CANARY}=")
    assert "'x-amz-signature'" in address_problem("s3://b/run?region=us&x-amz-signature=x")
    assert "'region'" not in address_problem("s3://b/run?region=us&x@y&b=")


def test_a_key_in_a_text_is_hidden_whatever_is_in_it():
    """Up to its `@`, also where an error quotes the address; what is no key is kept."""
    for key in (f"KEY:a {CANARY}", f"KEY:a'{CANARY}", f'KEY:"{CANARY}', f"KEY:1 <{CANARY}>/x"):
        address = f"s3://{key}@bucket/run"
        for text in (address, f"cannot open '{address}': no", f"<{address}>", repr(address)):
            assert CANARY not in redact(text), text
            assert "no" not in text or redact(text).endswith("no")
    for text in (
        "http://host:8265/v1 is down, ask a@b",
        "s3://bucket/run: not found, ask a@b",
        "hf://org/name@main: no, but hf://org/name@other",
        "2026-11-29 12:30:10 a@b",
        "u:p@h",
        "//server/a@b:c",
    ):
        assert redact(text) == text


def test_a_pattern_is_no_address():
    """Nor is a text in which an address is only a part."""
    for text in (r"https://\S+?id=1", "see https://h/x?y=z", "a@b", "u:p@h", "C:\\x?a=b"):
        assert config.AnswersConfig(refusal_patterns=[text]).refusal_patterns == (text,)
    assert config.ModelConfig(name="a", model="u:p@h", chat_template="see s3://u:p@b").chat_template


def test_what_holds_no_secret_stays_as_it_is():
    options = "endpoint_override=host:9000&scheme=http"
    for address, text in {
        f"s3://bucket/run?{options}": "s3://bucket/run",
        "s3://bucket/a@b:c?.jsonl": "s3://bucket/a@b:c?.jsonl",
        "hdfs:///user/a@b.jsonl": "hdfs:///user/a@b.jsonl",
        "s3://bucket/a?b-c = d.jsonl?&": "s3://bucket/a?b-c = d.jsonl",
        "hf://org/name@main": "hf://org/name@main",
        "abfs://container@account.dfs.core.windows.net/x": "abfs://container@account.dfs.core.windows.net/x",
        "gs://anonymous@bucket/x": "gs://bucket/x",
        "http://127.0.0.1:8000/v1": "http://127.0.0.1:8000/v1",
        "ray://head:10001": "ray://head:10001",
    }.items():
        assert address_problem(address) is None
        assert str(Address.of(address)) == text
    folder = Folder(f"s3://bucket/run?{options}")
    assert repr(folder / "a") == "Folder('s3://bucket/run/a')"
    assert pickle.loads(pickle.dumps(folder)).uri == folder.uri
    given = Submission("c.yaml", (), folder.uri, "http://head:8265", {})
    assert given.metadata["output"] == "s3://bucket/run"
    given = {"output": folder.uri, "n": [{"url": "https://h/v1"}], "s": 1}
    assert without_secrets(given) == {
        "output": "s3://bucket/run",
        "n": [{"url": "https://h/v1"}],
        "s": 1,
    }
