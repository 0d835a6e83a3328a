"""Submitting without a cluster: what is waited for, what is told, and what Ctrl-C does."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from wrpo_ray import cli, config
from wrpo_ray.errors import UserError, WrpoError
from wrpo_ray.runtime import submission as submit
from wrpo_ray.runtime.placement import NO_GPU_NODES
from wrpo_ray.runtime.submission import Submission, SubmittedJob, prepare_submission

GIVEN = Submission("jobs/demo.yaml", (), "/shared/run", "http://head:8265", {})
NO_AGENT = RuntimeError("Request failed: No available agent to submit job, please try again later.")


class Cluster:
    """Ray's client of Jobs: answers by script, the last answer for ever."""

    def __init__(self, **script: Any):
        self.script = {"submit": [None], "status": ["SUCCEEDED"], "logs": [[]]} | script
        self.jobs: list[Any] = []
        self.asked: dict[str, Any] = {}
        self.tries = self.stops = 0

    def _next(self, what: str) -> Any:
        answers = self.script[what]
        answer = answers[0] if len(answers) == 1 else answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def get_address(self) -> str:
        return GIVEN.address

    def submit_job(self, **asked: Any) -> str:
        self.tries += 1
        self._next("submit")
        self.asked = asked
        return asked["submission_id"]

    def get_job_status(self, job: str) -> Any:
        return status(self._next("status"))

    def get_job_info(self, job: str) -> Any:
        code = self.script.get("code")
        return SimpleNamespace(
            status=status(self._next("status")), driver_exit_code=code, message="no node has it"
        )

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in self._next("logs"):
            if isinstance(text, Exception):
                raise text
            yield text

    def stop_job(self, job: str) -> None:
        self.stops += 1


def status(name: str) -> Any:
    from ray.job_submission import JobStatus

    return JobStatus(name)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that jumps ahead, and heads with CPUs."""
    clock = SimpleNamespace(now=0.0, heads=[{"CPU": 8.0}])

    def sleep(seconds: float) -> None:
        clock.now += seconds

    async def sleep_async(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    monkeypatch.setattr(submit.asyncio, "sleep", sleep_async)

    def list_nodes(*_: Any, **__: Any) -> list[Any]:
        return [SimpleNamespace(resources_total=resources) for resources in clock.heads]

    monkeypatch.setattr("ray.util.state.list_nodes", list_nodes)
    return clock


def job(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> SubmittedJob:
    monkeypatch.setattr(submit, "_client", lambda address: cluster)
    return SubmittedJob(GIVEN)


def test_it_waits_for_an_agent(monkeypatch, no_waiting):
    cluster = Cluster(submit=[NO_AGENT, NO_AGENT, None])
    assert job(monkeypatch, cluster).id.endswith("-1")
    assert cluster.tries == 3
    assert cluster.asked["entrypoint"] == "wrpo fuse jobs/demo.yaml"
    assert cluster.asked["metadata"]["output"] == "/shared/run"


def test_an_agent_that_never_comes_is_told(monkeypatch, no_waiting):
    with pytest.raises(UserError, match="no agent that takes jobs after 60 s"):
        job(monkeypatch, Cluster(submit=[NO_AGENT]))
    assert submit.READY < no_waiting.now < submit.READY + 5


def test_a_refusal_is_told_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="^the cluster rejects the job: it is full$"):
        job(monkeypatch, Cluster(submit=[RuntimeError("Traceback ...\n  more\nit is full")]))


def test_ids_go_on_and_a_job_at_work_on_the_output_is_left_alone(monkeypatch):
    cluster = Cluster()
    first = job(monkeypatch, cluster).id
    cluster.jobs = [SimpleNamespace(submission_id=first, status=status("FAILED"))]
    assert job(monkeypatch, cluster).id == f"{first[:-1]}2"
    cluster.jobs[0].status = status("RUNNING")
    with pytest.raises(UserError, match=f"/shared/run is worked on by the job {first}"):
        job(monkeypatch, cluster)


def test_the_driver_goes_to_a_worker_if_the_head_has_no_cpus(monkeypatch, no_waiting):
    cluster = Cluster()
    job(monkeypatch, cluster)
    assert cluster.asked["entrypoint_num_cpus"] == 0
    assert cluster.asked["entrypoint_label_selector"] is None
    no_waiting.heads = [{"memory": 1.0}]
    job(monkeypatch, cluster)
    assert cluster.asked["entrypoint_num_cpus"] == 1
    assert cluster.asked["entrypoint_label_selector"] == NO_GPU_NODES
    no_waiting.heads = []
    with pytest.raises(UserError, match="the cluster's head reports no resources after 60 s"):
        job(monkeypatch, cluster)


@pytest.mark.parametrize(("name", "code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 3, 3)])
def test_exit_codes_are_passed_on(monkeypatch, name: str, code: int, expected: int):
    assert job(monkeypatch, Cluster(status=[name], code=code)).follow() == expected


@pytest.mark.parametrize(
    ("name", "told"), [("STOPPED", "submit it again to resume"), ("FAILED", "no node has it")]
)
def test_a_job_without_an_exit_code_is_an_error(monkeypatch, name: str, told: str):
    with pytest.raises(WrpoError, match=told):
        job(monkeypatch, Cluster(status=[name])).follow()


def test_a_lost_connection_is_made_again_and_nothing_is_printed_twice(monkeypatch, capsys):
    lost = RuntimeError("websocket closed")
    logs = [["one\nt", lost], ["on", lost], ["one\ntwo\n", "three\n"]]
    cluster = Cluster(logs=logs, status=["RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"], code=0)
    assert job(monkeypatch, cluster).follow() == 0
    printed = capsys.readouterr()
    assert printed.out == "one\ntwo\nthree\n"
    assert printed.err.count("connection to the job lost (websocket closed)") == 2


def test_a_job_that_waits_for_a_node_says_so_once(monkeypatch, capsys):
    job(monkeypatch, Cluster(status=["PENDING"] * 90 + ["SUCCEEDED"], code=0)).follow()
    assert capsys.readouterr().err.count("the job waits: no node has it") == 1


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster whose job is followed until Ctrl-C."""
    cluster = Cluster(status=["STOPPED"])
    monkeypatch.setattr(submit, "_client", lambda address: cluster)
    monkeypatch.setattr(
        SubmittedJob, "follow", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    return cluster


def command(*rest: str) -> int:
    where = ("--address=http://head:8265", "--set=output=/shared/run")
    return cli.main(["submit", "jobs/demo.yaml", *where, *rest])


@pytest.mark.parametrize(
    ("answer", "typed", "stops"),
    [("stop", None, 1), ("leave", None, 0), ("ask", None, 0), ("ask", "y", 1), ("ask", "", 0)],
)
def test_ctrl_c_stops_the_job_by_choice(
    interrupted, monkeypatch, capsys, answer: str, typed: str | None, stops: int
):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: typed is not None, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: typed)
    assert command(f"--on-interrupt={answer}") == 130
    assert interrupted.stops == stops
    told = "submit it again to resume" if stops else "interrupted; the job continues: `ray job logs"
    assert told in capsys.readouterr().err


def test_detached_it_does_not_follow(interrupted, capsys):
    assert command("--detach") == 0
    assert interrupted.stops == 0
    assert "is submitted; `ray job logs --follow wrpo-" in capsys.readouterr().err
    assert interrupted.asked["entrypoint"].endswith(
        "jobs/demo.yaml --set=output=/shared/run --until=evaluate"
    )


# --- what can be seen before -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "output", "address", "told"),
    [
        ("jobs/demo.yaml", "out/run", "http://head:8265", "output: out/run is relative"),
        ("jobs/demo.yaml", "/shared/run", None, "which cluster\\? give --address"),
        ("../demo.yaml", "/shared/run", "http://head:8265", "goes to the cluster; submit from"),
    ],
)
def test_what_a_job_would_not_find_is_told_before(
    monkeypatch, path: str, output: str, address: str | None, told: str
):
    monkeypatch.delenv(submit.API, raising=False)
    settings = config.load("jobs/demo.yaml", [f"output={output}"])
    with pytest.raises(UserError, match=told):
        prepare_submission(path, [], settings, address)


def test_a_dead_address_is_told():
    with pytest.raises(UserError, match="nothing answers at http://127.0.0.1:9"):
        submit._client("http://127.0.0.1:9")
