"""`wrpo cluster check`: manifests checked without a cluster."""

import argparse
from typing import Any

from wrpo_ray.errors import UserError
from wrpo_ray.text.display import say


def add_cluster(commands: Any) -> None:
    """`cluster check`."""
    text = "manifests of Kubernetes and of Ray's cluster launcher"
    cluster = commands.add_parser("cluster", help=text, description=text)
    actions = cluster.add_subparsers(metavar="ACTION", required=True)
    text = "check manifests offline, and whether a config's steps fit their nodes"
    check = actions.add_parser("check", help=text, description=text)
    check.add_argument(
        "manifests",
        metavar="MANIFEST",
        nargs="+",
        help="a YAML or JSON file, a folder, or - for stdin",
    )
    check.add_argument("--job", metavar="CONFIG", help="the config whose steps have to fit")
    check.add_argument("--crds", metavar="FOLDER", help="CRDs of another KubeRay than 1.7.0")
    check.set_defaults(run=_check_cluster)


def _check_cluster(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config
    from wrpo_ray.kubernetes.check import check, told_once
    from wrpo_ray.kubernetes.schema import Schemas

    settings = config.load(arguments.job) if arguments.job else None
    report = check(arguments.manifests, settings, Schemas(arguments.crds))
    for advice in told_once(report.advice):
        say(f"advice: {advice}")
    if report.problems:
        raise UserError("\n".join(told_once(report.problems)))
    for place in report.places:
        say(place)
    for namespace, names in report.needs.items():
        say(f"has to exist before{_in(namespace)}: {', '.join(names)}")
    for namespace, names in report.uses.items():
        say(f"is used{_in(namespace)} if it exists: {', '.join(names)}")
    say(f"{len(report.manifests)} objects: no problem found")


def _in(namespace: str) -> str:
    return f" in namespace {namespace}" if namespace else ""
