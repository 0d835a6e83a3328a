"""Secrets that stand in a manifest as plain text, or that were left as the example has them."""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from wrpo_ray.kubernetes.manifests import Manifest, Problem, document_in, mapping
from wrpo_ray.kubernetes.ray_objects import path_text, shown
from wrpo_ray.text import credentials

SECRET_NAME = re.compile(r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|SECRET_ACCESS_KEY|API_KEY)$", re.I)
"""Names of environment variables that hold secrets; fewer than `text.credentials` hides, since a
variable such as SORT_KEY is no problem."""
REFERENCE = re.compile(r"(?<!\$)\$\([A-Za-z_][\w.-]*\)")
"""What Kubernetes replaces with the value of another variable."""
PLACEHOLDER = "PLACEHOLDER"
"""What cluster/secrets.example.yaml has in the place of each value."""
RUNTIME_ENV = "runtimeEnvYAML"
COMMAND_KEYS = ("entrypoint", "command", "args")
SECRET_ENDS = ("password", "passwd", "_token", "_key", "_secret", "api-key")
"""How keys of mappings end that have secrets, such as `redis-password` of rayStartParams."""
NOT_SHOWN = "a value that is not shown"


def check(manifest: Manifest) -> Iterator[Problem]:
    """Yield the problems of an object of any kind."""
    if manifest.kind == "Secret":
        yield from _placeholders(manifest)
        return
    for path, name in _plain(manifest.body, ()):
        text = f"{name} is in plain text, for all who may read the object; use a secretKeyRef"
        yield Problem(manifest, path, "plain-secret", text)


def _placeholders(manifest: Manifest) -> Iterator[Problem]:
    for part in ("stringData", "data"):
        for key, value in mapping(manifest.body.get(part)).items():
            if PLACEHOLDER in _decoded(value, part):
                text = "has the example's value; fill it in, or leave the key out"
                yield Problem(manifest, f"{part}.{key}", "placeholder", text)


def _decoded(value: Any, part: str) -> str:
    if part == "stringData":
        return str(value)
    try:
        return base64.b64decode(str(value), validate=True).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return ""


def _plain(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Yield (path, variable) of each literal value of a variable that holds a secret."""
    parts: Iterable[tuple[Any, Any]] = enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, dict):
        name = value.get("name")
        if _is_literal(name, value.get("value")):
            yield path_text((*path, "value")), str(name)
        yield from _in_runtime_env(value.get(RUNTIME_ENV), path)
        for key in COMMAND_KEYS:
            yield from _in_command(value.get(key), (*path, key))
        parts = value.items()
    for key, part in parts:
        yield from _plain(part, (*path, key))


def _in_command(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Yield a literal such as `HF_TOKEN=hf_abc` or `--redis-password=abc` of a command line."""
    texts = value if isinstance(value, list) else [value]
    for word in " ".join(text for text in texts if isinstance(text, str)).split():
        name, _, given = word.strip("\"'").partition("=")
        is_variable = given.strip("\"'").startswith("$")
        if not is_variable and _is_literal(name.lstrip("-").replace("-", "_"), given):
            yield path_text(path), name


def _in_runtime_env(text: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """The runtime environment of a job is shown by Ray's dashboard."""
    variables = mapping(mapping(document_in(text)).get("env_vars"))
    for name, value in variables.items():
        if _is_literal(name, value):
            yield path_text((*path, RUNTIME_ENV, "env_vars", name)), str(name)


def _is_literal(name: Any, value: Any) -> bool:
    is_secret = isinstance(name, str) and SECRET_NAME.search(name) is not None
    return is_secret and bool(value) and not REFERENCE.search(str(value))


# --- values that no message may have ---------------------------------------------------------


def hide(manifest: Manifest, path: Sequence[str | int], value: Any, text: str) -> str:
    """Return a text about the value at a path, without the value if it is or holds a secret."""
    return text.replace(shown(value), NOT_SHOWN) if _is_hidden(manifest, path, value) else text


def _is_hidden(manifest: Manifest, path: Sequence[str | int], value: Any) -> bool:
    above: Any = manifest.body
    if manifest.kind == "Secret" and path and path[0] in ("data", "stringData"):
        return True
    for key in path:
        if _has_secret(key, above):
            return True
        above = above[key]
    return _holds_secret(value)


def _has_secret(key: str | int, above: Any) -> bool:
    """Whether a key of a mapping has a secret, by its name or, as in `env`, by that beside it."""
    if key == "value" and isinstance(above, dict):
        return credentials.SECRET_NAME.search(str(above.get("name"))) is not None
    return isinstance(key, str) and key.lower().endswith(SECRET_ENDS)


def _holds_secret(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_secret, value))
    parts = value.items() if isinstance(value, dict) else ()
    return any(_has_secret(key, value) or _holds_secret(part) for key, part in parts)
