"""Selection and pairing of synthetic candidates, side by side: ours, DuckDB, Polars.

Each reads the same Parquet shards and writes the same two tables, the selection (y_ws of every
prompt) and the preference rows, on two threads, in a process of its own. Rewards are random, so
that there are no ties; ours and DuckDB's rows are checked to be equal. RESULTS.md has what was
found and what it does not show.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "2", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ |= {"RAY_AUTH_MODE": "disabled"}

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from wrpo_ray.config import AnswersConfig, ClusterConfig, PairConfig
from wrpo_ray.core import records
from wrpo_ray.core.records import prompt_id
from wrpo_ray.core.run import Run
from wrpo_ray.core.shards import Bucket, Prompts, Samples, buckets, write_shard
from wrpo_ray.core.steps import Step
from wrpo_ray.core.storage import Folder
from wrpo_ray.pair.stage import Answers, Pair, Select
from wrpo_ray.pair.stage import run as run_jobs

SOURCES, OWN = ("gemma", "mistral", "qwen"), "target"
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
        return str(self.folder / Step(name).folder / "*.parquet")

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
    return pa.table(columns, schema=records.SCORED)


# --- the three contenders ----------------------------------------------------------------------


def ours(data: Data) -> float:
    """The stage itself on a Ray of two CPUs, so two actors; without Ray's start."""
    from wrpo_ray.core import cluster

    root = Folder(str(data.folder))
    cluster.connect(ClusterConfig(num_cpus=THREADS), root, "bench")
    prompts = Prompts(Step("prompts"), ("preference",))
    stores = {name: Samples(Step(f"score-{name}"), prompts, SAMPLES) for name in (*SOURCES, OWN)}
    policies = AnswersConfig()
    select = Select(prompts, Answers(tuple(stores[name] for name in SOURCES), policies))
    pair = Pair(select, Answers((stores[OWN],), policies), PairConfig())
    started = time.perf_counter()
    run_jobs(Run(root, data.buckets), [select, pair])
    taken = time.perf_counter() - started
    for name, job in (("selection", select), ("preference", pair)):
        (data.folder / job.step.folder).rename(data.folder / f"ours-{name}")
    cluster.disconnect()
    return taken


ANSWER = "{%s}" % ", ".join(f"{f.name}: {f.name}" for f in records.ANSWER)
CANDIDATES = "list({source: source, sample: sample, reward: reward} ORDER BY source, sample)"
WHOLE = "finish_reason <> 'length'"


def duckdb(data: Data) -> float:
    """Two queries; the answers of the best and worst are taken along in the aggregation."""
    import duckdb as engine

    db = engine.connect(config={"threads": THREADS, "preserve_insertion_order": False})
    db.execute(f"SET temp_directory = '{data.folder / 'spill'}'")
    sources = [data.shards(f"score-{name}") for name in SOURCES]
    selection, preference = (data.folder / f"duckdb-{name}.parquet" for name in TABLES)
    started = time.perf_counter()
    db.execute(f"""
        COPY (
          SELECT prompt_id, messages, split, source_chosen, candidates
          FROM read_parquet('{data.shards("prompts")}') JOIN (
            SELECT prompt_id, {CANDIDATES} AS candidates,
              max_by({ANSWER}, reward) FILTER ({WHOLE}) AS source_chosen
            FROM read_parquet({sources}) GROUP BY prompt_id
          ) USING (prompt_id) WHERE source_chosen IS NOT NULL
        ) TO '{selection}' (FORMAT parquet, COMPRESSION zstd)""")
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
        ) TO '{preference}' (FORMAT parquet, COMPRESSION zstd)""")
    return time.perf_counter() - started


def polars(data: Data) -> float:
    """The same, on the streaming engine."""
    import polars as pl

    answer = pl.struct(f.name for f in records.ANSWER)
    score = pl.struct("source", "sample", "reward")
    whole = pl.col("finish_reason") != "length"
    candidates = score.sort_by("source", "sample").alias("candidates")

    def best(name: str) -> pl.Expr:
        return answer.filter(whole).sort_by(pl.col("reward").filter(whole)).last().alias(name)

    def reward(name: str) -> pl.Expr:
        return pl.col(name).struct.field("reward")

    selection, preference = (data.folder / f"polars-{name}.parquet" for name in TABLES)
    started = time.perf_counter()
    groups = pl.scan_parquet([data.shards(f"score-{name}") for name in SOURCES]).group_by(
        "prompt_id"
    )
    (
        pl.scan_parquet(data.shards("prompts"))
        .join(groups.agg(best("source_chosen"), candidates), on="prompt_id")
        .select(*records.SELECTION.names)
        .filter(reward("source_chosen").is_not_null())
        .sink_parquet(selection, compression="zstd", engine="streaming")
    )
    worst = answer.sort_by("reward").first().alias("rejected")
    own = pl.scan_parquet(data.shards(f"score-{OWN}")).group_by("prompt_id")
    own = own.agg(best("target_chosen"), worst, candidates.alias("own"))
    (
        pl.scan_parquet(selection)
        .join(own, on="prompt_id")
        .filter(pl.col("split") == "preference", reward("target_chosen") > reward("rejected"))
        .filter(
            pl.col("target_chosen").struct.field("text") != pl.col("rejected").struct.field("text")
        )
        .with_columns(
            source_margin=reward("source_chosen") - reward("target_chosen"),
            target_margin=reward("target_chosen") - reward("rejected"),
            candidates=pl.col("candidates").list.concat("own"),
        )
        .select(*records.PREFERENCE.names)
        .sink_parquet(preference, compression="zstd", engine="streaming")
    )
    return time.perf_counter() - started


CONTENDERS: dict[str, Callable[[Data], float]] = {"ours": ours, "duckdb": duckdb, "polars": polars}


# --- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a contender took."""

    seconds: float
    whole: int
    """Peak resident bytes of all its processes, but for Ray's own services."""
    worker: int
    """Peak resident bytes of the largest of them."""


def measure(name: str, data: Data) -> Measured:
    """Run a contender in a process of its own, and watch its memory."""
    command = [sys.executable, "-W", "ignore", __file__, "--contender", name]
    command += ["--rows", str(data.rows), "--folder", str(data.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peaks = [0, 0]
        while process.poll() is None:
            sizes = resident(psutil.Process(process.pid))
            peaks = [max(peaks[0], sum(sizes)), max(peaks[1], max(sizes, default=0))]
            time.sleep(0.05)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{name} failed")
    measured = Measured(json.loads(output.splitlines()[-1]), *peaks)
    print(f"{data.rows:>12,} {name:8} {measured.seconds:7.1f} s  whole {measured.whole / 1e6:,.0f} "
          f"MB  largest {measured.worker / 1e6:,.0f} MB", flush=True)  # fmt: skip
    return measured


def resident(process: psutil.Process) -> list[int]:
    """Resident bytes of a process and of its Ray workers."""
    sizes = []
    for part in [process, *process.children(recursive=True)]:
        try:
            if part.pid == process.pid or part.cmdline()[:1][0].startswith("ray::"):
                sizes.append(part.memory_info().rss)
        except (psutil.Error, IndexError):
            continue  # it has ended
    return sizes


def check_equal(data: Data) -> None:
    """Ours and DuckDB's tables hold the same."""
    for name, schema in TABLES.items():
        own, their = (
            read(data.folder / f"{who}", schema)
            for who in (f"ours-{name}", f"duckdb-{name}.parquet")
        )
        assert own.num_rows > 0.9 * data.prompts, own.num_rows
        assert own.equals(their), f"{name}: ours and DuckDB's rows differ"


def read(path: Path, schema: pa.Schema) -> pa.Table:
    """A table, sorted by its prompts, with our own types."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    table = ds.dataset(files, format="parquet").to_table(columns=schema.names).cast(schema)
    return table.sort_by("prompt_id").combine_chunks().replace_schema_metadata()


# --- the report --------------------------------------------------------------------------------

PREFIX = "pair."
TEXT = """# Pairing: {rows:,} candidates, side by side
"""


def main() -> None:
    """Measure all sizes and report; or be one contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="candidates")
    parser.add_argument("--folder", type=Path, help="for the data, by default a temporary one")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(CONTENDERS[options.contender](Data(options.folder, options.rows))))
        return
    with tempfile.TemporaryDirectory(prefix="wrpo-bench-", dir=options.folder) as folder:
        data = Data(Path(folder), options.rows)
        started = time.perf_counter()
        data.make()
        size = sum(f.stat().st_size for f in data.folder.rglob("*.parquet"))
        print(
            f"made {data.rows:,} candidates in {data.buckets} buckets, {size / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s"
        )
        for name in CONTENDERS:
            measure(name, data)
        check_equal(data)


if __name__ == "__main__":
    main()
