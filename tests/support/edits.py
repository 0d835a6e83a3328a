"""Edits of an object by a path, such as `spec.workerGroupSpecs[cpu].replicas`, for mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from support.manifests import Body

Edit = Callable[[Body], Any]


def at(body: Body, path: str) -> Any:
    """`a.b[name].c` of an object; [name] is the list's item of that name or group name."""
    value: Any = body
    for key in re.findall(r"[^.\[\]]+", path):
        if isinstance(value, list):
            names = [v.get("groupName", v.get("name")) for v in value]
            value = value[int(key) if key.isdigit() else names.index(key)]
        else:
            value = value[key]
    return value


def put(path: str, value: Any) -> Edit:
    """Sets a field."""
    parent, _, name = path.rpartition(".")
    return lambda body: at(body, parent).__setitem__(name, value)


def drop(path: str) -> Edit:
    """Deletes a field."""
    parent, _, name = path.rpartition(".")
    return lambda body: at(body, parent).pop(name)


def add(path: str, value: Any) -> Edit:
    """Adds an item to a list."""
    return lambda body: at(body, path).append(value)


def both(*edits: Edit) -> Edit:
    return lambda body: [edit(body) for edit in edits]
