"""The command `wrpo`: parse, load the config, import the stage, run.

Neither torch nor ray is imported before a config is valid, so `--help` is instant. Exit codes:
0 done, 1 the run failed, 2 something the user can put right, 3 the budget is spent, 4 a model does
worse than --fail-below allows, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wrpo_ray import __version__
from wrpo_ray.addresses import Address, problem, shown
from wrpo_ray.errors import BudgetError, RegressionError, UserError, WrpoError

if TYPE_CHECKING:
    from wrpo_ray.config import Config

STAGE_HELP = {
    "prompts": "read prompts, or existing answers, into records",
    "generate": "sample answers from every source on vLLM",
    "score": "score every answer with the reward",
    "select": "choose the best source answer of each prompt (y_ws)",
    "sft": "fine-tune the target on y_ws",
    "sample": "sample and score answers of target-SFT",
    "pair": "write the preference shards (x, y_ws, y_wt, y_l)",
    "train": "WRPO from target-SFT, and DPO to compare with",
    "evaluate": "compare all models on held-out prompts",
}


STORE = (
    "check the path or address, the network, and the rights or the credentials in the environment"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    if os.getcwd() not in sys.path:  # functions named in the config are the user's own
        sys.path.insert(0, os.getcwd())
    try:
        return parsed.run(parsed) or 0
    except BrokenPipeError:
        raise
    except OSError as error:  # of a disk or a store
        _trace()
        reason = " ".join(str(error).split())
        is_run = parsed.run in (_fuse, _study)  # a run may be on its way, and goes on from there
        return _fail(f"{type(error).__name__}: {reason}; {STORE}", 1 if is_run else 2)
    except WrpoError as error:
        _trace()
        codes = {UserError: 2, BudgetError: 3, RegressionError: 4}
        return _fail(error, next((c for e, c in codes.items() if isinstance(error, e)), 1))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", 130)
    except Terminated:
        return _fail("terminated; run the same command again to go on", 143)


def _trace() -> None:
    if os.environ.get("WRPO_DEBUG"):
        print(shown(traceback.format_exc()), file=sys.stderr, end="")


class Terminated(SystemExit):
    """SIGTERM, which `ray job stop`, Kubernetes and batch systems send."""


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what follows puts things in order
    raise Terminated(143)


def _fail(reason: object, code: int) -> int:
    for line in shown(str(reason)).splitlines():
        print(f"wrpo: error: {line}", file=sys.stderr)
    return code


# --- arguments -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Tells what it does not take without secrets; parsers of commands are of its class too."""

    def error(self, message: str) -> NoReturn:
        super().error(shown(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wrpo",
        description="Fuse heterogeneous LLMs into one small target by Weighted-Reward Preference "
        "Optimization (arXiv 2412.03187), on Ray.",
        epilog="Every command can be run again: finished steps are skipped, unfinished ones go on.",
    )
    parser.add_argument("--version", action="version", version=f"wrpo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    fuse = _config_command(commands, "fuse", "the whole chain of a config", _fuse)
    _until_argument(fuse, "stop after this step")
    for name, text in STAGE_HELP.items():
        text = f"the chain up to here: {text}"
        command = _config_command(commands, name, text, _fuse, until=name)
        if name == "evaluate":
            _gate_argument(command)
    _study_command(commands)
    _submit_command(commands)
    _fetch_command(commands)
    _plan_command(commands)
    _export_command(commands)
    _report_command(commands)
    _status_command(commands)
    _failures_command(commands)
    text = "every field of a config: type, bounds, default, and what it says"
    reference = commands.add_parser("config", help=text, description=text)
    reference.add_argument(
        "field",
        metavar="FIELD",
        nargs="?",
        default="",
        help="a section or field, such as wrpo.alpha or serve.queue",
    )
    reference.set_defaults(run=_reference)
    _serve_command(commands)
    _cluster_commands(commands)
    zoo = commands.add_parser("zoo", help="train the demo's tiny models from nothing")
    zoo.add_argument("folder", metavar="FOLDER", type=_local, help="where the models go")
    zoo.add_argument("--seed", type=int, default=0, help="decides data and weights (default 0)")
    zoo.add_argument(
        "--recipe",
        choices=("near", "distant"),
        default="near",
        help="near: the demo's nearly perfect sources (default); distant: sources that err often "
        "and put it in words of their own, and a noisier reward",
    )
    zoo.add_argument("--processes", type=int, default=2, help="at the same time (default 2)")
    zoo.set_defaults(run=_zoo)
    return parser


def _study_command(commands: Any) -> None:
    text = "variants of training over seeds, compared with intervals"
    command = _config_command(commands, "study", text, _study)
    command.add_argument(
        "--only",
        metavar="VARIANT,...",
        default="",
        help="only these variants; what others have is kept",
    )


def _submit_command(commands: Any) -> None:
    text = "the whole chain of a config as a job of a Ray cluster"
    submit = commands.add_parser("submit", help=text, description=text)
    _config_arguments(submit)
    _until_argument(submit, "stop after this step")
    submit.add_argument(
        "--address",
        metavar="URL",
        help="of the head's dashboard, such as http://HEAD:8265 (else RAY_API_SERVER_ADDRESS, "
        "RAY_ADDRESS or the config's cluster.address)",
    )
    submit.add_argument(
        "--detach", action="store_true", help="do not follow the job, which goes on by itself"
    )
    submit.add_argument(
        "--on-interrupt",
        choices=("ask", "stop", "leave"),
        default="ask",
        help="what Ctrl-C does to the job (default: ask, on a terminal; else leave)",
    )
    submit.set_defaults(run=_submit)


def _gate_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fail-below",
        type=_finite,
        metavar="X",
        help="exit with 4 if a pair of evaluate.pairwise has a win rate below X (0 to 1)",
    )


def _fetch_command(commands: Any) -> None:
    text = "get the files of a public benchmark for `evaluate.benchmarks`, with checksums"
    fetch = commands.add_parser("fetch", help=text, description=text)
    fetch.add_argument("name", choices=("alpaca_eval", "arena_hard", "mt_bench"), metavar="NAME")
    fetch.add_argument("folder", metavar="FOLDER", type=_local, help="where the files go")
    fetch.add_argument(
        "--sha256",
        metavar="FILE=HEX",
        action="append",
        default=[],
        help="the checksum that a file must have; can be given again",
    )
    fetch.set_defaults(run=_fetch)


def _plan_command(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="work, tokens, GPU-hours, money and time of a config; runs nothing"
    )
    _config_arguments(plan)
    _until_argument(plan, "plan up to this step")
    plan.add_argument("--gpus", type=_positive, metavar="N", help="of the cluster to plan for")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)


def _export_command(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="preference rows as a data set, or the fused model, with its card"
    )
    _config_arguments(export)
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
        "float32 for what LoRA trained; what rounding loses of the training is told",
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


def _report_command(commands: Any) -> None:
    text = "report.html of a run, or how runs differ"
    report = commands.add_parser("report", help=text, description=text)
    report.add_argument(
        "places", metavar="OUTPUT_OR_CONFIG", nargs="+", help="the output of a run, or its config"
    )
    _set_argument(report)
    report.add_argument(
        "--compare", action="store_true", help="tell how two or more runs differ, the first first"
    )
    report.add_argument("--to", metavar="FILE", help="the page's file (default: in the output)")
    report.set_defaults(run=_report)


def _status_command(commands: Any) -> None:
    text = "where a run is, from any machine that sees its output"
    status = commands.add_parser("status", help=text, description=text)
    status.add_argument("place", metavar="OUTPUT", help="the output of a run, or its config")
    _set_argument(status)
    status.add_argument("--watch", action="store_true", help="go on until the run ends")
    status.add_argument(
        "--every", type=_interval, default=5.0, metavar="S", help="seconds between looks (5)"
    )
    status.set_defaults(run=_status)


def _failures_command(commands: Any) -> None:
    failures = commands.add_parser("failures", help="failed rows, and new attempts for them")
    _config_arguments(failures)
    failures.add_argument("--step", metavar="STEP", help="only of this stage or step")
    failures.add_argument("--json", action="store_true", help="as JSON")
    failures.add_argument(
        "--retry", action="store_true", help="give failed answers and scores new attempts"
    )
    failures.add_argument(
        "--yes", action="store_true", help="with --retry: also where models are trained again"
    )
    failures.set_defaults(run=_failures)


def _serve_command(commands: Any) -> None:
    text = "models behind an OpenAI-compatible endpoint, with keys and limits"
    command = commands.add_parser("serve", help=text, description=text)
    command.add_argument(
        "models",
        nargs="*",
        metavar="[NAME=]MODEL",
        help="a model folder or hub id, and what clients call it",
    )
    command.add_argument("--config", help="a YAML file of config.ServeConfig")
    _set_argument(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="port to listen at (8000)")
    command.add_argument(
        "--new-key", metavar="NAME", help="print a new API key and its line for the file of keys"
    )
    command.set_defaults(run=_serve)


def _config_command(
    commands: Any, name: str, text: str, run: Callable[..., Any], **defaults: Any
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    _config_arguments(command)
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="list the steps and whether they are done; run nothing",
    )
    command.set_defaults(run=run, **defaults)
    return command


def _until_argument(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument(
        "--until",
        metavar="STEP",
        choices=STAGE_HELP,
        default="evaluate",
        help=f"{text}: {', '.join(STAGE_HELP)}",
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _local(text: str) -> Path:
    if Address.of(text) or problem(text):
        raise argparse.ArgumentTypeError("give a folder on this machine")
    return Path(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _interval(text: str) -> float:
    if (number := _finite(text)) <= 0:
        raise ValueError
    return number


def _cluster_commands(commands: Any) -> None:
    text = "manifests of Kubernetes and of Ray's cluster launcher"
    cluster = commands.add_parser("cluster", help=text, description=text)
    actions = cluster.add_subparsers(metavar="ACTION", required=True)
    text = "check manifests offline, and whether a config's steps fit their nodes"
    check = actions.add_parser("check", help=text, description=text)
    check.add_argument(
        "manifests", metavar="MANIFEST", nargs="+", help="a YAML file, a folder, or - for stdin"
    )
    check.add_argument("--job", metavar="CONFIG", help="the config whose steps have to fit")
    check.add_argument("--crds", metavar="FOLDER", help="KubeRay's CustomResourceDefinitions")
    check.set_defaults(run=_check_cluster)


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file; see jobs/")
    _set_argument(command)


def _set_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        metavar="a.b=value",
        action="append",
        default=[],
        dest="overrides",
        help="override a value of the config; can be given again",
    )


# --- commands --------------------------------------------------------------------------------


def _fuse(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config, pipeline

    settings = config.load(arguments.config, arguments.overrides)
    if arguments.dry_run:
        for stage, step, done in pipeline.plan(settings, arguments.until):
            print(f"{stage:9} {'done' if done else 'to do':6} {step.folder}")
        return
    from wrpo_ray.plan.estimate import expected

    summary = pipeline.fuse(settings, arguments.until, expected)
    from wrpo_ray.report.text import summary_text

    print(summary_text(summary))
    if getattr(arguments, "fail_below", None) is not None:
        pipeline.check_pairs(summary, arguments.fail_below)


def _study(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config, study

    settings = config.load_study(arguments.config, arguments.overrides)
    only = [name for name in arguments.only.split(",") if name]
    if arguments.dry_run:
        for case, step, done in study.plan(settings, only):
            print(f"{case:12} {'done' if done else 'to do':6} {step.folder}")
        return
    result = study.study(settings, only)
    from wrpo_ray.report.study import study_text

    print(study_text(result))


def _fetch(arguments: argparse.Namespace) -> None:
    from wrpo_ray.evaluate.fetch import fetch

    pinned = dict(text.partition("=")[::2] for text in arguments.sha256)
    for file, digest in fetch(arguments.name, arguments.folder, pinned).items():
        print(f"{digest}  {arguments.folder / file}")


def _submit(arguments: argparse.Namespace) -> int:
    from wrpo_ray import config, submit

    settings = config.load(arguments.config, arguments.overrides)
    rest = [f"--set={override}" for override in arguments.overrides]
    rest.append(f"--until={arguments.until}")
    job = submit.Job(submit.submission(arguments.config, rest, settings, arguments.address))
    told = f"`ray job logs --follow {job.id}` shows it, `ray job stop {job.id}` ends it"
    print(f"job {job.id} is submitted; {told}", file=sys.stderr)
    if arguments.detach:
        return 0
    try:
        return job.follow()
    except KeyboardInterrupt:
        if not _wants_stop(arguments.on_interrupt):
            return _fail(f"interrupted; the job goes on: {told}", 130)
        job.stop()
        return _fail("the job is stopped; submit it again to go on", 130)


def _wants_stop(on_interrupt: str) -> bool:
    if on_interrupt == "ask" and sys.stdin.isatty():
        return input("\nStop the job, too? [y/N] ").strip().lower() in ("y", "yes")
    return on_interrupt == "stop"


def _plan(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config
    from wrpo_ray.plan.estimate import estimate
    from wrpo_ray.plan.text import plan_text

    settings = config.load(arguments.config, arguments.overrides)
    plan = estimate(settings, arguments.until, arguments.gpus)
    print(json.dumps(plan.record(), indent=1) if arguments.json else plan_text(plan))


def _export(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config, results
    from wrpo_ray.core.storage import Folder
    from wrpo_ray.export.forms import Form

    if arguments.pairs != "target" and arguments.format != "trl":
        raise UserError("export: --pairs belongs to --format trl; the other forms have all answers")
    if arguments.format != "model" and (arguments.dtype or arguments.weights):
        raise UserError("export: --dtype and --weights belong to --format model")
    settings = config.load(arguments.config, arguments.overrides)
    if arguments.format == "model":
        dtype, form = arguments.dtype or "auto", arguments.weights or "merged"
        size = results.export_model(settings, arguments.to, dtype, form)
        print(f"the fused model ({size / 1e6:,.1f} MB of weights) in {Folder(arguments.to)}")
        return
    rows = results.export(settings, arguments.to, Form(arguments.format, arguments.pairs))
    print(f"{rows:,} preference rows in {Folder(arguments.to)}")


def _report(arguments: argparse.Namespace) -> None:
    from wrpo_ray import reports

    places, overrides = arguments.places, arguments.overrides
    if arguments.compare:
        print(reports.compare(places, overrides, arguments.to))
        return
    if arguments.to and len(places) > 1:
        raise UserError("report: --to takes the page of one run; or add --compare")
    for place in places:
        print(reports.report(place, overrides, arguments.to))


def _status(arguments: argparse.Namespace) -> None:
    from wrpo_ray import reports

    every = arguments.every if arguments.watch else None
    reports.show_status(arguments.place, arguments.overrides, every)


def _failures(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config, results

    settings = config.load(arguments.config, arguments.overrides)
    if arguments.retry:
        _retry(arguments, settings)
        return
    groups = results.failures(settings, arguments.step)
    if arguments.json:
        print(json.dumps(groups, indent=2, ensure_ascii=False))
        return
    from wrpo_ray.report.text import failures_text

    print(failures_text(groups))


def _reference(arguments: argparse.Namespace) -> None:
    from wrpo_ray.config_reference import config_text

    print(config_text(arguments.field))


def _retry(arguments: argparse.Namespace, settings: Config) -> None:
    from wrpo_ray import results

    plan = results.plan_retry(settings, arguments.step)
    told = ", ".join(f"{rows:,} of {step}" for step, rows in plan.rows.items())
    print(f"failed rows to try again: {told}")
    if plan.again:
        print(f"done again after that:    {', '.join(plan.again)}")
    if plan.trained and not arguments.yes:
        raise UserError(
            f"--retry: {', '.join(plan.trained)} would be trained again; add --yes to do so"
        )
    results.retry(settings, plan)
    print("run the same `wrpo fuse` as before")


def _serve(arguments: argparse.Namespace) -> None:
    from wrpo_ray.serve.keys import ENVIRONMENT, new_key

    if arguments.new_key:
        print("key:  {}\nline: {}".format(*new_key(arguments.new_key)))
        return
    from wrpo_ray import config
    from wrpo_ray.serve.check import check_free, checked

    tree = config.read_serving(arguments.config) if arguments.config else {}
    if arguments.models:  # beside those of the file; what is no list there is told as such
        given = tree.get("models") or []
        more = list(map(_served, arguments.models))
        tree["models"] = given + more if isinstance(given, list) else given
    settings = config.serving(tree, arguments.overrides)
    told = ""
    if settings.keys is None and ENVIRONMENT not in os.environ:
        key, os.environ[ENVIRONMENT] = new_key("this-run")
        told = f"\nkey:    {key} (of this run; `keys` or {ENVIRONMENT} names lasting ones)"
    settings = checked(settings)
    if "RAY_ADDRESS" not in os.environ:
        check_free(arguments.host, arguments.port)
    from wrpo_ray.serve.app import run

    names = ", ".join(name for m in settings.models for name in (m.name, *m.adapters))
    url = f"http://{arguments.host}:{arguments.port}"
    ready = f"models: {names}\nAPI:    {url}/v1\npage:   {url}/{told}"
    run(settings, arguments.host, arguments.port, lambda: print(ready, flush=True))


def _served(model: str) -> dict[str, str]:
    """`NAME=MODEL`, or a model that is called by the last part of its path."""
    from wrpo_ray.config import NAME
    from wrpo_ray.core.storage import Folder

    name, equals, place = model.partition("=")
    if equals and re.fullmatch(NAME, name):
        return {"name": name, "model": place}
    return {"name": Path(str(Folder(model))).absolute().name, "model": model}


def _check_cluster(arguments: argparse.Namespace) -> None:
    from wrpo_ray import config
    from wrpo_ray.cluster_check.check import check
    from wrpo_ray.cluster_check.schema import Schemas

    settings = config.load(arguments.job) if arguments.job else None
    schemas = Schemas(arguments.crds) if arguments.crds else None
    report = check(arguments.manifests, settings, schemas)
    if report.problems:
        raise UserError("\n".join(map(str, report.problems)))
    for place in report.places:
        print(place)
    print(f"{len(report.manifests)} objects: no problem found")


def _zoo(arguments: argparse.Namespace) -> None:
    from wrpo_ray.zoo.build import build_zoo

    try:
        build_zoo(
            arguments.folder,
            seed=arguments.seed,
            processes=arguments.processes,
            recipe=arguments.recipe,
        )
    except (ValueError, OSError) as error:
        raise UserError(f"zoo: {error}") from None
    print(f"zoo: models and prompts are in {arguments.folder}")
