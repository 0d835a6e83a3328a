"""Whole evaluations against a server with scripted answers and judgments."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from support import benchmark_files
from support.grades import grade
from support.openai_server import Call, Server, serving
from support.waiting import LIMIT

from wrpo_ray.cli.entry import main


@dataclass
class World(Server):
    """Models that answer with their names, and a judge with a fixed ranking of them."""

    judge: dict[str, str] = field(default_factory=dict)
    """{part of the judge's prompt: judgment to return instead of a verdict}."""

    def completion(self, call: Call, what: str) -> dict[str, Any]:
        answer = super().completion(call, what)
        choice = answer["choices"][0]
        if call.body["model"] == "judge":
            choice["message"]["content"] = self._judgment(call, choice)
        else:
            said = "good" if "good" in call.prompt else call.body["model"]
            choice["message"]["content"] = f"{said} answer"
        return answer

    def _judgment(self, call: Call, choice: dict[str, Any]) -> str:
        asked = call.prompt
        for part, text in self.judge.items():
            if part in asked:
                return text
        if call.body.get("logprobs"):
            first, second = (grade(t) for t in re.findall(r'"""(.*?)"""', asked, re.DOTALL))
            share = {1: 0.9, 0: 0.5, -1: 0.1}[(first > second) - (first < second)]
            top = [{"token": "m", "logprob": math.log(share)}]
            top += [{"token": "M", "logprob": math.log(1 - share)}]
            choice["logprobs"] = {"content": [{"token": "m", "logprob": 0, "top_logprobs": top}]}
            return "m"
        if asked.startswith("rate"):
            turn = re.findall(r"<\d>(.*?)</\d>", asked, re.DOTALL)[-1]
            return f"Rating: [[{3 * grade(turn)}]]"
        if "final verdict label" in asked:
            return "So: [[A=B]]"
        pattern = r"<[AB]>(.*?)</[AB]>" if "<A>" in asked else r"\[Answer [AB]\]\n(.*?)\n"
        a, b = (grade(t) for t in re.findall(pattern, asked, re.DOTALL))
        if "<A>" in asked:
            return "[[A>>B]]" if a > b else "[[B>>A]]" if a < b else "[[A=B]]"
        return f"[[{'A' if a > b else 'B' if a < b else 'C'}]]"


pytestmark = pytest.mark.usefixtures("on_cluster")


def config(tmp_path: Path, url: str, timeout: float = LIMIT, **evaluate: Any) -> Path:
    def model(name: str) -> dict[str, Any]:
        endpoint = {"url": url, "attempts": 2, "timeout": timeout}
        return {"name": name, "model": name, "endpoint": endpoint}

    rows = [json.dumps({"prompt": f"own {i}?"}) for i in range(20)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    asked = {"models": [model("good"), model("bad")], "judge": model("judge")}
    tree = {
        "output": str(tmp_path / "out"),
        "evaluate": asked | evaluate,
        "storage": {"buckets": 2},
        "failure_limit": 1,
    }
    if "baselines" in evaluate:
        tree["sources"] = [model("even"), model("worse")]
        tree["reward"] = {"function": "support.grades:reward"}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"report": False} | tree))
    return path


def own(tmp_path: Path) -> dict[str, str]:
    return {"path": str(tmp_path / "own.jsonl")}


def table(output: Path) -> dict[str, Any]:
    (file,) = output.glob("comparison-*/comparison.json")
    return json.loads(file.read_text())


def failed(output: Path) -> Counter[str]:
    files = output.glob("verdicts-*/failures/*/*/[!.]*.parquet")
    return Counter(e for f in files for e in pq.read_table(f)["error"].to_pylist())


def test_known_preferences_come_out_of_all_benchmarks_and_nothing_is_asked_twice(tmp_path, capsys):
    benchmarks = {
        name: {"path": str(getattr(benchmark_files, name)(tmp_path / name))}
        for name in ("alpaca_eval", "arena_hard", "mt_bench")
    }
    benchmarks["arena_hard"]["style_control"] = True
    pairs = {"pairs": [["good", "bad"], ["bad", "good"], ["good", "good"]]}
    with serving(World()) as server:
        path = config(
            tmp_path, server.url, benchmarks=benchmarks, prompts=own(tmp_path), pairwise=pairs
        )
        assert main(["evaluate", str(path)]) == 0
        told, calls = capsys.readouterr().out, list(server.calls)
        assert main(["evaluate", str(path), "--fail-below", "0.5"]) == 4
        assert "win rate of bad against good is 0.000" in capsys.readouterr().err
        assert len(server.calls) == len(calls)
    found = table(tmp_path / "out")

    alpaca = found["benchmarks"]["alpaca_eval"]
    assert alpaca["good"]["win_rate"] == pytest.approx(90)
    assert alpaca["bad"]["win_rate"] == pytest.approx(10)
    assert (alpaca["good"]["wins"], alpaca["bad"]["losses"]) == (40, 40)
    assert alpaca["good"]["length_controlled_win_rate"] > 60  # of 40, and regularized
    arena = found["benchmarks"]["arena_hard"]
    assert arena["good"]["win_rate"] > 99
    assert arena["bad"]["win_rate"] < 1
    assert arena["good"]["judged"] == 24
    # All answers are two words without markdown, so that style explains nothing of the wins.
    assert arena["good"]["style_controlled"]["win_rate"] > 90
    assert arena["bad"]["style_controlled"]["win_rate"] < 10
    mt = found["benchmarks"]["mt_bench"]
    assert mt["good"]["overall"] == {"mean": 9.0, "judged": 16, "failed": 0}
    assert mt["bad"]["turns"]["2"]["mean"] == 3.0
    assert set(mt["good"]["categories"]) == set(benchmark_files.CATEGORIES)
    rates = {(p["a"], p["b"]): p["win_rate"]["mean"] for p in found["pairs"]}
    assert rates == {("good", "bad"): 1.0, ("bad", "good"): 0.0, ("good", "good"): 0.5}
    assert not failed(tmp_path / "out")

    assert "AlpacaEval 2 LC %" in told
    assert "Arena-Hard, style-controlled %" in told
    for name in ("comparison.md", "comparison.html"):
        (file,) = tmp_path.glob(f"out/comparison-*/{name}")
        assert "55.9" in file.read_text()  # the paper's
    # Every call once: answers, and for each model 40 + 24 + 16 judgments, and the pairs' games.
    judged = [c for c in calls if c.body["model"] == "judge"]
    assert len(judged) == 2 * (40 + 24 + 16) + 3 * 2 * 20
    temperatures = Counter(
        (c.body["temperature"], len(c.body["messages"]))
        for c in calls
        if c.body["model"] == "good" and ("First" in c.prompt or "Second" in c.prompt)
    )
    # writing .7, math and coding 0, stem .1, two questions each; the second turn has three messages
    assert temperatures == {
        (t, turn): n for t, n in ((0.7, 2), (0.0, 4), (0.1, 2)) for turn in (1, 3)
    }


def test_junk_refusals_and_silence_are_kept_with_their_reasons_and_the_figures_say_so(tmp_path):
    faults = {"own 1?": "400", "own 2?": "hang", "own 3?": "content_filter"}

    def plan(call: Call) -> str:
        if call.body["model"] != "judge":
            return "ok"
        return next((what for part, what in faults.items() if part in call.prompt), "ok")

    junk = {"own 4?": "I would rather not say.", "own 5?": "", "Arena 3?": "[[A>B]] or [[B>A]]"}
    junk |= {"Arena 4?": "Hard to say."}  # the judge is asked to go on, and calls a tie
    benchmarks = {"arena_hard": {"path": str(benchmark_files.arena_hard(tmp_path / "arena"))}}
    with serving(World(plan, judge=junk)) as server:
        path = config(
            tmp_path, server.url, benchmarks=benchmarks, prompts=own(tmp_path),
            pairwise={"pairs": [["good", "bad"]]}, judged=["good"], timeout=5,
        )  # fmt: skip
        assert main(["evaluate", str(path)]) == 0
        again = [c for c in server.calls if "final verdict label" in c.prompt]
    found = table(tmp_path / "out")
    (pair,) = found["pairs"]
    assert (pair["win_rate"]["n"], pair["failed"], pair["win_rate"]["mean"]) == (15, 5, 1.0)
    arena = found["benchmarks"]["arena_hard"]["good"]
    assert (arena["judged"], arena["failed"]) == (22, 2)
    assert failed(tmp_path / "out") == {
        "NoVerdictError": 2 * 3,
        "RefusedError": 2,
        "AnswerTimeoutError": 2,
        "ContentFilterError": 2,
    }
    assert len(again) == 2
    assert [m["role"] for m in again[0].body["messages"]] == ["system", "user", "assistant", "user"]
    (html,) = tmp_path.glob("out/comparison-*/comparison.html")
    assert "15 of 20 judged" in html.read_text()
    assert "22 of 24 judged" in html.read_text()


def test_a_limit_of_failures_stops_the_run(tmp_path, capsys):
    with serving(World(judge={"own": "no idea"})) as server:
        pairs = {"pairs": [["good", "bad"]]}
        path = config(tmp_path, server.url, prompts=own(tmp_path), pairwise=pairs)
        assert main(["evaluate", str(path), "--set", "failure_limit=0.1"]) == 1
    assert "verdicts-pairwise-good-bad: 40 of 40 rows failed" in capsys.readouterr().err


def test_collective_baselines_answer_from_the_sources_and_their_tokens_count(tmp_path):
    """The better source says `even`: best-of-sources ties with it. The mixture sees `good`."""
    benchmarks = {"arena_hard": {"path": str(benchmark_files.arena_hard(tmp_path / "arena"))}}
    pairs = [["best-of-sources", "bad"], ["even", "best-of-sources"], ["mixture", "bad"]]
    with serving(World()) as server:
        path = config(
            tmp_path, server.url, benchmarks=benchmarks, prompts=own(tmp_path),
            pairwise={"pairs": pairs}, judged=["best-of-sources", "mixture"],
            baselines={"best_of_sources": True, "mixture": "good"},
        )  # fmt: skip
        assert main(["evaluate", str(path)]) == 0
        mixed = [c.prompt for c in server.calls if "[Answer 2]" in c.prompt and "own" in c.prompt]
        rewarded = {"pairs": [["best-of-sources", "bad"]], "by": "reward"}
        path = config(
            tmp_path, server.url, prompts=own(tmp_path), pairwise=rewarded,
            baselines={"best_of_sources": True},
        )  # fmt: skip
        before = len(server.calls)
        assert main(["evaluate", str(path), "--set", f"output={tmp_path / 'out'}"]) == 0
        assert len(server.calls) == before
    files = sorted(
        tmp_path.glob("out/comparison-*/comparison.json"), key=lambda f: f.stat().st_mtime
    )
    judged, by_reward = (json.loads(f.read_text()) for f in files)
    assert [p["win_rate"]["mean"] for p in judged["pairs"]] == [1.0, 0.5, 1.0]
    tokens = {m: f["tokens"] for m, f in judged["benchmarks"]["arena_hard"].items()}
    assert tokens == {"best-of-sources": 10, "mixture": 15}  # each call takes five
    assert any("[Answer 1]\neven answer\n\n[Answer 2]\nworse answer" in text for text in mixed)
    (pair,) = by_reward["pairs"]
    assert (pair["by"], pair["win_rate"]["mean"]) == ("reward", 1.0)
