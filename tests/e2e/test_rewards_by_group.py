"""Chat, words, maths and code in one run, each group with a reward of its own."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.harness import Wrpo, shards
from support.openai_server import Call, Server, serving

from wrpo_ray.stages.ingest.groups import FIRST

EACH = 12
"""Prompts of a group."""
SAMPLES = 3
PROGRAM = "```python\ndef f(x):\n    return x * {factor}\n```"


@dataclass
class Teacher(Server):
    """Answers rightly with an even seed: sums, programs, and what it knows."""

    known: dict[str, str] = field(default_factory=dict)

    def completion(self, call: Call, what: str) -> dict[str, Any]:
        """The completion with the answer."""
        told, seed = super().completion(call, what), int(call.body["seed"])
        if sum_ := re.fullmatch(r"What is (\d+) \+ (\d+)\?", call.prompt):
            text = f"It is {int(sum_[1]) + int(sum_[2]) + seed % 2}."
        elif factor := re.fullmatch(r"Write f, which takes x times (\d+)\.", call.prompt):
            text = PROGRAM.format(factor=int(factor[1]) + seed % 2)
        else:
            text = "aeiou"[: 1 + seed % 5] if seed % 2 else self.known[call.prompt]
        told["choices"][0]["message"]["content"] = text
        return told


def prompts(zoo: Path) -> list[dict[str, Any]]:
    """Twelve of each group, three of a group without an own reward, three of none."""
    known = [json.loads(line) for line in (zoo / "prompts.jsonl").read_text().splitlines()[:42]]
    groups = ["chat"] * EACH + ["words"] * EACH + ["riddles"] * 3 + [None] * 3
    rows = [
        {"prompt": row["prompt"], "reference": row["reference"], "group": group}
        for row, group in zip(known, groups, strict=False)
    ]
    for row in rows[:EACH]:
        row["reference"] = None  # a reward model needs none
    for i in range(EACH):
        rows.append({"prompt": f"What is {i} + 30?", "reference": str(i + 30), "group": "maths"})
        text = f"Write f, which takes x times {i + 2}."
        rows.append({"prompt": text, "reference": f"assert f(3) == {3 * i + 6}", "group": "code"})
    rows.append({"prompt": "What is 99 + 1?", "reference": None, "group": "maths"})
    return rows


@pytest.fixture
def run(demo: Callable[..., Wrpo], zoo: Path, tmp_path: Path) -> Callable[..., Wrpo]:
    """Makes the config, with a source for chat only, and a teacher for all prompts.

    Maths and code have files of their own, the other groups a column.
    """
    own = {name: tmp_path / f"{name}.jsonl" for name in ("maths", "code")}
    file, lines = tmp_path / "prompts.jsonl", defaultdict(list)
    for row in prompts(zoo):
        path = own.get(row["group"], file)
        without = {name: value for name, value in row.items() if name != "group" or path == file}
        lines[path].append(json.dumps(without) + "\n")
    for path, written in lines.items():
        path.write_text("".join(written))

    def make(url: str, **by_group: Any) -> Wrpo:
        rewards = {
            "chat": {"model": str(zoo / "reward"), "overflow": "cut_prompt"},
            "words": {"verifier": "exact"},
            "maths": {"verifier": "number"},
            "code": {"verifier": "code"},
        }
        return demo(
            tmp_path / "out",
            prompts=[
                {"path": str(file), "columns": {"reference": "reference", "group": "group"}},
                *(
                    {"path": str(path), "columns": {"reference": "reference"}, "group": name}
                    for name, path in own.items()
                ),
            ],
            sources=[
                {"name": "tiny", "model": str(zoo / "sources/llama-bytes"), "groups": ["chat"]},
                {"name": "teacher", "model": "t", "endpoint": {"url": url}},
            ],
            reward={
                "function": "wrpo_ray.zoo.skills:verify",
                "name": "others",
                "by_group": rewards | by_group,
            },
            sampling={"samples": SAMPLES, "max_tokens": 16},
            split={"sft": 0.25},
            sft=None,
            evaluate=None,
            failure_limit=0.1,
            storage={"buckets": 4},
        )

    return make


def scored(output: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a step that scores, with their prompts."""
    given = {
        row["prompt_id"]: row
        for file in output.glob("prompts-*/*/[!.]*.parquet")
        for row in pq.read_table(file).to_pylist()
    }
    files = sorted(output.glob(f"score-{name}-????????????/*/[!.]*.parquet"))
    rows = pa.concat_tables(map(pq.read_table, files)).to_pylist() if files else []
    return [row | {"of": given[row["prompt_id"]]} for row in rows]


def classified(zoo: Path, rows: list[dict[str, Any]]) -> list[float]:
    """The reward model's scores, one by one, by transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(
        zoo / "reward", dtype=torch.float32
    ).eval()
    found = []
    for row in rows:
        turns = [*row["of"]["messages"], {"role": "assistant", "content": row["text"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(model(ids).logits[0, 0].item())
    return found


def passes(row: dict[str, Any]) -> float:
    """Whether the program of an answer, which is the teacher's or none, passes its test."""
    found = re.fullmatch(r"```python\n(def f\(x\):\n    return x \* \d+\n)```", row["text"])
    if not found:
        return 0.0
    scope: dict[str, Any] = {}
    exec(found[1], scope)
    try:
        exec(row["of"]["reference"], scope)
    except AssertionError:
        return 0.0
    return 1.0


def number(row: dict[str, Any]) -> float:
    found = re.findall(r"\d+", row["text"])
    return float(bool(found) and found[-1] == row["of"]["reference"])


def word(row: dict[str, Any]) -> float:
    text, right = (" ".join(t.lower().split()) for t in (row["text"], row["of"]["reference"]))
    return float(text.removesuffix(".").rstrip() == right)


def plain(row: dict[str, Any]) -> float:
    return float(row["text"].strip() == row["of"]["reference"])


@pytest.mark.usefixtures("on_cluster")
def test_each_group_has_its_reward_and_its_sources(run, zoo, tmp_path):
    output = tmp_path / "out"
    lines = (zoo / "prompts.jsonl").read_text().splitlines()
    known = {row["prompt"]: row["reference"] for row in map(json.loads, lines)}
    with serving(Teacher(known=known)) as server:
        result = run(server.url).here("fuse", "--until", "pair")
    assert result.returncode == 0, result.stderr
    summary = json.loads((output / "summary.json").read_text())
    counts = {step["step"]: step["counts"] for step in summary["steps"]}
    assert counts["generate-tiny"]["rows"] == EACH * SAMPLES
    assert counts["generate-teacher"]["rows"] == (4 * EACH + 7) * SAMPLES

    # every score, by other code, of every answer to the prompts of the group and of no other
    rules = {"words": word, "maths": number, "code": passes, "others": plain}
    sources = {"chat": ("tiny", "teacher", "target")}
    of_group = {"others": {"riddles", None}}
    for name in ("chat", *rules):
        rows = [r for s in ("tiny", "teacher", "target") for r in scored(output, f"{name}-{s}")]
        assert {r["of"]["group"] for r in rows} == of_group.get(name, {name})
        assert {r["source"] for r in rows} == set(sources.get(name, ("teacher", "target")))
        wanted = classified(zoo, rows) if name == "chat" else list(map(rules[name], rows))
        assert [r["reward"] for r in rows] == pytest.approx(wanted, abs=1e-4)
        assert len(set(wanted)) > 1
        mine = [r for r in rows if r["source"] == "teacher"]
        assert len(mine) == SAMPLES * (6 if name == "others" else EACH)

    # a prompt of maths without a reference is three failed rows, and in no selection
    (failed,) = [step for step in counts if step == "score-maths-teacher"]
    assert counts[failed]["failed"] == SAMPLES
    assert counts["select"]["without_answer"] == 1

    # counts by group, from the rows
    groups = summary["groups"]
    sizes = {"chat": EACH, "words": EACH, "maths": EACH + 1, "code": EACH, "": 6}
    assert {name: row["prompts"] for name, row in groups.items()} == sizes
    chosen, pairs = (
        pa.concat_tables(map(pq.read_table, output.glob(f"{n}-*/*/[!.]*.parquet"))).to_pylist()
        for n in ("select", "pair")
    )
    by_id = {
        r["prompt_id"]: r["of"]["group"]
        for name in ("chat", *rules)
        for source in ("tiny", "teacher", "target")
        for r in scored(output, f"{name}-{source}")
    }
    named = {key: group if group in sizes else "" for key, group in by_id.items()}
    for name, row in groups.items():
        best = [r["source_chosen"] for r in chosen if named[r["prompt_id"]] == name]
        assert row["wins"].get("tiny", 0) == sum(a["source"] == "tiny" for a in best)
        assert row["selected"] == len(best) == sum(row["wins"].values())
        assert row["y_ws"] == pytest.approx(sum(a["reward"] for a in best) / len(best))
        own = [r for r in pairs if named[r["prompt_id"]] == name]
        assert row["rows"] == len(own)
        if own:
            mean = sum(r["rejected"]["reward"] for r in own) / len(own)
            assert row["y_l"] == pytest.approx(mean)
    assert groups["chat"]["rows"] > 0
    assert set(groups["maths"]["wins"]) >= {"teacher"}
    assert groups["maths"]["wins"].get("tiny", 0) == 0
    assert "Prompts, preference rows and mean rewards by group" in result.stdout

    # another reward of one group: the scores of the others and all answers stay
    before = shards(output, "generate-*/*/*.parquet") | shards(output, "score-*/*/*.parquet")
    again = run(server.url, maths={"verifier": "exact"}).here("fuse", "--until", "select")
    assert again.returncode == 0, again.stderr
    after = shards(output, "generate-*/*/*.parquet") | shards(output, "score-*/*/*.parquet")
    assert before.items() <= after.items()
    new = Counter(name.split("/")[0].rpartition("-")[0] for name in after.keys() - before.keys())
    assert set(new) == {"score-maths-teacher"}


@pytest.mark.usefixtures("on_cluster")
def test_a_group_without_a_reward_behind_the_first_rows_stops_before_generation(demo, tmp_path):
    """A dry run reads the first rows only."""
    file = tmp_path / "many.jsonl"
    rows = [{"prompt": f"q{i}", "reference": "1", "group": "maths"} for i in range(FIRST + 1)]
    rows += [{"prompt": "q", "reference": "1", "group": "math"}] * 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrpo = demo(
        tmp_path / "out",
        prompts={"path": str(file), "columns": {"reference": "reference", "group": "group"}},
        sources=[{"name": "a", "model": "m", "endpoint": {"url": "http://127.0.0.1:9/v1"}}],
        reward={"by_group": {"maths": {"verifier": "number"}}},
        evaluate=None,
        target=None,
        storage={"buckets": 4},
    )
    assert wrpo.here("fuse", "--until", "select", "--dry-run").returncode == 0
    result = wrpo.here("fuse", "--until", "select")
    assert result.returncode == 2, result.stderr
    assert "no reward covers the prompts of group 'math' (1); add the groups" in result.stderr
    assert not list((tmp_path / "out").glob("generate-*"))
