"""An actor that scores a part of a request and then the whole, with a fake reward."""

from pathlib import Path

import pytest

from wrpo_ray.config import RewardConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.data.failures import failed_by_error
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.score.stage import Score, Scorer
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

BUCKET = Bucket(0, 1)


class FakeReward:
    """Fails for the texts in `refuses`."""

    def __init__(self, *refuses: str):
        self.refuses, self.asked = refuses, []

    def score(self, items):
        self.asked += [item.text for item in items]
        return [ValueError("no") if i.text in self.refuses else 1.0 for i in items]


@pytest.mark.parametrize("runs_with_part", range(3))
def test_an_answer_is_scored_or_tried_once_a_run(tmp_path: Path, runs_with_part):
    """Two prompts for SFT, of which one cannot be scored, and one other."""
    run = Run(Folder(str(tmp_path)), buckets=1, max_attempts=2)
    step, answers = Step("prompts"), Step("generate-m", source="m")
    splits = {"a": "sft", "b": "sft", "c": "preference"}
    given = [{"prompt_id": i, "split": s, "messages": []} for i, s in splits.items()]
    write_shard(run.root / step.folder, BUCKET, records.PROMPT, given, "all")
    made = [{"prompt_id": i, "source": "m", "sample": 0, "text": i} for i in splits]
    write_shard(run.root / answers.folder, BUCKET, records.RESPONSE, made, "all")
    samples = Samples(answers, Prompts(step, ("sft", "preference")), 1)
    reward = RewardConfig(function="wrpo_ray.zoo.skills:verify")
    whole = Score(samples, reward, (None,), ("code",))
    part = whole.part(Samples(answers, samples.prompts.of_splits(("sft",)), 1))
    asked = []
    for number in range(3):
        jobs = [part, whole] if number < runs_with_part else [whole]
        actor = Scorer(run, jobs)
        actor.reward = fake = FakeReward("a")
        for place in range(len(jobs)):
            counts = actor({"job": place, "bucket": 0})
        assert (counts["rows"], counts["failed"]) == (2, 1)
        asked.append(sorted(fake.asked))
        (failed,) = failed_by_error(whole.step.failures(run.root))
        assert (failed["rows"], failed["attempts"]) == (1, min(number + 1, 2))
    assert asked == [["a", "b", "c"], ["a"], []]
