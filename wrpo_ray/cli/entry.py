"""The command `wrpo`: the table of commands, and how one is run.

Neither torch nor ray is imported before a config is valid, so `--help` is instant. Exit codes:
0 done, 1 the run failed, 2 an error that the user can fix, 3 the budget is spent, 4 a model does
worse than --fail-below allows, 130 interrupted, 143 terminated.
"""

import argparse
import os
import signal
import sys
from typing import NoReturn

from wrpo_ray import __version__
from wrpo_ray.cli.exits import (
    INTERRUPTED,
    TERMINATED,
    Terminated,
    code_of,
    fail,
    print_trace,
    terminate,
)
from wrpo_ray.cli.export import add_export
from wrpo_ray.cli.fetch import add_fetch
from wrpo_ray.cli.fuse import add_fuse, add_study
from wrpo_ray.cli.inspect import add_config, add_failures, add_plan, add_report, add_status
from wrpo_ray.cli.kubernetes import add_cluster
from wrpo_ray.cli.serve import add_serve
from wrpo_ray.cli.submit import add_submit
from wrpo_ray.cli.zoo import add_zoo
from wrpo_ray.errors import WrpoError
from wrpo_ray.text.addresses import redact

COMMANDS = (
    *(add_fuse, add_study, add_submit, add_fetch, add_plan, add_export, add_report, add_status),
    *(add_failures, add_config, add_serve, add_cluster, add_zoo),
)
"""Functions that add commands, in the order of `wrpo --help`."""
STORE = (
    "check the path or address, the network, and the rights or the credentials in the environment"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parsed = make_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, terminate)
    if os.getcwd() not in sys.path:  # functions named in the config are the user's own
        sys.path.insert(0, os.getcwd())
    try:
        return parsed.run(parsed) or 0
    except BrokenPipeError:
        raise
    except OSError as error:  # of a disk or a store
        print_trace()
        reason = " ".join(str(error).split())
        code = 1 if parsed.is_run else 2  # a started run can be resumed
        return fail(f"{type(error).__name__}: {reason}; {STORE}", code)
    except WrpoError as error:
        print_trace()
        return fail(error, code_of(error))
    except KeyboardInterrupt:
        return fail("interrupted; run the same command again to go on", INTERRUPTED)
    except Terminated:
        return fail("terminated; run the same command again to go on", TERMINATED)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors hide secrets; argparse uses the class for subcommands too."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = _Parser(
        prog="wrpo",
        description="Fuse heterogeneous LLMs into one small target by Weighted-Reward Preference "
        "Optimization (arXiv 2412.03187), on Ray.",
        epilog="Every command can be run again: finished steps are skipped, unfinished ones go on.",
    )
    parser.add_argument("--version", action="version", version=f"wrpo {__version__}")
    parser.set_defaults(is_run=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser
