"""Scores that failed in a finished run: told, tried again, and the selection made anew."""

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from support.tiny_models import write_model

from wrpo_ray import config as configs
from wrpo_ray.cli.entry import main
from wrpo_ray.data.buckets import buckets, write_shard
from wrpo_ray.data.published import parse_messages
from wrpo_ray.data.records import RESPONSE, prompt_id
from wrpo_ray.pipeline.chain import Chain


def shy(messages, response: str, reference: str) -> float:
    """A reward that is not there for one answer, until the file that `reference` names is."""
    if response == "answer 0" and not Path(reference).exists():
        raise ConnectionError("the judge is away")
    return float(response[-1])


def answer(settings: configs.Config, prompts: list[str]) -> None:
    """As if the source had answered."""
    stages = {stage.name: stage for stage in Chain(settings, "select").build()}
    (step,), root = stages["generate"].steps, Chain(settings).root
    for index, prompt in enumerate(prompts):
        key = prompt_id(parse_messages(prompt))
        bucket = next(bucket for bucket in buckets(2) if key in bucket)
        row = {"prompt_id": key, "source": "a", "sample": 0, "text": f"answer {index}"}
        write_shard(root / step.folder, bucket, RESPONSE, [row], key)
    step.finish(root, {"rows": len(prompts)}, time.time())


def test_failed_scores_are_told_and_tried_again(on_cluster, tmp_path, capsys):
    model, here = tmp_path / "model", tmp_path / "judge-is-here"
    write_model(model)
    capsys.readouterr()
    prompts, path = tmp_path / "p.jsonl", tmp_path / "c.yaml"
    rows = [{"prompt": f"Why {i}?", "reference": str(here)} for i in range(4)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    tree = {
        "output": str(tmp_path / "out"),
        "prompts": {"path": str(prompts), "columns": {"reference": "reference"}},
        "sources": [{"name": "a", "model": str(model)}],
        "reward": {"function": f"{__name__}:shy"},
        "sampling": {"samples": 1},
        "storage": {"buckets": 2},
        "failure_limit": 0.5,
    }
    path.write_text(yaml.safe_dump({"report": False} | tree))

    def wrpo(*arguments: str) -> str:
        command, *rest = arguments
        assert main([command, str(path), *rest]) == 0
        return capsys.readouterr().out

    answer(configs.load(path), [row["prompt"] for row in rows])
    wrpo("select")
    (found,) = json.loads(wrpo("failures", "--json"))
    assert (found["step"], found["error"], found["rows"], found["attempts"]) == (
        "score-reward-a", "ConnectionError", 1, 1,
    )  # fmt: skip
    assert "the judge is away" in wrpo("failures")

    here.touch()
    scores = dict.fromkeys(tmp_path.glob("out/score-*/*/[!.]*.parquet"))
    told = wrpo("failures", "--retry")
    assert "1 of score-reward-a" in told
    assert "steps to run again:   score-reward-a, select" in told
    wrpo("select")
    assert wrpo("failures") == "no failed rows\n"
    assert sum(map(rows_of, tmp_path.glob("out/score-*/*/[!.]*.parquet"))) == 4
    assert sum(map(rows_of, scores)) == 3
    selections = sorted(
        sum(map(rows_of, folder.glob("*/[!.]*.parquet")))
        for folder in tmp_path.glob("out/select-*")
    )
    assert selections == [3, 4]


def rows_of(file: Path) -> int:
    return pq.read_metadata(file).num_rows
