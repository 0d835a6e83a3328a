"""The files of a model folder that an engine or a trainer reads."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch

SMALL = ("*.json", "*.jinja", "*.model", "*.model.v*", "*.txt", "*.tiktoken")
"""Configs, tokenizers and chat templates; no code, which would never run."""
TEMPLATES = "additional_chat_templates/"
WEIGHTS = (
    re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
    re.compile(r".*\.safetensors"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
)
"""Formats of weights, preferred first: a repository often has the same weights in several."""


def weight_files(names: Iterable[str]) -> list[str]:
    """Return the weight files among a model folder's files, in one format; may be empty."""
    top = [name for name in names if "/" not in name]
    found = ([name for name in top if form.fullmatch(name)] for form in WEIGHTS)
    return next(filter(None, found), [])


def engine_files(names: Iterable[str]) -> list[str]:
    """Return the files that an engine needs: the weights in one format, and small files."""
    names = list(names)
    weights = weight_files(names)
    return [name for name in names if name in weights or _is_small(name)]


def small_engine_files(names: Iterable[str]) -> list[str]:
    """Return the files that an engine needs beside the weights."""
    return [name for name in names if _is_small(name)]


def _is_small(name: str) -> bool:
    below = name.removeprefix(TEMPLATES)
    return "/" not in below and any(fnmatch(below, pattern) for pattern in SMALL)
