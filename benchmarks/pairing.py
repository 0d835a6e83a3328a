"""Selection and pairing of synthetic candidates, side by side: ours, DuckDB, Polars.

`make bench` runs it; RESULTS.md has what it found and what it does not show. Each reads the same
Parquet shards and writes the same two tables, the selection (y_ws of every prompt) and the
preference rows, on two threads, in a process of its own. Rewards are random, so that there are
no ties; all rows of all three are checked to be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "2", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ |= {"RAY_AUTH_MODE": "disabled"}

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import results

from wrpo_ray.config import AnswersConfig, ClusterConfig, PairConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, buckets, write_shard
from wrpo_ray.data.records import prompt_id
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.pair.stage import Answers, BucketJob, Pair, Select
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

SOURCES, OWN = ("gemma", "mistral", "qwen"), "target"
SIZES = (1_000_000, 3_000_000, 10_000_000)
SAMPLES = 10
"""Answers of a model to a prompt; there are three sources and the target."""
PER_BUCKET = 160_000
"""Candidates of a bucket, about: the number of buckets is a power of two."""
THREADS = 2
CUT_OFF = 0.03
"""Share of answers that were cut off, which may not be chosen."""
TABLES = {"selection": records.SELECTION, "preference": records.PREFERENCE}


# --- the data ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Scored answers in shards, as the stages before leave them."""

    folder: Path
    rows: int

    @property
    def prompts(self) -> int:
        """How many there are."""
        return self.rows // (SAMPLES * (len(SOURCES) + 1))

    @property
    def buckets(self) -> int:
        """How many the prompts lie in."""
        return 2 ** max(0, round(np.log2(self.rows / PER_BUCKET)))

    def shards(self, name: str) -> str:
        """A pattern of the files of a step."""
        return str(self.folder / Step(name).folder / "*/*.parquet")

    def make(self) -> None:
        """Write all buckets."""
        conversations = [[{"role": "user", "content": f"Prompt {i}?"}] for i in range(self.prompts)]
        ids = [(prompt_id(messages), messages) for messages in conversations]
        parts: list[list] = [[] for _ in range(self.buckets)]
        for key, messages in ids:
            parts[int(key[:8], 16) % self.buckets].append((key, messages))
        with ProcessPoolExecutor(THREADS) as pool:
            list(pool.map(self._make_bucket, buckets(self.buckets), parts))

    def _make_bucket(self, bucket: Bucket, prompts: list[tuple[str, list]]) -> None:
        root = Folder(str(self.folder))
        table = [
            {"prompt_id": key, "messages": messages, "split": "preference"}
            for key, messages in sorted(prompts, key=lambda prompt: prompt[0])
        ]
        write_shard(root / Step("prompts").folder, bucket, records.PROMPT, table, "all")
        ids = pa.array([row["prompt_id"] for row in table])
        for number, name in enumerate((*SOURCES, OWN)):
            rng = np.random.default_rng([bucket.index, number])
            answers = make_answers(ids, name, rng)
            write_shard(root / Step(f"score-{name}").folder, bucket, records.SCORED, answers, "all")


_VOCABULARY = pa.array([records.digest(i, 2 + i % 8) for i in range(20_000)])
_WEIGHTS = 1 / np.arange(1, len(_VOCABULARY) + 1)
_ZIPF = np.searchsorted(
    np.cumsum(_WEIGHTS) / _WEIGHTS.sum(), (np.arange(2**16) + 0.5) / 2**16
).astype(np.int32)
"""Words as often as Zipf's law has them."""


def make_answers(ids: pa.Array, source: str, rng: np.random.Generator) -> pa.Table:
    """SCORED records of all samples: texts of 6 to 40 words of 2 to 9 letters."""
    count = len(ids) * SAMPLES
    lengths = rng.integers(6, 41, count)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    words = _ZIPF[rng.integers(0, len(_ZIPF), offsets[-1])]
    texts = pc.binary_join(pa.ListArray.from_arrays(offsets, _VOCABULARY.take(words)), " ")
    is_cut = rng.random(count) < CUT_OFF

    def same(value: str | int, kind: pa.DataType) -> pa.Array:
        return pa.repeat(pa.scalar(value, kind), count)

    columns = {
        "prompt_id": ids.take(np.repeat(np.arange(len(ids)), SAMPLES)),
        "source": same(source, pa.string()),
        "sample": np.tile(np.arange(SAMPLES, dtype=np.int32), len(ids)),
        "text": texts,
        "token_ids": pa.ListArray.from_arrays(offsets, pa.array(words), type=records.TOKENS),
        "finish_reason": pa.array(["stop", "length"]).take(is_cut.astype(int)),
        "prompt_tokens": same(12, pa.int32()),
        "output_tokens": lengths.astype(np.int32),
        "seed": rng.integers(0, 2**62, count),
        "model": same("0123456789abcdef", pa.string()),
        "engine": same("vllm 0.29.0", pa.string()),
        "reward": rng.normal(size=count),
        "reward_model": same("fedcba9876543210", pa.string()),
    }
    for name in ("logprobs", "reasoning", "reasoning_state"):  # of models that do not reason
        columns[name] = pa.nulls(count, records.SCORED.field(name).type)
    return pa.table(columns, schema=records.SCORED)


# --- the three contenders ----------------------------------------------------------------------


class Taken:
    """Seconds that a block takes: by the clock, and of CPU time in all processes."""

    seconds: float
    cpu: float

    def __enter__(self) -> Taken:
        self.seconds, self.cpu = -time.perf_counter(), -cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu = self.seconds + time.perf_counter(), self.cpu + cpu_seconds()


def cpu_seconds() -> float:
    """Of this process and its Ray workers, up to now."""
    return sum(sum(part.cpu_times()[:2]) for part in parts(psutil.Process()))


def parts(process: psutil.Process) -> Iterator[psutil.Process]:
    """A process and its Ray workers; Ray's own services are left out."""
    yield process
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            if "".join(child.cmdline()[:1]).startswith("ray::"):
                yield child


def ours(data: Data) -> Taken:
    """The stage itself on a Ray of two CPUs, so two workers; without the start of processes."""
    from wrpo_ray.runtime import cluster
    from wrpo_ray.runtime.tasks import map_tasks

    root = Folder(str(data.folder))
    cluster.connect(ClusterConfig(num_cpus=THREADS), root, "bench")
    prompts = Prompts(Step("prompts"), ("preference",))
    stores = {name: Samples(Step(f"score-{name}"), prompts, SAMPLES) for name in (*SOURCES, OWN)}
    policies = AnswersConfig()
    select = Select(prompts, Answers(tuple(stores[name] for name in SOURCES), policies))
    pair = Pair(select, Answers((stores[OWN],), policies), PairConfig())
    list(map_tasks("imports", iter([{}] * THREADS), import_stage))
    with Taken() as taken:
        BucketJob.run(Run(root, data.buckets), [select, pair])
    for name, job in (("selection", select), ("preference", pair)):
        (data.folder / job.step.folder).rename(data.folder / f"ours-{name}")
    cluster.disconnect()
    return taken


def import_stage(row: dict) -> dict:
    """Import what the stage needs in a worker, as stages before have, and hold the worker."""
    importlib.import_module("wrpo_ray.stages.pair.stage")
    time.sleep(1)  # the other tasks start on other workers
    return row


ANSWER = f"{{{', '.join(f'{f.name}: {f.name}' for f in records.ANSWER)}}}"
CANDIDATES = "list_sort(list({source: source, sample: sample, reward: reward}))"
WHOLE = "finish_reason <> 'length'"
LEVEL = 1
"""Of the compression, as pyarrow's; the peers' own is 3."""
PARQUET = f"FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL {LEVEL}"


def duckdb(data: Data) -> Taken:
    """Two queries; the answers of the best and worst are taken along in the aggregation."""
    import duckdb as engine

    db = engine.connect(config={"threads": THREADS, "preserve_insertion_order": False})
    db.execute(f"SET temp_directory = '{data.folder / 'spill'}'")
    sources = [data.shards(f"score-{name}") for name in SOURCES]
    selection, preference = (data.folder / f"duckdb-{name}.parquet" for name in TABLES)
    with Taken() as taken:
        db.execute(f"""
            COPY (
              SELECT prompt_id, messages, split, source_chosen, candidates
              FROM read_parquet('{data.shards("prompts")}') JOIN (
                SELECT prompt_id, {CANDIDATES} AS candidates,
                  max_by({ANSWER}, reward) FILTER ({WHOLE}) AS source_chosen
                FROM read_parquet({sources}) GROUP BY prompt_id
              ) USING (prompt_id) WHERE source_chosen IS NOT NULL
            ) TO '{selection}' ({PARQUET})""")
        db.execute(f"""
            COPY (
              SELECT prompt_id, messages, source_chosen, target_chosen, rejected,
                source_chosen.reward - target_chosen.reward AS source_margin,
                target_chosen.reward - rejected.reward AS target_margin,
                list_concat(selection.candidates, own.candidates) AS candidates
              FROM read_parquet('{selection}') AS selection JOIN (
                SELECT prompt_id, {CANDIDATES} AS candidates,
                  max_by({ANSWER}, reward) FILTER ({WHOLE}) AS target_chosen,
                  min_by({ANSWER}, reward) AS rejected
                FROM read_parquet('{data.shards(f"score-{OWN}")}') GROUP BY prompt_id
              ) AS own USING (prompt_id)
              WHERE split = 'preference' AND target_chosen.reward > rejected.reward
                AND target_chosen.text <> rejected.text
            ) TO '{preference}' ({PARQUET})""")
    return taken


def polars(data: Data) -> Taken:
    """The same, on the streaming engine."""
    import polars as pl

    answer = pl.struct(f.name for f in records.ANSWER)
    score = pl.struct("source", "sample", "reward")
    whole = pl.col("finish_reason") != "length"
    candidates = score.sort_by("source", "sample").alias("candidates")

    def best(name: str) -> pl.Expr:
        return answer.filter(whole).max_by(pl.col("reward").filter(whole)).alias(name)

    def field(column: str, name: str) -> pl.Expr:
        return pl.col(column).struct.field(name)

    reward = partial(field, name="reward")
    selection, preference = (data.folder / f"polars-{name}.parquet" for name in TABLES)
    zstd: dict = {"compression": "zstd", "compression_level": LEVEL}
    with Taken() as taken:
        groups = pl.scan_parquet([data.shards(f"score-{name}") for name in SOURCES]).group_by(
            "prompt_id"
        )
        (
            pl.scan_parquet(data.shards("prompts"))
            .join(groups.agg(best("source_chosen"), candidates), on="prompt_id")
            .select(*records.SELECTION.names)
            .filter(reward("source_chosen").is_not_null())
            .sink_parquet(selection, engine="streaming", **zstd)
        )
        worst = answer.min_by("reward").alias("rejected")
        own = pl.scan_parquet(data.shards(f"score-{OWN}")).group_by("prompt_id")
        own = own.agg(best("target_chosen"), worst, candidates.alias("own"))
        (
            pl.scan_parquet(selection)
            .join(own, on="prompt_id")
            .filter(pl.col("split") == "preference", reward("target_chosen") > reward("rejected"))
            .filter(field("target_chosen", "text") != field("rejected", "text"))
            .with_columns(
                source_margin=reward("source_chosen") - reward("target_chosen"),
                target_margin=reward("target_chosen") - reward("rejected"),
                candidates=pl.col("candidates").list.concat("own"),
            )
            .select(*records.PREFERENCE.names)
            .sink_parquet(preference, engine="streaming", **zstd)
        )
    return taken


CONTENDERS: dict[str, Callable[[Data], Taken]] = {"ours": ours, "duckdb": duckdb, "polars": polars}


# --- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a contender took."""

    seconds: float
    cpu: float
    """Seconds of CPU time."""
    whole: float
    """Peak resident MB of all its processes, but for Ray's own services."""
    largest: float
    """Peak resident MB of the largest of them."""


def measure(name: str, data: Data) -> Measured:
    """Run a contender in a process of its own, and watch its memory."""
    for old in [*data.folder.glob(f"{name}-*"), *data.folder.glob("select-*")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    command = [sys.executable, "-W", "ignore", __file__, "--contender", name]
    command += ["--rows", str(data.rows), "--folder", str(data.folder)]
    whole = largest = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            sizes = resident(process.pid)
            whole, largest = max(whole, sum(sizes)), max(largest, *sizes, 0)
            time.sleep(0.05)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{name} failed")
    measured = Measured(**json.loads(output.splitlines()[-1]), whole=whole, largest=largest)
    figures = ", ".join(f"{name} {value:.1f}" for name, value in asdict(measured).items())
    print(f"{data.rows:,} {name}: {figures}; load {os.getloadavg()[0]:.1f}", flush=True)
    return measured


def resident(pid: int) -> list[float]:
    """Resident MB of a process and of its Ray workers."""
    sizes = []
    with contextlib.suppress(psutil.Error):
        for part in parts(psutil.Process(pid)):
            with contextlib.suppress(psutil.Error):
                sizes.append(part.memory_info().rss / 1e6)
    return sizes


def check_equal(data: Data) -> None:
    """All three wrote the same rows."""
    for name, schema in TABLES.items():
        own = read(data.folder / f"ours-{name}", schema)
        assert own.num_rows > 0.9 * data.prompts, f"{name}: only {own.num_rows} rows"
        for peer in ("duckdb", "polars"):
            their = read(data.folder / f"{peer}-{name}.parquet", schema)
            assert own.equals(their), f"{name}: the rows of ours and {peer} differ"


def read(path: Path, schema: pa.Schema) -> pa.Table:
    """A table, sorted by its prompts, with our own types."""
    files = sorted(path.glob("*/*.parquet")) if path.is_dir() else [path]
    table = ds.dataset(files, format="parquet").to_table(columns=schema.names).cast(schema)
    return table.sort_by("prompt_id").combine_chunks()


def measure_all(rows: int, repeats: int, folder: Path | None) -> dict[str, Measured]:
    """The quickest run of each contender, in turn, on data that is deleted at the end."""
    runs: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="wrpo-bench-", dir=folder) as temporary:
        data = Data(Path(temporary), rows)
        data.make()
        size = sum(file.stat().st_size for file in data.folder.rglob("*.parquet"))
        print(f"{rows:,} candidates in {data.buckets} buckets, {size / 1e9:.2f} GB", flush=True)
        for _ in range(repeats):
            for name, done in runs.items():
                done.append(measure(name, data))
        check_equal(data)
    return {name: min(done, key=lambda run: run.seconds) for name, done in runs.items()}


# --- the report --------------------------------------------------------------------------------

PREFIX = "pair."
TEXT = """# Pairing: y_ws, y_wt and y_l, side by side

| DuckDB / ours, {largest:,} candidates | at least | measured | |
| --- | --- | --- | --- |
| time | 1x | {ratio:.2f}x | {met} |

{table}

{machine}. `make bench` repeats the measurements and writes this section and
[results.json](results.json).

- The query: y_ws (the best answer of three sources), y_wt and y_l (the best and the worst of the
  target's own answers), and every score, with {samples} answers per model and prompt. Both tables,
  `select` and `pair`, are written as Parquet (zstd, level {level}). 3% of the answers were cut off
  and may not be chosen. The rows of all three are checked to be equal; rewards are random doubles,
  so there are no ties. Ours also looks for answers twice, empty ones, those without a reward, and
  reasoning; the peers' queries apply no rule but the cut-off.
- **ours**: the two stages as the pipeline runs them, on a running Ray with two CPUs. No process
  start is timed: its workers have imported the stage (about 0.5 s of CPU each), as after the
  stages before, and the peers their library.
  **DuckDB**, **Polars** (streaming engine): the same two tables with one query each, on two
  threads, written for speed: answers pass through the aggregation as structs (joining them back by
  their keys took DuckDB the same time).
- Texts have 6 to 40 words, about 130 bytes, and as many token ids. 10M candidates are 1.3 GB of
  Parquet, one shard per bucket and model, in the page cache.
- Each contender runs in its own process, in turn; the table has the faster of {repeats} runs. The
  load average was {load}. CPU time, which other load disturbs less, is the sum over all processes
  except Ray's own services. Memory is the sum of their peak resident MB; shared pages are counted
  for each process. A bucket is a hash partition of the prompts.

Memory: each of our workers holds one bucket at a time, so its peak depends on the candidates per
bucket, not on their total. DuckDB and Polars hold the groups of all prompts, or spill.

What it does not show: several nodes, object stores, stores with many small shards (an interrupted
generation leaves one per 64 prompts), ties (a hash in Python for each tied answer, about 1.2 us),
and `refusals`, `duplicates`, `max_similarity`, which are off by default.
"""


@dataclass(frozen=True)
class Report:
    """All sizes."""

    measured: dict[int, dict[str, Measured]]
    repeats: int
    loads: tuple[float, float]
    """Of the last minute, before and after."""

    def rows(self) -> list[results.Row]:
        """Named figures of results.json."""
        about = {
            "machine": results.machine(),
            "versions": results.versions("pyarrow", "ray", "duckdb", "polars", "wrpo-ray"),
        }
        rows = []
        for count, by_name in self.measured.items():
            own = by_name["ours"]
            for peer in ("duckdb", "polars"):
                their, name = by_name[peer], f"{PREFIX}{count / 1e6:g}m"
                rows += [
                    results.row(f"{name}.vs_{peer}", own.seconds, their.seconds, "s", about),
                    results.row(f"{name}.cpu.vs_{peer}", own.cpu, their.cpu, "s of CPU", about),
                    results.row(f"{name}.memory.vs_{peer}", own.whole, their.whole, "MB", about),
                ]
        return rows

    def text(self) -> str:
        """The section of RESULTS.md."""
        largest = max(self.measured)
        own, duck = (self.measured[largest][name] for name in ("ours", "duckdb"))
        ratio = duck.seconds / own.seconds
        return TEXT.format(
            largest=largest,
            ratio=ratio,
            met="met" if ratio >= 1.0 else "missed",
            table=self.table(),
            machine=results.machine(),
            samples=SAMPLES,
            level=LEVEL,
            repeats=self.repeats,
            load="{:.1f} before and {:.1f} after".format(*self.loads),
        )

    def table(self) -> str:
        """A line for each size and contender, in Markdown."""
        columns = ["candidates", "a bucket", "", "s", "DuckDB / this", "CPU s", "MB", "largest, MB"]
        lines = [columns, ["---"] * len(columns)]
        for count, by_name in self.measured.items():
            for name, m in by_name.items():
                size, bucket = (f"{count:,}", f"{count // Data(Path(), count).buckets:,}")
                head = [size, bucket, name] if name == "ours" else ["", "", name]
                ratio = by_name["duckdb"].seconds / m.seconds
                figures = [f"{m.seconds:.1f}", f"{ratio:.2f}", f"{m.cpu:.1f}"]
                lines.append([*head, *figures, f"{m.whole:,.0f}", f"{m.largest:,.0f}"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure all sizes and report; or be one contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="candidates; only these, and no report is written")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to make data, by default with others'")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(vars(CONTENDERS[options.contender](Data(options.folder, options.rows)))))
        return
    load = os.getloadavg()[0]
    sizes: Sequence[int] = [options.rows] if options.rows else SIZES
    measured = {n: measure_all(n, options.repeats, options.folder) for n in sizes}
    report = Report(measured, options.repeats, (load, os.getloadavg()[0]))
    print(f"\n{results.machine()}\n\n{report.table()}")
    if not options.rows:
        results.save(options.output, PREFIX, report.rows(), report.text())


if __name__ == "__main__":
    main()
