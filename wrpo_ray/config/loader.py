"""Loads configs from YAML and `--set`; each problem is one line with the field's path."""

import difflib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from wrpo_ray.config.base import S, Section
from wrpo_ray.config.root import Config
from wrpo_ray.config.serving import ServeConfig
from wrpo_ray.config.study import StudyConfig
from wrpo_ray.errors import UserError
from wrpo_ray.text.addresses import Address, address_problem, redact, without_secrets
from wrpo_ray.text.documents import DuplicateKeyError, describe_yaml_error, read_yaml
from wrpo_ray.text.files import read_text


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), and validate the config.

    Raises:
        UserError: with one line for each problem.

    Example:
        >>> load("fusion.yaml", ["wrpo.beta=0.1"]).wrpo.beta  # doctest: +SKIP
        0.1
    """
    return _checked(Config, _read_yaml(path), overrides, f"{path}: ")


def parse(text: str, overrides: Sequence[str], where: str) -> Config:
    """Validate the text of a config's file, which `where` names, as `load` does.

    Raises:
        UserError: with one line for each problem.
    """
    return _checked(Config, _tree(text, where), overrides, f"{where}: ")


def serving(tree: dict[str, Any], overrides: Sequence[str] = ()) -> ServeConfig:
    """Apply overrides to a tree of settings of `wrpo serve`, and validate them.

    Raises:
        UserError: with one line for each problem.
    """
    return _checked(ServeConfig, tree, overrides, "serve: ")


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read the YAML file of a study; `study_config` reads the configs of its cases.

    Raises:
        UserError: with one line for each problem.
    """
    study = _checked(StudyConfig, _read_yaml(path), overrides, f"{path}: ")
    cases = {
        name: case.model_copy(update={"config": str(Path(path).parent / case.config)})
        for name, case in study.cases.items()
    }
    return study.model_copy(update={"cases": cases})


def study_config(study: StudyConfig, case: str, variant: str) -> Config:
    """Return the config of a variant in a case, with the first seed.

    Raises:
        UserError: with one line for each problem.
    """
    place, asked = study.cases[case], study.variants[variant]
    tree = _read_yaml(place.config)
    fixed = {
        "output": f"{study.output}/{case}",
        "seed": study.seeds[0],
        "evaluate.dpo_baseline": False,  # a variant, if it is wanted
    }
    where = f"{place.config} ({case}, {variant})"
    for changes in (place.set, asked.set, fixed):
        for dotted, value in changes.items():
            _put(tree, dotted, value, f"{where}: {dotted}")
    if asked.sources:
        tree["sources"] = (tree.get("sources") or [])[: asked.sources]
    return _checked(Config, tree, (), f"{where}: ")


def read_serving(path: str | Path) -> dict[str, Any]:
    """Read a YAML file as a tree for `serving`.

    Raises:
        UserError: the file cannot be read.
    """
    return _read_yaml(path)


def _checked(kind: type[S], tree: Any, overrides: Sequence[str], where: str) -> S:
    for override in overrides:
        _override(tree, override)
    try:
        return _validated(kind, tree, where)
    except RecursionError:
        raise UserError(f"{where}a value holds itself, or is nested too deeply") from None


def _validated(kind: type[S], tree: Any, where: str) -> S:
    try:
        return kind.model_validate(tree, by_name=False)
    except ValidationError as error:
        told = [e for e in error.errors() if e["type"] != "too_short" or not e["input"]]
        lines = [explain(kind, e) for e in told or error.errors()]
        raise UserError("\n".join(f"{where}{redact(line)}" for line in lines)) from None


def _read_yaml(path: str | Path) -> dict[str, Any]:
    if Address.of(str(path)) or address_problem(str(path)):
        raise UserError(f"{redact(str(path))}: a config is a file on this machine; copy it here")
    if not Path(path).exists():
        raise UserError(f"{path}: no such config file; see jobs/ for examples")
    return _tree(read_text(path, "config"), path)


def _tree(text: str, path: str | Path) -> dict[str, Any]:
    try:
        tree = read_yaml(text)
    except DuplicateKeyError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {describe_yaml_error(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys (got {type(tree).__name__})")
    return tree


def _override(tree: Any, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set {redact(override)}: write it as a.b=value")
    try:
        value = read_yaml(text)
    except DuplicateKeyError as error:
        raise UserError(f"--set {dotted}: {error}") from None
    except yaml.YAMLError:
        raise UserError(f"--set {dotted}: the value is not valid YAML") from None
    _put(tree, dotted, value, f"--set {dotted}")


def _put(tree: Any, dotted: str, value: Any, what: str) -> None:
    """Set the value at `a.b` in a tree."""
    *parents, last = dotted.split(".")
    try:
        for key in parents:
            tree = tree[int(key)] if isinstance(tree, list) else tree.setdefault(key, {})
        tree[int(last) if isinstance(tree, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise UserError(f"{what}: the config has no such place") from None


def explain(kind: type[Section], error: Mapping[str, Any]) -> str:
    """Format a validation error as `path: problem (got value)`."""
    where = ".".join(str(without_secrets(part)) for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(kind, error['loc'])}"
    if error["type"] == "missing":
        return f"{where}: missing; it is required"
    if error["type"] == "model_type":
        return f"{where}: {_as_section(kind, error)}"
    if error["type"] == "string_type" and isinstance(error["input"], bool | int | float | date):
        read = json.dumps(error["input"], default=str)
        return f"{where}: has to be a text, and YAML reads it as {read}; put it in quotes"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]} (got {without_secrets(error['input'])!r})"


def _nearest(kind: type[Section], loc: tuple[str | int, ...]) -> str:
    *parents, unknown = loc
    sections = _sections_at(kind, parents)
    if len({unknown in section.model_fields for section in sections}) > 1:
        return _of_another_kind(sections, str(unknown))
    fields = [f for s in sections for f in s.model_fields.items()]
    names = list(dict.fromkeys(f.alias or n for n, f in fields))
    close = difflib.get_close_matches(str(unknown), names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(names)}"


def _of_another_kind(sections: list[type[Section]], key: str) -> str:
    """Where a key belongs that another kind of section has than the one that is given."""
    others = [s for s in sections if key not in s.model_fields]
    below = [(n, s) for o in others for n, f in o.model_fields.items() for s in _inside(f)]
    if inner := next((name for name, section in below if key in section.model_fields), None):
        return f"; did you mean '{inner}.{key}'?"
    owners = [s.model_fields for s in sections if key in s.model_fields]
    needed = (n for fields in owners for n, field in fields.items() if field.is_required())
    own = next((n for n in needed if not all(n in s.model_fields for s in others)), None)
    return f"; it belongs to a section with {own!r}" if own else "; it belongs to another section"


def _as_section(kind: type[Section], error: Mapping[str, Any]) -> str:
    """How a value is written that is given in place of a section."""
    found, given = _sections_at(kind, list(error["loc"])), error["input"]
    needed = [n for s in found[:1] for n, field in s.model_fields.items() if field.is_required()]
    shown = repr(without_secrets(given))
    if isinstance(given, str) and len(needed) == 1:
        return f"write it as {{{needed[0]}: ...}} (got {shown})"
    return f"has to be a section of keys and values (got {shown})"


def _inside(field: FieldInfo) -> list[type[Section]]:
    return _sections_in(field.annotation)


def _sections_at(section: type[Section], loc: list[str | int]) -> list[type[Section]]:
    """The sections that can be at a place: several where it takes one of several kinds."""
    found, is_name = [section], False  # of one of the user's own, in a mapping of sections
    for part in loc:
        if isinstance(part, int) or not found or is_name:
            is_name = False
            continue
        fields = {f.alias or n: f for s in found for n, f in s.model_fields.items()}
        annotation = fields[part].annotation if part in fields else None
        found, is_name = _sections_in(annotation), get_origin(annotation) is dict
    return found


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]
