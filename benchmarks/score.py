"""Scoring answers with a reward model: our pipeline, and plain loops over padded batches.

python benchmarks/score.py     # answers that share their prompt's computation, and that do not
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import results
from parts import Part
from workload import SAMPLES, Clock, ContenderRun, Message, Shape, key, texts, user, write_prompts

from wrpo_ray.config import Config, ScoreConfig
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


# --- sharing prompts ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharing:
    """A kind of answers, and the CPU seconds of scoring them in both ways."""

    name: str
    ratio: float
    """Tokens of a prompt over those of an answer."""
    samples: int
    """Answers to a prompt."""
    answers: int
    sharing: float
    alone: float
    apart: float
    """The largest difference of an answer's two rewards."""

    tokens: float
    """Tokens with padding, alone over sharing."""
    unpadded: float
    """The same without padding."""


KINDS = ((0.5, SAMPLES), (1.0, SAMPLES), (4.0, SAMPLES), (1.0, 1))
"""(ratio, answers to a prompt)."""


def asked(ratio: float, samples: int, options: argparse.Namespace) -> list[Item]:
    """About as many answers of each kind."""
    prompts = options.prompts * SAMPLES // samples
    given = texts(prompts, int(ratio * options.answer_mean), "prompts")
    said = texts(samples * prompts, options.answer_mean, "answers")
    return [Item(user(given[i // samples]), text, None) for i, text in enumerate(said)]


def measure_sharing(options: argparse.Namespace) -> list[Sharing]:
    """Both in turn, in one process; each has its own copy of the model.

    Raises:
        AssertionError: rewards differ, or nothing is shared.
    """
    from wrpo_ray.stages.score.decoder import Decoder
    from wrpo_ray.stages.score.reward_models import load_classifier

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        Shape().write(folder, classifier=True, context=16 * options.answer_mean * 2)
        part = ScoreConfig(model="m", dtype="float32", batch_size=options.batch, max_length=2**16)
        sharing = load_classifier(part, folder, on_gpu=False)
        with mock.patch.object(Decoder, "_can_share", return_value=False):
            alone = load_classifier(part, folder, on_gpu=False)
    assert sharing.shares
    assert not alone.shares
    computed = {reward: tokens_of(reward) for reward in (sharing, alone)}
    found = []
    for ratio, samples in KINDS:
        items = asked(ratio, samples, options)
        times: dict[Any, list[float]] = {sharing: [], alone: []}
        scores: dict[Any, list[Any]] = {}
        for counts in computed.values():
            counts.clear()
        for _ in range(options.repeats):
            for reward, taken in times.items():
                began = time.process_time()
                scores[reward] = reward.score(items)
                taken.append(time.process_time() - began)
        apart = max(abs(a - b) for a, b in zip(scores[sharing], scores[alone], strict=True))
        assert apart < 1e-4, f"rewards differ by {apart}"
        rows = options.repeats * sum(len(sharing.encode(item)) for item in items)
        sums = [sum(computed[reward]) for reward in (sharing, alone)]
        medians = [statistics.median(times[reward]) for reward in (sharing, alone)]
        name = f"r{ratio:g}" + ("" if samples == SAMPLES else f".n{samples}")
        found.append(
            Sharing(
                name, ratio, samples, len(items), *medians, apart, sums[1] / sums[0], rows / sums[0]
            )
        )
        print(found[-1], times.values(), flush=True)
    return found


def tokens_of(reward: Any) -> list[int]:
    """The tokens of each of its forward passes from now on, with padding."""
    counts: list[int] = []
    embedding = reward.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, given, out: counts.append(given[0].numel()))
    return counts


SHARING_TEXT = """# Scoring: answers that share their prompt

Rewards of a classifier, where the answers to a prompt are packed behind it, so that it is computed
once; and where each answer has a row of its own, padded on the right, as before and still for
models that do not allow it. Ratio: alone / sharing.

| prompt / answer | answers | sharing, answers/s | alone, answers/s | ratio | tokens | unpadded |
| --- | --- | --- | --- | --- | --- | --- |
{lines}

- {machine}, one thread, CPU time; medians of {repeats} runs, in turn in one process. Load average
  {load:.1f}.
- A Llama of random weights (width 512, 12 layers, fp32), {batch} answers at the most in a forward
  pass, answers of {answer_mean} tokens on average (log-normal, sigma 0.6). "Tokens" is the
  ratio of the tokens in all forward passes, with padding; where many answers are sorted by length,
  as in a run (64 batches at once), little of it is left, and the ratio of unpadded tokens counts.
- Rewards of both ways are compared: they are within {apart:.0e}.
- Versions: {versions}. `python benchmarks/score.py` repeats it.
"""


def told(found: list[Sharing], options: argparse.Namespace) -> tuple[list[results.Row], str]:
    """Rows of results.json, and the section."""
    versions = results.versions("torch", "transformers", "wrpo-ray")
    about = {"machine": results.machine(), "versions": versions}
    rows = [
        results.row(
            f"reward.sharing.{kind.name}.vs_alone",
            1e3 * kind.sharing / kind.answers,
            1e3 * kind.alone / kind.answers,
            "CPU ms/answer",
            about,
        )
        for kind in found
    ]
    lines = [
        f"| {k.ratio:g} | {k.samples} | {k.answers / k.sharing:.3g} | {k.answers / k.alone:.3g} "
        f"| **{k.alone / k.sharing:.2f}** | {k.tokens:.2f} | {k.unpadded:.2f} |"
        for k in found
    ]
    section = SHARING_TEXT.format(
        **vars(options),
        lines="\n".join(lines),
        machine=about["machine"],
        load=os.getloadavg()[2],
        apart=max(kind.apart for kind in found),
        versions=", ".join(f"{name} {v}" for name, v in versions.items()),
    )
    return rows, section


def main() -> None:
    """Measure what sharing prompts brings, and write it."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4, help="with five answers each")
    parser.add_argument("--answer-mean", type=int, default=160, help="bytes, which are tokens")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, section = told(measure_sharing(options), options)
    print(section)
    results.save(options.output, "reward.sharing.", rows, section)


if __name__ == "__main__":
    main()
