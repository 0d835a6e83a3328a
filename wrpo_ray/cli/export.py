"""`wrpo export`: preference rows for other trainers, or the fused model; also to the hub."""

import argparse
from typing import TYPE_CHECKING, Any

from wrpo_ray.cli.arguments import config_arguments
from wrpo_ray.errors import UserError
from wrpo_ray.text.display import say

if TYPE_CHECKING:
    from wrpo_ray.export.push import Push


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
    _model_arguments(export)
    export.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="upload the folder to this repository of the Hugging Face hub, made if it is new; "
        "needs HF_TOKEN or `hf auth login`",
    )
    export.add_argument(
        "--public", action="store_true", help="for --push: everybody sees it (default: private)"
    )
    export.set_defaults(run=_export)


def _model_arguments(export: argparse.ArgumentParser) -> None:
    """Options of `--format model`."""
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
    export.add_argument(
        "--gguf",
        action="store_true",
        help="for model, merged: also as a GGUF file for llama.cpp and Ollama in the folder; for "
        "Llama models with a byte-level BPE",
    )


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
    if arguments.gguf and (arguments.format != "model" or arguments.weights == "adapters"):
        raise UserError("export: --gguf belongs to --format model, with merged weights")
    if arguments.public and not arguments.push:
        raise UserError("export: --public belongs to --push")
    settings = config.load(arguments.config, arguments.overrides)
    push = _push(arguments)
    before = push.check_hub if push else lambda: None
    if arguments.format == "model":
        dtype, form = arguments.dtype or "auto", arguments.weights or "merged"
        size = export_model(settings, arguments.to, dtype, form, gguf=arguments.gguf, before=before)
        say(f"the fused model ({size / 1e6:,.1f} MB of weights) in {Folder(arguments.to)}")
        parts = {"adapters": ("adapters", "base"), "both": ("adapters", "base")}.get(form, ())
        _upload(push, arguments.to, settings.output, parts)
        return
    rows_form = Form(arguments.format, arguments.pairs)
    rows = export_preferences(settings, arguments.to, rows_form, before)
    say(f"{rows:,} preference rows in {Folder(arguments.to)}")
    _upload(push, arguments.to, settings.output)


def _push(arguments: argparse.Namespace) -> "Push | None":
    """The repository of `--push`, with a name and a token; None without the option."""
    from wrpo_ray.export.push import Push

    if arguments.push is None:
        return None
    kind = "model" if arguments.format == "model" else "dataset"
    push = Push(arguments.push, kind, arguments.public)
    push.check(arguments.to)
    return push


def _upload(push: "Push | None", to: str, output: str, parts: tuple[str, ...] = ()) -> None:
    from wrpo_ray.export.run_facts import last_name

    if push:
        say(f"uploaded to {push.upload(to, last_name(output), parts)}")
