"""`wrpo fetch`: the files of a benchmark, with their checksums."""

import argparse
from typing import Any

from wrpo_ray.cli.arguments import local_path
from wrpo_ray.text.display import say


def add_fetch(commands: Any) -> None:
    """`fetch`."""
    text = "get the files of a public benchmark for `evaluate.benchmarks`, with checksums"
    fetch = commands.add_parser("fetch", help=text, description=text)
    fetch.add_argument("name", choices=("alpaca_eval", "arena_hard", "mt_bench"), metavar="NAME")
    fetch.add_argument("folder", metavar="FOLDER", type=local_path, help="where the files go")
    fetch.add_argument(
        "--sha256",
        metavar="FILE=HEX",
        action="append",
        default=[],
        help="the checksum that a file must have; can be given again",
    )
    fetch.set_defaults(run=_fetch)


def _fetch(arguments: argparse.Namespace) -> None:
    from wrpo_ray.stages.evaluate.fetch import fetch

    pinned = dict(text.partition("=")[::2] for text in arguments.sha256)
    for file, digest in fetch(arguments.name, arguments.folder, pinned).items():
        say(f"{digest}  {arguments.folder / file}")
