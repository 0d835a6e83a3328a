"""Formats of single values: quantities, names, labels, ports, durations, types.

Sources: apimachinery's `resource.Quantity` and `validation`, Ray's `ray start`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wrpo_ray.kubernetes.ray_objects import shown

Wrong = Callable[[Any], str | None]
"""Returns what is wrong with a value, as the end of a sentence; None if it is right."""


@dataclass(frozen=True)
class Format:
    """A rule that a value has to meet."""

    rule: str
    """The rule's name in problems."""
    wrong: Wrong


LONGEST_LABEL, LONGEST_SUBDOMAIN, LONGEST_PORT_NAME, LONGEST_DURATION = 63, 253, 15, 100
LARGEST = 2**63 - 1
"""The largest quantity; Kubernetes truncates larger ones."""
INT32 = 2**31 - 1
LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
LABEL_WORDS = "small letters, digits and -, beginning and ending with a letter or digit"
_QUANTITY = re.compile(
    r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,2}|[KMGTPE]i|[numkMGTPE])?", re.ASCII
)
MISSPELT_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGTPE])(i?)[bB]", re.ASCII)


# --- types -----------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "a mapping"}
    return names.get(type(value), f"a {type(value).__name__}")


def _is(wanted: type, words: str) -> Format:
    def wrong(value: Any) -> str | None:
        if type(value) is wanted:
            return None
        quoted = "; write it in quotes" if wanted is str and isinstance(value, int | float) else ""
        return f"is {shown(value)}, {_kind(value)}; it has to be {words}{quoted}"

    return Format("wrong-type", wrong)


TEXT, LIST, MAP = _is(str, "a text"), _is(list, "a list"), _is(dict, "a mapping")
BOOLEAN = _is(bool, "true or false")


def integer(least: int, most: int = INT32, rule: str = "number") -> Format:
    """Return the format of a whole number within bounds."""
    words = f" from {least} to {most}" if least >= 0 else ""

    def wrong(value: Any) -> str | None:
        is_one = type(value) is int and least <= value <= most
        return None if is_one else f"is {shown(value)}; it has to be a whole number{words}"

    return Format(rule, wrong)


def one_of(*words: str) -> Format:
    """Return the format of a value that is one of some words."""
    known = ", ".join(word or '""' for word in words)
    return Format("word", lambda v: None if v in words else f"is {shown(v)}; known: {known}")


def _no_number(value: Any) -> str | None:
    is_number = type(value) in (int, float) and 0 <= value <= LARGEST  # which NaN is not
    return None if is_number else f"is {shown(value)}; it has to be a number, 0 or more"


NUMBER = Format("number", _no_number)


# --- texts -----------------------------------------------------------------------------------


def text(rule: str, pattern: str, longest: int, words: str) -> Format:
    """Return the format of a text that matches a pattern."""

    def wrong(value: Any) -> str | None:
        if type(value) is not str:
            return TEXT.wrong(value)
        if len(value) > longest:
            return f"has {len(value)} characters; Kubernetes allows {longest}"
        found = re.fullmatch(pattern, value, re.ASCII)
        return None if found else f"is {shown(value)}; it has to be {words}"

    return Format(rule, wrong)


DNS_LABEL = text("name", LABEL, LONGEST_LABEL, LABEL_WORDS)
DNS_1035 = text(
    "name", r"[a-z]([-a-z0-9]*[a-z0-9])?", LONGEST_LABEL, f"{LABEL_WORDS}, and with a letter first"
)
SUBDOMAIN = text(
    "name",
    rf"{LABEL}(\.{LABEL})*",
    LONGEST_SUBDOMAIN,
    f"{LABEL_WORDS}; dots may be between such words",
)
QUALIFIED = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
LABEL_VALUE = text(
    "label",
    rf"({QUALIFIED})?",
    LONGEST_LABEL,
    "letters, digits, -, _ and ., a letter or digit at both ends",
)
ENV_NAME = text(
    "name", r"[-._a-zA-Z][-._a-zA-Z0-9]*", 4096, "letters, digits, -, _ and ., with no digit first"
)
DATA_KEY = text("name", r"[-._a-zA-Z0-9]+", LONGEST_SUBDOMAIN, "letters, digits, -, _ and .")
NOT_EMPTY = text("text", r"(?s).*\S.*", 100_000, "a text that is not empty")
PATH_SEGMENT = text("name", r"(?s)(?!\.\.?$)[^/%]+", 100_000, "a text without / and %, not . or ..")
"""The name of an RBAC object."""


def or_empty(form: Format) -> Format:
    """Return the same format, with an empty text allowed."""
    return Format(form.rule, lambda value: None if value == "" else form.wrong(value))


PORT_NAME = text(
    "port",
    rf"(?!.*--)(?=.*[a-z]){LABEL}",
    LONGEST_PORT_NAME,
    f"{LABEL_WORDS}, one letter at least, and no two - together",
)
"""An IANA service name."""
PORT_NUMBER = integer(1, 65535, "port")
PORT = Format("port", lambda v: (PORT_NAME if isinstance(v, str) else PORT_NUMBER).wrong(v))
"""A port number, or a port's name."""


def _no_key(value: Any) -> str | None:
    if type(value) is not str:
        return TEXT.wrong(value)
    prefix, slash, name = value.rpartition("/")
    wrong = SUBDOMAIN.wrong(prefix) if slash else None
    wrong = wrong or (LABEL_VALUE.wrong(name) if name else "has no name")
    return f"the key {wrong}" if wrong else None


KEY = Format("name", _no_key)
"""The key of a label, an annotation or a resource: PREFIX/NAME or NAME."""


def _no_toleration(value: Any) -> str | None:
    if wrong := MAP.wrong(value):
        return wrong
    is_right = value.get("key") or value.get("operator") == "Exists"
    return None if is_right else "has no key, which only the operator Exists may leave out"


TOLERATION = Format("toleration", _no_toleration)
"""A toleration; without a key it tolerates every taint."""


def _no_quantity(value: Any) -> str | None:
    if type(value) in (int, float):
        return _no_number(value)
    if type(value) is not str:
        return (
            f"is {shown(value)}, {_kind(value)}; it has to be a quantity, such as 2, 500m or 16Gi"
        )
    if misspelt := MISSPELT_SIZE.fullmatch(value):
        number, letter, _ = misspelt.groups()
        remedy = f"write {number}{letter.upper()}i (or {number}{letter.replace('K', 'k')})"
        return f"is {shown(value)}, which is no quantity of Kubernetes; {remedy}"
    if not _QUANTITY.fullmatch(value):
        words = "write a number with m, k, M, G, T, Ki, Mi, Gi, Ti or nothing after it"
        return f"is {shown(value)}, which is no quantity of Kubernetes; {words}"
    return f"is {shown(value)}; it has to be 0 or more" if value.startswith("-") else None


def _no_whole_quantity(value: Any) -> str | None:
    wrong = _no_quantity(value)
    is_whole = not wrong and re.fullmatch(r"\+?\d+(\.0*)?([kMGTPE]|[KMGTPE]i)?", str(value))
    return wrong or (None if is_whole else f"is {shown(value)}; it has to be a whole number")


QUANTITY = Format("quantity", _no_quantity)
"""An amount of CPUs, bytes or devices: 2, 0.5, 500m, 16Gi, 1e3; not below 0."""
WHOLE_QUANTITY = Format("quantity", _no_whole_quantity)
"""A whole number of devices."""


GO_TIME = text(
    "duration",
    r"\d+|(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+",
    LONGEST_DURATION,
    "a time such as 90s, 30m or 1h30m",
)
"""A duration in Go's notation, or seconds."""
PROMETHEUS_TIME = text(
    "duration",
    r"0|(?=.)(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?",
    LONGEST_DURATION,
    "a time such as 30s or 1m",
)
"""A duration in Prometheus' notation."""


def _digits(rule: str, most: int, words: str) -> Format:
    """Return the format of a whole number in a text, as `ray start` expects it."""

    def wrong(value: Any) -> str | None:
        if type(value) is not str:
            return TEXT.wrong(value)
        is_one = re.fullmatch(r"\d{1,19}", value, re.ASCII) and int(value) <= most
        return None if is_one else f"is {shown(value)}; it has to be {words}"

    return Format(rule, wrong)


COUNT = _digits("number", INT32, "a whole number in quotes")
BYTES = _digits("quantity", LARGEST, "a whole number of bytes in quotes: it takes no units")
PORT_TEXT = _digits("port", 65535, "a port in quotes")


def _resources_text(given: Any, is_int: bool) -> str | None:
    words = "an integer" if is_int else "a number"
    wrong = f"is {shown(given)}; it has to be a JSON object, as a text, with {words} a resource"
    try:
        tree = json.loads(given)
    except (TypeError, ValueError, RecursionError):
        return wrong
    values = tree.values() if isinstance(tree, dict) else [None]
    is_right = all(not _no_number(v) and (not is_int or type(v) is int) for v in values)
    return None if is_right else wrong


def _no_json_resources(value: Any) -> str | None:
    return _resources_text(value, is_int=False) if value else None


def _no_quoted_resources(value: Any) -> str | None:
    if type(value) is not str:
        return TEXT.wrong(value)
    if not re.fullmatch(r"(\".*\")|('.*')", value, re.DOTALL):
        return f'is {shown(value)}; it has to be JSON in quotes of its own: \'"{{\\"a\\": 1}}"\''
    return _resources_text(value[1:-1].replace("\\", ""), is_int=True)


JSON_RESOURCES = Format("resources", _no_json_resources)
"""Resources as JSON."""
QUOTED_RESOURCES = Format("resources", _no_quoted_resources)
"""Resources as JSON in another pair of quotes, as KubeRay passes them to `ray start`."""
