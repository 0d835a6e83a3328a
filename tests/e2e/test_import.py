"""Existing answers and published preference rows enter the chain."""

import collections
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support.harness import ROOT, Wrpo
from support.in_browser import look
from support.shared_data import DATA

REAL = DATA / "gsm8k_real_responses.parquet"
TARGET = "Meta-Llama-3-8B-Instruct"


def table(output: Path, step: str) -> list[dict]:
    return [
        r
        for f in sorted(output.glob(f"{step}-*/*/[!.]*.parquet"))
        for r in pq.read_table(f).to_pylist()
    ]


def config(tmp_path: Path, **tree: object) -> Wrpo:
    path = tmp_path / "import.yaml"
    path.write_text(
        yaml.safe_dump(
            {"output": str(tmp_path / "out"), "storage": {"buckets": 4}, "report": False} | tree
        )
    )
    return Wrpo(path)


@pytest.fixture(scope="module")
def imported(head, tmp_path_factory) -> Path:
    """The output of jobs/import-real.yaml over the real responses."""
    if not REAL.exists():
        pytest.skip("no real data beside the repository, nor named by WRPO_TEST_DATA")
    output = tmp_path_factory.mktemp("imported") / "gsm8k-answers"
    wrpo = Wrpo(ROOT / "jobs" / "import-real.yaml")
    result = wrpo.here(
        "fuse",
        "--set",
        f"import.path={REAL}",
        "--set",
        f"output={output}",
        "--until",
        "pair",
        "--set",
        f"cluster.address={head.address}",
    )
    assert result.returncode == 0, result.stderr
    return output


def test_real_responses(imported):
    """Each y_ws has its prompt's highest reward; ties are spread; no pair is made up."""
    best, target = collections.defaultdict(float), {}
    for row in pq.read_table(REAL, columns=["prompt", "model", "reward"]).to_pylist():
        if row["model"] == TARGET:
            target[row["prompt"]] = row["reward"]
        else:
            best[row["prompt"]] = max(best[row["prompt"]], row["reward"])
    chosen = {r["messages"][0]["content"]: r["source_chosen"] for r in table(imported, "select")}
    assert len(chosen) == 1319
    assert all(answer["reward"] == best[prompt] for prompt, answer in chosen.items())
    hard = [p for p in chosen if best[p] == 1 and target[p] == 0]
    assert len(hard) > 100
    assert all(chosen[p]["reward"] == 1 for p in hard)
    wins = collections.Counter(answer["source"] for answer in chosen.values())
    assert TARGET not in wins
    assert max(wins.values()) <= 0.25 * 1319
    summary = json.loads((imported / "summary.json").read_text())
    counts = {step["step"]: step["counts"] for step in summary["steps"]}
    assert counts["pair"]["rows"] == 0
    assert counts["pair"]["dropped.too_few"] == counts["pair"]["prompts"]
    assert {k[5:]: v for k, v in counts["select"].items() if k.startswith("wins.")} == wins
    report = (imported / "report.html").read_text()
    assert all(f">{name}</text>" in report for name in wins)  # each source has its bar
    assert "done up to pair" in report


def test_the_report_of_real_responses_in_a_browser(imported, browser):
    look(browser, imported / "report.html", "report-import", "main", "#rewards", "#rows")


ANSWERS = [("A", 0, 0.9), ("B", 0, 0.2), ("T", 0, 0.5), ("T", 1, 0.1)]


def one_answer_a_row(question: str) -> list[dict]:
    return [{"q": question, "a": f"{who} {n}", "who": who, "score": s} for who, n, s in ANSWERS]


def all_answers_of_a_model_in_a_row(question: str) -> list[dict]:
    return [
        {
            "q": question,
            "a": [f"{who} {n}" for who, n, _ in ANSWERS if who == name],
            "who": name,
            "score": [score for who, _, score in ANSWERS if who == name],
        }
        for name in "ABT"
    ]


@pytest.mark.parametrize(
    ("form", "rows_of"),
    [("responses", one_answer_a_row), ("candidates", all_answers_of_a_model_in_a_row)],
)
def test_two_target_answers_make_preference_rows_and_columns_are_mapped(
    on_cluster, tmp_path, form, rows_of
):
    rows = [row for i in range(8) for row in rows_of(f"Question {i}?")]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "q", "response": "a", "source": "who", "reward": "score"}
    wrpo = config(
        tmp_path,
        split={"sft": 0.0},
        **{"import": {"path": str(data), "format": form, "columns": columns, "target": "T"}},
    )
    result = wrpo.here("fuse", "--until", "pair")
    assert result.returncode == 0, result.stderr
    pairs = table(tmp_path / "out", "pair")
    assert len(pairs) == 8
    for row in pairs:
        texts = [row[n]["text"] for n in ("source_chosen", "target_chosen", "rejected")]
        assert texts == ["A 0", "T 0", "T 1"]
        assert row["source_margin"] == pytest.approx(0.4)
        assert len(row["candidates"]) == 4

    exported = tmp_path / "published.jsonl"
    assert wrpo.here("export", "--to", str(exported)).returncode == 0
    published = [json.loads(line) for line in exported.read_text().splitlines()]
    assert len(published) == 8
    assert all([a["content"] for a in p["chosen"]] == ["A 0", "T 0"] for p in published)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_published_rows_survive_import_and_export(on_cluster, tmp_path, kind):
    rows = [
        {
            "prompt_id": str(i),
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "chosen": [{"role": "assistant", "content": c} for c in (f"ws{i}", f"wt{i}")],
            "rejected": [{"role": "assistant", "content": f"l{i}"}],
        }
        for i in range(5)
    ]
    data = tmp_path / f"published.{kind}"
    if kind == "jsonl":
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist(rows), data)
    wrpo = config(tmp_path, **{"import": {"path": str(data), "format": "preferences"}})
    assert wrpo.here("fuse", "--until", "pair").returncode == 0
    out = tmp_path / f"again.{kind}"
    result = wrpo.here("export", "--to", str(out))
    assert result.returncode == 0, result.stderr
    if kind == "jsonl":
        again = [json.loads(line) for line in out.read_text().splitlines()]
        again = [row | {"prompt": [row["prompt"]]} for row in again]
    else:
        again = pq.read_table(out).to_pylist()

    def texts(published: list[dict]) -> list:
        return sorted(
            (
                r["prompt"][0]["content"],
                [a["content"] for a in r["chosen"]],
                r["rejected"][0]["content"],
            )
            for r in published
        )

    assert texts(again) == texts(rows)
