"""Every field of every section of the config tree, with what a test puts into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from wrpo_ray.config import Section, explain


@dataclass(frozen=True)
class Field:
    """A field of a section."""

    section: type[Section]
    name: str
    """As a file has it."""
    annotation: Any

    def __str__(self) -> str:
        return f"{self.section.__name__}.{self.name}"

    @property
    def kinds(self) -> set[Any]:
        """All plain types in its type, at any depth, but for the keys of maps."""
        return _kinds(self.annotation)

    def problems(self, value: Any) -> list[str]:
        """What is said of the field where it holds the value, in the form of its type."""
        try:
            self.section.model_validate({self.name: _shaped(value, self.annotation)})
        except ValidationError as error:
            of_it = [e for e in error.errors() if e["loc"][:1] == (self.name,)]
            return [explain(self.section, e) for e in of_it]
        return []


def fields() -> list[Field]:
    """Those of all sections."""
    found, queue = [], [Section]
    while queue:
        section = queue.pop()
        queue += section.__subclasses__()
        given = section.model_fields.items()
        found += [Field(section, f.alias or n, f.annotation) for n, f in given]
    return sorted(found, key=str)


def _kinds(annotation: Any) -> set[Any]:
    inside = get_args(annotation)
    if get_origin(annotation) is Literal:
        return {type(value) for value in inside}
    if get_origin(annotation) is dict:
        inside = inside[1:]
    return {k for part in inside for k in _kinds(part)} if inside else {annotation}


def _shaped(value: Any, annotation: Any) -> Any:
    """The value, in a list or a map where the type is one."""
    if get_origin(annotation) is tuple:
        part, *rest = get_args(annotation)
        inside = _shaped(value, part)
        return [inside for _ in (part, *rest) if _ is not ...]
    if get_origin(annotation) is dict:
        return {"x": _shaped(value, get_args(annotation)[1])}
    for part in get_args(annotation):
        if get_origin(part) in (tuple, dict):
            return _shaped(value, part)
    return value
