"""The paper's generation on 1 to 64 simulated nodes: efficiency, and what a plan foretells.

`python benchmarks/simulate.py` writes SIMULATION.md, rows of results.json and the plot in
docs/img. Sources, rates and starts are those of `wrpo plan benchmarks/paper.yaml`; lengths of
answers are log-normal, cut at `max_tokens`. Nothing here needs a GPU, Ray or torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from results import save_rows
from simulation import Chunk, Cluster, Outcome, Policy, Source, simulate

from wrpo_ray import config
from wrpo_ray.planning.estimate import plan as make_plan
from wrpo_ray.planning.work import Plan, Work

PREFIX = "simulate."
HERE = Path(__file__).parent
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8
SIGMA = 0.8
"""Spread of the answers' lengths, the standard deviation of their logarithms."""


@dataclass(frozen=True)
class Setting:
    """A policy, and how the work is cut."""

    name: str
    policy: Policy
    buckets: int
    chunk: int


ONE = Policy(in_hand=1, ahead=1)
TWO = Policy(in_hand=2, ahead=2)
FIRST = Setting("one bucket at a time", ONE, 64, 64)
"""As generation was first: each chunk waits for the longest answer of the one before."""
NOW = Policy(in_hand=2, ahead=0, barrier=False)
"""As it is: an engine is given more as it finishes, and no bucket is bound to it ahead."""
BEST = Setting("current scheduling, more buckets", NOW, 256, 64)
SETTINGS = (
    FIRST,
    Setting("two buckets at once", TWO, 64, 64),
    Setting("two at once, more buckets", TWO, 256, 64),
    Setting("two at once, large chunks, more buckets", TWO, 256, 256),
    Setting("two at once, no chunk waits", Policy(2, 2, barrier=False), 256, 64),
    Setting("current scheduling", NOW, 64, 64),
    BEST,
    Setting("current scheduling, 1,024 buckets", NOW, 1024, 64),
)


def lengths(count: int, mean: float, most: int, seed: int) -> np.ndarray:
    """Tokens of answers: log-normal, cut at `most`, and then of this mean."""
    drawn = np.exp(np.random.default_rng(seed).normal(0, SIGMA, count))
    scale = mean
    for _ in range(20):
        scale *= mean / np.minimum(drawn * scale, most).mean()
    return np.maximum(1, np.minimum(drawn * scale, most).round())


def cut(tokens: np.ndarray, samples: int, setting: Setting, seed: int) -> list[list[Chunk]]:
    """Prompts into buckets by hash, and those into chunks."""
    prompts = len(tokens) // samples
    bucket = np.random.default_rng(seed).integers(0, setting.buckets, prompts)
    order = np.argsort(bucket, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(bucket, minlength=setting.buckets))[:-1])
    answers = tokens.reshape(prompts, samples)
    size = setting.chunk
    return [
        [answers[part[i : i + size]].ravel().tolist() for i in range(0, len(part), size)]
        for part in parts
    ]


@dataclass(frozen=True)
class Result:
    """A simulated run, and the plan for it."""

    setting: Setting
    nodes: int
    outcome: Outcome
    planned: float
    """Seconds."""

    @property
    def error(self) -> float:
        """Of the plan, against the simulation."""
        return self.planned / self.outcome.wall - 1


@dataclass(frozen=True)
class Bench:
    """The config whose generation is simulated."""

    settings: config.Config
    share: float = 1.0
    """Of the prompts."""

    def run(self, setting: Setting, nodes: int, *, static: bool = False, **trouble: Any) -> Result:
        """Simulate; `static` gives each source an equal part of the GPUs for good."""
        plan = self._plan(setting, nodes)
        works = [w for w in plan.works if w.stage == "generate"]
        sources = [
            self._source(w, setting, i, nodes, len(works) * static) for i, w in enumerate(works)
        ]
        sources.sort(key=lambda s: -s.gpus)  # large engines find whole nodes
        outcome = simulate(sources, Cluster(nodes, GPUS, **trouble), setting.policy)
        return Result(setting, nodes, outcome, plan.seconds("generate"))

    def _plan(self, setting: Setting, nodes: int) -> Plan:
        storage = config.StorageConfig(buckets=setting.buckets)
        prompts = round(self.settings.plan.prompts * self.share)
        planned = self.settings.plan.model_copy(update={"prompts": prompts})
        changed = self.settings.model_copy(update={"storage": storage, "plan": planned})
        return make_plan(changed, "generate", nodes * GPUS)

    def _source(self, work: Work, setting: Setting, seed: int, nodes: int, parts: int) -> Source:
        sampling = self.settings.sampling
        tokens = lengths(work.rows, work.output_tokens / work.rows, sampling.max_tokens, seed)
        gpus = int(work.gpus)
        most = max(1, nodes * GPUS // max(parts, 1) // gpus)
        return Source(
            name=work.pool,
            gpus=gpus,
            engines=most,
            least=most if parts else work.engines,
            rate=work.output_tokens / work.actor_seconds,
            startup=work.startup,
            buckets=cut(tokens, sampling.samples, setting, seed),
        )


# --- what it found ---------------------------------------------------------------------------


def table(results: Sequence[Result], names: Sequence[str]) -> str:
    """Results in Markdown."""
    head = [
        "",
        "wall, h",
        "plan, h",
        "plan's error",
        "efficiency",
        "starting",
        "no engine",
        "slack",
    ]
    lines = [head, ["---"] * len(head)]
    for name, r in zip(names, results, strict=True):
        o = r.outcome
        shares = [o.starting, o.unused, o.slack]
        lines.append(
            [
                name, f"{o.wall / 3600:.2f}", f"{r.planned / 3600:.2f}", f"{r.error:+.0%}",
                f"**{o.efficiency:.2f}**", *(f"{s / o.capacity:.2f}" for s in shares),
            ]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(curves: dict[str, Sequence[Result]], path: Path) -> None:
    """Efficiency over nodes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "wrpo"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4))
    for name, results in curves.items():
        axes.plot(
            [r.nodes for r in results], [r.outcome.efficiency for r in results], "o-", label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(NODES, [str(n) for n in NODES])
    axes.set(xlabel="nodes of 8 GPUs", ylabel="useful share of GPU time", ylim=(0, 1))
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def row(name: str, ours: float, peer: float, ratio: float, unit: str, nodes: int) -> dict[str, Any]:
    """A row of results.json."""
    return {
        "name": PREFIX + name,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "ratio": round(ratio, 3),
        "unit": unit,
        "machine": f"simulated: {nodes} nodes of {GPUS} GPUs",
        "versions": {n: version(n) for n in ("numpy", "wrpo-ray")},
    }


TEXT = """# Generation on a simulated cluster

The paper's data: 10 sources (9B to 236B), 61,800 prompts, 5 answers each: 3.09M answers, of 450
tokens on average (log-normal, sigma {sigma}, cut at 2,048). Rates and start times are guessed from
model sizes ([paper.yaml](paper.yaml)), so shares and ratios are meaningful, hours are not. `python
benchmarks/simulate.py` writes this file again in a few minutes.

A bucket is a hash partition of the prompts; an engine works on some buckets at once and commits
their answers chunk by chunk. A slot is a place for one answer in an engine's batch.

The columns are shares of all GPUs' time. **efficiency**: the time that the committed tokens take
at an engine's full rate. **starting**: engines that load weights. **no engine**: GPUs that no
engine uses. **slack**: engines with fewer answers than slots, or on slow nodes. **plan** is the
estimate of `wrpo plan --gpus`.

## 1 to 64 nodes of 8 GPUs

{best} ({buckets} buckets, chunks of {chunk} prompts):

{curve}

The first version (64 buckets, one at a time, chunks of 64 prompts):

{first}

![efficiency over nodes](../docs/img/simulate.svg)

## 64 nodes: where the time goes

{settings}

With ten times the prompts (1,024 buckets), the efficiency is {tenfold:.2f}.

## Conclusions

- If a chunk waits for the longest answer of the previous one, the engine is half empty: lengths
  are heavy-tailed, and 320 answers barely fill 256 slots. So no chunk waits, and an engine works
  on two buckets at once, which keeps the slots full.
- Two at once alone makes it worse on many nodes: with two more assigned in advance, each engine
  holds four of 64 buckets, and most engines of a pool get none. So no bucket is assigned in
  advance. `storage.buckets` should be about six times the engines of the largest pool; `wrpo plan`
  prints the number. With far more, a bucket is too small to fill an engine.
- The sources finish together if engines are proportional to work (`wrpo plan --gpus N` prints
  their numbers for `actors.min`) and free GPUs go to pools that still have buckets (a larger
  `actors.max`).
- On 64 nodes, engine starts are the largest remaining loss: all work takes half an hour, and a
  236B engine takes twelve minutes to start. With more data, this share is smaller.
- The plan does not model slots, long last answers and partly used nodes. It is right within about
  a tenth where engines stay full, and too optimistic by a third or more where they do not.

## Slow and lost nodes, at 64 nodes

{trouble}

Static: each source has a tenth of the GPUs for the whole run.
"""


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts (default 1)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of what is written")
    options = parser.parse_args()
    bench = Bench(config.load(HERE / "paper.yaml"), options.share)
    curves = {s.name: [bench.run(s, n) for n in NODES] for s in (BEST, FIRST)}
    best, first = curves.values()
    most, last = NODES[-1], best[-1]
    at_most = [bench.run(s, most) for s in SETTINGS]
    slow = dict.fromkeys(range(0, most, 20), 0.5)
    trouble = {
        "none": last,
        f"{len(slow)} nodes at half speed": bench.run(BEST, most, slow=slow),
        "a node lost after a third": bench.run(BEST, most, lost={1: last.outcome.wall / 3}),
        "both": bench.run(BEST, most, slow=slow, lost={1: last.outcome.wall / 3}),
        "static": bench.run(BEST, most, static=True),
    }
    more = Bench(bench.settings, 10 * options.share).run(Setting("tenfold", NOW, 1024, 64), most)
    plot(curves, options.out.parent / "docs" / "img" / "simulate.svg")
    names = [f"{s.name} ({s.buckets} buckets, chunks of {s.chunk})" for s in SETTINGS]
    text = TEXT.format(
        sigma=SIGMA, best=BEST.name.capitalize(), buckets=BEST.buckets, chunk=BEST.chunk,
        curve=table(best, [f"{n} nodes" for n in NODES]),
        first=table(first, [f"{n} nodes" for n in NODES]),
        settings=table(at_most, names),
        trouble=table(list(trouble.values()), list(trouble)),
        tenfold=more.outcome.efficiency,
    )  # fmt: skip
    (options.out / "SIMULATION.md").write_text(text)
    save_rows(options.out, PREFIX, list(rows(last, first[-1], trouble["static"])))
    print(text)


def rows(best: Result, first: Result, static: Result) -> Iterator[dict[str, Any]]:
    """What is kept in results.json; above 1 ours is better, but for the plan's ratio."""
    nodes, ours = best.nodes, best.outcome
    for name, peer in (("", static.outcome), (".vs_first", first.outcome)):
        ratio = ours.efficiency / peer.efficiency
        what = "useful share of GPU time"
        yield row(f"efficiency.{nodes}{name}", ours.efficiency, peer.efficiency, ratio, what, nodes)
    planned = best.planned / ours.wall
    yield row(f"wall.{nodes}.vs_plan", ours.wall, best.planned, planned, "s", nodes)


if __name__ == "__main__":
    main()
