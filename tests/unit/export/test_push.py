"""`wrpo export --push`: what the hub holds afterwards is what was exported, as a user reads it."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants, snapshot_download
from support.hub_server import Repo, serve
from unit.export import test_export, test_export_model

from wrpo_ray.cli.entry import main
from wrpo_ray.config import Config
from wrpo_ray.export.push import Push

run, config, weights = test_export.run, test_export_model.config, test_export_model.weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub, and a token that may write."""
    with serve() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # files over plain HTTP
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


def command(config: Config, to: Path, *more: str) -> list[str]:
    """The command line of an export."""
    path = to.parent / "config.yaml"
    tree = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    path.write_text(yaml.safe_dump(tree))
    return ["export", str(path), "--to", str(to), *more]


def content(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_a_pushed_model_is_read_back_whole_and_is_private(hub, config, weights, tmp_path, capsys):
    test_export_model.finish(config, weights)
    to, back = tmp_path / "fused", tmp_path / "back"
    push = command(config, to, "--format", "model", "--push", "org/fused")
    assert main(push) == 0
    assert capsys.readouterr().out.endswith(f"uploaded to {hub.url}/org/fused\n")
    assert hub.repos["org/fused"].is_private
    assert hub.repos["org/fused"].messages == ["Export of the model of the run out by wrpo_ray"]
    snapshot_download("org/fused", local_dir=back, cache_dir=tmp_path / "hf")
    assert content(back) == content(to)
    (to / "secret.pem").write_text("mine")
    assert main(push) == 0
    assert "secret.pem" not in hub.repos["org/fused"].commits[hub.repos["org/fused"].refs["main"]]


def test_adapters_go_with_the_model_that_they_were_trained_on(hub, tmp_path):
    names = {"README.md", "base/config.json", "base/model.safetensors",
             "adapters/adapter_config.json", "adapters/adapter_model.safetensors"}  # fmt: skip
    for name in names | {"notes/a.json", ".env"}:
        (tmp_path / "to" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "to" / name).write_text(name)
    push, to = Push("org/lora", "model"), str(tmp_path / "to")
    push.check(to)
    push.check_hub()
    push.upload(to, "run", ("adapters", "base"))
    repo = hub.repos["org/lora"]
    assert set(repo.commits[repo.refs["main"]]) == names
    push.upload(to, "run", ("adapters", "base"))  # nothing has changed


def test_pushed_rows_are_a_data_set_and_a_broken_upload_continues(hub, run, tmp_path, capsys):
    from datasets import load_dataset

    to, back = tmp_path / "rows", tmp_path / "back"
    push = command(run, to, "--push", "org/rows", "--public")
    hub.broken_commits = 1
    assert main(push) == 2
    assert "answers 400; run the command again later" in capsys.readouterr().err
    assert main(push) == 0
    assert capsys.readouterr().out.endswith(f"uploaded to {hub.url}/datasets/org/rows\n")
    sent = [count for (method, _), count in hub.asked.items() if method == "PUT"]
    assert sent == [1]  # the file of the first try is not sent again
    assert not hub.repos["datasets/org/rows"].is_private
    snapshot_download("org/rows", repo_type="dataset", local_dir=back, cache_dir=tmp_path / "hf")
    assert content(back) == content(to)
    rows = load_dataset(str(back), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 60


def test_what_cannot_be_pushed_is_refused_before_the_export(
    hub, run, tmp_path, capsys, monkeypatch
):
    hub.repos["datasets/org/taken"] = Repo(is_others=True)
    hub.repos["datasets/org/open"] = Repo()
    hub.repos["datasets/org/closed"] = Repo(is_private=True)
    for name in ("open", "closed"):
        hub.repos[f"datasets/org/{name}"].commit({})
    to = tmp_path / "rows"

    def refusal(*more: str) -> str:
        capsys.readouterr()
        assert main(command(run, to, *more)) == 2
        assert not to.exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "hf_" not in said
        return said

    assert "--public belongs to --push" in refusal("--public")
    for name in ("rows", "a/b/c", "org/..", "org/a b"):
        assert "not a valid name; give ORG/NAME" in refusal("--push", name)
    for name in ("others/rows", "org/taken"):
        assert "does not let this token write it (403)" in refusal("--push", name)
    assert "is public; add --public" in refusal("--push", "org/open")
    assert "is private; drop --public" in refusal("--push", "org/closed", "--public")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not let this token write it (401)" in refusal("--push", "org/rows")
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "is not reached (ConnectError)" in refusal("--push", "org/rows")
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token; set HF_TOKEN" in refusal("--push", "org/rows")
    to = tmp_path / "rows.parquet"
    assert "--push uploads a folder" in refusal("--push", "org/rows")


def test_no_repository_is_made_where_there_is_nothing_to_export(hub, config, tmp_path, capsys):
    nothing = config.model_copy(update={"output": str(tmp_path / "nothing")})
    for more, said in (((), "wrpo pair"), (("--format", "model"), "wrpo train")):
        push = command(nothing, tmp_path / "to", "--push", "org/new", *more)
        assert main(push) == 2
        assert f"not there yet; run `{said}` first" in capsys.readouterr().err
    assert not hub.repos
    assert not hub.asked


BESIDE = ["README.md", ".gitattributes", "notes.md", "x/y.safetensors"]
"""Files of a repository that no loader takes for a part of an export."""


def refused(hub, path: str, name: str, push: list[str], capsys) -> None:
    """The push is refused for a file that the repository has, which stays as it is."""
    hub.repos[path] = Repo(is_private=True)
    held = hub.repos[path].commit(dict.fromkeys([*BESIDE, name], b"x"))
    assert main(push) == 2
    assert f"org/m: holds {name} of another export" in capsys.readouterr().err
    assert hub.repos[path].refs["main"] == held
    hub.repos[path].commit(dict.fromkeys(BESIDE, b"x"))


def test_rows_of_another_export_are_not_mixed_with_those_that_are_pushed(
    hub, run, tmp_path, capsys
):
    push = command(run, tmp_path / "rows", "--push", "org/m")
    refused(hub, "datasets/org/m", "data/train-00001-of-00002.parquet", push, capsys)
    assert main(push) == 0


def test_weights_of_another_export_are_not_mixed_with_those_that_are_pushed(
    hub, config, weights, tmp_path, capsys
):
    test_export_model.finish(config, weights)
    push = command(config, tmp_path / "m", "--format", "model", "--push", "org/m")
    for name in (
        "m.gguf",  # as an earlier export with --gguf wrote it
        "model-00001-of-00002.safetensors",
        "adapters/adapter_model.safetensors",
        "additional_chat_templates/x.jinja",
    ):
        refused(hub, "org/m", name, push, capsys)
    assert main(push) == 0
