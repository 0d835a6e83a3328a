"""Prompts of a data set on the hub, read by tasks of a cluster with an environment of its own."""

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import Repo
from support.ray_head import RayHead

from wrpo_ray import read
from wrpo_ray.config import Config
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.runner import fuse
from wrpo_ray.stages.ingest import distribute


def files(*prompts: str) -> dict[str, bytes]:
    """One prompt in a Parquet file, the others in JSON lines."""
    first = io.BytesIO()
    pq.write_table(pa.table({"prompt": prompts[:1]}), first)
    lines = "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts[1:])
    return {"data/train-0.parquet": first.getvalue(), "data/train-1.jsonl": lines.encode()}


def prompts(settings: Config) -> list[str]:
    """The prompts that a run read."""
    rows = read(settings.output, "prompts").to_pylist()
    return sorted(row["messages"][0]["content"] for row in rows)


def test_a_run_that_resumes_keeps_its_commit(hub, tmp_path, monkeypatch):
    """The nodes have no token at first; the branch moves before the same command runs again.

    One task reads all files, then one each.
    """
    repo = hub.repos["datasets/org/data"] = Repo(is_gated=True)
    first = repo.commit(files("a", "b", "c"))
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    settings = Config(
        output=str(tmp_path / "out"),
        prompts={"path": "hf://datasets/org/data/data/train-*"},
        sources=[{"name": "a", "model": "m", "endpoint": {"url": "http://127.0.0.1:9/v1"}}],
        reward={"function": "wrpo_ray.zoo.skills:verify"},
        storage={"buckets": 2},
        report=False,
    )
    with RayHead(2, env={"HF_TOKEN": ""}) as head:
        monkeypatch.setenv("RAY_ADDRESS", head.address)
        with pytest.raises(UserError, match="is gated; .* set HF_TOKEN, on every node, to a token"):
            fuse(settings, until="prompts")
        repo.is_gated = False
        second = repo.commit(files("a", "b", "d"))
        with monkeypatch.context() as patch:
            patch.setattr(distribute, "SMALL", 0)
            fuse(settings, until="prompts")
        assert prompts(settings) == ["a", "b", "c"]
        fresh = settings.model_copy(update={"output": str(tmp_path / "fresh")})
        fuse(fresh, until="prompts")
        assert prompts(fresh) == ["a", "b", "d"]
    read_at = {path.split("/")[5] for _, path in hub.asked if "/resolve/" in path}
    assert read_at == {first, second}
    outline = json.loads((tmp_path / "out" / "chain.json").read_text())
    assert outline["config"]["prompts"]["path"] == f"hf://datasets/org/data@{first}/data/train-*"
    assert os.environ["HF_TOKEN"] not in json.dumps(outline)
