"""`wrpo submit`: run the chain as a job of a Ray cluster."""

import argparse
import sys
from typing import Any

from wrpo_ray.cli.arguments import config_arguments, until_argument
from wrpo_ray.cli.exits import INTERRUPTED, fail


def add_submit(commands: Any) -> None:
    """`submit`."""
    text = "the whole chain of a config as a job of a Ray cluster"
    submit = commands.add_parser("submit", help=text, description=text)
    config_arguments(submit)
    until_argument(submit, "stop after this step")
    submit.add_argument(
        "--address",
        metavar="URL",
        help="address of the head's dashboard, such as http://HEAD:8265 (else "
        "RAY_API_SERVER_ADDRESS, RAY_ADDRESS or the config's cluster.address)",
    )
    submit.add_argument("--detach", action="store_true", help="return at once; the job continues")
    submit.add_argument(
        "--on-interrupt",
        choices=("ask", "stop", "leave"),
        default="ask",
        help="what Ctrl-C does to the job (default: ask, on a terminal; else leave)",
    )
    submit.set_defaults(run=_submit)


def _submit(arguments: argparse.Namespace) -> int:
    from wrpo_ray import config
    from wrpo_ray.runtime.submission import SubmittedJob, prepare_submission

    settings = config.load(arguments.config, arguments.overrides)
    rest = [f"--set={override}" for override in arguments.overrides]
    rest.append(f"--until={arguments.until}")
    job = SubmittedJob(prepare_submission(arguments.config, rest, settings, arguments.address))
    hint = f"`ray job logs --follow {job.id}` shows it, `ray job stop {job.id}` ends it"
    print(f"job {job.id} is submitted; {hint}", file=sys.stderr)
    if arguments.detach:
        return 0
    try:
        return job.follow()
    except KeyboardInterrupt:
        if not _wants_stop(arguments.on_interrupt):
            return fail(f"interrupted; the job continues: {hint}", INTERRUPTED)
        job.stop()
        return fail("the job is stopped; submit it again to resume", INTERRUPTED)


def _wants_stop(on_interrupt: str) -> bool:
    if on_interrupt == "ask" and sys.stdin.isatty():
        return input("\nStop the job, too? [y/N] ").strip().lower() in ("y", "yes")
    return on_interrupt == "stop"
