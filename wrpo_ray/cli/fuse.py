"""`wrpo fuse`, the commands of single stages, and `wrpo study`: run the chain of a config."""

import argparse
from typing import Any

from wrpo_ray.cli.arguments import config_command, finite, until_argument
from wrpo_ray.pipeline.stage_table import STAGE_HELP
from wrpo_ray.text.display import say


def _gate_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fail-below",
        type=finite,
        metavar="X",
        help="exit with 4 if a pair of evaluate.pairwise has a win rate below X (0 to 1)",
    )


def add_fuse(commands: Any) -> None:
    """`fuse`, and a command for each stage, which stops after it."""
    fuse = config_command(commands, "fuse", "the whole chain of a config", _fuse, is_run=True)
    until_argument(fuse, "stop after this step")
    for name, text in STAGE_HELP.items():
        text = f"the chain up to here: {text}"
        command = config_command(commands, name, text, _fuse, until=name, is_run=True)
        if name == "evaluate":
            _gate_argument(command)


def _fuse(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config
    from wrpo_ray.pipeline import runner

    settings = config.load(arguments.config, arguments.overrides)
    if arguments.dry_run:
        for stage, step, done in runner.plan(settings, arguments.until):
            say(f"{stage:9} {'done' if done else 'to do':6} {step.folder}")
        return
    from wrpo_ray.planning.estimate import expected

    summary = runner.fuse(settings, arguments.until, expected)
    from wrpo_ray.report.text import summary_text

    say(summary_text(summary))
    if getattr(arguments, "fail_below", None) is not None:
        from wrpo_ray.pipeline.summary import check_pairs

        check_pairs(summary, arguments.fail_below)


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
            say(f"{case:12} {'done' if done else 'to do':6} {step.folder}")
        return
    result = study.study(settings, only)
    from wrpo_ray.report.text import study_text

    say(study_text(result))
