"""Submit a run as a job of a Ray cluster: `wrpo fuse` on one of its nodes, by Ray's Jobs API.

The working directory is uploaded, so code, config and relative paths are those of this machine;
the nodes have to see models, prompts and outputs elsewhere. Not covered: two submissions of one
output to different addresses of a cluster are kept apart by the lease of the run only.
"""

import asyncio
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrpo_ray import __version__
from wrpo_ray.config import Config
from wrpo_ray.errors import UserError, WrpoError
from wrpo_ray.runtime.cluster import check_listening, output_mark
from wrpo_ray.runtime.placement import NO_GPU_NODES
from wrpo_ray.runtime.progress import log
from wrpo_ray.storage.folder import Folder
from wrpo_ray.text.addresses import redact
from wrpo_ray.text.display import printable
from wrpo_ray.text.documents import describe_yaml_error, read_document
from wrpo_ray.text.files import read_text

RUNTIME_ENV = "jobs/runtime_env.yaml"
IGNORED = ".rayignore"
API = "RAY_API_SERVER_ADDRESS"
READY = 60.0
"""Seconds to wait until the cluster takes jobs: the agent of a head node starts after it."""
SLOW = 15.0
"""Seconds of waiting for the job's start after which a line is logged."""
RESUME_HINT = "submit it again to resume"


@dataclass(frozen=True)
class Submission:
    """The command to run, and the cluster to run it on."""

    path: str
    """The config file, relative to the working directory."""
    arguments: tuple[str, ...]
    """Further arguments of `wrpo fuse`."""
    output: str
    address: str
    """Address of the head's dashboard (http://...) or of the cluster."""
    runtime_env: dict[str, Any]

    @property
    def command(self) -> str:
        """The entry point of the job."""
        return shlex.join(["wrpo", "fuse", self.path, *self.arguments])

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the job for Ray's dashboard."""
        names = {"project": "wrpo_ray", "version": __version__}
        return names | {"config": self.path, "output": str(Folder(self.output))}


def prepare_submission(
    path: str, arguments: Sequence[str], config: Config, address: str | None = None
) -> Submission:
    """Check config, output and address on this machine, and describe the job.

    Raises:
        UserError: the job would not find its config, its output would be lost, or no address is
            known.
    """
    here = Path.cwd()
    file = Path(path).resolve()
    if not file.is_relative_to(here):
        raise UserError(f"{path}: not below {here}, which goes to the cluster; submit from there")
    if Folder(config.output).is_relative:
        raise UserError(
            f"output: {Folder(config.output)} is relative, and a job's working directory does not "
            f"last; give a folder that every node mounts, or an object store (s3://...)"
        )
    known = [address, os.environ.get(API), os.environ.get("RAY_ADDRESS"), config.cluster.address]
    found = next(filter(None, known), None)
    if not found:
        raise UserError(
            f"which cluster? give --address http://HEAD:8265, or set {API} (`auto` finds a Ray on "
            f"this machine)"
        )
    return Submission(
        str(file.relative_to(here)), tuple(arguments), config.output, found, _runtime_env()
    )


def _runtime_env() -> dict[str, Any]:
    """The runtime environment: `RUNTIME_ENV` of the working directory, if there is one.

    Raises:
        UserError: it cannot be read, or Ray rejects it.
    """
    from ray.runtime_env import RuntimeEnv

    file = Path(RUNTIME_ENV)
    if not file.exists():
        return {"working_dir": "."}
    text = read_text(file, "runtime environment")
    try:
        given = read_document(text) or {}
        RuntimeEnv(**given)
    except Exception as error:  # of YAML, or of a value that Ray's checks do not expect
        raise UserError(
            f"{RUNTIME_ENV}: {describe_yaml_error(error)[:300]}; it holds a mapping of Ray's "
            f"runtime_env, such as env_vars"
        ) from None
    return given | {"working_dir": "."}


class SubmittedJob:
    """A job, submitted when this is created.

    Raises:
        UserError: the cluster does not answer or rejects the job, or another job works on this
            output.
    """

    def __init__(self, given: Submission):
        self.given = given
        self.client = _client(given.address)
        self.id = self._submitted()

    def _submitted(self) -> str:
        name = f"wrpo-{output_mark(Folder(self.given.output))[:12]}-"
        jobs = [j for j in self.client.list_jobs() if (j.submission_id or "").startswith(name)]
        for earlier in jobs:
            self._check_ended(earlier)
        cpus, deadline = self._driver_cpus(), time.monotonic() + READY
        while True:
            try:
                job: str = self.client.submit_job(
                    entrypoint=self.given.command,
                    # an id is taken once: of two concurrent submissions one is rejected
                    submission_id=f"{name}{len(jobs) + 1}",
                    runtime_env=self.given.runtime_env,
                    metadata=self.given.metadata,
                    entrypoint_num_cpus=cpus,
                    entrypoint_label_selector=NO_GPU_NODES if cpus else None,
                )
                return job
            except RuntimeError as error:
                if "No available agent" not in str(error):
                    raise UserError(f"the cluster rejects the job: {_first_line(error)}") from None
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the cluster has no agent that takes jobs after {READY:g} s; see "
                        f"dashboard_agent.log on its head"
                    ) from None
            log("waiting for the cluster to take jobs")
            time.sleep(2)

    def _check_ended(self, job: Any) -> None:
        if not job.status.is_terminal():
            raise UserError(
                f"output: {Folder(self.given.output)} is worked on by the job {job.submission_id}; "
                f"see it with `ray job logs --follow {job.submission_id}`, end it with "
                f"`ray job stop {job.submission_id}`, or set another `output`"
            )

    def _driver_cpus(self) -> int:
        """CPUs to request for the driver: 0 runs it on the head, 1 elsewhere if that has none."""
        from ray.util.state import list_nodes

        deadline = time.monotonic() + READY
        while True:
            heads = list_nodes(
                self.client.get_address(),
                [("is_head_node", "=", True)],
                raise_on_missing_output=False,  # nodes may come and go just now
            )
            if known := [head.resources_total for head in heads if head.resources_total]:
                return 0 if known[0].get("CPU") else 1
            if time.monotonic() > deadline:
                raise UserError(f"the cluster's head reports no resources after {READY:g} s")
            time.sleep(0.5)  # the head has just started

    def follow(self) -> int:
        """Print the job's output until it ends; return its exit code.

        Raises:
            WrpoError: the job did not run, or was stopped.
        """
        asyncio.run(self._follow())
        info = self.client.get_job_info(self.id)
        if info.status == "SUCCEEDED":
            return 0
        if info.status == "STOPPED":
            raise WrpoError(f"the job {self.id} was stopped; {RESUME_HINT}")
        if info.driver_exit_code is None:
            raise WrpoError(f"the job {self.id} failed: {info.message}")
        return int(info.driver_exit_code)

    async def _follow(self) -> None:
        """Print new output; after a lost connection, reconnect and skip what was printed."""
        self._await_start()
        printed = 0
        while True:
            seen = 0
            try:
                async for text in self.client.tail_job_logs(self.id):
                    print(printable(text[max(0, printed - seen) :]), end="", flush=True)
                    seen += len(text)
                    printed = max(printed, seen)
            except RuntimeError as error:
                log(f"connection to the job lost ({error}); trying again")
            if self.client.get_job_status(self.id).is_terminal():
                return
            await asyncio.sleep(1)

    def _await_start(self) -> None:
        """Wait until the driver runs, which may take a new node."""
        started, is_logged = time.monotonic(), False
        while (info := self.client.get_job_info(self.id)).status == "PENDING":
            if not is_logged and time.monotonic() - started > SLOW:
                log(f"the job waits: {info.message}")
                is_logged = True
            time.sleep(0.5)

    def stop(self) -> None:
        """Stop the job, and wait until it has ended; finished work is kept."""
        self.client.stop_job(self.id)
        while not self.client.get_job_status(self.id).is_terminal():
            time.sleep(0.5)


def _client(address: str) -> Any:
    """Ray's client for this address, even if the environment names another one.

    Raises:
        UserError: no cluster answers at the address.
    """
    check_listening(address)
    from ray.job_submission import JobSubmissionClient

    os.environ[API] = address
    if Path(IGNORED).exists():  # then .gitignore does not apply
        os.environ.setdefault("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Jobs API at {redact(address)}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return redact(str(error).strip().splitlines()[-1][:500])
