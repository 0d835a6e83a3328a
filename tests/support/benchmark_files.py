"""Small benchmarks in the official files' forms, of our own questions and templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CATEGORIES = ("writing", "math", "stem", "coding")


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def alpaca_eval(folder: Path, count: int = 40) -> Path:
    """Instructions, a baseline that says `even`, and two gamed baselines."""
    folder.mkdir()
    rows = [
        {"instruction": f"{{instruction}} {i}?", "output": f"even {i}", "dataset": "own"}
        for i in range(count)
    ]
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(rows))
    (folder / "alpaca_eval_clf.txt").write_text(
        "<|im_start|>system\nYou compare.\n<|im_end|>\n<|im_start|>user\n{instruction}\n"
        '{\n"m": """{output_1}""",\n"M": """{output_2}"""\n}\n<|im_end|>\n'
    )
    difficulty = np.random.default_rng(0).normal(size=count)
    lines = ["index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    lines += [
        f"{i},{0.7 if delta < 0 else 0.3},{delta},{difficulty[i]},False"
        for delta in (-1.0, 1.0)
        for i in range(count)
    ]
    (folder / "df_gamed.csv").write_text("\n".join(lines) + "\n")
    return folder


def arena_hard(folder: Path, count: int = 12) -> Path:
    """Questions and a baseline that says `even`."""
    folder.mkdir()
    _jsonl(
        folder / "question.jsonl",
        [{"question_id": f"q{i}", "turns": [{"content": f"Arena {i}?"}]} for i in range(count)],
    )
    answers = [{"index": 0, "turns": [{"content": "even"}]}]
    rows = [{"question_id": f"q{i}", "choices": answers} for i in reversed(range(count))]
    _jsonl(folder / "gpt-4-0314.jsonl", rows)
    settings = {
        "system_prompt": "You judge games.",
        "prompt_template": ["{question_1}\n<A>{answer_1}</A>\n<B>{answer_2}</B>"],
    }
    (folder / "judge_config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def mt_bench(folder: Path, count: int = 8) -> Path:
    """Questions of two turns, with right answers."""
    folder.mkdir()
    _jsonl(
        folder / "question.jsonl",
        [
            {
                "question_id": 81 + i,
                "category": CATEGORIES[i % len(CATEGORIES)],
                "turns": [f"First {i}?", f"Second {i}?"],
            }
            for i in range(count)
        ],
    )
    answers = [{"question_id": 81 + i, "choices": [{"turns": ["R1", "R2"]}]} for i in range(count)]
    _jsonl(folder / "gpt-4.jsonl", answers)
    names = {
        "single-v1": "rate <1>{answer}</1>",
        "single-math-v1": "rate {ref_answer_1} <1>{answer}</1>",
        "single-v1-multi-turn": "rate {question_2} <1>{answer_1}</1><2>{answer_2}</2>",
        "single-math-v1-multi-turn": "rate {ref_answer_2} <1>{answer_1}</1><2>{answer_2}</2>",
    }
    rows = [{"name": n, "system_prompt": "s", "prompt_template": t} for n, t in names.items()]
    _jsonl(folder / "judge_prompts.jsonl", rows)
    return folder
