"""Arguments that several commands share."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wrpo_ray.pipeline.stage_table import STAGES
from wrpo_ray.text.addresses import Address, address_problem


def config_command(
    commands: Any, name: str, text: str, run: Callable[..., Any], **defaults: Any
) -> argparse.ArgumentParser:
    """A command that takes a config and `--dry-run`."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    config_arguments(command)
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="list the steps and whether they are done; run nothing",
    )
    command.set_defaults(run=run, **defaults)
    return command


def until_argument(command: argparse.ArgumentParser, text: str) -> None:
    """`--until`, the last stage to run."""
    command.add_argument(
        "--until",
        metavar="STEP",
        choices=STAGES,
        default=STAGES[-1],
        help=f"{text}: {', '.join(STAGES)}",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def local_path(text: str) -> Path:
    """A folder on this machine."""
    if Address.of(text) or address_problem(text):
        raise argparse.ArgumentTypeError("give a folder on this machine")
    return Path(text)


def finite(text: str) -> float:
    """A finite number."""
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def interval(text: str) -> float:
    """A number of seconds above 0."""
    if (number := finite(text)) <= 0:
        raise ValueError
    return number


def config_arguments(command: argparse.ArgumentParser) -> None:
    """The config and `--set`."""
    command.add_argument("config", metavar="CONFIG", help="a YAML file; see jobs/")
    set_argument(command)


def set_argument(command: argparse.ArgumentParser) -> None:
    """`--set`."""
    command.add_argument(
        "--set",
        metavar="a.b=value",
        action="append",
        default=[],
        dest="overrides",
        help="override a value of the config; can be given again",
    )
