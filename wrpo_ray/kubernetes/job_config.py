"""The config that a RayJob's entrypoint reads, where a ConfigMap among the manifests has it."""

import base64
import difflib
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from wrpo_ray.config import Config, parse
from wrpo_ray.errors import UserError
from wrpo_ray.kubernetes.manifests import Manifest, Problem, mapping
from wrpo_ray.kubernetes.pod_rules import IMAGE
from wrpo_ray.kubernetes.ray_objects import GPU, Group, Job, Mount, RayObject, Volume
from wrpo_ray.kubernetes.reference_rules import EXTERNAL, declared

FIELD = "spec.entrypoint"
IN_IMAGE = "/opt/wrpo"
"""The folder of the project's image that has files (cluster/Dockerfile)."""
OPERATORS = {"&&", "||", ";", "|", "&", ">", ">>", "<", "(", ")"}
SHOWN = 3
"""Maximum fields named where two configs differ."""


COMMANDS = (
    "fuse prompts generate score select sft sample pair train evaluate study submit fetch plan"
)
COMMANDS += " export report status failures config serve cluster zoo"
"""The commands of `wrpo`, whose parser is in a layer above this one."""
BEFORE = {"exec", "env", "nohup", "time", "then", "do", "python", "-m", "!"}
"""Words after which a command may stand."""


@dataclass(frozen=True)
class Command:
    """A `wrpo` command."""

    name: str
    """Such as `fuse`; empty where it is not written out."""
    path: str
    """The config; empty without one."""
    overrides: tuple[str, ...]

    @classmethod
    def all_of(cls, entrypoint: str) -> "list[Command]":
        """Return those of an entrypoint, also inside `sh -c '...'`."""
        words = _words(entrypoint)
        starts = [n for n in range(len(words)) if _is_wrpo(words, n)]
        found = []
        for start in starts:
            ends = [n for n, word in enumerate(words) if word in OPERATORS and n > start]
            given = words[start + 1 : min(ends, default=len(words))]
            sets = [n for n, word in enumerate(given) if word == "--set"]
            overrides = [given[n + 1] for n in sets if n + 1 < len(given)]
            overrides += [w.removeprefix("--set=") for w in given if w.startswith("--set=")]
            files = [w for w in given if w.endswith((".yaml", ".yml")) and w not in overrides]
            name = given[0] if given and given[0].isalpha() else ""
            found.append(cls(name, files[0] if files else "", tuple(overrides)))
        return found


def _is_wrpo(words: list[str], n: int) -> bool:
    """Whether a word stands for this program, and where a command may stand."""
    before = words[n - 1] if n else ";"
    if words[n] == "wrpo_ray":
        return before == "-m"
    is_start = before in OPERATORS | BEFORE or "=" in before or before[0] + before[-1] == "-c"
    return PurePosixPath(words[n]).name == "wrpo" and is_start


def _words(text: str) -> list[str]:
    """Return the words of a command line, and in the place of a text for a shell its words."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError:
        return text.split()
    is_script = [before.startswith("-") and before.endswith("c") for before in ["", *words]]
    return [w for n, word in enumerate(words) for w in (_words(word) if is_script[n] else [word])]


def check(
    found: RayObject, job: Job, manifests: Sequence[Manifest], given: Config | None
) -> tuple[list[Config], list[Problem]]:
    """Return the configs that the run reads, and their problems; the given one if elsewhere."""
    commands = Command.all_of(job.entrypoint)
    known = COMMANDS.split()
    problems = []
    for name in (one.name for one in commands if one.name and one.name not in known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        problems.append(found.problem(FIELD, "job-config", f"wrpo has no command {name!r}; {hint}"))
    configs: list[Config] = []
    for command in commands:
        if command.path:
            config, faults = _config_of(found, job, command, manifests, given)
            configs += [config] if config and config not in configs else []
            problems += [fault for fault in faults if fault not in problems]
    no_path = not any(command.path for command in commands)
    return ([given] if given and no_path else configs), problems


def _config_of(
    found: RayObject,
    job: Job,
    command: Command,
    manifests: Sequence[Manifest],
    given: Config | None,
) -> tuple[Config | None, list[Problem]]:
    texts: set[str] = set()
    for group in _of_driver(found, job):
        try:
            text = _text(found, group, command.path, manifests)
        except LookupError as fault:
            return given, [found.problem(FIELD, "job-config", str(fault.args[0]))]
        texts |= {text} if text is not None else set()
    if len(texts) != 1:
        return given, []
    return _parsed(found, command, texts.pop(), given)


def _parsed(
    found: RayObject, command: Command, text: str, given: Config | None
) -> tuple[Config | None, list[Problem]]:
    try:
        as_written = parse(text, (), command.path)
        run = parse(text, command.overrides, command.path)
    except UserError as error:
        lines = str(error).splitlines()
        return None, [found.problem(FIELD, "job-config", line) for line in lines]
    if given in (None, as_written, run):
        return run, []
    differ = ", ".join(list(_different(as_written, given))[:SHOWN])
    fault = (
        f"{command.path} is mounted with another content than the config of --job (they differ in "
        f"{differ}): the run reads the mounted one; render the manifests anew"
    )
    return run, [found.problem(FIELD, "job-config", fault)]


def _different(one: Config, other: Config | None) -> Iterator[str]:
    a, b = one.model_dump(by_alias=True), other.model_dump(by_alias=True) if other else {}
    return (name for name in a if a[name] != b.get(name))


def _of_driver(found: RayObject, job: Job) -> list[Group]:
    """Return the groups whose pods may run the driver: the head, or workers without GPUs."""
    asks = job.entrypoint_num_cpus or job.entrypoint_num_gpus or job.entrypoint_resources
    workers: list[Group] = [group for _, group in found.workers]
    if not found.cluster or not asks:
        return [found.cluster.head_group_spec] if found.cluster else []
    without = [group for group in workers if GPU not in group.ray.resources.limits]
    return workers if job.entrypoint_num_gpus else without or workers


def _text(found: RayObject, group: Group, path: str, manifests: Sequence[Manifest]) -> str | None:
    """Return a file's content; None if it is where manifests do not tell, as in an image.

    Raises:
        LookupError: it is not there.
    """
    mount = _mount_of(group, path)
    if mount is None:
        is_ours = group.ray.image.rpartition("/")[2].partition(":")[0] == IMAGE
        if is_ours and path.startswith("/") and not path.startswith(f"{IN_IMAGE}/"):
            raise LookupError(f"{path} is on no volume that the driver's pod mounts; mount it")
        return None
    volume = next((v for v in group.template.spec.volumes if v.name == mount.name), None)
    if volume and volume.empty_dir:
        raise LookupError(f"{path} is on an emptyDir, which has no file at the start")
    if volume is None or volume.config_map is None or mount.sub_path_expr:
        return None
    inside = str(PurePosixPath(mount.sub_path) / PurePosixPath(path).relative_to(mount.mount_path))
    return _value(found, volume, path, inside, manifests)


def _mount_of(group: Group, path: str) -> Mount | None:
    """Return the innermost mount that has a path."""
    above = {str(PurePosixPath(path)), *map(str, PurePosixPath(path).parents)}
    mounts = [m for m in group.ray.volume_mounts if str(PurePosixPath(m.mount_path)) in above]
    return max(mounts, key=lambda mount: len(mount.mount_path), default=None)


def _files(manifest: Manifest) -> dict[str, Any]:
    """Return the files of a ConfigMap."""
    texts = {}
    for key, value in mapping(manifest.body.get("binaryData")).items():
        with suppress(ValueError):
            texts[key] = base64.b64decode(str(value)).decode()
    return texts | mapping(manifest.body.get("data"))


def _value(
    found: RayObject, volume: Volume, path: str, inside: str, manifests: Sequence[Manifest]
) -> str | None:
    source = volume.config_map or {}
    name, items = str(source.get("name")), [mapping(one) for one in source.get("items") or []]
    beside = [m for m in manifests if m.is_beside(found.manifest)]
    maps = [_files(m) for m in beside if (m.kind, m.name) == ("ConfigMap", name)]
    if not maps and f"ConfigMap/{name}" in declared(found.manifest):
        return None
    if not maps:
        raise LookupError(
            f"{path}: its ConfigMap {name!r} is not in these manifests; add it, or name it in the "
            f"annotation {EXTERNAL}: ConfigMap/{name}"
        )
    keys = {str(one.get("path")): str(one.get("key")) for one in items}
    key = keys.get(inside) if items else inside
    if key is not None and items and key not in maps[0]:
        known = ", ".join(maps[0]) or "none"
        text = f"{path}: `items` names the key {key!r}, which the ConfigMap {name!r} does not have"
        raise LookupError(f"{text}; it has {known}")
    if key not in maps[0]:
        names = list(keys or maps[0])
        close = difflib.get_close_matches(inside, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names) or 'none'}"
        raise LookupError(f"{path}: the ConfigMap {name!r} has no file {inside!r}; {hint}")
    return str(maps[0][key])


# --- the output ------------------------------------------------------------------------------


def output_of(job: Job, config: Config) -> str:
    """Return where a run writes: a `--set output=...` of its entrypoint comes before the config."""
    overrides = [text for one in Command.all_of(job.entrypoint) for text in one.overrides]
    given = [text for text in overrides if text.startswith("output=")]
    return given[-1].removeprefix("output=") if given else config.output


def check_output(found: RayObject, output: str) -> Iterator[Problem]:
    """Yield a problem if a run's output is lost with the pods of a try."""
    if "://" in output or not found.cluster:
        return
    pods = [group.template.spec for _, group in found.groups]
    kept = [
        {
            mount.mount_path
            for mount in (pod.containers[0].volume_mounts if pod.containers else [])
            for volume in pod.volumes
            if volume.name == mount.name and volume.persistent_volume_claim
        }
        for pod in pods
    ]
    above = {str(parent) for parent in (PurePosixPath(output), *PurePosixPath(output).parents)}
    if not all(above & paths for paths in kept):
        text = (
            f"writes to {output!r}, on no volume that all pods mount: each try starts from "
            f"nothing, and the result is deleted with the cluster; set `output` to a folder of a "
            f"mounted PersistentVolumeClaim, or of an object store"
        )
        yield found.problem(FIELD, "output", text)
