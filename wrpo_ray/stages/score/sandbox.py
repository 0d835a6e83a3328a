"""Run untrusted programs with their tests, each run in a sandbox of its own.

A run has no network, its own user and process namespace, an empty environment and keyring, Python's
standard library, a folder in memory, and limits on time, CPU, memory, processes, files and system
calls. This needs Linux namespaces, as root or in a user namespace, which bubblewrap makes where it
is installed and allowed; `isolation: limits` sets only the limits.

Not covered: a program that is written to cheat. Program and tests share an interpreter, so one
that searches it for the token of a finished run, or returns objects equal to anything, passes.
"""

import marshal
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import wrpo_ray
from wrpo_ray.config import CodeConfig
from wrpo_ray.errors import UserError
from wrpo_ray.stages.score import sandbox_process, sandbox_watch
from wrpo_ray.text.credentials import SECRET_NAME

SLACK = 60.0
"""Seconds beyond the longest run after which the sandbox process itself counts as hung."""
SCRIPT = """import sys
sys.path.insert(0, sys.argv[1])
from wrpo_ray.stages.score.sandbox_process import main
sys.exit(main())"""


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
    bubblewrap: str | None = field(default_factory=lambda: shutil.which("bwrap"))
    """The program that makes the namespaces; None: `sandbox_isolation` does."""
    package: Path = Path(wrpo_ray.__file__).parents[1]
    """The folder with the package."""

    def passes(self, program: str, tests: str) -> bool:
        """Whether the tests, Python code that sees the program's names, run to their end.

        Raises:
            BadTestsError: they do not compile.
            SandboxError: the program could not be run.
        """
        return self.run(program, tests)[0]

    def run(self, program: str, tests: str) -> tuple[bool, str]:
        """Whether the tests run to their end, and which limit ended them if one did.

        Raises:
            BadTestsError: they do not compile.
            SandboxError: the program could not be run.
        """
        with tempfile.TemporaryDirectory(
            prefix="wrpo-sandbox-", ignore_cleanup_errors=True
        ) as root:
            os.chmod(root, 0o1777)  # nosec B103 # the program is another user
            isolated = self.config.isolation == "namespaces"
            task = {
                "program": program,
                "tests": tests,
                "timeout": self.config.timeout,
                "memory": self.config.memory * 2**20,
                "isolated": isolated,
                "bubblewrap": self.bubblewrap if isolated else None,
                "root": root,
                "python": self.python,
                "prefix": self.prefix,
            }
            code, message = self._run(marshal.dumps(task))
        if code == sandbox_process.BAD_TESTS:
            raise BadTestsError(f"the reference is no Python code: {message}")
        if code not in (sandbox_process.PASSED, sandbox_process.NOT_PASSED):
            raise SandboxError(message or f"the sandbox process exited with code {code}")
        return code == sandbox_process.PASSED, message

    def _run(self, task: bytes) -> tuple[int, str]:
        process = subprocess.Popen(
            [self.python, "-I", "-S", "-c", SCRIPT, str(self.package)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={},
            start_new_session=True,
        )
        longest = self.config.timeout * sandbox_watch.PATIENCE * 2 + SLACK
        try:
            _, errors = process.communicate(task, timeout=longest)
        except subprocess.TimeoutExpired:
            process.kill()  # and with it the supervisor
            process.communicate()
            raise SandboxError("the sandbox process did not end in time") from None
        return process.returncode, " ".join(errors.decode(errors="replace").split())

    def checked(self) -> "Sandbox":
        """Run a harmless program and return the sandbox that can, without bubblewrap if need be.

        Raises:
            UserError: this machine does not support the isolation that the config asks for.
        """
        if self.config.isolation == "limits":
            _refuse_secrets()
        try:
            works = self.passes("answer = 42", "assert answer == 42")
        except SandboxError as error:
            if self.bubblewrap and self.config.isolation == "namespaces":
                return replace(self, bubblewrap=None).checked()
            raise UserError(
                f"verifier code: this machine cannot sandbox programs ({error}); allow "
                f"namespaces (root with CAP_SYS_ADMIN, or user namespaces), or set "
                f"code.isolation: limits, which leaves them the network and this user's files"
            ) from None
        if not works and self.bubblewrap and self.config.isolation == "namespaces":
            return replace(self, bubblewrap=None).checked()
        if not works:
            raise UserError(
                "verifier code: not even `answer = 42` passes; raise code.timeout or code.memory"
            )
        return self


def _refuse_secrets() -> None:
    """Raise a UserError if a program could read secrets in the environment of this process."""
    names = sorted(name for name, value in os.environ.items() if value and SECRET_NAME.search(name))
    if names and os.geteuid() != 0:
        raise UserError(
            f"verifier code: with code.isolation: limits, programs could read {', '.join(names)} "
            f"in this process's environment; take them out, or use namespaces"
        )
