"""Run untrusted programs with their tests, each run in a sandbox of its own.

A run has no network, its own user and process namespace, an empty environment, Python's standard
library, a folder in memory, and limits on time, CPU, memory, processes and files. This needs Linux
namespaces, as root or in a user namespace; `isolation: limits` sets only the limits.

Not covered: a program that is written to cheat. Program and tests share an interpreter, so one
that searches it for the token of a finished run, or returns objects equal to anything, passes.
"""

import marshal
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from wrpo_ray.config import CodeConfig
from wrpo_ray.errors import UserError
from wrpo_ray.stages.score import sandbox_process

SLACK = 10.0
"""Seconds beyond the limit after which the sandbox process itself counts as hung."""


class SandboxError(RuntimeError):
    """The sandbox could not be set up; this says nothing about the program."""


class BadTestsError(ValueError):
    """The tests are not Python."""


@dataclass(frozen=True)
class Sandbox:
    """Runs programs; thread-safe."""

    config: CodeConfig
    python: str = field(default_factory=lambda: os.path.realpath(sys.executable))
    prefix: str = field(default_factory=lambda: os.path.realpath(sys.base_prefix))
    """The Python executable, and the folder of its standard library."""

    def passes(self, program: str, tests: str) -> bool:
        """Whether the tests, Python code that sees the program's names, run to their end.

        Raises:
            BadTestsError: they do not compile.
            SandboxError: the program could not be run.
        """
        with tempfile.TemporaryDirectory(
            prefix="wrpo-sandbox-", ignore_cleanup_errors=True
        ) as root:
            os.chmod(root, 0o1777)  # nosec B103 # the program is another user
            task = {
                "program": program,
                "tests": tests,
                "timeout": self.config.timeout,
                "memory": self.config.memory * 2**20,
                "isolated": self.config.isolation == "namespaces",
                "root": root,
                "python": self.python,
                "prefix": self.prefix,
            }
            code, message = self._run(marshal.dumps(task))
        if code == sandbox_process.BAD_TESTS:
            raise BadTestsError(f"the reference is no Python code: {message}")
        if code not in (sandbox_process.PASSED, sandbox_process.NOT_PASSED):
            raise SandboxError(message or f"the sandbox process exited with code {code}")
        return code == sandbox_process.PASSED

    def _run(self, task: bytes) -> tuple[int, str]:
        process = subprocess.Popen(
            [self.python, "-I", "-S", str(Path(sandbox_process.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={},
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(task, timeout=self.config.timeout + SLACK)
        except subprocess.TimeoutExpired:
            process.kill()  # and with it the supervisor
            process.communicate()
            raise SandboxError("the sandbox process did not end in time") from None
        return process.returncode, " ".join(errors.decode(errors="replace").split())

    def check(self) -> None:
        """Run a harmless program to see whether the sandbox works.

        Raises:
            UserError: this machine does not support the isolation that the config asks for.
        """
        try:
            works = self.passes("answer = 42", "assert answer == 42")
        except SandboxError as error:
            raise UserError(
                f"verifier code: this machine cannot sandbox programs ({error}); allow "
                f"namespaces (root with CAP_SYS_ADMIN, or user namespaces), or set "
                f"code.isolation: limits, which leaves them the network and this user's files"
            ) from None
        if not works:
            raise UserError(
                "verifier code: not even `answer = 42` passes; raise code.timeout or code.memory"
            )
