"""Strict conversion of YAML values: numbers must be numbers, addresses hold no secrets."""

import math
import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from wrpo_ray.text.addresses import address_problem, without_secrets
from wrpo_ray.text.documents import PlainNumber


class _NoNumber:
    """Wraps a value that is not a number; validation of every type rejects it."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        is_quoted = isinstance(self.value, str) and bool(_NUMBER.fullmatch(self.value))
        remedy = ", a text; write it without quotes, as 1.0e-3" if is_quoted else ""
        return f"{without_secrets(self.value)!r}{remedy}"


_WORDS = {False: ("off", "no"), True: ("on", "yes")}
_NUMBER = re.compile(r"[-+]?[\d_.]+([eE][-+]?\d+)?")


def as_written(value: Any, annotation: Any) -> Any:
    """Convert a YAML value for a field of this type, at any depth.

    pydantic alone would read true as 1.0 and "1" as 1.

    Raises:
        ValueError: an address holds credentials, or a number among other values is not finite.
    """
    kinds = _kinds(_without_word(value, annotation))
    if isinstance(value, bool) and bool not in kinds:
        value = _word(value, annotation)
    if isinstance(value, dict):
        of = _arguments(kinds, dict) or ((Any, Any) if Any in kinds else None)
        if of is None:
            return value
        return {as_written(k, of[0]): as_written(v, of[1]) for k, v in value.items()}
    if isinstance(value, list | tuple):
        inner = _arguments(kinds, tuple) or ((Any, ...) if Any in kinds else None)
        if inner is None or inner[0] is str:  # lists of texts are patterns and names
            return value
        return [as_written(v, t) for v, t in _each(value, inner)]
    is_wrong = isinstance(value, bool) and kinds & {int, float} and not kinds & {bool, Any}
    if (Any in kinds or str in kinds) and not is_wrong:
        return _text_or_number(value, kinds)
    if not kinds & {int, float}:
        return value
    if isinstance(value, PlainNumber):
        return float(value)
    return _NoNumber(value) if isinstance(value, bool | str) else value


def _word(value: bool, annotation: Any) -> Any:
    """The word of a literal that YAML 1.1 reads as a boolean: unquoted `off` is false."""
    meant = [word for word in _WORDS[value] if word in _literals(annotation)]
    return meant[0] if len(meant) == 1 else value


def _without_word(value: Any, annotation: Any) -> Any:
    """The annotation without its literal words, if it has numbers too and the value is no word."""
    is_text = isinstance(value, str) and not isinstance(value, PlainNumber)
    if is_text and value in _literals(annotation):
        return annotation
    if get_origin(annotation) is Literal:
        numbers = tuple(word for word in get_args(annotation) if not isinstance(word, str))
        return Literal[numbers] if numbers else annotation
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    others = [part for part in get_args(annotation) if get_origin(part) is not Literal]
    return Union[tuple(others)] if others else annotation  # noqa: UP007 (made of a list)


def _literals(annotation: Any) -> set[Any]:
    inside = get_args(annotation)
    if get_origin(annotation) is Literal:
        return set(inside)
    is_union = get_origin(annotation) in (Union, UnionType)
    parts = inside if is_union else inside[:1] if get_origin(annotation) is Annotated else ()
    return {word for part in parts for word in _literals(part)}


def _text_or_number(value: Any, kinds: set[Any]) -> Any:
    if isinstance(value, float) and not math.isfinite(value) and kinds != {str}:
        raise ValueError(f"holds {value}, and a number has to be finite")
    if isinstance(value, PlainNumber):
        return str(value) if str in kinds else float(value)
    if isinstance(value, str) and kinds <= {str, type(None)} and (reason := address_problem(value)):
        raise ValueError(reason)
    return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows: all of a union, and the types of literal values."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(inside[0])
    if origin in (Union, UnionType):
        return {kind for part in inside for kind in _kinds(part)}
    return {type(value) for value in inside} if origin is Literal else {annotation}


def _arguments(kinds: set[Any], origin: type) -> tuple[Any, ...] | None:
    return next((get_args(kind) for kind in kinds if get_origin(kind) is origin), None)


def _each(values: Sequence[Any], types: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """Pairs of a value and its expected type."""
    is_open = types[-1] is ... or len(types) != len(values)
    return zip(values, (types[0] for _ in values) if is_open else types, strict=True)
