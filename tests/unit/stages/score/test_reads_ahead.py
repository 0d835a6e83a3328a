"""A scoring actor has its next bucket in hand while it scores one, and never scores two at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from wrpo_ray.config import RewardConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import buckets, write_shard
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.score.base import Item
from wrpo_ray.stages.score.stage import Score, Scorer, pool_of
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

LIMIT = 60.0
"""Seconds after which what is waited for will not come."""


class Noting(Scorer):
    """Tells which buckets' answers it has read."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.read = [threading.Event() for _ in range(self.run.buckets)]

    def _missing(self, job: Score, bucket: Any, *rest: Any) -> Any:
        found = super()._missing(job, bucket, *rest)
        self.read[bucket.index].set()
        return found


class Waiting:
    """Scores 1.0 once both buckets have been read, and leaves a second call time to come in."""

    def __init__(self, actor: Noting):
        self.actor, self.inside, self.both_inside = actor, 0, threading.Event()
        self.asked: list[str] = []

    def score(self, items: list[Item]) -> list[float | Exception]:
        self.inside += 1
        if self.inside > 1:
            self.both_inside.set()
        assert all(event.wait(LIMIT) for event in self.actor.read)
        self.both_inside.wait(0.2)
        self.asked += [item.text for item in items]
        self.inside -= 1
        return [1.0] * len(items)


def test_the_next_bucket_is_read_while_one_is_scored(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("wrpo_ray.stages.score.stage.BATCHES", 1)  # several calls a bucket
    run = Run(Folder(str(tmp_path)), buckets=2)
    step, answers = Step("prompts"), Step("generate-m", source="m")
    ids = [records.digest(n) for n in range(100)]
    for bucket in buckets(2):
        own = [i for i in ids if i in bucket]
        given = [{"prompt_id": i, "split": "sft", "messages": []} for i in own]
        write_shard(run.root / step.folder, bucket, records.PROMPT, given, "all")
        made = [{"prompt_id": i, "source": "m", "sample": 0, "text": i} for i in own]
        write_shard(run.root / answers.folder, bucket, records.RESPONSE, made, "all")
    samples = Samples(answers, Prompts(step, ("sft",)), 1)
    actor = Noting(run, [Score(samples, RewardConfig(verifier="exact"), (None,), ("v",))])
    actor.reward = reward = Waiting(actor)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(actor, [{"job": 0, "bucket": n} for n in range(2)]))
    assert sorted(reward.asked) == sorted(ids)
    assert not reward.both_inside.is_set()
    assert sum(result["new"] for result in results) == 100
    firsts = [text in buckets(2)[0] for text in reward.asked]
    assert firsts in (sorted(firsts), sorted(firsts)[::-1])  # one bucket after the other


JUDGE = {"model": "j", "endpoint": {"url": "http://h/v1"}}
FUNCTION = {"function": "math:sqrt"}


@pytest.mark.parametrize(
    ("reward", "buckets_in_hand"),
    [
        ({"model": "m"}, 2),
        ({"model": "m", "engine": "vllm"}, 2),
        ({"verifier": "code"}, 2),
        ({"judge": JUDGE}, 2),
        (FUNCTION, 1),  # it may want the main thread
        ({"mixture": [{"weight": 1, "verifier": "exact"}, {"weight": 1, **FUNCTION}]}, 1),
    ],
)
def test_an_actor_has_one_bucket_ahead_unless_a_users_function_scores(reward, buckets_in_hand):
    assert pool_of(RewardConfig.model_validate(reward)).threads == buckets_in_hand
