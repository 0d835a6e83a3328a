"""The config that a RayJob's entrypoint reads, where a ConfigMap among the manifests has it."""

import difflib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

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


@dataclass(frozen=True)
class Command:
    """A `wrpo` command with a config."""

    path: str
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, entrypoint: str) -> "Command | None":
        """Return the first one of an entrypoint, also inside `sh -c '...'`."""
        words = _words(entrypoint)
        starts = [n for n, word in enumerate(words) if PurePosixPath(word).name == "wrpo"]
        for start in starts:
            ends = [n for n, word in enumerate(words) if word in OPERATORS and n > start]
            given = words[start + 1 : min(ends, default=len(words))]
            sets = [n for n, word in enumerate(given) if word == "--set"]
            overrides = [given[n + 1] for n in sets if n + 1 < len(given)]
            overrides += [w.removeprefix("--set=") for w in given if w.startswith("--set=")]
            files = [w for w in given if w.endswith((".yaml", ".yml")) and w not in overrides]
            if files:
                return cls(files[0], tuple(overrides))
        return None


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
) -> tuple[Config | None, list[Problem]]:
    """Return the config that the run reads, and its problems; the given one if it is elsewhere."""
    command = Command.of(job.entrypoint)
    if command is None:
        return given, []
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
    if volume is None or volume.config_map is None:
        return None
    inside = str(PurePosixPath(mount.sub_path) / PurePosixPath(path).relative_to(mount.mount_path))
    return _value(found, volume, path, inside, manifests)


def _mount_of(group: Group, path: str) -> Mount | None:
    """Return the innermost mount that has a path."""
    above = {str(PurePosixPath(path)), *map(str, PurePosixPath(path).parents)}
    mounts = [m for m in group.ray.volume_mounts if str(PurePosixPath(m.mount_path)) in above]
    return max(mounts, key=lambda mount: len(mount.mount_path), default=None)


def _value(
    found: RayObject, volume: Volume, path: str, inside: str, manifests: Sequence[Manifest]
) -> str | None:
    source = volume.config_map or {}
    name, items = str(source.get("name")), [mapping(one) for one in source.get("items") or []]
    beside = [m for m in manifests if m.is_beside(found.manifest)]
    maps = [mapping(m.body.get("data")) for m in beside if (m.kind, m.name) == ("ConfigMap", name)]
    if not maps and f"ConfigMap/{name}" in declared(found.manifest):
        return None
    if not maps:
        raise LookupError(
            f"{path}: its ConfigMap {name!r} is not in these manifests; add it, or name it in the "
            f"annotation {EXTERNAL}: ConfigMap/{name}"
        )
    keys = {str(one.get("path")): str(one.get("key")) for one in items}
    key = keys.get(inside) if items else inside
    if key not in maps[0]:
        names = list(keys or maps[0])
        close = difflib.get_close_matches(inside, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names) or 'none'}"
        raise LookupError(f"{path}: the ConfigMap {name!r} has no file {inside!r}; {hint}")
    return str(maps[0][key])
