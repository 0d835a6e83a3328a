"""The paper's run on 1 to 64 simulated nodes: efficiency, what bounds it, what a plan foretells.

`python benchmarks/simulate.py` writes SIMULATION.md, rows of results.json and two plots in
docs/img. The config is paper.yaml; rates are those of roofline.py; engines and trainings start
what `runtime.allocation` gives them. Nothing here needs a GPU, Ray or torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusion import SIGMA, START, TRAINING_START, Fusion, Overlap
from results import save_rows
from roofline import MODELS, TRAIN_MFU
from simulation import Cluster, Outcome, Policy, Source, Span, Store, simulate

from wrpo_ray import config
from wrpo_ray.planning.estimate import plan as make_plan

PREFIX = "simulate."
HERE = Path(__file__).parent
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8
STORE = Store(node=5e9, total=200e9, load=1.25e9)
"""Bytes/s into a node, out of the store, and from a node's memory into each GPU of an engine."""
ON_NODES = replace(STORE, on_nodes=True)
HELD = "sft training"
"""The training whose node is held free from the beginning, so that it need not wait for one."""
CHAINS: tuple[tuple[str, Overlap, bool, str], ...] = (
    ("serial", "", False, ""), ("serial, wide trainings", "", True, ""),
    ("two branches", "branches", False, ""),
    ("two branches, wide trainings", "branches", True, ""),
    ("overlapped", "all", True, ""), ("overlapped, with a node held", "all", True, HELD),
)  # fmt: skip
"""(name, what runs side by side, whether trainings are wide, one whose node is held) of each."""
BUILT = 4
"""Of these are what the runner does."""
NOW = Policy(2)


@dataclass(frozen=True)
class Setting:
    """A policy, and how the work is cut."""

    name: str
    buckets: int
    policy: Policy = NOW
    fills: float | None = None
    """Times that the buckets in hand fill an engine; None is `FILLS`, 0 the policy's number."""
    store: Store = STORE


BEST = Setting("1,024 buckets", 1024)
FIRST = Setting(
    "the first version: 64 buckets, one at a time, chunks wait, pools take turns",
    64, Policy(1, 1, barrier=True, in_turn=True), 0,
)  # fmt: skip
IN_TURN = Setting("pools take turns, as before the allocator", 1024, Policy(2, in_turn=True))
FEW = Setting("256 buckets", 256)
STAYS = Setting("no engine ends for another pool", 1024, Policy(2, moves=False))
AHEAD = Setting("weights on all nodes before", 1024, store=ON_NODES)
SETTINGS = (
    BEST,
    FEW,
    Setting("4,096 buckets", 4096),
    Setting("buckets in hand fill an engine twice", 1024, fills=2),
    Setting("weights from other nodes", 1024, store=replace(STORE, peers=True)),
    AHEAD,
    Setting("4,096 buckets, weights on all nodes before", 4096, store=ON_NODES),
    Setting("a store of 20 GB/s", 1024, store=replace(STORE, total=20e9)),
    Setting("a store of 20 GB/s, weights from other nodes", 1024,
            store=replace(STORE, total=20e9, peers=True)),
    STAYS,
    IN_TURN,
    FIRST,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A simulated run, and the plan for it."""

    name: str
    nodes: int
    outcome: Outcome
    planned: float = 0.0
    """Seconds."""

    @property
    def error(self) -> float:
        """Of the plan, against the simulation."""
        return self.planned / self.outcome.wall - 1


@dataclass(frozen=True)
class Bench:
    """The config that is simulated."""

    settings: config.Config
    share: float = 1.0
    """Of the prompts."""

    def fusion(self, setting: Setting, nodes: int) -> Fusion:
        """The run, cut as the setting says."""
        made = Fusion(self.settings, nodes, GPUS, setting.buckets, share=self.share)
        return made if setting.fills is None else replace(made, fills=setting.fills)

    def generate(self, setting: Setting, nodes: int, name: str = "", **trouble: Any) -> Result:
        """The answers of the sources."""
        sources = self.fusion(setting, nodes).sources
        cluster = Cluster(nodes, GPUS, store=setting.store, **trouble)
        outcome = simulate(sources, cluster, setting.policy)
        return Result(name or setting.name, nodes, outcome, self._plan(sources, setting, nodes))

    def chain(
        self,
        name: str,
        nodes: int,
        *,
        overlaps: Overlap,
        is_wide: bool = True,
        held: str = "",
        store: Store = STORE,
        policy: Policy = NOW,
    ) -> Result:
        """The whole run."""
        made = replace(self.fusion(BEST, nodes), overlaps=overlaps, is_wide=is_wide)
        pools, others = made.chain()
        cluster = Cluster(nodes, GPUS, store=store, held=held)
        return Result(name, nodes, simulate(pools, cluster, policy, others))

    def _plan(self, sources: Sequence[Source], setting: Setting, nodes: int) -> float:
        """Seconds that `wrpo plan` tells for generation with the same rates and starts."""
        download = 0.0 if setting.store.on_nodes else 1 / setting.store.node
        starts = {
            s.name: START + s.bytes * (1 / (setting.store.load * s.gpus) + download)
            for s in sources
        }  # fmt: skip
        planned = self.settings.plan.model_copy(
            update={
                "prompts": round((self.settings.plan.prompts or 0) * self.share),
                "rates": {s.name: s.rate for s in sources},
                "startup": starts,
            }
        )
        storage = config.StorageConfig(buckets=setting.buckets)
        changed = self.settings.model_copy(update={"storage": storage, "plan": planned})
        return make_plan(changed, "generate", nodes * GPUS).seconds("generate")


# --- what it found ---------------------------------------------------------------------------


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def outcomes(results: Sequence[Result]) -> str:
    """Shares of all GPUs' time, and the plan's error where there is one."""
    head = ["", "wall, min", "plan's error", "efficiency", "starting", "no engine", "slack"]
    return table(
        head,
        [
            [
                r.name, f"{r.outcome.wall / 60:.1f}", f"{r.error:+.0%}" if r.planned else "",
                f"**{r.outcome.efficiency:.2f}**",
                *(f"{s / r.outcome.capacity:.2f}" for s in parts(r.outcome)),
            ]
            for r in results
        ],
    )  # fmt: skip


def parts(o: Outcome) -> tuple[float, float, float]:
    """GPU-seconds that are not useful."""
    return o.starting, o.unused, o.slack + o.redone


def rates(fusion: Fusion) -> str:
    """The rates of all models."""
    lines = []
    for source in fusion.sources:
        model = MODELS[source.name]
        hours = source.tokens / source.rate * source.gpus / 3600
        start = START + source.bytes * (1 / STORE.node + 1 / (STORE.load * source.gpus))
        lines.append(
            [
                source.name, f"{model.weights / 1e9:.0f}", f"{model.kv / 1e3:.0f}",
                str(source.gpus), str(source.slots), f"{source.steps[-1] * 1e3:.0f}",
                f"{source.rate:,.0f}", f"{start:.0f}", f"{hours:.1f}",
            ]
        )  # fmt: skip
    head = ["", "weights, G", "KV of a token, kB", "GPUs", "slots", "step, ms", "tokens/s",
            "start, s", "GPU-h in all"]  # fmt: skip
    return table(head, lines)


def ends(result: Result) -> str:
    """When the parts of a chain ended, in minutes."""
    of = {name: f"{second / 60:.1f}" for name, second in result.outcome.ends.items()}
    sources = [n for n in of if n.split()[0] in MODELS and not n.startswith("sft ")]
    last = {
        split: max((float(of[n]) for n in sources if n.endswith(split)), default=0.0)
        for split in ("sft", "preference")
    }
    names = {
        "scores sft": "their scores", "sft training": "SFT",
        "sft preference": "answers of target-SFT", "scores preference": "all scores of sources",
        "reference": "reference log-probs", "wrpo training": "WRPO",
    }  # fmt: skip
    begin = [f"sources, SFT's prompts {last['sft']:.1f}", f"all prompts {last['preference']:.1f}"]
    return ", ".join([*begin, *(f"{what} {of[name]}" for name, what in names.items())])


def bounds(chain: Result) -> str:
    """Where the GPU-time of the chain goes that is not useful, as a sum."""
    o = chain.outcome
    gpus = chain.nodes * GPUS
    spans = {s.pool: s for s in o.spans}
    wrpo = spans["wrpo training"]
    before = max(second for name, second in o.ends.items() if name != "wrpo training")
    alone = (o.wall - before) * (gpus - wrpo.gpus)
    lines = [
        ("useful", o.useful),
        ("starts of engines and trainings", o.starting),
        ("GPUs without work while WRPO trains", alone),
        ("other GPUs without an engine: parts of the chain that wait, ends of pools",
         o.unused - alone),
        ("engines with few answers left, trainings below the stated share of the peak",
         o.slack + o.redone),
    ]  # fmt: skip
    return table(
        ["", "GPU-h", "share"],
        [[name, f"{n / 3600:.1f}", f"{n / o.capacity:.2f}"] for name, n in lines],
    )


def plot_axes(size: tuple[float, float], rows: int = 1) -> tuple[Any, Any]:
    """A figure whose SVG is the same on every run, and its axes, below each other if several."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "wrpo"
    from matplotlib import pyplot as plt

    return plt.subplots(rows, figsize=size)


def save_plot(figure: Any, path: Path) -> None:
    """Write it without a date."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def plot(curves: dict[str, Sequence[Result]], path: Path) -> None:
    """Efficiency over nodes."""
    figure, axes = plot_axes((6, 3.4))
    for name, results in curves.items():
        axes.plot(
            [r.nodes for r in results], [r.outcome.efficiency for r in results], "o-", label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(NODES, [str(n) for n in NODES])
    axes.set(xlabel="nodes of 8 GPUs", ylabel="useful share of GPU time", ylim=(0, 1))
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    save_plot(figure, path)


def draw_gpus(axes: Any, spans: Sequence[Span], step: float, steps: int, unit: float) -> None:
    """GPUs that engines and trainings hold, every `step` seconds; starts are grey."""
    from matplotlib import pyplot as plt

    seconds = [step * n for n in range(steps)]
    names = dict.fromkeys(s.pool for s in sorted(spans, key=lambda s: s.since))
    counts = {name: [0] * len(seconds) for name in [*names, "starting"]}
    for span in spans:
        for n, second in enumerate(seconds):
            if span.since <= second < span.until:
                counts["starting" if second < span.ready else span.pool][n] += span.gpus
    all_colours = plt.get_cmap("tab20").colors
    coloured = [c for c in all_colours if max(c) - min(c) > 0.1]  # grey is for starts
    colours = [*coloured[: len(names)], (0.8, 0.8, 0.8)]
    times = [second / unit for second in seconds]
    axes.stackplot(times, *counts.values(), labels=[*counts], colors=colours)
    axes.set(ylabel="GPUs", xlim=(0, times[-1]))


def timeline(result: Result, path: Path) -> None:
    """GPUs over time."""
    figure, axes = plot_axes((8, 4.2))
    draw_gpus(axes, result.outcome.spans, 20, int(result.outcome.wall) // 20 + 2, 60)
    axes.set_xlabel("minutes")
    axes.set_ylim(0, result.nodes * GPUS)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
    save_plot(figure, path)


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


TEXT = """# The paper's run on a simulated cluster

The paper's data: 10 sources (9B to 236B), 61,800 prompts, 5 answers each: 3.09M answers, of 450
tokens on average (log-normal, sigma {sigma}, cut at 2,048), then SFT, answers of target-SFT,
scores, reference log-probs and WRPO ([paper.yaml](paper.yaml)). `python benchmarks/simulate.py`
writes this file again in some ten minutes.

Rates are a roofline of an H100's memory and FLOPs ([roofline.py](roofline.py) has the formula),
not measurements. So shares and ratios are meaningful; hours are right within a factor of two.
Weights come from a store: {node:.0f} GB/s into a node, {total:.0f} GB/s for all; {load:.2f} GB/s
into each GPU; {start:.0f} s more until an engine answers, {training:.0f} s until workers train.
Training has {mfu:.0%} of the peak.

A bucket is a hash partition of the prompts; an engine works on some buckets at once and commits
their answers chunk by chunk. A slot is a place for one answer in an engine's batch. What starts
where is decided by the code of the real pools ([decision 23](../docs/adr/0023-allocation.md)).

The columns are shares of all GPUs' time. **efficiency**: the time that the committed tokens take
at an engine's full rate, and trainings at the stated share. **starting**: engines that download
and load weights. **no engine**: GPUs that no engine uses. **slack**: engines with fewer answers
than slots, or on slow nodes. **plan** is `wrpo plan --gpus` with the same rates and starts.

## Rates

{rates}

gemma2-27b on one GPU and mistral-large on four have little room for keys and values. With twice
the GPUs for an engine they would make {gemma:.2f} and {mistral:.2f} times as many tokens per GPU.

## Generation on 1 to 64 nodes of 8 GPUs

{curve}

![efficiency over nodes](../docs/img/simulate.svg)

## Generation on 64 nodes: what matters

{settings}

With ten times the prompts (4,096 buckets), the efficiency is {tenfold:.2f}.

## The whole chain

{chains}

- **serial** is what the runner does where there is no room for more: a phase begins when the one
  before has ended; scores are made beside the answers.
- **two branches** is what it does where there is room: the sources answer SFT's prompts first, and
  SFT and the answers of target-SFT run beside what is left of theirs. All GPUs are busy when SFT
  can begin, and engines of a node end for it. Pairs, reference log-probs and WRPO follow one
  another.
- **wide trainings** have as many nodes as a step's tokens feed (`workers`), the others one, as in
  the config.
- **overlapped** is not built: reference log-probs follow bucket by bucket as well, and WRPO's
  workers start before their rows are finished.
- **with a node held**, not built either: a node is kept free for SFT from the beginning.

Minutes at which the parts end on 64 nodes, with wide trainings:

- serial: {serial_ends}
- two branches, SFT waits for a node: {waits_ends}
- two branches: {built_ends}

![GPUs over time](../docs/img/allocation.svg)

What the GPUs of 64 nodes do in the chain of two branches with wide trainings:

{bounds}

## Conclusions

- On 64 nodes, 0.90 of the GPUs' time for generation needs weights on all nodes before
  ({ahead:.2f}), and 0.80 for the chain is out of reach with this amount of data; 8 nodes have both.
  All answers are half an hour of work for 512 GPUs, and an engine of 236B takes three to four
  minutes of it to start. The last answers (2,048 tokens in steps of 40 to 50 ms) take a minute
  and a half.
- An engine more or less of a pool is two minutes of its time, so with whole engines some pools end
  well before others. Where they would, engines of the first ones end a few minutes before, and
  others have their GPUs: {best:.2f} against {stays:.2f}, and {idle:.2f} of the GPUs' time without
  an engine against {stays_idle:.2f}.
- The runner's engines get **weights from other nodes**: each file leaves the store about once, and
  an engine with a node takes its GPUs when its weights are there
  ([decision 7](../docs/adr/0007-weights.md)). Weights of later phases come ahead; those of the
  first one cannot, so that **weights on all nodes before** is a bound for generation.
- WRPO trains for the last five minutes, on at most as many GPUs as its steps of 128 rows feed. That
  alone is a tenth of the chain's GPU time, which no order of the other parts changes.
- With engines that end for SFT, the chain of two branches has {displaced:.2f} on 64 nodes, and
  without {waits:.2f}: all GPUs have engines when SFT's rows are there, and much waits for SFT. A
  node held for it from the beginning is worth no more.
- Engines must be filled: long answers take over four times the mean, so that buckets in hand that
  fill an engine only twice leave it half empty at the end of each (0.57). Six times is enough, and
  is what engines have. Two in hand, whatever their size, suit 256 buckets ({few:.2f}).
- Pools that take turns end at different times; the GPUs of those that end first start engines of
  others for a few minutes' work.
- Scores begin when the first bucket is answered. The allocator keeps room for them, or sources
  that started earlier would hold all GPUs until they end.
- A plan does not have long last answers and partly used nodes, so it is too optimistic by the
  stated error.

## Slow and lost nodes, generation on 64 nodes

{trouble}
"""


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts (default 1)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of what is written")
    options = parser.parse_args()
    bench, most = Bench(config.load(HERE / "paper.yaml"), options.share), NODES[-1]
    curve = [bench.generate(BEST, n, f"{n} nodes") for n in NODES]
    settings = [curve[-1], *(bench.generate(s, most) for s in SETTINGS[1:])]
    settings[0] = replace(settings[0], name=BEST.name)
    chains = [
        bench.chain(f"{nodes} nodes, {name}", nodes, overlaps=overlaps, is_wide=is_wide, held=held)
        for nodes in (8, most)
        for name, overlaps, is_wide, held in CHAINS
    ]
    built = chains[len(CHAINS) + BUILT - 1]
    waits = bench.chain(
        f"{built.name}, SFT waits for a node", most, overlaps="branches",
        policy=replace(NOW, displaces=False),
    )  # fmt: skip
    ahead = bench.chain(
        f"{built.name}, weights on all nodes before", most, overlaps="branches", store=ON_NODES
    )
    slow = dict.fromkeys(range(0, most, 20), 0.5)
    lost = {1: curve[-1].outcome.wall / 3}
    trouble = [
        replace(curve[-1], name="none"),
        bench.generate(BEST, most, f"{len(slow)} nodes at half speed", slow=slow),
        bench.generate(BEST, most, "a node lost after a third", lost=lost),
        bench.generate(BEST, most, "both", slow=slow, lost=lost),
    ]
    tenfold = Bench(bench.settings, 10 * options.share).generate(Setting("tenfold", 4096), most)
    images = options.out.parent / "docs" / "img"
    plot({"generation": curve}, images / "simulate.svg")
    timeline(built, images / "allocation.svg")
    text = TEXT.format(
        sigma=SIGMA, node=STORE.node / 1e9, total=STORE.total / 1e9, load=STORE.load / 1e9,
        start=START, training=TRAINING_START, mfu=TRAIN_MFU,
        rates=rates(bench.fusion(BEST, most)), gemma=twice("gemma2-27b"),
        mistral=twice("mistral-large-2407"), curve=outcomes(curve), settings=outcomes(settings),
        **conclusions(settings), tenfold=tenfold.outcome.efficiency,
        chains=outcomes([*chains, waits, ahead]),
        serial_ends=ends(chains[len(CHAINS) + 1]), waits_ends=ends(waits), built_ends=ends(built),
        displaced=built.outcome.efficiency, waits=waits.outcome.efficiency,
        bounds=bounds(built), trouble=outcomes(trouble),
    )  # fmt: skip
    (options.out / "SIMULATION.md").write_text(text)
    save_rows(options.out, PREFIX, list(rows(curve[-1], settings, chains)))
    print(text)


def conclusions(settings: Sequence[Result]) -> dict[str, float]:
    """Figures of generation that the text speaks of."""
    of = {r.name: r.outcome for r in settings}
    best, stays = of[BEST.name], of[STAYS.name]
    return {
        "few": of[FEW.name].efficiency,
        "best": best.efficiency, "stays": stays.efficiency, "ahead": of[AHEAD.name].efficiency,
        "idle": best.unused / best.capacity, "stays_idle": stays.unused / stays.capacity,
    }  # fmt: skip


def twice(name: str) -> float:
    """Tokens/s per GPU of an engine of twice the GPUs, against the one that there is."""
    model, typical = MODELS[name], (600.0, 40.0, 450.0)
    return replace(model, gpus=2 * model.gpus).rate(*typical) / 2 / model.rate(*typical)


def rows(
    best: Result, settings: Sequence[Result], chains: Sequence[Result]
) -> Iterator[dict[str, Any]]:
    """What is kept in results.json; above 1 ours is better, but for the plan's ratio."""
    nodes, what = best.nodes, "useful share of GPU time"
    *_, in_turn, first = settings
    for name, peer in ((f"{nodes}", in_turn), (f"{nodes}.vs_first", first)):
        ours, theirs = best.outcome.efficiency, peer.outcome.efficiency
        yield row(f"generate_efficiency.{name}", ours, theirs, ours / theirs, what, nodes)
    planned = best.planned / best.outcome.wall
    yield row(f"wall.{nodes}.vs_plan", best.outcome.wall, best.planned, planned, "s", nodes)
    few, many = chains[: len(CHAINS)], chains[len(CHAINS) :]
    for name, found in (
        ("64gpus", few[:BUILT]), ("512gpus", many[:BUILT]), ("64", many[:BUILT]),
        ("64.not_built", many),
    ):  # fmt: skip
        ours, serial = max(r.outcome.efficiency for r in found), found[0].outcome.efficiency
        yield row(f"chain_efficiency.{name}", ours, serial, ours / serial, what, found[0].nodes)


if __name__ == "__main__":
    main()
