"""Reference of all config fields for the terminal and the site, from the JSON schema."""

import difflib
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from wrpo_ray.config import Config, Section, ServeConfig
from wrpo_ray.config.base import PLACEMENT
from wrpo_ray.errors import UserError

Schema = dict[str, Any]
ROOTS: dict[str, type[Section]] = {"": Config, "serve": ServeConfig}
"""Root section by first part of a path: a run's config, or `serve` for `wrpo serve`."""
KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
}
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "minItems": "at least",
}

STAR = "* says where and how fast a step runs, or names what is known by its content"
LONG = 100
"""Maximum characters of a list that is shown as a default."""


@dataclass(frozen=True)
class FieldLine:
    """The reference of a field."""

    key: str
    kind: str
    """Its type in words, with the section's name where it is one."""
    bounds: str
    """Such as `at least 1`; empty without."""
    default: str
    """The default as YAML, or `required`."""
    text: str
    decides: bool
    """Whether its value is part of step keys, because it can change results."""
    sections: tuple[str, ...]
    """Class names of the sections in its value, also inside a list or mapping: several where it
    takes one of several kinds."""

    @property
    def section(self) -> str | None:
        """The first of these; None without."""
        return self.sections[0] if self.sections else None


@dataclass(frozen=True)
class SectionLines:
    """The reference of a section, at the first path where it occurs."""

    path: str
    name: str
    text: str
    fields: tuple[FieldLine, ...]


@cache
def sections(root: type[Section]) -> dict[str, SectionLines]:
    """Every section below a root by class name, parents first."""
    schema = root.model_json_schema()
    found: dict[str, SectionLines] = {}
    _collect(schema, root.__name__, "", schema.get("$defs", {}), found, True)
    return found


def _collect(
    schema: Schema,
    name: str,
    path: str,
    defs: Schema,
    found: dict[str, SectionLines],
    decides: bool,
) -> None:
    """Add a section and those below it; fields below a placement field are placement too."""
    if name in found:
        return
    fields = tuple(_fields(schema, defs, decides))
    about = schema.get("description", "").partition("\n\nExample:")[0]
    found[name] = SectionLines(path, name, _flat(about), fields)
    for field in fields:
        for number, of in enumerate(field.sections):
            below = f"{path}.{field.key}".lstrip(".") + f" {_word(of)}" * bool(number)
            _collect(defs[of], of, below, defs, found, field.decides)


def _word(section: str) -> str:
    """A word for one of several kinds of sections, such as `recorded` for RecordedConfig."""
    return section.removesuffix("Config").lower()


def _fields(schema: Schema, defs: Schema, decides: bool) -> Iterator[FieldLine]:
    required = schema.get("required", ())
    for key, field in schema["properties"].items():
        inside = tuple(dict.fromkeys(_sections(field)))
        yield FieldLine(
            key,
            _kind(field),
            ", ".join(_bounds(field)),
            "required"
            if key in required
            else _default(field, defs.get(inside[0] if inside else "", {})),
            _flat(field.get("description", "")),
            decides and not PLACEMENT.items() <= field.items(),
            inside,
        )


def _flat(text: str) -> str:
    return " ".join(text.split())


def _kind(field: Schema) -> str:
    if "$ref" in field:
        return f"section {next(_sections(field))}"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(map(_kind, field["anyOf"])))
    if values := field.get("enum") or ([field["const"]] if "const" in field else None):
        return " | ".join(map(str, values))
    if field.get("type") == "array":
        parts = [_kind(part) for part in field.get("prefixItems") or [field.get("items", {})]]
        return f"list of {', '.join(parts)}"
    if field.get("type") == "object":
        values_of = _values_of(field)
        return f"name: {_kind(values_of)}" if values_of else "mapping"
    return KINDS.get(field.get("type", ""), "any value")


def _values_of(field: Schema) -> Schema | None:
    """The schema of a mapping's values; None if they can be anything."""
    by_name = next(iter(field.get("patternProperties", {}).values()), None)
    values = by_name or field.get("additionalProperties")
    return values if isinstance(values, dict) else None


def _bounds(field: Schema) -> Iterator[str]:
    """Bounds of a value and of the values inside a list or mapping."""
    for name, words in BOUNDS.items():
        if name in field:
            yield f"{words} {field[name]:,}" + " long" * (name == "minItems")
    if "pattern" in field:
        yield f"like `{field['pattern']}`"
    inner = [*field.get("anyOf", ()), *field.get("prefixItems", ())]
    inner += [part for part in (field.get("items"), _values_of(field)) if part]
    yield from dict.fromkeys(bound for part in inner for bound in _bounds(part))


def _sections(field: Schema) -> Iterator[str]:
    """Class names of the sections in a field's schema, at any depth."""
    if "$ref" in field:
        yield str(field["$ref"]).rpartition("/")[2]
        return
    for part in (*field.get("anyOf", ()), field.get("items"), _values_of(field)):
        if part:
            yield from _sections(part)


def _default(field: Schema, section: Schema) -> str:
    """The default as YAML; of a section only values that differ from its fields' defaults."""
    value = field.get("default")
    if "$ref" in field and isinstance(value, dict):
        own = {key: f.get("default") for key, f in section.get("properties", {}).items()}
        value = {key: v for key, v in value.items() if key not in own or own[key] != v}
        return _yaml({k: v for k, v in value.items() if not isinstance(v, dict)})
    return _yaml(value)


def _yaml(value: Any) -> str:
    if isinstance(value, list) and len(str(value)) > LONG:
        return f"{len(value)} of them, see wrpo_ray/config/pairing.py"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


# --- in the terminal -------------------------------------------------------------------------


def config_text(path: str, width: int = 100) -> str:
    """The output of `wrpo config PATH`: a section with its fields, or one field.

    Raises:
        UserError: there is no such field.
    """
    root, _, rest = path.partition(".") if path.split(".")[0] == "serve" else ("", "", path)
    known = sections(ROOTS[root])
    here, field = [next(iter(known.values()))], None
    for part in filter(None, rest.split(".")):
        if field and not field.section:
            raise UserError(f"config: {field.key} has no fields below it")
        here = [known[name] for name in field.sections] if field else here
        field = _named(here, part)
    if field and not field.section:
        return "\n".join(_field_text(path, field, path, width))
    here = [known[name] for name in field.sections] if field else here
    lines: list[str] = []
    for number, section in enumerate(here):
        lead = f"{path}: {field.text} " if field and not number else ""
        lines += [*[""] * bool(number), *textwrap.wrap(lead + section.text, width), ""]
        for one in section.fields:
            lines += _field_text(one.key, one, f"{path}.{one.key}".lstrip("."), width)
    return "\n".join([*lines, "", STAR])


def _named(sections: list[SectionLines], key: str) -> FieldLine:
    fields = {field.key: field for section in reversed(sections) for field in section.fields}
    if key in fields:
        return fields[key]
    close = difflib.get_close_matches(key, fields, n=1)
    there = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(fields)}"
    raise UserError(f"config: no field {key!r}; {there}")


def _field_text(shown: str, field: FieldLine, path: str, width: int) -> list[str]:
    kind = field.kind
    for of in field.sections:
        named = f"section ({_word(of)})" if of != field.section else "section"
        kind = kind.replace(f"section {of}", named)
    told = [kind, field.bounds, _default_text(field)]
    star = "" if field.decides else "*"
    more = f" (wrpo config {path})" if field.section else ""
    head = f"{shown}{star}: {', '.join(part for part in told if part)}{more}"
    wrapped = textwrap.TextWrapper(width, initial_indent="    ", subsequent_indent="    ")
    return [head, *wrapped.wrap(field.text)]


def _default_text(field: FieldLine) -> str:
    if field.default == "required" or not field.default:
        return field.default
    return "" if field.section and field.default == "{}" else f"default {field.default}"


# --- in the docs -----------------------------------------------------------------------------


def config_markdown(root: type[Section], prefix: str = "") -> str:
    """The reference as Markdown: a heading and a table for each section."""
    known = sections(root)
    parts = []
    for section in known.values():
        path = f"{prefix}{section.path}"
        heading = f"## {path}" if section.path else "## At the top"
        parts += [heading, escaped(section.text), "\n".join(_table(section, known, prefix))]
    return "\n\n".join(parts)


def _table(section: SectionLines, known: dict[str, SectionLines], prefix: str) -> Iterator[str]:
    yield "| field | type | default | description |"
    yield "| --- | --- | --- | --- |"
    for field in section.fields:
        kind = escaped(field.kind)
        for of in field.sections:
            there = f"{prefix}{known[of].path}"
            kind = kind.replace(f"section {of}", f"[{there}](#{anchor(there)})")
        bounds = escaped(f", {field.bounds}" if field.bounds else "")
        default = field.default if field.default == "required" else f"`{field.default}`"
        star = "" if field.decides else " \\*"
        yield f"| `{field.key}`{star} | {kind}{bounds} | {default} | {escaped(field.text)} |"


def anchor(path: str) -> str:
    """The anchor that Python-Markdown and GitHub give to the heading of a dotted path."""
    return path.replace(".", "").replace(" ", "-").lower()


def escaped(text: str) -> str:
    """Escape text for a cell of a Markdown table; code spans stay code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_\[<|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
