"""The run on a real Ray of logical nodes against the simulator, with the same inputs.

`python benchmarks/on_ray.py` starts Ray with 8 nodes of 8 GPUs that are not there, runs generation
and scoring of five sources through the real runner, pools, allocator and stores, with engines that
sleep (`sleeping.py`); with `--lose-a-node` once more, and a node is lost. It writes rows of
results.json, a section of RESULTS.md and a picture. What the simulator foretells has the same
rates, starts, lengths and buckets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
# Workers that Ray starts early have another environment than actors; a lost node is seen after 5 s.
os.environ |= {"RAY_prestart_worker_first_driver": "0"}
os.environ |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, sys.path)]
)

import results
from fusion import SIGMA, START
from roofline import MODELS
from simulate import STORE, draw_gpus, plot_axes, save_plot, table
from simulation import Cluster, Outcome, Policy, Source, Span, simulate
from sleeping import FOLDER, NOTES, Lengths, Pace, Sleeper, Table
from workload import Shape, user, write_prompts

from wrpo_ray.config import Config
from wrpo_ray.data.buckets import buckets
from wrpo_ray.runtime import pool as pools
from wrpo_ray.stages.generate import stage
from wrpo_ray.storage.folder import Folder

HERE = Path(__file__).parent
PREFIX = "ray."
PROMPT, ANSWER, LONGEST = 200, 450.0, 2048
"""Tokens of a prompt and of answers, as in `paper.yaml`."""
SAMPLES = 5
SHRINK = 8
"""Answers that one stands for: engines have so many times fewer slots, so that two cores do all
that is not sleep."""
REWARDS = 6
"""Actors of the reward at the most: each is a process that two cores have to start."""
CPUS = 64
"""Logical CPUs of a node."""
SCORES = "score with reward"
NAMES = "all nodes", "a node lost"


@dataclass(frozen=True)
class Work:
    """The paper's models and answers, so many times quicker."""

    nodes: int = 8
    gpus: int = 8
    prompts: int = 1360
    buckets: int = 256
    quicker: float = 4.0
    tells: bool = True
    """Whether the config has the rates and starts of the sources."""
    sources: Sequence[str] = (
        "deepseek-v2-chat", "mistral-large-2407", "qwen2-72b", "yi-1.5-34b", "gemma2-27b"
    )  # fmt: skip

    @cached_property
    def table(self) -> Table:
        """The times of all pools."""
        engines = {name: self._engine(name) for name in self.sources}
        token = SHRINK / self.quicker / MODELS["reward-8b"].forward_rate
        return Table(
            engines, Pace(self._start("reward-8b"), (token,)), PROMPT,
            Lengths(ANSWER, SIGMA, LONGEST),
        )  # fmt: skip

    def _engine(self, name: str) -> Pace:
        steps = MODELS[name].steps(2 * ANSWER, PROMPT / SAMPLES, ANSWER)
        return Pace(self._start(name), tuple(s / self.quicker for s in steps[::SHRINK]))

    def _start(self, name: str) -> float:
        model = MODELS[name]
        load = model.bytes * (1 / STORE.node + 1 / (STORE.load * model.gpus))
        return (START + load) / self.quicker

    def config(self, folder: Path) -> Config:
        """The pipeline's, of which `generate` and `score` are run."""
        engines = self.table.engines
        told = {
            "output_tokens": ANSWER,
            "rates": {n: (len(p.steps) - 1) / p.steps[-1] for n, p in engines.items()},
            "startup": {name: pace.start for name, pace in engines.items()},
        }
        sources = [
            {
                "name": name,
                "model": str(folder / "model"),
                "tensor_parallel": (gpus := MODELS[name].gpus),
                "engine": {"max_num_seqs": len(engines[name].steps) - 1},
                "actors": {"num_gpus": 1, "max": self.nodes * self.gpus // gpus},
            }
            for name in self.sources
        ]
        return Config.model_validate(
            {
                "output": str(folder / "out"),
                "prompts": {"path": str(folder / "prompts.jsonl")},
                "sources": sources,
                "sampling": {"samples": SAMPLES},
                "reward": {
                    "name": "reward",
                    "function": "sleeping:reward",
                    "actors": {"num_gpus": 1, "max": REWARDS},
                },
                "storage": {"buckets": self.buckets},
                "plan": told if self.tells else {},
                "report": False,
            }
        )

    def write(self, folder: Path) -> None:
        """The prompts, and a model for its tokenizer."""
        Shape(128, 1).write(folder / "model")
        write_prompts(folder / "prompts.jsonl", [user(f"Prompt {n}?") for n in range(self.prompts)])

    def pools(self, folder: Path) -> list[Source]:
        """The work as the simulator takes it, with the buckets that the run has written."""
        from wrpo_ray.pipeline.chain import Chain

        chain = Chain(self.config(folder), "generate")
        jobs = [job for s in chain.build() for job in s.jobs if isinstance(job, stage.Generate)]
        sources = [self._source(job, list(self._lengths(job, chain.root))) for job in jobs]
        order = [(b, source) for b in range(self.buckets) for source in sources]
        read = [[[sum(PROMPT + n for chunk in s.buckets[b] for n in chunk)]] for b, s in order]
        scores = Source(
            SCORES, 1, REWARDS, 1 / self.table.reward.steps[0],
            self.table.reward.start, read, slots=1, half=0, in_hand=1,
            fed_by=[[(source.name, b)] for b, source in order],
        )  # fmt: skip
        return [*sources, scores]

    def _lengths(self, job: stage.Generate, root: Folder) -> Iterator[list[float]]:
        """Tokens of the answers of each bucket."""
        of = partial(self.table.lengths.of, job.model.name)
        for bucket in buckets(self.buckets):
            ids = job.prompts.read(root, bucket)["prompt_id"].to_pylist()
            yield [float(of(key, sample)) for key in ids for sample in range(SAMPLES)]

    def _source(self, job: stage.Generate, lengths: list[list[float]]) -> Source:
        name = job.model.name
        pace, gpus = self.table.engines[name], MODELS[name].gpus
        slots = len(pace.steps) - 1
        return Source(
            name, gpus, self.nodes * self.gpus // gpus, slots / pace.steps[-1], pace.start,
            [[bucket] if bucket else [] for bucket in lengths], slots=slots, steps=pace.steps,
            in_hand=stage.buckets_in_hand(job.model, SAMPLES * self.prompts / self.buckets),
        )  # fmt: skip

    def foretold(self, sources: Sequence[Source], **trouble: Any) -> Outcome:
        """The simulated run."""
        return simulate(sources, Cluster(self.nodes, self.gpus, **trouble), Policy())


# --- the real run ------------------------------------------------------------------------------


@dataclass
class Recorder:
    """When actors were asked for, and ended."""

    began: float = 0.0
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.members: dict[str, dict[str, Any]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Note what the pools start and end in the block."""
        start, end = pools.start_member, pools.end_member

        def started(pool: Any, *args: Any) -> Any:
            member = start(pool, *args)
            self.began = self.began or time.time()
            self.members[name(member)] = {"pool": pool.what, "gpus": pool.needs["GPU"]}
            return member

        def ended(member: Any) -> None:
            self.ended = time.time()
            self.members[name(member)] |= {"until": self.ended, "node": member.place}
            end(member)

        def name(member: Any) -> str:
            return str(member.handle._actor_id.hex())

        pools.start_member, pools.end_member = started, ended
        try:
            yield
        finally:
            pools.start_member, pools.end_member = start, end

    def spans(self, notes: Path) -> list[Span]:
        """Of all actors that had a node."""
        found = []
        for actor, member in self.members.items():
            file = notes / f"{actor}.json"
            if file.exists():
                times = json.loads(file.read_text())
                until = member["until"] - self.began
                ready = min(until, times.get("ready", member["until"]) - self.began)
                what = member["pool"].removeprefix("generate ")
                since = times["since"] - self.began
                found.append(Span(what, int(member["gpus"]), since, ready, until))
        return found


def run(work: Work, lost_after: float = 0.0) -> dict[str, Any]:
    """Run it on Ray; returns its wall, the simulator's for the same, and spans of both."""
    from ray.cluster_utils import Cluster as Nodes

    from wrpo_ray.pipeline.runner import fuse

    with tempfile.TemporaryDirectory(prefix="wrpo-bench-") as name:
        folder = Path(name)
        work.write(folder)
        work.table.write(folder)
        os.environ[FOLDER] = str(folder)
        each = {"num_cpus": CPUS, "num_gpus": work.gpus, "object_store_memory": 80 * 2**20}
        nodes = Nodes(initialize_head=True, head_node_args=each)
        others = [nodes.add_node(**each) for _ in range(work.nodes - 1)]
        os.environ["RAY_ADDRESS"] = nodes.address
        fuse(work.config(folder), until="prompts")
        recorder, killed = Recorder(), {}

        def lose() -> None:
            while not recorder.began:
                time.sleep(0.05)
            time.sleep(lost_after)
            killed.update(node=others[0].node_id, at=time.time() - recorder.began)
            nodes.remove_node(others[0], allow_graceful=False)

        stage.Generator = Sleeper  # type: ignore[misc]
        if lost_after:
            threading.Thread(target=lose, daemon=True).start()
        with recorder.running():
            fuse(work.config(folder), until="score")
        found = {"wall": recorder.ended - recorder.began, "spans": recorder.spans(folder / NOTES)}
        notice = 0.0
        if killed:
            there = [m["until"] for m in recorder.members.values() if m["node"] == killed["node"]]
            notice = min((t - recorder.began for t in there if t - recorder.began > killed["at"]),
                         default=killed["at"]) - killed["at"]  # fmt: skip
        nodes.shutdown()
        found |= {"work": asdict(work), "load": os.getloadavg()[1]}
        return found | told(work, folder, starts(found["spans"]), killed.get("at", 0.0), notice)


def starts(spans: Sequence[Span]) -> dict[str, float]:
    """Mean seconds of a start of each pool, of engines that started."""
    pools = {span.pool: [s for s in spans if s.pool == span.pool] for span in spans}
    return {
        pool: mean([s.ready - s.since for s in own if s.ready < s.until] or [0.0])
        for pool, own in pools.items()
    }


def told(
    work: Work, folder: Path, seen: dict[str, float], lost: float, notice: float
) -> dict[str, Any]:
    """The simulated run; for a lost node the mean over the nodes that it may be.

    Also one with starts that take as long as they were `seen` to take on this machine.
    """
    sources = work.pools(folder)
    late = [replace(s, startup=max(s.startup, seen.get(s.name, 0.0))) for s in sources]
    trouble = [{"lost": {n: lost}, "notice": notice} for n in range(work.nodes)] if lost else [{}]
    outcomes = [work.foretold(sources, **one) for one in trouble]
    return {
        "simulated": mean(o.wall for o in outcomes), "useful": outcomes[0].useful,
        "as_seen": mean(work.foretold(late, **one).wall for one in trouble),
        "simulated_spans": outcomes[0].spans, "lost": lost, "notice": notice,
        "engines": {s.name: s.gpus for s in sources},
        "starts": {s.name: s.startup for s in sources},
    }  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A real run and the simulated one."""

    name: str
    nodes: int
    gpus: int
    wall: float
    simulated: float
    as_seen: float
    """Simulated with starts that take as long as on this machine."""
    useful: float
    """GPU-seconds."""
    spans: list[Span]
    simulated_spans: list[Span]
    lost: float
    notice: float
    starts: dict[str, float]
    load: float | None
    """Processes that wanted a core in the last five minutes, on average."""

    @staticmethod
    def of(name: str, work: Work, found: dict[str, Any]) -> Compared:
        """Of what a process printed."""
        spans = {key: [Span(**s) for s in found[key]] for key in ("spans", "simulated_spans")}
        names = ("wall", "simulated", "as_seen", "useful", "lost", "notice", "starts", "load")
        kept = {key: found[key] for key in names}
        return Compared(name, work.nodes, work.gpus, **spans, **kept)

    def efficiency(self, wall: float) -> float:
        """Useful share of the GPUs' time in so many seconds."""
        return self.useful / (self.nodes * self.gpus * wall)


def alone(name: str, work: Work, lost_after: float = 0.0) -> Compared:
    """Run it in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--work", json.dumps(asdict(work))]
    command += ["--lost-after", str(lost_after)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Compared.of(name, work, json.loads(done.stdout.splitlines()[-1]))


# --- the report --------------------------------------------------------------------------------


def of_pools(compared: Compared) -> str:
    """Engines, starts and ends of each pool on Ray and simulated, in Markdown."""
    lines = []
    for pool in dict.fromkeys(span.pool for span in compared.simulated_spans):
        line = [pool, f"{compared.starts[pool]:.1f}"]
        for spans in (compared.spans, compared.simulated_spans):
            own = [span for span in spans if span.pool == pool]
            starts = [span.ready - span.since for span in own if span.ready < span.until]
            last = max((span.until for span in own), default=0.0)
            line += [str(len(starts)), f"{mean(starts or [0.0]):.1f}", f"{last:.1f}"]
        lines.append(line)
    head = ["", "start, s", "engines", "start, s", "last end, s", "simulated: engines",
            "start, s", "last end, s"]  # fmt: skip
    return table(head, lines)


def walls(found: Sequence[Compared]) -> str:
    """Wall and efficiency of both, in Markdown."""
    return table(
        ["", "Ray, s", "simulated, s", "ratio", "with starts as seen, s", "ratio", "efficiency",
         "simulated"],
        [
            [
                c.name, f"{c.wall:.1f}", f"{c.simulated:.1f}", f"{c.simulated / c.wall:.3f}",
                f"{c.as_seen:.1f}", f"{c.as_seen / c.wall:.3f}",
                f"**{c.efficiency(c.wall):.3f}**", f"{c.efficiency(c.simulated):.3f}",
            ]
            for c in found
        ],
    )  # fmt: skip


def plot(compared: Compared, path: Path) -> None:
    """GPUs over time, on Ray above and simulated below."""
    figure, (real, simulated) = plot_axes((8, 5.4), 2)
    last = max(compared.wall, compared.simulated)
    for axes, spans in ((real, compared.spans), (simulated, compared.simulated_spans)):
        draw_gpus(axes, sorted(spans, key=lambda s: s.pool), 1.0, int(last) + 3, 1.0)
        axes.set_ylim(0, compared.nodes * compared.gpus)
    real.set_title("a real Ray", fontsize=9)
    simulated.set(xlabel="seconds")
    simulated.set_title("simulated", fontsize=9)
    real.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
    save_plot(figure, path)


def rows(found: Sequence[Compared]) -> list[results.Row]:
    """Of results.json; `peer` is the simulator's, and a ratio of 1 is what it foretold."""
    about = {
        "machine": f"{results.machine()}; Ray's nodes and GPUs are logical, engines sleep",
        "versions": results.versions("ray", "wrpo-ray"),
    }
    made = []
    for name, one in zip(("", "lost_node."), found, strict=False):
        ours, peer = one.efficiency(one.wall), one.efficiency(one.simulated)
        for what, pair, unit in (
            (f"chain_efficiency.{name}{one.nodes}nodes", (ours, peer), "useful share of GPU time"),
            (f"{name}vs_simulated", (one.wall, one.simulated), "s"),
            (f"{name}vs_simulated.starts_as_seen", (one.wall, one.as_seen), "s"),
        ):
            ratio = one.as_seen / one.wall if what.endswith("as_seen") else one.simulated / one.wall
            row = results.row(PREFIX + what, *pair, unit, about)
            made.append(row | {"ratio": round(ratio, 3)})
    return made


TEXT = """# The pools on a real Ray, against the simulator

{walls}

Generation and scoring of {answers:,} answers of five sources on a real Ray of {nodes} nodes of
{gpus} GPUs, all on this machine: nodes and GPUs are logical. `make bench` repeats the measurement
and writes this section and [results.json](results.json); `on_ray.py` runs it alone.

- Real: the runner, stages, pools, allocator, placement groups (deepseek: one of eight GPUs on one
  node) and the committed shards. Not real: engines and reward sleep, as long as the paper's models
  would take by the roofline ([SIMULATION](SIMULATION.md)), {quicker:g} times quicker; one answer
  stands for {shrink}: {prompts:,} prompts, {samples} answers each, {buckets} buckets. No trainings.
- **efficiency**: the time of all tokens at an engine's full rate, as a part of all GPUs' time. The
  simulator has the same lengths, buckets, rates and starts, and no other delays.
- **with starts as seen**: the simulator's starts take as long as they did on this machine, whose
  {cores} cores start all processes{load}.
{lost}- {told}
- What the simulator does not have: Ray's start of a process; times of buckets as they are measured;
  all stages on these cores.

{pools}

![GPUs over time on Ray and simulated](../docs/img/on-ray.svg)
"""


TOLD = (
    "The config tells no rates: until a pool has finished a bucket, the allocator guesses. With\n"
    "  `plan.rates` and `plan.startup` it need not.",
    "The config tells `plan.rates` and `plan.startup`, so that the allocator need not guess\n"
    "  before the first buckets.",
)
LOST = """- **a node lost**: its processes are killed after {lost:.0f} s; Ray notices after
  {notice:.0f} s, and the simulator is told so. It gives the mean over the nodes that it may be.
"""


def text(work: Work, found: Sequence[Compared]) -> str:
    """The section of RESULTS.md."""
    whole, *others = found
    lost = "".join(LOST.format(lost=one.lost, notice=one.notice) for one in others)
    return TEXT.format(
        walls=walls(found), pools=of_pools(whole), nodes=work.nodes, gpus=work.gpus,
        answers=len(work.sources) * work.prompts * SAMPLES, quicker=work.quicker, shrink=SHRINK,
        prompts=work.prompts, samples=SAMPLES, buckets=work.buckets, cores=os.cpu_count(),
        lost=lost, told=TOLD[work.tells],
        load=f" at a load of {whole.load:.1f}" if whole.load else ", beside other programs",
    )  # fmt: skip


def main() -> None:
    """Measure and report; or be one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--lose-a-node", action="store_true", help="and run it without one")
    parser.add_argument(
        "--found", type=Path, nargs="+", default=[],
        help="what runs with --work printed, to report them: with all nodes, and without one",
    )  # fmt: skip
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--lost-after", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        found = run(Work(**json.loads(options.work)), options.lost_after)
        print(json.dumps(found, default=asdict))
        return
    work = Work()
    printed = [json.loads(path.read_text().splitlines()[-1]) for path in options.found]
    if printed:
        work = Work(**printed[0]["work"])
    found = [Compared.of(name, work, one) for name, one in zip(NAMES, printed, strict=False)]
    found = found or [alone(NAMES[0], work)]
    whole = found[0]
    print(walls([whole]), of_pools(whole), sep="\n\n", flush=True)
    if options.lose_a_node:
        found.append(alone(NAMES[1], work, whole.wall / 3))
    plot(whole, options.output.parent / "docs" / "img" / "on-ray.svg")
    results.save(options.output, PREFIX, rows(found), text(work, found))
    print(text(work, found))


if __name__ == "__main__":
    main()
