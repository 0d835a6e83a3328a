"""Requests to an object store by a run of millions of answers, and the time of a restart.

`python benchmarks/storage.py` writes the table of docs/scale.md and rows of results.json. Requests
are counted in the log of an S3 server (moto) on this machine. Generation, scoring and selection
work on whole buckets of two sources, with real files of real sizes, a fake engine and a fake
reward, in one process without Ray. What one bucket costs, what a process costs once, and what the
32 buckets cost in which wins are counted, add up to a run of any size. Not counted: training,
evaluation, the report, and failed rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pyarrow as pa
import results

from wrpo_ray.config import AnswersConfig, ModelConfig, RewardConfig, SamplingConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.data.samples import Prompts
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.generate.stage import Generate, Generator
from wrpo_ray.stages.pair.stage import Answers, Select
from wrpo_ray.stages.score.stage import Score, Scorer
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

with contextlib.suppress(ImportError):  # the version before
    from wrpo_ray.data.shards import share_layouts

PREFIX = "storage"
KINDS = ("PUT", "GET", "LIST", "HEAD", "DELETE")
SAMPLES, TOKENS = 5, 450
RATE = 10.0
"""Answers a second of one engine: the mean over the sources of paper.yaml, by guessed rates."""
ENGINES, SCORERS, TASKS = 64, 32, 64
"""Processes at work. An engine looks once at the stores of its source, the others at all."""
ROW_BYTES = 200 + 8 * TOKENS
"""Of an answer before compression, as `ShardWriter` counts: four letters and an id a token."""


@dataclass(frozen=True)
class Size:
    """A run."""

    answers: int
    buckets: int
    sources: int = 10

    @property
    def prompts(self) -> int:
        """Of a bucket."""
        return round(self.answers / self.sources / SAMPLES / self.buckets)


SIZES = (Size(3_090_000, 64), Size(31_000_000, 256), Size(310_000_000, 2048))
RESTART = (1_000, 1_000_000)
GOALS = {"requests_per_million": 5_000, "1m_vs_1k": 1.5}


# --- a store that counts -----------------------------------------------------------------------


class Store:
    """An S3 server whose log is read."""

    def __init__(self, url: str, log: Path):
        self.url, self.log, self._read = url, log, 0

    def folder(self, name: str) -> Folder:
        """A folder in its bucket."""
        address = self.url.removeprefix("http://")
        return Folder(f"s3://bench/{name}?endpoint_override={address}&scheme=http")

    def taken(self) -> Counter[str]:
        """Requests by kind since the last call."""
        urllib.request.urlopen(f"{self.url}/moto-api/").close()  # all before it are in the log
        with self.log.open() as log:
            log.seek(self._read)
            text = log.read()
            self._read = log.tell()
        return Counter(filter(None, map(kind_of, text.splitlines())))


def kind_of(line: str) -> str | None:
    """The kind of the request that a line of the server's log tells of."""
    match = re.search(r'"([A-Z]+) (/bench\S*) HTTP', line)
    if not match:
        return None
    method, path = match.groups()
    if method == "GET" and "list-type" in path:
        return "LIST"
    return "PUT" if method == "POST" else method


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    """A server of one bucket."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    log, url = folder / "log", f"http://127.0.0.1:{port}"
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream) as server,
    ):
        try:
            while True:
                try:
                    urllib.request.urlopen(f"{url}/moto-api/").close()
                    break
                except OSError:
                    time.sleep(0.1)
            import boto3

            boto3.client("s3", endpoint_url=url).create_bucket(Bucket="bench")
            yield Store(url, log)
        finally:
            server.terminate()


# --- the work ----------------------------------------------------------------------------------


class FakeEngine:
    """Answers at once, with texts and ids that compress as little as real ones."""

    def __init__(self, name: str):
        self.name = name
        self.rng = random.Random(name)
        self.words = [records.digest(i, 2 + i % 7) for i in range(20_000)]

    def answers(self, requests: list[Any], *_: Any) -> Iterator[tuple[list[Any], list[Any]]]:
        """The answers of one request after another."""
        for request in requests:
            yield [self._row(request.prompt_id, sample) for sample in request.samples], []

    def under_way(self) -> dict[int, dict[str, int]]:
        """Nothing: an answer is there at once."""
        return {}

    def _row(self, prompt_id: str, sample: int) -> dict[str, Any]:
        ids = [int(20_000 ** self.rng.random()) - 1 for _ in range(TOKENS)]
        text = " ".join(self.words[i] for i in ids)[: 4 * TOKENS]
        key = {"prompt_id": prompt_id, "source": self.name, "sample": sample}
        told = {"prompt_tokens": 200, "output_tokens": TOKENS, "finish_reason": "stop"}
        return {**key, **told, "text": text, "token_ids": ids, "engine": "fake", "seed": sample}


class FakeReward:
    """Scores by length."""

    def score(self, items: list[Any]) -> list[float]:
        """A number for each."""
        return [len(item.text) + hash(item.text) % 100 / 100 for item in items]


def jobs_of(prompts: Prompts) -> tuple[list[Generate], list[Score], Select]:
    """The jobs of two sources."""
    made = [
        Generate(
            ModelConfig(name=name, model=name), Folder(name).absolute(), name, prompts,
            SamplingConfig(samples=SAMPLES), 0,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    reward = RewardConfig(function="results:row")
    scored = [Score(job.samples, reward, (None,), ("f",)) for job in made]
    select = Select(prompts, Answers(tuple(job.samples for job in scored), AnswersConfig()))
    return made, scored, select


def write_prompts(run: Run, step: Step, bucket: Bucket, count: int) -> None:
    """A bucket of prompts."""
    rows = []
    for number in range(count):
        key = f"{bucket.index + bucket.count * number:08x}{records.digest(number, 24)}"
        turns = [{"role": "user", "content": records.digest(number) * 20}]
        rows.append({"prompt_id": key, "messages": turns, "split": "sft"})
    write_shard(run.root / step.folder, bucket, records.PROMPT, rows, "all")


Stages = dict[str, Counter[str]]
"""Requests by stage and kind."""


@dataclass(frozen=True)
class Costs:
    """Requests for two sources: of a bucket, of a process, and of a bucket with counted wins."""

    bucket: Stages
    once: Stages
    wins: Stages


def measure(store: Store, size: Size) -> Costs:
    """Work on three buckets of two sources."""
    run = Run(store.folder(f"run-{size.answers}"), size.buckets)
    is_new = hasattr(run, "bucket")
    run = replace(run, session=str(size.answers)) if is_new else run
    prompts = Prompts(Step("prompts"), ("sft",))
    made, scored, select = jobs_of(prompts)
    places = (1, 3, size.buckets // 2)  # wins are counted in the last one
    chosen = [run.bucket(i) if is_new else Bucket(i, size.buckets) for i in places]
    for bucket in chosen:
        write_prompts(run, prompts.step, bucket, size.prompts)
    seen = run
    if is_new:  # as the driver does at the beginning of each phase
        finished = [run.root / prompts.step.folder]
        seen = run.having_seen([job.samples.folder(run.root) for job in (*made, *scored)], finished)
        kept = [job.step.failures(run.root) for job in (*made, *scored)]
        seen = replace(seen, layouts={**seen.layouts, **run.having_seen(kept, ()).layouts})
        share_layouts(run.session, seen.layouts)
    generators = [Generator(seen, made) for _ in made]
    scorers = [Scorer(seen, scored) for _ in scored]
    taken: list[Stages] = []
    for bucket in chosen:
        stages: Stages = {}
        store.taken()
        for number, generator in enumerate(generators):
            generator.engine = FakeEngine(made[number].model.name)
            generator({"job": number, "bucket": bucket.index})
        stages["generate"] = store.taken()
        for number, scorer in enumerate(scorers):
            scorer.reward = FakeReward()
            scorer({"job": number, "bucket": bucket.index})
        stages["score"] = store.taken()
        if is_new:  # the driver of the next phase looks again
            again = [job.samples.folder(run.root) for job in scored]
            share_layouts(run.session, run.having_seen(again, finished).layouts)
        store.taken()
        select.fill(run, bucket)
        stages["select"] = store.taken()
        taken.append(stages)
        shown = {name: dict(counts) for name, counts in stages.items()}
        print(f"{size.answers:,} answers, bucket {bucket.index}: {shown}", file=sys.stderr)
    first, second, third = taken
    return Costs(second, minus(first, second), minus(third, second))


def minus(one: Stages, other: Stages) -> Stages:
    """What the one has more."""
    return {name: counts - other[name] for name, counts in one.items()}


def total(size: Size, costs: Costs, *, flat: bool) -> Counter[str]:
    """Requests of a run: all buckets of all sources, and what each process does once.

    A listing takes a request a thousand names: of a bucket in its folder; of the folders of a
    store, once a process; or, if all shards of a store are `flat`, of them all each time.
    """
    counts = dict.fromkeys(KINDS, 0.0)
    pages, pairs = math.ceil(size.buckets / 1000), size.sources / 2
    shards = size.answers / size.sources / (64 * SAMPLES)
    looks = {"generate": ENGINES / 2, "score": SCORERS * pairs, "select": TASKS * pairs}
    sampled = pairs * min(32 * size.sources / 2 if flat else 8, size.buckets)
    for stage, often in looks.items():
        for kind in KINDS:
            is_list = kind == "LIST"
            each = (math.ceil(shards / 1000) + 1) / 2 if flat and is_list else 1
            counts[kind] += pairs * size.buckets * each * costs.bucket[stage][kind]
            counts[kind] += often * (pages if is_list else 1) * costs.once[stage][kind]
            counts[kind] += sampled * costs.wins[stage][kind]
    if not flat:  # the driver: folders of the two stores and their failures, thrice; prompts; marks
        counts["LIST"] += (3 * 4 * size.sources + 3 + 2 * size.sources) * pages
        counts["PUT"] += 2 * size.sources
    return Counter({kind: round(n) for kind, n in counts.items()})


def count_requests(sizes: list[Size]) -> dict[Size, Counter[str]]:
    """Measure and add up."""
    try:
        from wrpo_ray.data import writer
    except ImportError:  # the version before
        is_flat = True
    else:
        is_flat = False
        seconds = Run(Folder("/"), 1).commit_seconds
        writer.SHARD_BYTES = min(writer.SHARD_BYTES, RATE * seconds * ROW_BYTES)
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as store:
            if not is_flat:  # scores come as fast as they are committed: by size and bucket
                found[size] = total(size, measure_new(store, size), flat=False)
            else:
                found[size] = total(size, measure(store, size), flat=True)
    return found


def measure_new(store: Store, size: Size) -> Costs:
    """Generation commits by age, which is simulated by size; scoring by size alone."""
    from wrpo_ray.data import writer

    by_age, call = writer.SHARD_BYTES, Scorer.__call__

    def by_size(self: Scorer, row: dict[str, Any]) -> dict[str, Any]:
        writer.SHARD_BYTES = 64_000_000
        try:
            return call(self, row)
        finally:
            writer.SHARD_BYTES = by_age

    Scorer.__call__ = by_size  # type: ignore[method-assign]
    try:
        return measure(store, size)
    finally:
        Scorer.__call__ = call  # type: ignore[method-assign]


# --- restart -----------------------------------------------------------------------------------


def restart_seconds(sizes: Sequence[int], repeats: int) -> list[list[float]]:
    """Seconds from the start of a process to its first commit, beside so many shards, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, str(size)) for size in sizes]
        for size, output in zip(sizes, folders, strict=True):
            make_store(output, size)
        turns = [[restart(output) for output in folders] for _ in range(repeats + 1)]
    return [list(taken) for taken in zip(*turns[1:], strict=True)]  # the first reads from the disk


BUCKETS, FINISHED, IN_HAND = 2048, 0.9, 0.03
"""Of a store: all buckets, the share that is finished, and the share that is half full."""


def restart_job() -> Generate:
    """The job that is restarted."""
    return jobs_of(Prompts(Step("prompts"), ("sft",)))[0][0]


def make_store(folder: Path, shards: int) -> None:
    """Shards as a killed run leaves them; those of finished buckets are empty files.

    Those of buckets in hand are files without rows, as they are read.
    """
    from wrpo_ray.data.finished import BEGUN, MARKS, Mark
    from wrpo_ray.data.shards import Counts, shard_path

    run, job = Run(Folder(str(folder)), BUCKETS), restart_job()
    store = job.samples.folder(run.root)
    finished, half = round(BUCKETS * FINISHED), round(BUCKETS * IN_HAND)
    share = shards / (finished + half / 2)
    empty = pa.Table.from_pylist([], schema=records.RESPONSE)
    numbers = iter(range(10**9))
    for index in range(finished + half):
        here = round(share * (index + 1)) - round(share * index)
        is_whole = index < finished
        place = Path(store.path, shard_path((index, BUCKETS), "x", None)).parent
        place.mkdir(parents=True)
        if not is_whole:
            store.write_table(shard_path((index, BUCKETS), "first", Counts.of(empty)), empty)
        source = next(place.iterdir(), None)
        for _ in range(here if is_whole else here // 2):
            path = place / f"{next(numbers):016x}-r0.parquet"
            os.link(source, path) if source else path.touch()
        if is_whole:
            mark = Mark((index, BUCKETS), 5, 0, run.max_attempts, Counts(5, 200, 2250))
            store.write(f"{MARKS}/{job.step.key}/{mark.name}", b"")
    store.write(f"{MARKS}/{job.step.key}/{BEGUN}", b"")
    write_prompts(run, Step("prompts"), Bucket(finished, BUCKETS), 20)


def restart(folder: Path) -> float:
    """Seconds of one restart; what it committed is deleted after it."""
    command = [sys.executable, __file__, "--restart-of", str(folder)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(told)
    for path in found["made"]:
        Path(path).unlink()
    print(f"{folder.name} shards: {found['seconds']:.2f} s, {found['work']:.2f} s without imports")
    return float(found["seconds"])


def restart_here(folder: Path) -> None:
    """What the driver and an actor do before the first commit; prints the seconds."""
    from wrpo_ray.config import BudgetConfig, PricesConfig
    from wrpo_ray.pipeline.runner import log_resumed
    from wrpo_ray.runtime.ledger import Ledger
    from wrpo_ray.runtime.tally import Tally

    started = time.time()
    run, job = Run(Folder(str(folder)), BUCKETS, session="restart"), restart_job()
    with Ledger(run.root, PricesConfig(), BudgetConfig()):
        store = job.samples.folder(run.root)
        log_resumed(run, [job])
        tally = Tally(run, job.step, store)
        index = next(i for i in range(BUCKETS) if i not in tally.marks)
        stores = [store, job.step.failures(run.root)]
        seen = run.having_seen(stores, [run.root / job.prompts.step.folder])
        generator = Generator(seen, [job])
        generator.engine = FakeEngine("a")
        before = set(Path(store.path, f"{index:05d}-of-{BUCKETS:05d}").iterdir())
        generator({"job": 0, "bucket": index})
        ended = time.time()
        own = set(Path(store.path, f"{index:05d}-of-{BUCKETS:05d}").iterdir()) - before
    marks = Path(store.path, "finished", job.step.key).glob(f"{index:05d}-*")
    made = [str(path) for path in (*own, *marks, folder / "ledger.json")]
    began = psutil.Process().create_time()
    print(json.dumps({"seconds": ended - began, "work": ended - started, "made": made}))


# --- results -----------------------------------------------------------------------------------


def table(found: dict[Size, Counter[str]]) -> str:
    """A line for each run, in Markdown."""
    columns = ["answers", "buckets", *KINDS, "for a million answers"]
    lines = [columns, ["---"] * len(columns)]
    for size, counts in found.items():
        each = counts.total() / size.answers * 1e6
        numbers = [f"{counts[kind]:,}" for kind in KINDS]
        lines.append([f"{size.answers:,}", f"{size.buckets:,}", *numbers, f"{each:,.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, choices=range(len(SIZES)), help="only this run")
    parser.add_argument("--no-restart", action="store_true")
    parser.add_argument("--shards", type=int, default=RESTART[1], help="of the restarted store")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--before", type=float, help="requests per million of the version before")
    parser.add_argument("--output", type=Path, help="folder of results.json; none: only print")
    parser.add_argument("--restart-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.restart_of:
        restart_here(options.restart_of)
        return
    sizes = list(SIZES) if options.size is None else [SIZES[options.size]]
    found = count_requests(sizes)
    print(f"\n{table(found)}\n")
    rows = []
    about = {"machine": results.machine(), "versions": results.versions("pyarrow", "moto")}
    if options.before:
        size = SIZES[0]
        each = found[size].total() / size.answers * 1e6
        told = {"goal": GOALS["requests_per_million"], **about}
        name = f"{PREFIX}.requests_per_million"
        rows.append(results.row(name, each, options.before, "requests", told))
    if not options.no_restart:
        few, many = restart_seconds((RESTART[0], options.shards), options.repeats)
        print(f"restart, s: {few} beside {RESTART[0]:,} shards, {many} beside {options.shards:,}")
        told = {"goal": GOALS["1m_vs_1k"], **about}
        name = f"{PREFIX}.restart.1m_vs_1k"
        rows.append(results.row(name, median(many), median(few), "s", told))
    if options.output:
        results.save_rows(options.output, PREFIX, rows)


if __name__ == "__main__":
    main()
