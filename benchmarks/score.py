"""Scoring answers with a reward model: our pipeline, and plain loops over padded batches."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from parts import Part
from workload import SAMPLES, Clock, ContenderRun, Message, Shape, key, texts, user, write_prompts

from wrpo_ray.config import Config
from wrpo_ray.data.buckets import buckets, write_shard
from wrpo_ray.data.records import RESPONSE, SCORED, prompt_id
from wrpo_ray.runtime.placement import thread_env
from wrpo_ray.stages.score import stage
from wrpo_ray.stages.score.base import Item

SOURCE = "llama"
CLOCK = "clock.json"


@dataclass(frozen=True)
class Work:
    """Answers to be scored."""

    prompts: int
    buckets: int = 2
    prompt_mean: int = 96
    """Bytes of a prompt, which are tokens."""
    answer_mean: int = 160
    batch: int = 8
    shape: Shape = field(default_factory=Shape)

    @cached_property
    def answers(self) -> list[tuple[list[Message], int, str]]:
        """(prompt, sample, text)."""
        asked = [user(text) for text in texts(self.prompts, self.prompt_mean, "prompts")]
        said = texts(SAMPLES * self.prompts, self.answer_mean, "answers")
        return [(asked[i // SAMPLES], i % SAMPLES, text) for i, text in enumerate(said)]

    @cached_property
    def warm_up(self) -> list[tuple[list[Message], str]]:
        """Others, scored before the clock is started."""
        said = texts(2 * self.batch, self.answer_mean, "warm-up")
        return [(user(text[:20]), text) for text in said]

    def config(self, folder: Path) -> Config:
        """The pipeline's."""
        model = str(folder / "model")
        return Config.model_validate(
            {
                "output": str(folder / "out"),
                "prompts": {"path": str(folder / "prompts.jsonl")},
                "sources": [{"name": SOURCE, "model": model}],
                "sampling": {"samples": SAMPLES},
                "reward": {"model": model, "dtype": "float32", "batch_size": self.batch},
                "storage": {"buckets": self.buckets},
            }
        )

    def write(self, folder: Path) -> None:
        """The model and the prompts."""
        self.shape.write(folder / "model", classifier=True)
        write_prompts(folder / "prompts.jsonl", [m for m, sample, _ in self.answers if sample == 0])


class Clocked(stage.Scorer):
    """The pipeline's actor, whose reward model is warm when the clock is started."""

    work: Work

    @cached_property
    def reward(self) -> Any:
        """The reward model."""
        reward = super().reward
        reward.score([Item(messages, text, None) for messages, text in self.work.warm_up])
        self.clock = Clock(Path(self.run.root.path) / CLOCK)
        return reward

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score a bucket: it is committed when the clock is read."""
        result = super().__call__(row)
        if result["new"]:
            self.clock.lap()
        return result


def ours(folder: Path, work: Work) -> ContenderRun:
    """`wrpo score` where the answers are there."""
    from wrpo_ray.pipeline.chain import Chain
    from wrpo_ray.pipeline.preflight import preflight
    from wrpo_ray.pipeline.runner import fuse

    stage.Scorer = type("Scorer", (Clocked,), {"work": work})
    config = work.config(folder)
    fuse(config, until="prompts")
    chain = Chain(preflight(config), "score")
    *_, generate, score = chain.build()
    put_answers(generate.phases[0][0], chain.root, work)
    fuse(config, until="score")
    scored = score.phases[0][0].samples
    results = {
        f"{row['prompt_id']}/{row['sample']}": row["reward"]
        for bucket in buckets(work.buckets)
        for row in scored.read(chain.root, bucket, SCORED).to_pylist()
    }
    return ContenderRun(*Clock.read(folder / "out" / CLOCK), results)


def put_answers(job: Any, root: Any, work: Work) -> None:
    """Finish the step of generation with the answers that are to be scored."""
    for bucket in buckets(work.buckets):
        rows = [
            dict.fromkeys(RESPONSE.names)
            | {"prompt_id": prompt, "source": SOURCE, "sample": sample, "text": text}
            for messages, sample, text in work.answers
            if (prompt := prompt_id(messages)) in bucket
        ]
        write_shard(job.samples.folder(root), bucket, RESPONSE, rows, "all")
    job.step.finish(root, {"rows": len(work.answers)}, time.time())


def loop(folder: Path, work: Work, by_length: bool = False) -> ContenderRun:
    """Batches in the given order or by the texts' length, padded to their longest."""
    os.environ |= thread_env(1)
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "model", dtype=torch.float32
    ).eval()

    def score(asked: list[tuple[list[Message], str]]) -> list[float]:
        scores = []
        for start in range(0, len(asked), work.batch):
            chats = [
                [*messages, {"role": "assistant", "content": text}]
                for messages, text in asked[start : start + work.batch]
            ]
            inputs = tokenizer.apply_chat_template(
                chats, padding=True, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():
                scores += model(**inputs).logits[:, 0].tolist()
        return scores

    score(work.warm_up)
    clock = Clock(folder / CLOCK)
    answers = work.answers
    if by_length:
        answers = sorted(answers, key=lambda a: len(a[0][0]["content"]) + len(a[2]))
    scores = score([(messages, text) for messages, _, text in answers])
    clock.lap()
    keys = [key(messages, sample) for messages, sample, _ in answers]
    return ContenderRun(*Clock.read(folder / CLOCK), dict(zip(keys, scores, strict=True)))


def sorted_loop(folder: Path, work: Work) -> ContenderRun:
    """The same, with all answers sorted by length before."""
    return loop(folder, work, by_length=True)


# --- the report --------------------------------------------------------------------------------


def check_scores(ours: Mapping[str, float], their: Mapping[str, float]) -> str:
    """They are equal but for rounding."""
    assert ours.keys() == their.keys()
    apart = max(abs(ours[name] - their[name]) for name in ours)
    told = f"scores are within {apart:.0e} of ours"
    assert apart < 1e-4, told
    return told


TEXT = """# Scoring: rewards of answers, side by side

{targets}

{table}

{machine}, one thread. `make bench` repeats the measurements and writes this section and
[results.json](results.json); `data.py --only score` runs this part.

- {units} answers of {answer_mean} tokens on average to {prompts} prompts of {prompt_mean}
  (log-normal, sigma 0.6), and a sequence classifier of {weights:.0f}M random weights, fp32, with
  {batch} answers per forward pass.
- **ours**: `wrpo score` with one actor on existing answers. They are in {buckets} buckets (hash
  partitions of the prompts); each is read, sorted by length, scored and committed as Parquet.
  **loop**: `apply_chat_template(..., padding=True)` and the model, batch by batch, in the given
  order or with all answers sorted by length first.
- Scores are compared: each must be within 1e-4 of ours.
- Time is measured from the first batch of a warm model until the last score is committed or in a
  list. CPU time is the sum over all processes of a run in this time. The load average of the
  minute before was {load:.1f}. "with start" is the total: imports, the start of Ray, and for ours
  the ingestion of prompts and answers.
- Versions: {versions}.

What it does not show: GPUs, several actors, rewards other than classifiers.
"""

PART = Part(
    name="score",
    unit="answer",
    count=len,
    check=check_scores,
    contenders=(loop, ours, sorted_loop),
    titles={"ours": "ours", "loop": "loop", "sorted_loop": "loop, sorted by length"},
    targets={"loop": 0.95, "sorted_loop": 0.95},
    packages=("ray", "torch", "transformers", "wrpo-ray"),
    text=TEXT,
)
