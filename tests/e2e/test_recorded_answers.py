"""Recorded answers as sources: matched, scored, mixed with models that are asked, added later."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.harness import ROOT, Wrpo, failures, shards
from support.openai_server import Server, serving
from support.shared_data import DATA

REAL = DATA / "gsm8k_real_responses.parquet"
TARGET = "Meta-Llama-3-8B-Instruct"
PROMPTS = 24
VERIFY = {"function": "wrpo_ray.zoo.skills:verify"}


def job(tmp_path: Path, **tree: Any) -> Wrpo:
    path = tmp_path / "recorded.yaml"
    given = {"output": str(tmp_path / "out"), "storage": {"buckets": 4}, "report": False}
    path.write_text(yaml.safe_dump(given | tree))
    return Wrpo(path)


def table(output: Path, step: str) -> list[dict[str, Any]]:
    files = sorted(shards(output, f"{step}-????????????/*/*.parquet"))
    return [row for file in files for row in pq.read_table(output / file).to_pylist()]


def manifest(output: Path, step: str) -> dict[str, Any]:
    (file,) = output.glob(f"{step}-????????????/manifest*.json")
    return json.loads(file.read_text())


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_eight_real_models_are_sources_of_one_file(on_cluster, tmp_path):
    """Without `prompts`: the file has them. Each y_ws has the highest of the recorded scores."""
    if not REAL.exists():
        pytest.skip("no real data beside the repository, nor named by WRPO_TEST_DATA")
    best: dict[str, float] = collections.defaultdict(float)
    for row in pq.read_table(REAL, columns=["prompt", "model", "reward"]).to_pylist():
        if row["model"] != TARGET:
            best[row["prompt"]] = max(best[row["prompt"]], row["reward"])
    wrpo, out = Wrpo(ROOT / "jobs" / "recorded.yaml"), tmp_path / "out"
    names = {source["name"] for source in yaml.safe_load(wrpo.config.read_text())["sources"]}
    paths = [f"--set=sources.{i}.answers.path={REAL}" for i in range(len(names))]
    result = wrpo.here("fuse", "--until", "select", f"--set=output={out}", *paths)
    assert result.returncode == 0, result.stderr
    chosen = {r["messages"][0]["content"]: r["source_chosen"] for r in table(out, "select")}
    assert {prompt: answer["reward"] for prompt, answer in chosen.items()} == best
    assert len(names) == 8
    for name in names:
        counts = manifest(out, f"recorded-{name}")["counts"]
        assert (counts["rows"], counts["prompts"], counts["unmatched"]) == (1319, 1319, 0)
    assert {answer["source"] for answer in chosen.values()} == names
    assert all(row["reference"] for row in table(out, "prompts"))


def test_recorded_answers_beside_models_and_an_endpoint(on_cluster, zoo, tmp_path):
    """Answers are counted by source; a second file later leaves all finished work alone."""
    lines = (zoo / "prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[: PROMPTS + 2]]
    prompts, others = rows[:PROMPTS], rows[PROMPTS:]
    right = [{"q": r["prompt"], "a": r["reference"], "s": 9.5, "end": "EOS"} for r in prompts[:10]]
    wrong = [{"prompt": r["prompt"], "response": ["?", r["reference"]]} for r in prompts + others]
    write(tmp_path / "scored" / "train" / "0.parquet", right + right[:2])
    scored = {
        "path": str(tmp_path / "scored"),
        "columns": {"prompt": "q", "response": "a", "reward": "s", "finish_reason": "end"},
        "reward": "recorded",
    }
    plain = {"path": write(tmp_path / "plain.jsonl", wrong)}
    with serving(Server(usage={"prompt_tokens": 5, "completion_tokens": 5})) as server:
        sources = [
            {"name": "scored", "answers": scored},
            {"name": "live", "model": str(zoo / "sources" / "llama-bytes")},
            {"name": "plain", "answers": plain},
            {"name": "far", "model": "served", "endpoint": {"url": server.url}},
        ]
        tree = {
            "prompts": {
                "path": write(tmp_path / "prompts.jsonl", prompts),
                "columns": {"reference": "reference"},
            },
            "reward": VERIFY,
            "sampling": {"samples": 2, "max_tokens": 8},
            "sources": sources,
        }
        wrpo, out = job(tmp_path, **tree), tmp_path / "out"
        result = wrpo.here("fuse", "--until", "select")
        assert result.returncode == 0, result.stderr
        assert len(server.calls) == PROMPTS * 2
        counts = manifest(out, "recorded-plain")
        assert {n: counts["counts"][n] for n in ("read", "rows", "unmatched")} == {
            "read": 2 * PROMPTS + 4, "rows": 2 * PROMPTS, "unmatched": 4,
        }  # fmt: skip
        assert any(repr(others[0]["prompt"]) in shown for shown in counts["unmatched"])
        assert manifest(out, "recorded-scored")["counts"]["dropped"] == 2
        candidates = [c for row in table(out, "select") for c in row["candidates"]]
        found = collections.Counter(c["source"] for c in candidates)
        assert found == {"scored": 10, "plain": 48, "far": 48, "live": 48}
        rewards = {(c["source"], c["reward"]) for c in candidates}
        assert ("scored", 9.5) in rewards
        assert {reward for source, reward in rewards if source == "plain"} == {0.0, 1.0}
        assert "scores of its own (column s)" in result.stderr
        status = wrpo.here("status").stdout
        assert "4 match no prompt (such as plain.jsonl:" in status
        assert "scores of its own" in status

        before = shards(out, "*-????????????/*/*.parquet")
        server.calls.clear()
        late = write(
            tmp_path / "late.jsonl",
            [{"prompt": r["prompt"], "response": r["reference"]} for r in prompts],
        )
        tree["sources"] = [*sources, {"name": "late", "answers": {"path": late}}]
        result = job(tmp_path, **tree).here("fuse", "--until", "select")
        assert result.returncode == 0, result.stderr
        assert not server.calls
        after = shards(out, "*-????????????/*/*.parquet")
        assert {name: time for name, time in after.items() if name in before} == before
        new = {name.split("/")[0].rsplit("-", 1)[0] for name in after.keys() - before.keys()}
        assert new == {"recorded-late", "score-reward-late", "select"}


def by_id(tmp_path: Path) -> dict[str, Any]:
    """A job whose recorded answers know their prompts by an id; the target's are recorded too."""
    prompts = [{"prompt": f"Question {i}?", "n": i} for i in range(20)]
    files = [
        [{"uid": float(i), "response": f"{says} {i}", "score": i % 2 + 0.5} for i in part]
        for says in ("<think>7</think>A", "B")
        for part in (range(10), range(10, 22))
    ]
    for number, rows in enumerate(files):
        write(tmp_path / "AB"[number // 2] / f"{number}.jsonl", rows)
    own = [{"uid": f"{i}", "response": ["good", "bad"], "score": [2.0, 1.0]} for i in range(20)]
    own = [row | {"why": ["9", None]} for row in own]
    ids = {"id": "uid", "reward": "score"}
    recorded = {"columns": ids, "reward": "recorded"}
    return {
        "prompts": {"path": write(tmp_path / "p.parquet", prompts), "columns": {"id": "n"}},
        "sources": [
            {"name": name, "answers": {"path": str(tmp_path / name), **recorded} | more}
            | {"license": "mit"}
            for name, more in {"A": {"reasoning": "strip"}, "B": {}}.items()
        ],
        "target": {
            "name": "t",
            "model": "unset",
            "answers": {
                "path": write(tmp_path / "own.jsonl", own),
                "columns": ids | {"reasoning": "why"},
                "reward": "recorded",
                "reasoning": "strip",
            },
        },
        "sft": None,
        "split": {"sft": 0.0},
    }


@pytest.mark.parametrize("small", [True, False])
def test_answers_of_sources_and_target_by_id(on_cluster, zoo, tmp_path, monkeypatch, small):
    """In one task or by Ray Data's shuffles: the same rows; no reward is needed, none is loaded."""
    if not small:
        monkeypatch.setattr("wrpo_ray.stages.ingest.distribute.SMALL", -1)
    tree = by_id(tmp_path)
    tree["target"]["model"] = str(zoo / "target")
    wrpo, out = job(tmp_path, report=True, **tree), tmp_path / "out"
    planned = wrpo.here("plan", "--until", "pair")
    assert planned.returncode == 0, planned.stderr
    assert "recorded-t: off-policy" in planned.stdout
    listed = wrpo.here("fuse", "--dry-run", "--until", "pair")
    assert listed.returncode == 0, listed.stderr
    assert not list(out.iterdir())
    folders = {word.rpartition("-")[0] for word in listed.stdout.split()}
    assert {"recorded-A", "recorded-t"} <= folders
    result = wrpo.here("fuse", "--until", "pair")
    assert result.returncode == 0, result.stderr
    counts = {n: manifest(out, f"recorded-{n}")["counts"] for n in ("A", "B", "t")}
    assert [(c["rows"], c["unmatched"]) for c in counts.values()] == [(20, 2), (20, 2), (40, 0)]
    pairs = table(out, "pair")
    assert len(pairs) == 20
    rows = [row for name in "ABt" for row in table(out, f"recorded-{name}")]
    why = "<think>\n9\n</think>\n\n"
    assert {(row["text"].split()[0], row["reasoning"]) for row in rows} == {
        ("A", "<think>7</think>"), ("B", None), ("good", why), ("bad", None),
    }  # fmt: skip
    for row in pairs:
        number = int(row["messages"][0]["content"].split()[1][:-1])
        assert row["source_chosen"]["text"] in (f"A {number}", f"B {number}")
        assert row["source_chosen"]["reward"] == number % 2 + 0.5
        assert (row["target_chosen"]["text"], row["rejected"]["text"]) == ("good", "bad")
        assert row["target_chosen"]["source"] == "t"
    assert "off-policy" in result.stderr
    report = (out / "report.html").read_text()
    assert "off-policy" in report
    assert "uid 20" in report
    exported = tmp_path / "rows"
    assert wrpo.here("export", "--to", str(exported)).returncode == 0
    card = (exported / "README.md").read_text()
    assert "| source | A | recorded answers | " in card
    assert " | mit |" in card
    assert not failures(out)


def test_what_cannot_be_used_is_refused_before_models_are_asked(on_cluster, tmp_path):
    asked = write(tmp_path / "p.jsonl", [{"prompt": "a?"}, {"prompt": "b?"}])
    far = {"name": "far", "model": "served", "endpoint": {"url": "http://127.0.0.1:9/v1"}}

    def refused(rows: list[dict[str, Any]], failure_limit: float = 0.01, **answers: Any) -> str:
        given = {"path": write(tmp_path / "r.jsonl", rows), **answers}
        sources = [far, {"name": "r", "answers": given}]
        tree = {"prompts": {"path": asked}, "reward": VERIFY, "failure_limit": failure_limit}
        wrpo = job(tmp_path, sources=sources, **tree)
        result = wrpo.here("fuse", "--until", "select")
        assert result.returncode != 0, result.stdout
        assert not list(tmp_path.glob("out/generate-*"))
        return result.stderr.splitlines()[-1]

    said = refused([{"prompt": " a?", "response": "x"}, {"prompt": "c?", "response": "y"}])
    assert "none of the 2 answers in" in said
    assert "(such as r.jsonl:1: ' a?'; r.jsonl:2: 'c?')" in said
    said = refused([{"prompt": "a?", "response": 3}], failure_limit=1)
    assert "recorded-r: no usable answer in" in said
    assert "see " in said
    twice = [{"prompt": "a?", "response": "x", "s": s} for s in (1, 2)]
    said = refused(twice, columns={"reward": "s"}, reward="recorded")
    assert "the same answer to the prompt has 2 scores (1, 2); keep one" in said
    said = refused([{"response": "x"}])
    assert "sources.r.answers: " in said
    assert "has no column 'prompt' in its first rows; they have response; set `columns`" in said
    nameless = [*twice, {"prompt": "a?", "response": None}]
    said = refused(nameless, 1, columns={"source": "response"}, of="Y")
    assert "is of 'Y' in the column 'response'; set `answers.of` to one of x; see " in said
