"""The job that turns judgments into verdicts: one row for each prompt and position.

A verdict fails if a model gave no answer, if the judge gave no judgment (its own error is
repeated), or if the judgment holds no valid verdict.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from wrpo_ray.config import Actors
from wrpo_ray.data.buckets import Bucket, buckets, read_bucket, write_shard
from wrpo_ray.data.failures import retrying_failures, write_failures
from wrpo_ray.data.records import FAILURE, JUDGMENT, FailureRow, failure
from wrpo_ray.data.samples import Samples
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.pool import map_rows
from wrpo_ray.runtime.progress import log
from wrpo_ray.stages.evaluate.answers import Answer, Answers
from wrpo_ray.stages.evaluate.protocols import Item, Judging, Judgment, NoVerdictError
from wrpo_ray.stages.evaluate.questions import Questions, items, rows_of
from wrpo_ray.storage.steps import Step

Row = dict[str, Any]


class NoAnswerError(ValueError):
    """A model gave no answer to judge."""


class NotJudgedError(RuntimeError):
    """The judge gave no judgment."""


def once(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return the steps without repetitions, in order."""
    return tuple({step.key: step for step in steps}.values())


@dataclass(frozen=True)
class Game:
    """The judge's prompts and judgments at one position."""

    questions: Questions
    judgments: Samples
    continued: Samples | None = None
    """The judgments that were given when the judge was asked to continue."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """The judge's steps."""
        return (self.judgments.step, *([self.continued.step] if self.continued else []))


@dataclass(frozen=True)
class Verdicts(BaseJob):
    """Write the verdicts on one model, or one pair of models."""

    kind = JobKind.VERDICTS

    judging: Judging
    model: str
    against: str | None
    judge: str
    games: tuple[Game, ...]

    @property
    def prompts(self) -> Questions:
        """The judge's prompts of the first game."""
        return self.games[0].questions

    @property
    def answers(self) -> tuple[Answers, ...]:
        """The judged answers of both models, or of all turns."""
        return self.games[-1].questions.answers

    @cached_property
    def step(self) -> Step:
        """The step of the output folder."""
        inputs = [step for game in self.games for step in game.steps]
        inputs += [step for answers in self.answers for step in answers.steps]
        pair = [self.model] + ([self.against] if self.against else [])
        config = {"judging": self.judging.identity, "splits": self.prompts.splits}
        config |= (
            {"reading": self.judging.parser_version} if self.judging.parser_version > 1 else {}
        )
        names = {"models": pair, "judge": self.judge}
        name = "-".join(["verdicts", self.judging.name, *pair])
        return Step(name, config | names, once([self.prompts.step, *inputs]))

    @property
    def row_source(self) -> Questions:
        """The judge's questions."""
        return self.prompts

    @classmethod
    def run(cls, run: Run, jobs: list[Self]) -> None:
        """Parse each job's judgments.

        Raises:
            FailureLimitError: too many judgments hold no verdict.
        """
        rows = [
            {"job": j, "bucket": b.index} for j in range(len(jobs)) for b in buckets(run.buckets)
        ]
        counts = [Counter[str](rows=0, failed=0) for _ in jobs]
        left, started = Counter(row["job"] for row in rows), time.time()
        pool = Pool("verdicts", Actors(num_cpus=0.5, max=64))
        for result in map_rows(pool, rows, Reader, {"run": run, "jobs": jobs}):
            number, job = result["job"], jobs[result["job"]]
            counts[number].update(rows=result["rows"], failed=result["failed"])
            left[number] -= 1
            if not left[number]:
                count = counts[number]
                run.check_failures(job.step, count["failed"], count["rows"])
                job.step.finish(run.root, dict(count), started)
                log(f"{job.step.name}  {count['rows']:,} of {count.total():,} judged")


class Reader:
    """The actor that parses the judgments of a bucket."""

    def __init__(self, run: Run, jobs: list[Verdicts]):
        self.run, self.jobs = run, jobs

    def __call__(self, row: Row) -> Row:
        """Write the verdicts of one bucket of one job; return counts."""
        job, bucket = self.jobs[row["job"]], self.run.bucket(row["bucket"])
        root, kept = self.run.root, job.step.failures(self.run.root)
        asked = items(job.prompts, job.judging.schema, root, bucket)
        found = [answers.read(root, bucket) for answers in job.answers]
        judged: list[Row] = []
        failed: list[FailureRow] = []
        for position, game in zip(job.judging.positions, job.games, strict=True):
            judgments, errors = self._judgments(game, bucket)
            for item in asked:
                mine = [answers.get(item["prompt_id"]) for answers in found]
                record = _record(job, item, position, mine)
                try:
                    if None in mine[: len(game.questions.answers)]:
                        raise NoAnswerError("a model gave no answer to this prompt")
                    record |= _verdict(job, item, position, judgments.get(item["prompt_id"]))
                except (NoAnswerError, NotJudgedError, NoVerdictError) as error:
                    key = item["prompt_id"]
                    lost = failure("judge", error, prompt_id=key, source=job.model, sample=position)
                    lost.update(errors.get(key, {}))
                    failed.append(lost)
                judged.append(record)
        with retrying_failures(kept, bucket):
            if judged:
                write_shard(root / job.step.folder, bucket, JUDGMENT, judged, "all")
            write_failures(kept, bucket, failed, "all")
        return row | {"rows": len(judged) - len(failed), "failed": len(failed)}

    def _judgments(self, game: Game, bucket: Bucket) -> tuple[dict[str, Judgment], dict[str, Any]]:
        """Judgments by prompt id, and the {error, message, attempts} of those missing."""
        root = self.run.root
        found: dict[str, Judgment] = {}
        errors: dict[str, Row] = {}
        for samples in (game.judgments, game.continued):
            if samples is None:
                continue
            for key, row in rows_of(samples, root, bucket).items():
                before = f"{found[key]['text']}\n" if key in found else ""
                found[key] = {**row, "text": before + row["text"]}
        kept = game.judgments.step.failures(root)
        for row in read_bucket(kept, bucket, FAILURE).to_pylist():
            if row["prompt_id"] not in found:
                error = {n: row[n] for n in ("error", "message", "attempts")}
                errors.setdefault(row["prompt_id"], error)
        return found, errors


def _verdict(job: Verdicts, item: Item, position: int, judgment: Judgment | None) -> Row:
    if judgment is None:
        raise NotJudgedError(f"{job.judge} gave no judgment")
    verdict = job.judging.verdict(item, position, judgment)
    return {"value": verdict.value, "label": verdict.label}


def _record(job: Verdicts, item: Item, position: int, answers: list[Answer | None]) -> Row:
    """Return a JUDGMENT row without its verdict."""
    lengths = [len(answer.text) if answer else 0 for answer in answers]
    if job.against is None:  # several answers are turns then
        mine = lengths[0] if position == 1 else lengths[-1]
        other = len(item.get("baseline") or "")
        tokens = sum(a.tokens for a in answers if a)
    else:
        mine, other = lengths
        tokens = answers[0].tokens if answers[0] else 0
    return {
        "prompt_id": item["prompt_id"],
        "model": job.model,
        "against": job.against,
        "judge": job.judge,
        "position": position,
        "label": None,
        "value": None,
        "index": item.get("index"),
        "group": item["group"],
        "length": mine,
        "other_length": other,
        "tokens": tokens,
    }
