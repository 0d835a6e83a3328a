"""What a run will take: sums worked by hand, what the output shows, and nothing started."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray.config import Config, PricesConfig, ReferenceConfig, RewardConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, buckets, write_shard
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.branches import Branches
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.identities import scorer_fingerprint
from wrpo_ray.planning import rates
from wrpo_ray.planning.estimate import plan as make_plan
from wrpo_ray.planning.input_rows import count_rows
from wrpo_ray.planning.spread import Spread
from wrpo_ray.planning.text import count, duration, plan_text
from wrpo_ray.planning.work import Plan, Work, balance, share
from wrpo_ray.runtime.ledger import FILE
from wrpo_ray.stages.generate.stage import Generate
from wrpo_ray.storage.folder import Folder

ROOT = Path(__file__).parents[3]


def tree(tmp_path: Path, **changes) -> Config:
    """Two sources of 1 and 2 GPUs, 600 prompts, all lengths and rates given."""
    plan = {
        "prompts": 600,
        "prompt_tokens": 100,
        "output_tokens": 300,
        "rates": {"a": 1000, "b": 500, "r": 50, "t": 900, "sft": 4000, "wrpo": 2000}
        | {"rows-sft": 10_000, "rows-wrpo": 8000},
        "startup": {"a": 60, "b": 120, "target-sft": 0},
    }
    settings = {
        "output": str(tmp_path / "out"),
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "sources": [
            {"name": "a", "model": "none/a", "actors": {"max": 2, "num_gpus": 1}},
            {"name": "b", "model": "none/b", "actors": {"max": 1, "num_gpus": 2}},
        ],
        "target": {"name": "t", "model": "none/t", "actors": {"num_gpus": 1}},
        "reward": {"name": "r", "model": "none/r", "actors": {"max": 4, "num_gpus": 1}},
        "sft": {"workers": 2, "num_gpus": 1},
        "wrpo": {"workers": 2, "num_gpus": 1, "epochs": 2},
        "prices": {"gpu_hour": 2, "pools": {"b": 3}, "output_tokens": {"b": 10}},
        "plan": plan,
    }
    return Config.model_validate(settings | changes)


def of(plan: Plan, step: str) -> Work:
    return next(w for w in plan.works if w.step == step)


def test_the_sum_of_a_config_by_hand(tmp_path):
    """a: 600 x 5 answers x 300 tokens = 900,000, at 1,000/s 900 actor-seconds."""
    plan = make_plan(tree(tmp_path))
    a, b = of(plan, "generate-a"), of(plan, "generate-b")
    assert (a.prompts, a.rows, a.done) == (600, 3000, 0)
    assert (a.prompt_tokens, a.output_tokens) == (60_000, 900_000)
    assert a.actor_seconds == 900
    assert a.gpu_seconds == 900 + 2 * 60  # two engines start
    assert a.seconds == 60 + 450  # 64 buckets: 32 rounds of 900/64 s
    assert a.money(plan.prices) == pytest.approx(1020 / 3600 * 2)
    assert b.gpu_seconds == 2 * (1800 + 120)
    assert b.money(plan.prices) == pytest.approx(3840 / 3600 * 3 + 0.9 * 10)
    assert (a.lengths, a.rate) == ("given", "given")
    # the reward reads prompt and answer: 3,000 answers, 50 a second an actor, 4 actors, a source
    r = of(plan, "score-r-a")
    assert (r.actor_seconds, r.prompt_tokens, r.seconds) == (60, 1_200_000, 15)
    # SFT on a third: 200 rows of 400 tokens; 4,000 tokens/s a worker, two workers
    sft = of(plan, "sft")
    assert (sft.rows, sft.prompt_tokens, sft.actor_seconds, sft.seconds) == (200, 80_000, 20, 10)
    # WRPO on two thirds, twice: 400 rows of 100 + 3 x 300 tokens
    wrpo = of(plan, "wrpo")
    assert (wrpo.rows, wrpo.prompt_tokens, wrpo.seconds) == (400, 800_000, 200)
    own = of(plan, "generate-target-sft")
    assert (own.prompts, own.rate) == (400, "given")  # at the target's own rate
    # sources side by side, their rewards after each other
    assert plan.seconds("generate") == max(60 + 450, 120 + 1800)
    assert plan.seconds("score") == 15 + 15
    # SFT and its samples end before the sources
    alone = [name for name in plan.stages if name not in ("sft", "sample")]
    assert plan.seconds() == pytest.approx(sum(map(plan.seconds, alone)))
    assert [name for name, _ in plan.path()] == alone
    assert plan.totals()["money"] == pytest.approx(sum(w.money(plan.prices) for w in plan.works))


def test_the_critical_path_of_branches_is_the_longer_one(tmp_path):
    """SFT waits for a third of the answers and scores: 1,950 s of all."""
    slow = tree(tmp_path).plan.model_copy(update={"rates": {"a": 1000, "b": 500, "r": 50, "t": 90}})
    plan = make_plan(tree(tmp_path, plan=slow))
    path = dict(plan.path())
    assert list(path) == [
        "prompts", "generate for SFT", "score for SFT", "sft", "sample", "pair", "train",
    ]  # fmt: skip
    assert (path["generate for SFT"], path["score for SFT"]) == pytest.approx((640, 10))
    assert plan.seconds() == pytest.approx(sum(path.values()))
    assert plan.seconds("sft") + plan.seconds("sample") > 1950 - 650
    assert "SFT runs beside the sources; the critical path: generate for SFT 11 min, score" in (
        plan_text(plan)
    )
    assert plan.record()["critical_path"] == path
    low, high = plan.range()
    assert low < plan.seconds() < high


def in_turn(plan: Plan) -> bool:
    """Whether all stages follow one another."""
    return plan.beside is None and [name for name, _ in plan.path()] == plan.stages


def test_a_plan_has_branches_where_a_run_has_them(tmp_path, monkeypatch):
    """Both have work, GPUs for both are there, and the run's own rule says so."""
    assert not in_turn(make_plan(tree(tmp_path)))
    assert not in_turn(make_plan(tree(tmp_path), gpus=999))
    for gpus in (2, 10):  # too few at all; all are the sources'
        assert in_turn(make_plan(tree(tmp_path), gpus=gpus))
    assert in_turn(make_plan(tree(tmp_path), until="select"))
    assert in_turn(make_plan(tree(tmp_path, sft={"prompts": "all", "workers": 2, "num_gpus": 1})))
    monkeypatch.setattr(Branches, "are_worth_it", lambda *_: False)
    assert in_turn(make_plan(tree(tmp_path)))


def test_branches_are_planned_for_what_is_left(tmp_path):
    settings = tree(tmp_path)
    chain = Chain(settings, for_plan=True)
    rows = [(stage, job) for stage in chain.build() for job in stage.jobs]
    for stage, job in rows:
        if stage.name == "sft":
            job.step.finish(chain.root, {"rows": 200, "tokens": 80_000}, 0)
    plan = make_plan(settings)
    assert plan.beside is not None
    assert plan.beside.first == {}  # the samples wait for nothing
    for stage, job in rows:
        if stage.name in ("prompts", "generate", "score"):
            job.step.finish(chain.root, {"rows": 3000}, 0)
    assert in_turn(make_plan(settings))


def test_on_given_gpus_all_sources_end_together(tmp_path):
    """a has 900 GPU-seconds and b 3,600: of 10 GPUs b gets 4 engines of 2, a two."""
    plan = make_plan(tree(tmp_path), gpus=10)
    assert (of(plan, "generate-a").engines, of(plan, "generate-b").engines) == (2, 4)
    busy = (900 + 2 * 60 + 2 * (1800 + 4 * 120)) / 10
    assert plan.seconds("generate") == pytest.approx(busy + 1800 / 64 / 2)
    assert of(plan, "sft").engines == 2  # workers are the config's
    assert plan.seconds("train") == 400 * 1000 / 8000 / 2 + 200  # nobody is beside it
    assert of(make_plan(tree(tmp_path), gpus=1), "sft").engines == 1


@given(
    st.lists(st.tuples(st.floats(1, 1e6), st.integers(1, 8)), min_size=1, max_size=6),
    st.integers(1, 600),
)
def test_a_balance_fits_and_no_move_is_better(works, gpus):
    pools = [
        Work(str(i), str(i), actor_seconds=s, gpus=g, units=64) for i, (s, g) in enumerate(works)
    ]
    engines = balance(pools, gpus)
    used = sum(e * w.gpus for e, w in zip(engines, pools, strict=True))
    if sum(w.gpus for w in pools) > gpus:
        assert all(
            e == max(1, min(64, gpus // w.gpus)) for e, w in zip(engines, pools, strict=True)
        )
        return
    assert used <= gpus
    ends = [w.actor_seconds / e for w, e in zip(pools, engines, strict=True)]
    last = ends.index(max(ends))
    if engines[last] < 64 and gpus - used < pools[last].gpus:
        # an engine more for the last one would have to come from others that then end later,
        # or from GPUs that are too few
        spare = gpus - used
        for w, e, end in zip(pools, engines, ends, strict=True):
            if e > 1 and w.gpus + spare >= pools[last].gpus and end < max(ends):
                assert w.actor_seconds / (e - 1) >= ends[last] * (1 - 1e-9)


# --- what the output shows ------------------------------------------------------------------


def write_answers(config: Config, name: str, prompts: int, tokens: int) -> Generate:
    """Answers to the first so many prompts in the store of a source, five each."""
    jobs = [
        j for s in Chain(config, "generate", for_plan=True).build() for p in s.phases for j in p
    ]
    job = next(j for j in jobs if j.step.name == f"generate-{name}")
    root = Folder(config.output).absolute()
    for bucket in buckets(4):
        ids = [k for k in map(records.digest, range(prompts)) if k in bucket]
        rows = [
            {
                "prompt_id": key,
                "source": name,
                "sample": s,
                "prompt_tokens": 50,
                "output_tokens": tokens,
            }
            for key in ids
            for s in range(5)
        ]
        write_shard(root / job.step.folder, bucket, records.RESPONSE, rows, "x")
        failures = root / job.step.folder / "failures" / "x"
        write_shard(failures, Bucket(0, 1), records.FAILURE, [{"stage": "generate"}], "f")
    return job


def test_what_is_there_is_skipped_and_measured(tmp_path):
    config = tree(tmp_path)
    job = write_answers(config, "a", 150, 40)
    spent = {"rows": 750, "prompt_tokens": 7500, "output_tokens": 30_000, "actor_seconds": 75.0}
    spent |= {"start_seconds": 50.0, "starts": 2, "idle_seconds": 10.0}
    ledger = {job.step.folder: {"pool": "a", **spent}}
    Folder(config.output).write_json(FILE, {"seconds": 9, "open": False, "steps": ledger})
    unknown = config.plan.model_copy(update={"rates": {}})
    plan = make_plan(config.model_copy(update={"plan": unknown}))
    a = of(plan, "generate-a")
    assert (a.rows, a.done) == (3000, 750)
    assert a.output_tokens == 2250 * 40  # the mean so far, not the given 300
    assert a.prompt_tokens == 450 * 50
    # the ledger's tokens a second, without starts and waiting; engines were and will be full
    assert a.actor_seconds == pytest.approx(90_000 / 2000)
    assert a.startup == 60  # as given
    assert (a.lengths, a.rate) == ("measured", "measured")
    b = of(plan, "generate-b")
    assert (b.done, b.output_tokens, b.lengths, b.rate) == (0, 3000 * 40, "measured", "guess")
    assert of(make_plan(config), "generate-a").rate == "given"  # for other hardware


@pytest.mark.parametrize(("rows", "at_once"), [(60, 30), (150, 75), (3000, 256)])
def test_a_rate_of_engines_that_were_half_empty_is_not_that_of_full_ones(rows, at_once, tmp_path):
    """n answers at once, half of the rows with each of two engines, make n / (n + 64) of the most.

    The rate of few answers thus gives a higher one of many: 30 make 0.32 of it, 256 make 0.8.
    """
    config = tree(tmp_path)
    unknown = config.plan.model_copy(update={"rates": {}})
    config = config.model_copy(update={"plan": unknown})
    first = next(s for s in config.sources if s.name == "a")
    first = first.model_copy(update={"engine": {"max_num_seqs": 256}})
    config = config.model_copy(update={"sources": [first, *config.sources[1:]]})
    jobs = [j for s in Chain(config, for_plan=True).build() for p in s.phases for j in p]
    folder = next(j for j in jobs if j.step.name == "generate-a").step.folder
    spent = {"pool": "a", "rows": rows, "output_tokens": 100 * rows, "actor_seconds": rows / 10.0}
    spent["prompt_tokens"] = 20 * rows
    Folder(config.output).write_json(FILE, {"seconds": 9, "open": False, "steps": {folder: spent}})
    a = of(make_plan(config), "generate-a")  # 3,000 answers of 100 tokens, measured at 1,000/s
    share = (at_once / (at_once + 64)) / (256 / (256 + 64))
    assert a.rate == "measured"
    assert a.actor_seconds == pytest.approx(300 * share)


def test_a_finished_step_has_nothing_left(tmp_path):
    config = tree(tmp_path)
    job = write_answers(config, "a", 600, 40)
    job.step.finish(Folder(config.output).absolute(), {"rows": 3000}, 0.0)
    a = of(make_plan(config), "generate-a")
    assert (a.done, a.output_tokens, a.gpu_seconds, a.seconds) == (3000, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("", None),  # begun just now
        ('{"step": 0, "tok', None),  # a line that is being written
        ('{"step": 0, "tokens_per_s": null}\n', None),
        ('{"step": 0, "tokens_per_s": 800.0}\n', 400.0),
        ('{"step": 0, "tokens_per_s": 800.0}\n{"step": 1, "tokens_per_s": 600.0}\n{"st', 350.0),
    ],
)
@pytest.mark.parametrize("step", ["sft", "wrpo"])
def test_training_that_has_begun_tells_its_rate(tmp_path, step, text, rate):
    """Tokens a second of one of two workers, as `metrics.jsonl` says at any moment."""
    config = tree(tmp_path)
    unknown = config.plan.model_copy(update={"rates": {}})
    config = config.model_copy(update={"plan": unknown})
    jobs = [j for s in Chain(config, for_plan=True).build() for p in s.phases for j in p]
    job = next(j for j in jobs if j.step.name == step)
    (Folder(config.output) / job.step.folder).write("metrics.jsonl", text.encode())
    work = of(make_plan(config), step)
    assert work.rate == ("measured" if rate else "guess")
    if rate:
        tokens = work.prompt_tokens + work.output_tokens
        assert work.actor_seconds == pytest.approx(tokens / rate, rel=0.01)


def test_prompts_are_counted_in_files(tmp_path):
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    jsonl.write_bytes(b'{"prompt": "x"}\n' * 3 + b'{"prompt": "no newline"}')
    pq.write_table(pa.table({"prompt": ["x"] * 7}), parquet)
    assert (count_rows(str(jsonl)), count_rows(str(parquet))) == (4, 7)
    config = tree(tmp_path, prompts={"path": str(tmp_path)})
    assert of(make_plan(config), "prompts").rows == 11
    assert (
        of(make_plan(tree(tmp_path, prompts={"path": str(tmp_path), "limit": 5})), "prompts").rows
        == 5
    )


def test_without_prompts_their_number_has_to_be_given(tmp_path):
    with pytest.raises(UserError, match="give its rows as plan.prompts"):
        make_plan(tree(tmp_path, plan={}))


def test_the_command_prints_json_and_starts_nothing(tmp_path):
    code = (
        "import sys; from wrpo_ray.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or len({'ray', 'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    arguments = ["plan", "benchmarks/paper.yaml", "--gpus", "64", "--json"]
    arguments += ["--set", f"output={tmp_path}/out"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    plan = json.loads(result.stdout)
    assert sum(w["rows"] for w in plan["works"] if w["stage"] == "generate") == 3_090_000
    assert plan["totals"]["money"] == pytest.approx(2.5 * plan["totals"]["gpu_hours"])
    assert list(tmp_path.iterdir()) == []


def test_the_text_has_a_line_for_each_pool(tmp_path):
    text = plan_text(make_plan(tree(tmp_path)))
    line = next(x for x in text.splitlines() if x.startswith("generate  a "))
    assert line.split() == [
        "generate", "a", "3,000", "0", "60.0k", "900.0k", "2x1", "0.3", "0.57", "8", "min",
        "given,", "given",
    ]  # fmt: skip
    assert (count(999), count(1_200_000), duration(31), duration(7500)) == (
        "999", "1.2M", "31 s", "2 h 05",
    )  # fmt: skip


def test_few_buckets_for_many_engines_are_told(tmp_path):
    text = plan_text(make_plan(tree(tmp_path), gpus=200))
    assert "storage.buckets: 64 are few for 64 engines of " in text
    assert "; set 512 before" in text
    assert "storage.buckets" not in plan_text(make_plan(tree(tmp_path), gpus=10))


def test_weights_by_config():
    """Llama-3 8B has 8.03G weights, of which the input embedding (0.53G) multiplies nothing."""
    llama = {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    }  # fmt: skip
    assert rates.weights(llama) == pytest.approx(8.03e9 - 128256 * 4096, rel=1e-3)
    mixtral = llama | {"num_experts_per_tok": 2, "num_local_experts": 8, "vocab_size": 32000}
    assert rates.weights(mixtral) == pytest.approx(12.9e9 - 32000 * 4096, rel=0.01)
    assert rates.parameters(Folder("none/Qwen2-72B-Instruct"), "q") == 72e9
    assert rates.parameters(Folder("none/qwen"), "gemma2-9b") == 9e9
    assert rates.parameters(Folder("none/SmolLM2-135M-Instruct"), "q") == 135e6
    assert rates.parameters(Folder("none/8MB"), "4bit-model") == rates.UNKNOWN
    assert rates.parameters(Folder("none/x"), "y") == rates.UNKNOWN


SMOL = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
}  # fmt: skip
"""SmolLM2-135M."""
ZOO = {
    "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 4, "intermediate_size": 256, "vocab_size": 260,
}  # fmt: skip
"""A source of the demo."""


@pytest.mark.parametrize(
    ("config", "kind", "least", "most"),
    [
        (SMOL, "generate", 50, 75),
        (SMOL, "train", 60, 100),
        (ZOO, "generate", 8_000, 12_000),
    ],
)
def test_guesses_on_one_cpu_are_what_was_measured(config, kind, least, most, tmp_path):
    """Tokens/s of one core of the machine that the guesses are set by."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    folder, cpu = str(tmp_path / "model"), {"num_cpus": 1}
    settings = tree(
        tmp_path,
        sources=[{"name": "a", "model": folder, "actors": cpu}],
        target={"name": "t", "model": folder, "actors": cpu},
        wrpo={"workers": 1, "num_cpus": 1},
        plan={"prompts": 600},
        storage={"buckets": 16},  # so that the engine is full
    )
    plan = make_plan(settings)
    work = of(plan, "generate-a" if kind == "generate" else "wrpo")
    tokens = work.output_tokens if kind == "generate" else work.prompt_tokens
    assert work.rate == "guess"
    assert least <= tokens / work.actor_seconds <= most
    bigger = rates.Power(0, 4, 990)
    assert bigger.forward_rate(1e9) == pytest.approx(4 * rates.Power(0, 1, 1).forward_rate(1e9))


def test_works_of_a_pool_share_engines():
    works = [
        Work("s1", "p", actor_seconds=100, gpus=1, units=4, stage="x", startup=10),
        Work("s2", "p", actor_seconds=60, gpus=1, units=4, stage="x"),
    ]
    assert Plan(works, PricesConfig()).seconds() == 10 + 160
    assert [w.engines for w in share(works, 4)] == [4, 4]


@pytest.mark.parametrize("module", ["builtins", "math"])
def test_a_reward_in_a_module_without_a_file_has_a_fingerprint(module: str):
    part = RewardConfig(function=f"{module}:pow")
    assert len(scorer_fingerprint(part)) == 16


def test_cores_of_a_machine_are_shared():
    """Three engines of a core each, of 10 s to start and 90 of work, on two cores: 150 s."""
    works = [
        Work(name, name, actor_seconds=90, cpus=1, units=4, startup=10, stage="x") for name in "abc"
    ]
    assert Plan(works, PricesConfig()).seconds() == 100
    assert Plan(works, PricesConfig(), cpus=2).seconds() == 150
    assert Plan(works[:1], PricesConfig(), cpus=2).seconds() == 100


def test_the_bounds_of_a_plan():
    sure = Work("a", "a", actor_seconds=60, stage="x")
    guessed = Work("b", "b", actor_seconds=90, startup=10, spread=Spread(2, 3), stage="y")
    open_ = Work("c", "c", actor_seconds=30, least=0, stage="z")
    plan = Plan([sure, guessed, open_], PricesConfig())
    assert plan.seconds() == 60 + 100 + 30
    assert plan.range() == pytest.approx((60 + 45 + 5 + 0, 60 + 270 + 30 + 60))
    both = Work("d", "d", actor_seconds=30, least=0.5, spread=Spread(2, 2))  # independent of it
    most = math.exp(math.hypot(math.log(2), math.log(1.5)))
    assert (both.at(-1).actor_seconds, both.at(1).actor_seconds) == pytest.approx((7.5, 30 * most))
    text = plan_text(plan)
    assert "between 2 min and 7 min" in text
    assert "between" not in plan_text(Plan([sure], PricesConfig()))


def on_cpus(tmp_path: Path, **changes) -> Config:
    """One model as source and target, on two cores of this machine."""
    model, cpu = "none/m-135M", {"num_cpus": 1}
    return tree(
        tmp_path,
        sources=[{"name": "a", "model": model, "actors": cpu}],
        target={"name": "t", "model": model, "actors": cpu},
        reward={"name": "r", "model": model, "actors": cpu},
        sft={"workers": 1}, wrpo={"workers": 1}, cluster={"num_cpus": 2},
        plan={"prompts": 600, "parameters": {"a": 1e8, "t": 1e8}}, **changes,
    )  # fmt: skip


def job_of(config: Config, step: str):
    jobs = [j for s in Chain(config, for_plan=True).build() for p in s.phases for j in p]
    return next(job for job in jobs if job.step.name == step)


def test_a_finished_training_tells_how_long_the_start_of_another_takes(tmp_path, monkeypatch):
    """Of 47 s it made 3,000 tokens at 100/s: 17 s were no steps. WRPO has the rate too."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = on_cpus(tmp_path)
    root = Folder(config.output).absolute()
    before = of(make_plan(config), "wrpo")
    assert (before.rate, before.startup) == ("guess", rates.CPU_START)
    sft = job_of(config, "sft")
    lines = [json.dumps({"step": n, "tokens": 1500, "tokens_per_s": 100.0}) for n in range(2)]
    folder = root / sft.step.folder
    folder.write("metrics.jsonl", "\n".join(lines).encode())
    folder.write_json(sft.step.manifest, {"counts": {"rows": 9}, "seconds": 47.0})
    after = of(make_plan(config), "wrpo")
    assert (after.rate, after.startup) == ("measured", 17)
    assert after.actor_seconds == pytest.approx(after.prompt_tokens / 100)


def test_a_split_reference_is_a_forward_pass_of_the_training_workers(tmp_path, monkeypatch):
    """Two operations for each weight and token, where a step has six; once for all epochs."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = on_cpus(tmp_path)
    plans = {}
    for mode in ("live", "split"):
        for epochs in (1, 3):
            change = {"reference": ReferenceConfig(mode=mode), "epochs": epochs}
            wrpo = config.wrpo.model_copy(update=change)
            plan = make_plan(config.model_copy(update={"wrpo": wrpo}))
            plans[mode, epochs] = of(plan, "wrpo").actor_seconds
    assert plans["live", 3] == pytest.approx(3 * plans["live", 1])
    for epochs in (1, 3):
        passed = plans["split", epochs] - plans["live", epochs]
        assert passed == pytest.approx(plans["live", 1] / 3)


def test_a_trained_model_answers_as_long_as_its_sources(tmp_path, monkeypatch):
    """The untrained target's short answers to other prompts say nothing of it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = on_cpus(tmp_path, evaluate={"prompts": {"path": "none/eval.jsonl"}})
    spent = {"pool": "x", "rows": 100, "prompt_tokens": 5000, "actor_seconds": 100.0}
    steps = {
        job_of(config, step).step.folder: spent | {"output_tokens": tokens}
        for step, tokens in (("generate-a", 18_000), ("generate-t", 3000))
    }
    Folder(config.output).write_json(FILE, {"seconds": 9, "open": False, "steps": steps})
    plan = make_plan(config)
    trained = of(plan, "generate-target-sft")
    assert trained.output_tokens == trained.rows * 180
    assert of(plan, "generate-t").output_tokens == pytest.approx(of(plan, "generate-t").rows * 30)


def test_a_slow_machine_is_slow_for_what_was_not_measured_too(tmp_path, monkeypatch):
    """One model's engine took twice the guessed time to start, and thrice for its answers."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = on_cpus(tmp_path)
    before = make_plan(config)
    a, t = of(before, "generate-a"), of(before, "generate-target-sft")
    folder = job_of(config, "generate-a").step.folder
    start = 2 * rates.CPU_START
    spent = {"pool": "a", "rows": a.rows, "output_tokens": a.output_tokens, "starts": 1}
    spent |= {"prompt_tokens": a.prompt_tokens, "start_seconds": start}
    spent |= {"actor_seconds": 3 * a.actor_seconds + start}
    Folder(config.output).write_json(FILE, {"seconds": 9, "open": False, "steps": {folder: spent}})
    after = make_plan(config)
    assert of(after, "generate-target-sft").rate == "guess"
    assert of(after, "generate-target-sft").actor_seconds == pytest.approx(3 * t.actor_seconds)
    assert of(after, "generate-target-sft").startup == start
    assert of(after, "sft").startup == start
    assert of(after, "select").startup == 2 * of(before, "select").startup


@pytest.mark.parametrize(
    ("rows", "is_open", "origin"),
    [(255, True, "guess"), (256, True, "measured"), (20, False, "measured")],
)
def test_the_first_answers_of_a_run_under_way_tell_only_the_start(
    rows, is_open, origin, tmp_path, monkeypatch
):
    """Fewer than its engine has at once: the shortest ones, beside which others were computed."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = on_cpus(tmp_path)
    folder = job_of(config, "generate-a").step.folder
    spent = {"pool": "a", "rows": rows, "output_tokens": 3 * rows, "prompt_tokens": 9 * rows}
    spent |= {"actor_seconds": 100.0, "start_seconds": 37.0, "starts": 1}
    ledger = {"seconds": 9, "open": is_open, "steps": {folder: spent}}
    Folder(config.output).write_json(FILE, ledger)
    a = of(make_plan(config), "generate-a")
    assert (a.rate, a.lengths, a.startup) == (origin, origin, 37)


def test_of_a_training_under_way_the_steps_that_are_left_count(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = on_cpus(tmp_path)
    job = job_of(config, "sft")
    told = {"steps": 8, "tokens": 1500, "tokens_per_s": 100.0}
    folder = Folder(config.output).absolute() / job.step.folder
    folder.write("metrics.jsonl", json.dumps(told | {"step": 0}).encode())
    before = of(make_plan(config), "sft").actor_seconds
    folder.write("metrics.jsonl", json.dumps(told | {"step": 4}).encode())
    assert of(make_plan(config), "sft").actor_seconds == pytest.approx(before * 3 / 7, rel=0.01)
