"""Commands that read a run or a config: plan, report, status, failures, config."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from wrpo_ray.cli.arguments import (
    config_arguments,
    interval,
    positive,
    set_argument,
    until_argument,
)
from wrpo_ray.errors import UserError
from wrpo_ray.text.display import say

if TYPE_CHECKING:
    from wrpo_ray.config import Config


def add_plan(commands: Any) -> None:
    """`plan`."""
    plan = commands.add_parser(
        "plan", help="work, tokens, GPU-hours, money and time of a config; runs nothing"
    )
    config_arguments(plan)
    until_argument(plan, "plan up to this step")
    plan.add_argument("--gpus", type=positive, metavar="N", help="of the cluster to plan for")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)


def add_report(commands: Any) -> None:
    """`report`."""
    text = "report.html of a run, or how runs differ"
    report = commands.add_parser("report", help=text, description=text)
    report.add_argument(
        "places", metavar="OUTPUT_OR_CONFIG", nargs="+", help="the output of a run, or its config"
    )
    set_argument(report)
    report.add_argument(
        "--compare", action="store_true", help="show how the other runs differ from the first"
    )
    report.add_argument("--to", metavar="FILE", help="the page's file (default: in the output)")
    report.set_defaults(run=_report)


def add_status(commands: Any) -> None:
    """`status`."""
    text = "where a run is, from any machine that sees its output"
    status = commands.add_parser("status", help=text, description=text)
    status.add_argument("place", metavar="OUTPUT", help="the output of a run, or its config")
    set_argument(status)
    status.add_argument("--watch", action="store_true", help="update until the run ends")
    status.add_argument(
        "--every", type=interval, default=5.0, metavar="S", help="seconds between updates (5)"
    )
    status.set_defaults(run=_status)


def add_failures(commands: Any) -> None:
    """`failures`."""
    failures = commands.add_parser("failures", help="failed rows, and new attempts for them")
    config_arguments(failures)
    failures.add_argument("--step", metavar="STEP", help="only of this stage or step")
    failures.add_argument("--json", action="store_true", help="as JSON")
    failures.add_argument(
        "--retry", action="store_true", help="give failed answers and scores new attempts"
    )
    failures.add_argument(
        "--yes", action="store_true", help="with --retry: also if models must be trained again"
    )
    failures.set_defaults(run=_failures)


def _plan(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config
    from wrpo_ray.planning.estimate import plan as make_plan
    from wrpo_ray.planning.text import plan_text

    settings = config.load(arguments.config, arguments.overrides)
    plan = make_plan(settings, arguments.until, arguments.gpus)
    say(json.dumps(plan.record(), indent=1) if arguments.json else plan_text(plan))


def _report(arguments: argparse.Namespace) -> None:
    from wrpo_ray.pipeline import outputs

    places, overrides = arguments.places, arguments.overrides
    if arguments.compare:
        say(outputs.compare(places, overrides, arguments.to))
        return
    if arguments.to and len(places) > 1:
        raise UserError("report: --to takes the page of one run; or add --compare")
    for place in places:
        say(outputs.report(place, overrides, arguments.to))


def _status(arguments: argparse.Namespace) -> None:
    from wrpo_ray.pipeline import outputs

    every = arguments.every if arguments.watch else None
    outputs.show_status(arguments.place, arguments.overrides, every)


def _failures(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config
    from wrpo_ray.pipeline import failed_rows as retries

    settings = config.load(arguments.config, arguments.overrides)
    if arguments.retry:
        _retry(arguments, settings)
        return
    groups = retries.failures(settings, arguments.step)
    if arguments.json:
        say(json.dumps(groups, indent=2, ensure_ascii=False))
        return
    from wrpo_ray.report.text import failures_text

    say(failures_text(groups))


def add_config(commands: Any) -> None:
    """`config`."""
    text = "every field of a config: type, bounds, default and meaning"
    reference = commands.add_parser("config", help=text, description=text)
    reference.add_argument(
        "field",
        metavar="FIELD",
        nargs="?",
        default="",
        help="a section or field, such as wrpo.alpha or serve.queue",
    )
    reference.set_defaults(run=_reference)


def _reference(arguments: argparse.Namespace) -> None:
    from wrpo_ray.config.reference import config_text

    say(config_text(arguments.field))


def _retry(arguments: argparse.Namespace, settings: Config) -> None:
    from wrpo_ray.pipeline import failed_rows as retries

    plan = retries.plan_retry(settings, arguments.step)
    counts = ", ".join(f"{rows:,} of {step}" for step, rows in plan.rows.items())
    say(f"failed rows to retry: {counts}")
    if plan.again:
        say(f"steps to run again:   {', '.join(plan.again)}")
    if plan.trained and not arguments.yes:
        raise UserError(
            f"--retry: {', '.join(plan.trained)} would be trained again; add --yes to do so"
        )
    retries.retry(settings, plan)
    say("run the same `wrpo fuse` as before")
