"""Studies: which config a variant has, what runs together, and intervals over seeds and prompts."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path as File

import numpy as np
import pytest

from wrpo_ray.config import load_study, study_config
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline import study
from wrpo_ray.pipeline.study import Path, chosen, next_wave
from wrpo_ray.report.text import study_text
from wrpo_ray.runtime.job import BaseJob, JobKind
from wrpo_ray.stages.evaluate.stage import ScoredModel
from wrpo_ray.stages.evaluate.statistics import (
    Crossed,
    Sums,
    crossed_interval,
    crossed_of,
    normal_interval,
)
from wrpo_ray.stages.evaluate.variants import TrainedVariant, VariantTable, tabulate
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

JOBS = File(__file__).parents[3] / "jobs"


# --- intervals ---------------------------------------------------------------------------------


def test_an_interval_worked_by_hand():
    """Two seeds, three prompts: values (0, 1, 2) and (1, 2, 6), their mean 2.

    Seeds' means 1 and 3: sum of squares 3 * (1 + 1) = 6, mean square 6 / 1. Prompts' means 0.5,
    1.5, 4: sum of squares 2 * (2.25 + 0.25 + 4) = 13, mean square 6.5. All: 4 + 1 + 0 + 1 + 0 + 16
    = 22, so the rest is 22 - 6 - 13 = 3 with 2 degrees of freedom, mean square 1.5. The mean's
    variance is (6 + 6.5 - 1.5) / 6 = 11 / 6, with 11^2 / (36 / 1 + 42.25 / 2 + 2.25 / 2) = 2.0796
    degrees of freedom, for which t is 4.1486 (between 4.3027 of 2 and 3.1824 of 3).
    """
    found = crossed_interval(Crossed.of(np.array([[0.0, 1, 2], [1, 2, 6]])))
    assert (found.mean, found.n) == (2, 3)
    from scipy.stats import t

    assert found.high - 2 == pytest.approx(t.ppf(0.975, 121 / 58.25) * (11 / 6) ** 0.5)
    assert 2 - found.low == pytest.approx(found.high - 2)


def test_sums_of_buckets_add_up_to_those_of_all_prompts():
    values = np.random.default_rng(0).normal(size=(4, 30))
    parts = Crossed.of(values[:, :7]) + Crossed.of(values[:, 7:])
    assert crossed_interval(parts).high == pytest.approx(crossed_interval(Crossed.of(values)).high)


@pytest.mark.parametrize(
    ("of_seeds", "of_prompts"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1.0), (0.1, 1.0), (1.0, 0.3)]
)
def test_95_of_100_intervals_hold_the_truth_whatever_varies(of_seeds, of_prompts):
    """5 seeds, 60 prompts; an interval over prompts alone would miss it wherever seeds vary."""
    rng, held, trials = np.random.default_rng(1), 0, 1000
    for _ in range(trials):
        values = (
            of_seeds * rng.normal(size=(5, 1))
            + of_prompts * rng.normal(size=(1, 60))
            + rng.normal(size=(5, 60))
        )
        found = crossed_interval(Crossed.of(values))
        held += found.low <= 0 <= found.high
    assert 0.93 * trials <= held <= 0.995 * trials


def test_one_seed_has_the_interval_over_its_prompts():
    values = np.random.default_rng(2).normal(size=400)
    over_prompts = normal_interval(Sums.of(values.tolist()))
    found = crossed_interval(Crossed.of(values[None]))
    assert found.mean == pytest.approx(over_prompts.mean)
    assert found.high == pytest.approx(over_prompts.high, abs=1e-3)  # t of 399, not normal


def test_equal_values_have_no_width_and_one_prompt_no_interval():
    same = crossed_interval(Crossed.of(np.full((3, 5), 0.5)))
    assert (same.low, same.mean, same.high) == (0.5, 0.5, 0.5)
    assert np.isnan(crossed_interval(Crossed.of(np.ones((3, 1)))).low)
    assert np.isnan(crossed_interval(Crossed.of(np.ones((3, 0)))).mean)


def test_prompts_that_a_seed_lacks_do_not_count():
    sums = crossed_of([{"a": 1.0, "b": 0.0}, {"b": 1.0, "c": 1.0}])
    assert (sums.prompts, sums.by_seed) == (1, (0.0, 1.0))


def test_a_table_pairs_the_seeds_that_both_have():
    job = VariantTable(
        tuple(
            TrainedVariant(name, seed, ScoredModel(name, (), ()))
            for name, seeds in {"a": (1, 2, 3), "b": (1, 2)}.items()
            for seed in seeds
        ),
        (("a", "b"),),
    )
    found = {
        ("accuracy", "a"): Crossed.of(np.array([[1.0, 1], [1, 0], [0, 0]])),
        ("accuracy", "b"): Crossed.of(np.array([[0.0, 1], [0, 0]])),
        ("accuracy", "a - b"): Crossed.of(np.array([[1.0, 0], [1, 0]])),
    }
    table = tabulate(job, found)
    assert table["accuracy"]["variants"]["a"]["seeds"] == {"1": 1.0, "2": 0.5, "3": 0.0}
    assert table["accuracy"]["contrasts"]["a - b"]["seeds"] == {"1": 0.5, "2": 0.5}
    assert "reward" not in table
    text = study_text({"cases": {"near": table}})
    assert "near: Verifier accuracy, %" in text
    assert "+50.0" in text
    json.dumps(table)


# --- configs -----------------------------------------------------------------------------------


def test_the_shipped_study_names_configs_that_are_whole():
    settings = load_study(JOBS / "study.yaml")
    configs = {
        (case, name): study_config(settings, case, name)
        for case in settings.cases
        for name in settings.variants
    }
    near = configs["near", "wrpo"]
    assert (near.wrpo.alpha.end, near.output, near.seed) == (0.5, "out/study/near", 1)
    assert configs["near", "dpo"].sft is None
    assert configs["near", "dpo"].wrpo.alpha.end == 0
    assert [s.name for s in configs["near", "wrpo-1-source"].sources] == ["llama-bytes"]
    assert configs["distant", "wrpo"].target.model == ".cache/zoo-distant/target"
    assert not any(config.evaluate.dpo_baseline for config in configs.values())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("contrasts=[[wrpo, wpo]]", "contrasts: there is no variant 'wpo'"),
        ("seeds=[1, 1]", "seeds: one is given twice"),
        ("variants={}", "variants: "),
        ("cases.near.confg=a.yaml", "did you mean 'config'"),
    ],
)
def test_a_wrong_study_is_told(given, told):
    with pytest.raises(UserError, match=told):
        load_study(JOBS / "study.yaml", [given])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"wrpo.bta": 1}, r"demo.yaml \(near, odd\): wrpo.bta: unknown key; did you mean 'beta'"),
        ({"sources.7.model": "m"}, r"demo.yaml \(near, odd\): sources.7.model: the config has no"),
    ],
)
def test_a_wrong_change_of_a_variant_is_told_with_its_name(changes, told):
    given = [f"variants={json.dumps({'odd': {'set': changes}})}", "contrasts=[]"]
    settings = load_study(JOBS / "study.yaml", given)
    with pytest.raises(UserError, match=told):
        study_config(settings, "near", "odd")


def test_only_some_variants_in_the_studys_order():
    settings = load_study(JOBS / "study.yaml")
    assert chosen(settings, ["wrpo", "sft"]) == ["sft", "wrpo"]
    assert chosen(settings, []) == list(settings.variants)
    with pytest.raises(UserError, match="--only wrp: there are target, sft"):
        chosen(settings, ["wrp"])


# --- what runs together ------------------------------------------------------------------------


@dataclass(frozen=True)
class Cook(BaseJob):
    """One kind of job."""

    step: Step
    kind = JobKind.SELECT


@dataclass(frozen=True)
class Serve(BaseJob):
    """Another."""

    step: Step
    kind = JobKind.PAIR


def job(kind, name):
    return kind(Step(name, {}))


def test_paths_meet_in_jobs_of_one_kind_and_none_overtakes_its_own():
    """Path 2 lacks a stage of path 1: it waits where path 1 will have jobs like its own."""
    first, shared = job(Cook, "first"), job(Cook, "shared")
    one = Path([(0, (shared,)), (1, (first,)), (2, (job(Serve, "x"),))])
    two = Path([(0, (shared,)), (2, (job(Serve, "y"), job(Serve, "z")))])
    waves = []
    while wave := next_wave([one, two]):
        waves.append([w.step.name for w in wave])
        for path in (one, two):
            if path.phases and all(j in wave for j in path.phases[0][1]):
                path.phases.pop(0)
    assert waves == [["shared"], ["first"], ["x", "y", "z"]]


def test_what_is_done_is_passed_over(tmp_path):
    done, left = job(Cook, "done"), job(Serve, "left")
    done.step.finish(Folder(str(tmp_path)), {"rows": 1}, 0)
    path = Path([(0, (done,)), (1, (left,))])
    path.skip_done(Folder(str(tmp_path)))
    assert path.jobs == [left]


@pytest.fixture
def plan(zoo, monkeypatch):
    monkeypatch.chdir(JOBS.parent)
    names = ("target", "sft", "dpo", "sft-dpo", "wrpo", "sft-all", "simpo")
    case = ["cases={near: {config: demo.yaml}}", "seeds=[1, 2]", "output=/nowhere/study"]
    return study.Case.of(load_study(JOBS / "study.yaml", case), "near", names)


def test_what_variants_have_in_common_is_one_step(plan):
    """A seed: 3 sources' answers, 1 selection; target, target-SFT (twice) and 4 others trained."""
    steps = {j.step.key: j.step.name for path in plan.paths for j in path.jobs}
    counts = Counter(steps.values())
    assert counts["generate-llama-bytes"] == counts["select"] == 2
    assert counts["sft"] == 2 * 2  # of a third of the prompts, and of all
    assert counts["pair"] == 2 * 2  # on target-SFT's answers, and on the target's
    assert counts["rows-wrpo"] == 2 * 3  # SimPO needs no reference
    assert counts["wrpo"] == 2 * 4
    assert len(plan.table.models) == 2 * 7


def test_the_target_and_its_kin_share_engines_and_sources_have_their_own(plan):
    jobs = {j.step.key: j for path in plan.paths for j in path.jobs}.values()
    pools = {}
    for found in jobs:
        if found.step.name.startswith("generate-"):
            pools.setdefault(found.engines.model_dump_json(), set()).add(found.model.name)
    kin = {"target", "target-sft", "fused"}
    assert sorted(map(sorted, pools.values())) == sorted(
        [sorted(kin), ["gemma2-chars"], ["llama-bytes"], ["qwen3-bpe"]]
    )
