"""Jobs of a running cluster, through the command and through Ray's own: run, stopped, run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes
from support.harness import ROOT, processes_of, shards, submit_command
from support.ray_head import RayHead
from support.waiting import LIMIT, wait_until

ONE_SOURCE = "[{name: llama-bytes, model: .cache/zoo/sources/llama-bytes}]"
SMALL = {
    "prompts.limit": 96,
    "sources": ONE_SOURCE,
    "evaluate": "null",
    "sft.epochs": 1,
    "sft.batch_size": 16,
    "sft.workers": 1,
}
"""The demo with one source, fewer prompts and no evaluation."""


def submitted(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=LIMIT
    )


def working_for(output: Path) -> list[str]:
    """Its driver, actors and workers; Ray Data's own detached actors stay with the cluster."""
    found = []
    for pid in processes_of(output):
        with suppress(psutil.Error):
            found.append(" ".join(psutil.Process(pid).cmdline()))
    kinds = ("ray::generate", "ray::score", "Train", "wrpo fuse")
    return [name for name in found if any(kind in name for kind in kinds)]


def test_a_stopped_job_is_submitted_again_and_goes_on(head, zoo, tmp_path):
    output = tmp_path / "run"
    command = submit_command(head.api, output, SMALL, "--until=sft")
    first = subprocess.Popen(
        [*command, "--on-interrupt=stop"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # which a shell takes away from what it runs in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: shards(output, "generate-*/*/*.parquet"), first)
    other = submitted(command)
    assert other.returncode == 2
    assert f"output: {output} is worked on by the job wrpo-" in other.stderr
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=LIMIT)
    assert first.returncode == 130, error
    assert "the job is stopped; submit it again to resume" in error
    client = JobSubmissionClient(head.api)
    (job,) = (j for j in client.list_jobs() if j.type == "SUBMISSION")
    assert job.status == "STOPPED"
    told = client.get_job_logs(job.submission_id)
    assert "terminated; run the same command again to go on" in told  # the driver had the time
    assert not list(output.glob("lease-*.json"))
    wait_until(lambda: not working_for(output))

    finished = shards(output, "**/*.parquet")
    again = submitted(command)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr
    assert finished.items() <= shards(output, "**/*.parquet").items()  # none was made again
    assert "buckets have rows, which are skipped" in again.stdout or ": done before" in again.stdout
    assert (next(output.glob("sft-*")) / "model" / "config.json").exists()
    wait_until(lambda: not working_for(output))


def test_a_job_passes_its_exit_code_on(head, tmp_path):
    command = submit_command(head.api, tmp_path, SMALL | {"prompts.path": "none.jsonl"})
    failed = submitted(command)
    assert failed.returncode == 2
    assert "wrpo: error: prompts: no such file: none.jsonl" in failed.stdout
    assert "Traceback" not in failed.stdout + failed.stderr


def test_ray_job_submit(head, tmp_path):
    """The command of the guide; .gitignore leaves the demo's models out otherwise."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    sets = [f"--set={name}={value}" for name, value in SMALL.items()]
    wrpo = ["wrpo", "fuse", "jobs/demo.yaml", *sets, f"--set=output={tmp_path}", "--until=prompts"]
    result = submitted(
        [*ray, "--working-dir=.", "--runtime-env=jobs/runtime_env.yaml", "--", *wrpo],
        RAY_API_SERVER_ADDRESS=head.api,
        RAY_RUNTIME_ENV_IGNORE_GITIGNORE="1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(tmp_path.glob("prompts-*/manifest.json"))


def test_a_driver_goes_to_a_worker_if_the_head_has_no_cpus(zoo, tmp_path):
    with RayHead(0) as head:
        head.add_node(2)
        result = submitted(submit_command(head.api, tmp_path, SMALL, "--until=prompts"))
        assert result.returncode == 0, result.stdout + result.stderr
        (job,) = JobSubmissionClient(head.api).list_jobs()
        (worker,) = (n for n in list_nodes(head.api) if not n.is_head_node)
        assert job.driver_node_id == worker.node_id
    assert list(tmp_path.glob("prompts-*/manifest.json"))
