"""Bad input: one line that names the cause and the remedy, exit code 2; or a kept failure row.

One run for each exit code is a process of its own, as a user starts it.
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.harness import Wrpo, failures

PROMPT = {"prompt": "Reverse abc.", "reference": "cba", "skill": "reverse"}


pytestmark = pytest.mark.usefixtures("on_cluster")


@pytest.fixture
def wrpo(zoo: Path, tmp_path: Path):
    """Makes a config with one source and a verifier as reward; `changes` go on top."""

    def make(rows: object = (PROMPT,), **changes: object) -> Wrpo:
        prompts = tmp_path / "prompts.jsonl"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        prompts.write_text("\n".join(lines))
        tree = {
            "output": str(tmp_path / "out"),
            "prompts": {"path": str(prompts), "columns": {"reference": "reference"}},
            "sources": [{"name": "a", "model": str(zoo / "target")}],
            "reward": {"function": "wrpo_ray.zoo.skills:verify"},
            "sampling": {"samples": 1, "max_tokens": 8},
            "storage": {"buckets": 1},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree | changes))
        return Wrpo(path)

    return make


def refused(result, *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("wrpo: error:")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[0]


def test_unknown_key(wrpo):
    refused(wrpo(sauces=[])("fuse"), "sauces: unknown key", "did you mean 'sources'")


def test_wrong_type(wrpo):
    refused(wrpo(seed="many").here("fuse"), "seed: input should be a valid integer", "'many'")


def test_missing_file(wrpo, tmp_path):
    gone = str(tmp_path / "gone.jsonl")
    refused(
        wrpo(prompts={"path": gone}).here("fuse"), "no such file", gone, "give a JSONL or Parquet"
    )


def test_zero_sources(wrpo):
    refused(wrpo(sources=[]).here("fuse"), "zero sources", "add at least one")


def test_model_folder_without_chat_template(wrpo, zoo, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(zoo / "target", model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    sources = [{"name": "a", "model": str(model)}]
    refused(
        wrpo(sources=sources).here("fuse"), "sources.a", "no chat template", "set `chat_template`"
    )


@pytest.mark.parametrize("case", ["no weights", "a pointer", "another tensor", "a classifier"])
def test_model_that_cannot_be_used_stops_a_dry_run(wrpo, zoo, tmp_path, case):
    model = tmp_path / "model"
    shutil.copytree(zoo / ("reward" if case == "a classifier" else "target"), model)
    weights = model / "model.safetensors"
    told = {
        "no weights": "has no weights",
        "a pointer": "model.safetensors: a git-lfs pointer",
        "another tensor": "norm.weight is missing",
        "a classifier": "gives no answers; give a causal language model",
    }[case]
    if case == "no weights":
        weights.unlink()
    if case == "a pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    if case == "another tensor":
        weights.write_bytes(weights.read_bytes().replace(b'norm.weight"', b'norm.weighs"', 1))
    target = {"name": "t", "model": str(model)}
    refused(wrpo(target=target).here("fuse", "--dry-run"), f"target: {model}: ", told)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_output_that_cannot_be_written(wrpo, tmp_path):
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / "out")
    refused(wrpo(output=output).here("fuse"), output, "is not writable", "set `output`")


def test_missing_column(wrpo, tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"question": ["x"]}), path)
    refused(wrpo(prompts={"path": str(path)}).here("fuse"), "no column 'prompt'", "it has question")


def test_function_that_cannot_be_imported(wrpo):
    refused(wrpo(reward={"function": "nowhere:f"}).here("fuse"), "nowhere:f", "cannot be imported")


def test_empty_prompts(wrpo):
    refused(wrpo(rows=[]).here("prompts"), "has no rows", "give a file with at least one")


def test_malformed_line_is_kept_and_the_run_stops_above_the_limit(wrpo, tmp_path):
    result = wrpo(rows=[PROMPT, "{broken"])("prompts")
    assert result.returncode == 1
    assert "prompts.jsonl:2: JSONDecodeError" in result.stderr
    assert "fix the cause" in result.stderr
    (row,) = failures(tmp_path / "out")
    assert (row["where"], row["error"]) == ("prompts.jsonl:2", "JSONDecodeError")


def test_rows_that_cannot_be_used_are_kept_with_their_reasons(wrpo, tmp_path):
    """Below the limit the run goes on: malformed, null answer, empty prompt, wrong type."""
    bad = [
        "{broken",
        PROMPT | {"reference": None},
        PROMPT | {"prompt": " "},
        "[1]",
        PROMPT | {"prompt": 5},
    ]
    result = wrpo(rows=[PROMPT, *bad], failure_limit=0.9).here("prompts")
    assert result.returncode == 0, result.stderr
    reasons = sorted((r["where"].split(":")[1], r["message"]) for r in failures(tmp_path / "out"))
    assert [place for place, _ in reasons] == ["2", "3", "4", "5", "6"]
    assert "'reference' is null" in reasons[1][1]
    assert "the prompt is empty" in reasons[2][1]
