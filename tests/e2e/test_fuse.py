"""The whole chain on real engines, undisturbed and killed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.harness import HELD_OUT, PROMPTS, ROOT, SOURCES, Wrpo, processes_of, rows, shards
from support.in_browser import look
from support.openai_server import Server, serving
from support.waiting import wait_until

from wrpo_ray.cli.entry import main
from wrpo_ray.config import load
from wrpo_ray.data.buckets import buckets, read_bucket
from wrpo_ray.data.records import PREFERENCE
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.pipeline.stage_table import STAGES
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.train.prepare import Prepare, Preparer
from wrpo_ray.stages.train.rows import PreparedRows
from wrpo_ray.stages.train.task import WRPO_ANSWERS

KEY = ("prompt_id", "source", "sample")


def test_a_run_tells_its_results_and_status_follows_it_to_the_end(finished):
    assert "not written" not in finished.stderr
    assert "Verifier accuracy on held-out prompts" in finished.stdout
    assert "Fused model:" in finished.stdout
    assert f"process {finished.process}, heartbeat" in finished.status
    assert finished.status.rpartition("lease: ")[2].startswith("nobody")
    wait_until(lambda: not processes_of(finished.output))


def test_summary_tells_every_step_and_compares_every_model(fused):
    summary = json.loads((fused / "summary.json").read_text())
    assert {step["state"] for step in summary["steps"]} == {"done"}
    assert all(step["rows_out"] > 0 for step in summary["steps"])
    accuracy = summary["evaluation"]["accuracy"]["models"]
    assert set(accuracy) == {*SOURCES, "target", "target-sft", "target-dpo", "fused"}
    assert accuracy["fused"]["all"]["n"] == HELD_OUT
    assert accuracy["fused"]["all"]["low"] > accuracy["target"]["all"]["high"]


def test_every_prompt_has_its_answers_once_and_every_score_is_kept(fused):
    summary = json.loads((fused / "summary.json").read_text())
    counts = {s["step"]: s["counts"] for s in summary["steps"] if s["stage"] == "select"}["select"]
    assert counts["rows"] == PROMPTS
    assert counts["candidates"] == PROMPTS * 5 * len(SOURCES)
    pairs = rows(fused, "pair", "prompt_id", "candidates")
    assert all(text.count("'reward'") == 5 * (len(SOURCES) + 1) for _, text in pairs)


def test_trained_models_are_ordinary_folders(fused):
    """vLLM has loaded it for the evaluation; transformers loads it here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (folder,) = fused.glob("wrpo-*/model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size >= len(tokenizer)
    assert tokenizer.chat_template


def test_training_starts_at_ln_2_and_alpha_ends_at_its_end(fused):
    (file,) = fused.glob("wrpo-*/metrics.jsonl")
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(len(steps)))
    assert steps[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert steps[0]["alpha"] == 0
    assert steps[-1]["alpha"] == 0.5


def test_the_output_alone_tells_of_the_run(demo, fused, capsys):
    """The report, `wrpo status`, and the exported model need neither Ray nor the config's file."""
    page = (fused / "report.html").read_text()
    for name in ("wins", "rewards-pairs", "training-wrpo", "evaluation-accuracy"):
        assert f'id="{name}-title"' in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert all(c[3] is not None for row in data["rows"] for c in row["candidates"])
    assert main(["status", str(fused)]) == 0
    steps = json.loads((fused / "chain.json").read_text())["steps"]
    assert f"{len(steps)} of {len(steps)} steps done" in capsys.readouterr().out


def test_its_report_in_a_browser(fused, browser):
    look(
        browser,
        fused / "report.html",
        "report",
        "main",
        "figure:has(#training-wrpo-title)",
        "#rows",
    )


def test_a_second_call_does_nothing(demo, fused):
    before = shards(fused, "**/*")
    result = demo(fused, report=True).here("fuse")
    assert result.returncode == 0
    assert "all steps are done" in result.stderr
    assert "Verifier accuracy" in result.stdout
    assert shards(fused, "**/*") == before


FINISHED = {
    "fuse": {"": "Fused model:", "--dry-run": " done ", "--until pair": "preference rows"},
    **{stage: {"": "Summary:"} for stage in STAGES},
    "plan": {
        "": "measured",
        "--gpus 8": "on 8 GPUs",
        "--json": '"rate": "measured"',
        "--until train": "measured",
        "--set wrpo.epochs=9": "measured",
    },
    "failures": {"": "rows", "--json": "["},
    "status": {"": "steps done", "--watch": "nobody"},
    "report": {"": "report.html", "--compare": "Results", "--to page.html": "page.html"},
    "export": {
        **{f"--to {form} --format {form}": "rows in" for form in ("published", "trl", "records")},
        "--to rows.jsonl": "rows in",
        "--to model --format model": "the fused model",
    },
    "config": {"": "output", "wrpo.alpha": "end"},
}
"""What each command of README's table shows on a finished output, with which arguments."""
ELSEWHERE = {
    "submit": "test_submit.py",
    "serve": "test_serving.py",
    "study": "test_studies.py",
    "fetch": "../unit/stages/evaluate/test_protocols.py",
    "cluster": "../unit/kubernetes/test_manifests.py",
    "zoo": "../conftest.py",
}
"""Commands that do not look at the output of a run, and what runs them."""


@pytest.fixture(scope="module")
def copy(fused, tmp_path_factory) -> Path:
    """A copy, as commands that stop early write a summary of their own."""
    return Path(shutil.copytree(fused, tmp_path_factory.mktemp("finished") / "output"))


def commands_of_readme() -> set[str]:
    """The first words of the commands in its table and blocks."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `wrpo ([^`]+)`", text, flags=re.M)
    names = [n for row in rows for n in re.split(r" (?=[A-Z\[])", row)[0].split(" / ")]
    blocks = re.findall(r"^wrpo (\w+)", text, flags=re.M)
    return {name.split()[0] for name in [*names, *blocks]}


def test_each_command_of_the_readme_is_run_on_an_output_or_elsewhere():
    assert commands_of_readme() == set(FINISHED) | set(ELSEWHERE)
    for name, file in ELSEWHERE.items():
        text = (ROOT / "tests" / "e2e" / file).resolve().read_text()
        assert name in text


@pytest.mark.parametrize(
    ("command", "arguments"), [(name, given) for name, cases in FINISHED.items() for given in cases]
)
def test_a_command_of_the_readme_on_a_finished_output(
    demo, copy, tmp_path, monkeypatch, capfd, command, arguments
):
    """None runs anything again, and none ends in a trace or leaves something unwritten."""
    config = demo(copy, report=(command, arguments) == ("fuse", "")).config
    before = shards(copy, "*-*/*")
    place = {"config": [], "status": [copy], "report": [copy]}.get(command, [config])
    if arguments == "--compare":
        place *= 2
    monkeypatch.chdir(tmp_path)
    assert main([command, *map(str, place), *arguments.split()]) == 0
    out, err = capfd.readouterr()
    assert FINISHED[command][arguments] in out
    assert "not written" not in err
    assert "Traceback" not in err
    assert shards(copy, "*-*/*") == before


@pytest.mark.parametrize("policy", ["wrpo", "fusechat3"])
def test_rows_are_the_answers_in_the_targets_vocabulary(demo, fused, on_cluster, tmp_path, policy):
    """Of three vocabularies: the target's own answers as sampled, all others by their text."""
    made, output = demo(fused), fused
    if policy == "fusechat3":
        output = tmp_path / "out"
        shutil.copytree(fused, output)
        wrpo = {"alpha": {"end": 0}, "reference": {"mode": "live"}}
        made = demo(output, pair={"policy": policy, "max_margin": 1000}, wrpo=wrpo)
        result = made.here("pair")
        assert result.returncode == 0, result.stderr
        assert "generate" not in result.stderr.replace("generate: done before", "")
    job, run = wrpo_rows(made)
    counts = [Preparer(run, [job])({"job": 0, "bucket": b.index}) for b in buckets(run.buckets)]
    assert not any(c["failed"] + c["dropped"] + c["cut"] for c in counts)
    tokenizer, records = load_tokenizer(job.base.local()), records_of(job, run)
    prepared = PreparedRows((run.root / job.step.folder).local())
    assert len(prepared) == len(records) > 20
    sampled = dict.fromkeys(WRPO_ANSWERS, 0)
    for row in (prepared[i] for i in range(len(prepared))):
        for name, ids in zip(WRPO_ANSWERS, row.answers, strict=True):
            answer = records[row.prompt_id][name]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert text.strip() == answer["text"].strip()
            sampled[name] += ids.tolist() == answer["token_ids"]
    assert sampled["source_chosen"] < len(prepared)  # the three vocabularies differ
    own = sampled["target_chosen"], sampled["rejected"]
    assert (own == (len(prepared), len(prepared))) == (policy == "wrpo")


def wrpo_rows(made: Wrpo) -> tuple[Prepare, Run]:
    """The rows of preference training that a config asks for."""
    config = preflight(load(made.config))
    chain = Chain(config)
    jobs = [job for stage in chain.build() for phase in stage.phases for job in phase]
    (job,) = (j for j in jobs if isinstance(j, Prepare) and j.answers == WRPO_ANSWERS)
    return job, Run(chain.root, config.storage.buckets)


def records_of(job: Prepare, run: Run) -> dict[str, dict[str, Any]]:
    """The preference records that rows are made from, by prompt."""
    folder = run.root / job.rows.folder
    tables = [read_bucket(folder, b, PREFERENCE).to_pylist() for b in buckets(run.buckets)]
    return {record["prompt_id"]: record for table in tables for record in table}


def has_checkpoint(output: Path) -> bool:
    """Whether WRPO training has a checkpoint that is complete, which Ray Train lists then."""
    lists = output.glob("wrpo-*/checkpoints/*/checkpoint_manager_snapshot.json")
    return any('"checkpoint_dir_name"' in file.read_text() for file in lists)


@pytest.mark.soak
def test_killed_twice_the_same_command_ends_with_the_same_rows(demo, fused, tmp_path):
    """SIGKILL of the driver in mid-generation and in mid-training of WRPO.

    In short: test_kills.py, and tests/ray/test_train.py for training.
    """
    output = tmp_path / "killed"
    wrpo = demo(output)

    log = wrpo.killed_when(lambda: len(shards(output, "generate-*/*/*.parquet")) >= 10, "fuse")
    assert "generate" in log
    generated = shards(output, "generate-*/*/*.parquet")

    log = wrpo.killed_when(lambda: has_checkpoint(output), "fuse")
    assert "rows were there" in log
    assert generated.items() <= shards(output, "generate-*/*/*.parquet").items()
    finished = shards(output, "**/*.parquet")

    result = wrpo("fuse")
    assert result.returncode == 0, result.stderr
    assert "wrpo: resumed at step" in result.stderr
    assert finished.items() <= shards(output, "**/*.parquet").items()
    wait_until(lambda: not processes_of(output))

    for source in (*SOURCES, "target-sft"):
        for step in (f"generate-{source}", f"score-reward-{source}"):
            killed = rows(output, step, *KEY)
            assert killed == rows(fused, step, *KEY)
            assert len(killed) == len(set(killed))
    for step in ("select", "pair"):
        assert rows(output, step, "prompt_id") == rows(fused, step, "prompt_id")


def test_a_fourth_source_is_all_that_is_generated(demo, fused, on_cluster, zoo, tmp_path):
    """Of a finished run with three: their answers and scores stay, shard by shard.

    It is an endpoint, which answers at once.
    """
    output = tmp_path / "four"
    shutil.copytree(fused, output)
    before = shards(output, "generate-*/*/*.parquet") | shards(output, "score-*/*/*.parquet")
    sources = [{"name": n, "model": str(zoo / "sources" / n)} for n in SOURCES]
    with serving(Server()) as server:
        endpoint = {"url": server.url}
        sources.append({"name": "fourth", "model": "served", "endpoint": endpoint})
        result = demo(output, sources=sources, evaluate=None).here("fuse", "--until", "select")
    assert result.returncode == 0, result.stderr
    after = shards(output, "generate-*/*/*.parquet") | shards(output, "score-*/*/*.parquet")
    assert before.items() <= after.items()
    assert {name.split("/")[0].rpartition("-")[0] for name in after.keys() - before.keys()} == {
        "generate-fourth",
        "score-reward-fourth",
    }
    assert not any(f"generate {name}: starting" in result.stderr for name in SOURCES)
    folders = sorted(output.glob("select-*"), key=lambda f: f.stat().st_mtime)
    counts = json.loads((folders[-1] / "manifest.json").read_text())["counts"]
    assert counts["candidates"] == PROMPTS * 5 * 4
