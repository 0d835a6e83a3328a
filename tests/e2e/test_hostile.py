"""A thousand hostile prompt rows through ingest, rendering and a real engine."""

import json

import pyarrow.parquet as pq
import yaml
from support.harness import Wrpo, failures, rows
from support.hostile import hostile_lines

COUNT = 1000


def test_every_row_is_answered_or_quarantined_and_no_text_becomes_a_special_token(
    zoo, on_cluster, tmp_path
):
    """That the engine saw the ids of `prompt_ids` is known by their number for each prompt."""
    from wrpo_ray.llm.chat import prompt_ids
    from wrpo_ray.llm.rendering import load_tokenizer

    model, output = zoo / "sources" / "llama-bytes", tmp_path / "out"
    lines = hostile_lines(COUNT, seed=0)
    prompts, config = tmp_path / "prompts.jsonl", tmp_path / "config.yaml"
    prompts.write_bytes(b"\n".join(lines))
    tree = {
        "output": str(output),
        "prompts": {"path": str(prompts), "columns": {"group": "group"}},
        "sources": [{"name": "bytes", "model": str(model)}],
        "reward": {"function": "wrpo_ray.zoo.skills:verify"},
        "sampling": {"samples": 1, "max_tokens": 8},
        "storage": {"buckets": 4},
        "failure_limit": 1.0,
    }
    config.write_text(yaml.safe_dump({"report": False} | tree))
    result = Wrpo(config).here("generate")
    assert result.returncode == 0, result.stderr

    failed = failures(output)
    unread = [row["error"] for row in failed if row["stage"] == "prompts"]
    assert {"RowError", "JSONDecodeError", "UnicodeDecodeError", "RecursionError"} <= {*unread}
    unanswered = {row["prompt_id"]: row["error"] for row in failed if row["stage"] == "generate"}
    assert "PromptTooLongError" in unanswered.values()
    too_long = [row["message"] for row in failed if row["error"] == "PromptTooLongError"]
    assert all("the context of bytes" in message for message in too_long)
    answered = dict(rows(output, "generate-bytes", "prompt_id", "prompt_tokens"))
    asked = {r["prompt_id"]: r["messages"] for r in shard_rows(output, "prompts")}
    assert len(answered) > 300
    assert asked.keys() == answered.keys() | unanswered.keys()
    assert len(asked) == len(answered) + len(unanswered)
    steps = {s["step"]: s for s in json.loads((output / "summary.json").read_text())["steps"]}
    blank = sum(not line.strip() for line in lines)
    assert len(asked) + len(unread) + steps["prompts"]["counts"]["dropped"] + blank == COUNT

    tokenizer = load_tokenizer(model)
    special = set(tokenizer.all_special_ids)
    spelled = 0
    for key, tokens in answered.items():
        ids = prompt_ids(tokenizer, asked[key])
        own = prompt_ids(tokenizer, [message | {"content": "x"} for message in asked[key]])
        assert [i for i in ids if i in special] == [i for i in own if i in special]
        assert str(len(ids)) == tokens
        spelled += any("<|end|>" in message["content"] for message in asked[key])
    assert spelled > 5


def shard_rows(output, step: str) -> list[dict]:
    files = output.glob(f"{step}-*/*/[!.]*.parquet")
    return [row for file in files for row in pq.read_table(file).to_pylist()]
