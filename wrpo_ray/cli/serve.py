"""`wrpo serve`: models behind an OpenAI-compatible endpoint."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

from wrpo_ray.cli.arguments import set_argument

LOOPBACK_ONLY = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
"""Ray's setting, on Linux too, that its own processes listen at loopback; read at its import."""


def add_serve(commands: Any) -> None:
    """`serve`."""
    text = "models behind an OpenAI-compatible endpoint, with keys and limits"
    command = commands.add_parser("serve", help=text, description=text)
    command.add_argument(
        "models",
        nargs="*",
        metavar="[NAME=]MODEL",
        help="a model folder or hub id, and what clients call it",
    )
    command.add_argument("--config", help="a YAML file of config.ServeConfig")
    set_argument(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="port to listen at (8000)")
    command.add_argument(
        "--new-key", metavar="NAME", help="print a new API key and its line for the file of keys"
    )
    command.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from wrpo_ray.serve.keys import ENVIRONMENT, new_key

    if arguments.new_key:
        print("key:  {}\nline: {}".format(*new_key(arguments.new_key)))
        return
    from wrpo_ray import config
    from wrpo_ray.serve.check import check_free, checked

    tree = config.read_serving(arguments.config) if arguments.config else {}
    if arguments.models:  # added to those of the file; the config rejects a value that is no list
        given = tree.get("models") or []
        more = list(map(_served, arguments.models))
        tree["models"] = given + more if isinstance(given, list) else given
    settings = config.serving(tree, arguments.overrides)
    note = ""
    if settings.keys is None and ENVIRONMENT not in os.environ:
        key, os.environ[ENVIRONMENT] = new_key("this-run")
        note = f"\nkey:    {key} (of this run; `keys` or {ENVIRONMENT} names lasting ones)"
    settings = checked(settings)
    if "RAY_ADDRESS" not in os.environ:
        check_free(arguments.host, arguments.port)
        os.environ.setdefault(*LOOPBACK_ONLY)
    from wrpo_ray.serve.app import run

    names = ", ".join(name for m in settings.models for name in (m.name, *m.adapters))
    url = f"http://{arguments.host}:{arguments.port}"
    ready = f"models: {names}\nAPI:    {url}/v1\npage:   {url}/{note}"
    run(settings, arguments.host, arguments.port, lambda: print(ready, flush=True))


def _served(model: str) -> dict[str, str]:
    """`NAME=MODEL`, or a model whose name is the last part of its path."""
    from wrpo_ray.config import NAME
    from wrpo_ray.storage.folder import Folder

    name, equals, place = model.partition("=")
    if equals and re.fullmatch(NAME, name):
        return {"name": name, "model": place}
    return {"name": Path(str(Folder(model))).absolute().name, "model": model}
