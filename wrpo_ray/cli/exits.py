"""Exit codes, errors on stderr, and SIGTERM."""

import os
import signal
import sys
import traceback

from wrpo_ray.errors import BudgetError, RegressionError, UserError, WrpoError
from wrpo_ray.text.addresses import redact
from wrpo_ray.text.display import printable

CODES: dict[type[WrpoError], int] = {UserError: 2, BudgetError: 3, RegressionError: 4}
"""Exit codes by error; any other is 1."""
INTERRUPTED, TERMINATED = 130, 143


def print_trace() -> None:
    """Print the traceback of the current error if WRPO_DEBUG is set."""
    if os.environ.get("WRPO_DEBUG"):
        print(printable(redact(traceback.format_exc())), file=sys.stderr, end="")


class Terminated(SystemExit):
    """SIGTERM, which `ray job stop`, Kubernetes and batch systems send."""


def terminate(*_: object) -> None:
    """Handler of SIGTERM: raise `Terminated` once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the cleanup
    raise Terminated(TERMINATED)


def code_of(error: WrpoError) -> int:
    """The exit code of an error."""
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), 1)


def fail(reason: object, code: int) -> int:
    """Print the reason without secrets, and return the code."""
    for line in printable(redact(str(reason))).strip("\n").split("\n"):
        print(f"wrpo: error: {line}", file=sys.stderr)
    return code
