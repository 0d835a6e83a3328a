"""`wrpo export`: preference rows for other trainers, or the fused model."""

import argparse
from typing import Any

from wrpo_ray.cli.arguments import config_arguments
from wrpo_ray.errors import UserError
from wrpo_ray.text.display import say


def add_export(commands: Any) -> None:
    """`export`."""
    export = commands.add_parser(
        "export", help="preference rows as a data set, or the fused model, with its card"
    )
    config_arguments(export)
    export.add_argument(
        "--to",
        required=True,
        metavar="PLACE",
        help="a folder, local or in an object store, or a .jsonl or .parquet file",
    )
    export.add_argument(
        "--format",
        choices=("published", "trl", "records", "model"),
        default="published",
        help="published: chosen [y_ws, y_wt], rejected [y_l] (default); trl: TRL's preference "
        "rows; records: with every reward and source; model: the fused model with its card",
    )
    export.add_argument(
        "--pairs",
        choices=("target", "source", "both"),
        default="target",
        help="for trl: y_wt and y_l (default), y_ws and y_l, or a row of each",
    )
    export.add_argument(
        "--dtype",
        type=_dtype,
        metavar="PRECISION",
        help="for model: float32, bfloat16, float16 or auto (default): the target's own, and "
        "float32 for what LoRA trained; a loss by rounding is reported",
    )
    export.add_argument(
        "--weights",
        choices=("merged", "adapters", "both"),
        help="for model, trained with LoRA: merged (default), adapters beside the model that they "
        "were trained on, or both",
    )
    export.set_defaults(run=_export)


def _dtype(text: str) -> str:
    """A precision's name, or what a config calls it."""
    from wrpo_ray.export.weights import ALIASES, DTYPES

    name = ALIASES.get(text, text)
    if name not in ("auto", *DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r}: give auto, {', '.join(DTYPES)}")
    return name


def _export(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config
    from wrpo_ray.export.forms import Form
    from wrpo_ray.export.fused_model import export_model
    from wrpo_ray.export.preferences import export_preferences
    from wrpo_ray.storage.folder import Folder

    if arguments.pairs != "target" and arguments.format != "trl":
        raise UserError("export: --pairs belongs to --format trl; the other forms have all answers")
    if arguments.format != "model" and (arguments.dtype or arguments.weights):
        raise UserError("export: --dtype and --weights belong to --format model")
    settings = config.load(arguments.config, arguments.overrides)
    if arguments.format == "model":
        dtype, form = arguments.dtype or "auto", arguments.weights or "merged"
        size = export_model(settings, arguments.to, dtype, form)
        say(f"the fused model ({size / 1e6:,.1f} MB of weights) in {Folder(arguments.to)}")
        return
    rows = export_preferences(settings, arguments.to, Form(arguments.format, arguments.pairs))
    say(f"{rows:,} preference rows in {Folder(arguments.to)}")
