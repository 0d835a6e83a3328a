"""What a generation actor does with a bucket, with a fake engine: asking, committing, resuming."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, read_bucket, write_shard
from wrpo_ray.data.failures import failed_by_error
from wrpo_ray.data.finished import marks, stored_rows
from wrpo_ray.data.samples import Prompts, Samples, parts, shares
from wrpo_ray.errors import FailureLimitError
from wrpo_ray.runtime.awaited import Awaited
from wrpo_ray.runtime.context import Run
from wrpo_ray.runtime.tally import Tally, unmarked
from wrpo_ray.stages.generate.stage import Generate, Generator
from wrpo_ray.stages.generate.vllm_engine import (
    Request,
    SamplingIdentity,
    failures,
    requests_for,
)
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

BUCKET = Bucket(0, 1)
ROW = {"job": 0, "bucket": 0}


class FakeEngine:
    """Answers with the prompt's id; dies at request `dies_at`; refuses the prompts in `refuses`."""

    def __init__(self, dies_at: int | None = None, refuses: tuple[str, ...] = ()):
        self.asked: list[Request] = []
        self.calls, self.dies_at, self.refuses = 0, dies_at, refuses

    def answers(
        self, requests: list[Request], sampling: SamplingConfig, identity: SamplingIdentity
    ):
        assert identity == SamplingIdentity("m", 0, Path("m").absolute())
        for request in requests:
            self.calls += 1
            if self.calls == self.dies_at:
                raise RuntimeError("the engine died")
            self.asked.append(request)
            if request.prompt_id in self.refuses:
                yield failures("m", request, ValueError("no"))
            else:
                yield [self.row(request.prompt_id, sample) for sample in request.samples], []

    def under_way(self) -> dict:
        """Nothing: an answer is there at once."""
        return {}

    def row(self, prompt_id: str, sample: int) -> dict:
        key = {"prompt_id": prompt_id, "source": "m", "sample": sample}
        return key | {"text": f"{prompt_id}/{sample}", "output_tokens": 1, "prompt_tokens": 2}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Folder(str(tmp_path)), buckets=1)


def prompts(run: Run, count: int) -> Prompts:
    step = Step("prompts", {"count": count})
    rows = [
        {
            "prompt_id": records.digest(i),
            "split": "sft",
            "messages": [{"role": "user", "content": str(i)}],
        }
        for i in range(count)
    ]
    write_shard(run.root / step.folder, BUCKET, records.PROMPT, rows, "all")
    return Prompts(step, ("sft",))


def job(asked: Prompts, samples: int = 3) -> Generate:
    sampling = SamplingConfig(samples=samples)
    return Generate(
        ModelConfig(name="m", model="m"), Folder("m").absolute(), "weights", asked, sampling, 0
    )


def generator(run: Run, job: Generate, engine: FakeEngine) -> Generator:
    actor = Generator(run, [job])
    actor.engine = engine  # in place of the lazily started one
    return actor


def stored(run: Run, job: Generate) -> list[tuple[str, int, str]]:
    table = job.samples.read(run.root, BUCKET, records.RESPONSE)
    return [(r["prompt_id"], r["sample"], r["text"]) for r in table.to_pylist()]


def test_an_error_loses_nothing_that_was_answered_and_nothing_is_asked_twice(run):
    ten = job(prompts(run, 10))
    first = FakeEngine(dies_at=10)
    with pytest.raises(RuntimeError):
        generator(run, ten, first)(ROW)
    assert len(stored(run, ten)) == 9 * 3
    second = FakeEngine()
    counts = generator(run, ten, second)(ROW)
    assert {r.prompt_id for r in first.asked}.isdisjoint(r.prompt_id for r in second.asked)
    assert (counts["rows"], counts["new"]) == (30, 3)
    assert stored(run, ten) == [
        (key, s, f"{key}/{s}") for key in sorted(map(records.digest, range(10))) for s in range(3)
    ]


def test_more_samples_ask_for_the_last_ones_only(run):
    asked = prompts(run, 4)
    generator(run, job(asked, 3), FakeEngine())(ROW)
    more, engine = job(asked, 5), FakeEngine()
    generator(run, more, engine)(ROW)
    assert {(r.first, r.count) for r in engine.asked} == {(3, 2)}
    assert len(stored(run, more)) == 20
    assert len(stored(run, job(asked, 3))) == 12


def test_more_prompts_ask_for_the_new_ones_only(run):
    generator(run, job(prompts(run, 4)), FakeEngine())(ROW)
    engine, more = FakeEngine(), job(prompts(run, 6))
    generator(run, more, engine)(ROW)
    assert sorted(r.prompt_id for r in engine.asked) == sorted(map(records.digest, (4, 5)))
    assert len(stored(run, more)) == 18


def test_failed_rows_are_kept_with_the_reason_and_tried_again(run):
    two, bad = job(prompts(run, 2)), records.digest(0)
    counts = generator(run, two, FakeEngine(refuses=(bad,)))(ROW)
    assert (counts["rows"], counts["failed"]) == (3, 3)
    kept = read_bucket(two.step.failures(run.root), BUCKET, records.FAILURE).to_pylist()
    assert {(r["prompt_id"], r["sample"], r["message"]) for r in kept} == {
        (bad, s, "no") for s in range(3)
    }
    with pytest.raises(FailureLimitError, match="3 of 6 rows failed.*ValueError: no"):
        run.check_failures(two.step, counts["failed"], counts["rows"])
    counts = generator(run, two, FakeEngine())(ROW)
    assert (counts["rows"], counts["failed"]) == (6, 0)
    assert read_bucket(two.step.failures(run.root), BUCKET, records.FAILURE).num_rows == 0


def test_a_row_is_tried_in_so_many_runs_and_then_given_up(run):
    """Its attempts are counted over the runs; a retry is another request, with attempts anew."""
    two, bad = job(prompts(run, 2), samples=1), records.digest(0)
    for attempt in (1, 2, 3):
        engine = FakeEngine(refuses=(bad,))
        counts = generator(run, two, engine)(ROW)
        assert [r.prompt_id for r in engine.asked].count(bad) == 1
        assert (counts["rows"], counts["failed"]) == (1, 1)
        (row,) = read_bucket(two.step.failures(run.root), BUCKET, records.FAILURE).to_pylist()
        assert row["attempts"] == attempt
    engine = FakeEngine(refuses=(bad,))
    counts = generator(run, two, engine)(ROW)
    assert (engine.asked, counts["rows"], counts["failed"]) == ([], 1, 1)
    (found,) = failed_by_error(two.step.failures(run.root))
    assert (found["error"], found["rows"], found["attempts"]) == ("ValueError", 1, 3)

    again, engine = replace(two, retry=1), FakeEngine()
    assert again.step.folder == two.step.folder
    assert again.step.key != two.step.key
    counts = generator(run, again, engine)(ROW)
    assert [r.prompt_id for r in engine.asked] == [bad]
    assert (counts["rows"], counts["new"], counts["failed"]) == (2, 1, 0)
    counts = generator(run, two, engine)(ROW)  # what another request brought is no failed row
    assert (counts["rows"], counts["failed"]) == (2, 0)


def test_a_store_of_an_earlier_version_is_gone_on_with(run):
    """Its shards lie beside each other; what they have is not asked for again."""
    six = job(prompts(run, 6))
    store, kept = six.samples.folder(run.root), six.step.failures(run.root)
    keys = [records.digest(i) for i in range(6)]
    for bucket, some in ((Bucket(0, 1), keys[:3]), (Bucket(1, 4), keys[3:5])):
        rows = [FakeEngine().row(key, s) for key in some for s in range(3) if key in bucket]
        table = pa.Table.from_pylist(rows, schema=records.RESPONSE)
        store.write_table(f"{bucket.index:05d}-of-{bucket.count:05d}-0123abc.parquet", table)
    lost = records.failure("generate", ValueError("no"), prompt_id=keys[5], source="m", sample=0)
    table = pa.Table.from_pylist([lost], schema=records.FAILURE)
    kept.write_table("00000-of-00001-4567def.parquet", table)
    there = {key for key, _, _ in stored(run, six)}
    engine = FakeEngine()
    counts = generator(run, six, engine)(ROW)
    assert {r.prompt_id for r in engine.asked} == set(keys) - there
    assert (counts["rows"], counts["new"], counts["failed"]) == (18, 18 - 3 * len(there), 0)
    assert len(there) >= 3
    assert read_bucket(kept, BUCKET, records.FAILURE).num_rows == 0
    again = FakeEngine()
    assert generator(run, six, again)(ROW)["new"] == 0
    assert again.asked == []
    assert stored_rows(store) == 18


def test_a_marked_bucket_is_of_no_later_run(run):
    """Of the same step and number of attempts; with failed rows it is not marked."""
    asked = prompts(run, 4)
    for samples, refuses, is_marked in ((2, (records.digest(0),), False), (2, (), True)):
        some = job(asked, samples)
        store = some.samples.folder(run.root)
        counts = generator(run, some, FakeEngine(refuses=refuses))(ROW)
        assert counts["is_whole"] is is_marked
        assert bool(marks(store, some.step.key, 1, run.max_attempts)) is is_marked
    tally = Tally(run, some.step, store)
    assert (tally.left, unmarked([tally], [ROW])) == (0, [])
    assert some.step.read_manifest(run.root)["counts"]["rows"] == 8
    more = job(asked, 3)
    assert more.samples.folder(run.root) == store
    assert Tally(run, more.step, store).left == 1
    assert Tally(replace(run, max_attempts=9), some.step, store).left == 1


def test_runs_of_consecutive_samples():
    prompt = {"prompt_id": "p", "messages": []}
    asked = [(r.first, r.count, r.job) for r in requests_for(prompt, [0, 1, 4], 7)]
    assert asked == [(0, 2, 7), (4, 1, 7)]
    assert requests_for(prompt, []) == []


def test_samples_of_all_sources_in_one_store_are_kept_apart(run):
    """An import has all sources in one store: the key of a row includes its source."""
    asked, step = prompts(run, 1), Step("import")
    key = records.digest(0)
    rows = [
        {"prompt_id": key, "source": s, "sample": 0, "text": s, "reward": 1.0} for s in ("a", "b")
    ]
    write_shard(run.root / step.folder / "sources", BUCKET, records.SCORED, rows, "all")
    table = Samples(step, asked, None, "sources").read(run.root, BUCKET, records.SCORED)
    assert table["source"].to_pylist() == ["a", "b"]


@pytest.fixture
def split_run(run) -> tuple[Run, Generate, Generate]:
    """A run with a part and the whole of a request: 4 prompts for SFT and 2 others, one bucket."""
    step = prompts(run, 4).step
    others = [
        {"prompt_id": records.digest(i), "split": "preference", "messages": []} for i in (8, 9)
    ]
    write_shard(run.root / step.folder, BUCKET, records.PROMPT, others, "others")
    whole = job(Prompts(step, ("sft", "preference")))
    return run, whole.of_splits(("sft",)), whole


def test_a_part_and_then_the_whole_ask_each_prompt_once(split_run):
    """Two splits in one bucket; a row that fails in the part is asked again by the next run."""
    run, part, whole = split_run
    assert parts([(j.step.folder, j.prompts) for j in (part, whole)]) == {1: 0}
    waited = Awaited([part.step])
    driver = replace(run, awaited=waited, failure_limit=0.5)
    actor = Generator(run, [part, whole])
    tallies = [Tally(driver, j.step, j.samples.folder(run.root)) for j in (part, whole)]
    bad = records.digest(0)
    actor.engine = first = FakeEngine(refuses=(bad,))
    counts = actor(ROW)
    assert (counts["rows"], counts["new"], counts["failed"]) == (9, 9, 3)
    assert not waited._over.is_set()
    tallies[0].add(counts)
    assert waited.wait()
    actor.engine = second = FakeEngine()
    counts = actor({"job": 1, "bucket": 0})
    assert (counts["rows"], counts["new"], counts["failed"]) == (15, 6, 3)
    assert not counts["is_whole"]
    assert {r.prompt_id for r in first.asked} == set(map(records.digest, range(4)))
    assert {r.prompt_id for r in second.asked} == set(map(records.digest, (8, 9)))
    (failed,) = failed_by_error(whole.step.failures(run.root))
    assert (failed["rows"], failed["attempts"]) == (3, 1)
    assert not marks(run.root / whole.step.folder, whole.step.key, 1, run.max_attempts)
    again = Generator(run, [whole])  # the part is finished
    again.engine = third = FakeEngine()
    counts = again(ROW)
    assert (counts["rows"], counts["new"], counts["failed"]) == (18, 3, 0)
    assert {r.prompt_id for r in third.asked} == {bad}
    tallies[1].add(counts)
    assert len(stored(run, whole)) == stored_rows(run.root / whole.step.folder) == 18
    assert len(stored(run, part)) == 12
    assert whole.step.read_manifest(run.root)["counts"]["rows"] == 18


@pytest.mark.parametrize("runs_with_part", range(4))
def test_a_row_is_tried_once_a_run_whether_a_part_or_the_whole_tries_it(split_run, runs_with_part):
    """As often as without branches: in `max_attempts` runs, then it is given up."""
    run, part, whole = split_run
    bad, asked = records.digest(0), []
    for number in range(5):
        jobs = [part, whole] if number < runs_with_part else [whole]
        actor = Generator(run, jobs)
        actor.engine = engine = FakeEngine(refuses=(bad,))
        for place in range(len(jobs)):
            counts = actor({"job": place, "bucket": 0})
        assert counts["failed"] == 3
        asked.append([r.prompt_id for r in engine.asked].count(bad))
        (failed,) = failed_by_error(whole.step.failures(run.root))
        assert (failed["rows"], failed["attempts"]) == (3, min(number + 1, run.max_attempts))
        assert counts["is_whole"] is (number >= run.max_attempts)
    assert asked == [1, 1, 1, 0, 0]


def test_failures_of_a_part_count_against_the_rows_of_the_whole(split_run):
    """3 of 12 rows for SFT failed, which are 3 of 18 of the request."""
    run, part, whole = split_run
    config = {"splits": {"sft": 2 / 3, "preference": 1 / 3}}
    step = Step("prompts", config)
    asked = [(j.step.folder, replace(j.prompts, step=step)) for j in (part, whole)]
    share, of_whole = shares(asked)
    assert (share, of_whole) == (pytest.approx(2 / 3), 1.0)
    assert shares(asked[:1]) == [1.0]
    actor = Generator(run, [part, whole])
    actor.engine = FakeEngine(refuses=(records.digest(0),))
    counts, store = actor(ROW), run.root / part.step.folder
    Tally(replace(run, failure_limit=0.17), part.step, store, share).add(counts)
    with pytest.raises(FailureLimitError, match="3 of 12 rows failed so far"):
        Tally(replace(run, failure_limit=0.16), part.step, store, share).add(counts)
