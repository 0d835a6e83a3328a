"""`wrpo study`: variants of a config compared over seeds."""

import argparse
from typing import Any

from wrpo_ray.cli.arguments import config_command


def add_study(commands: Any) -> None:
    """`study`."""
    text = "variants of training over seeds, compared with intervals"
    command = config_command(commands, "study", text, _study, is_run=True)
    command.add_argument(
        "--only",
        metavar="VARIANT,...",
        default="",
        help="only these variants; results of the others are kept",
    )


def _study(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config
    from wrpo_ray.pipeline import study

    settings = config.load_study(arguments.config, arguments.overrides)
    only = [name for name in arguments.only.split(",") if name]
    if arguments.dry_run:
        for case, step, done in study.plan(settings, only):
            print(f"{case:12} {'done' if done else 'to do':6} {step.folder}")
        return
    result = study.study(settings, only)
    from wrpo_ray.report.study_table import study_text

    print(study_text(result))
