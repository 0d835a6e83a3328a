"""Weighted-Reward Preference Optimization (WRPO, arXiv 2412.03187) on Ray.

The names below are the public Python API. `import wrpo_ray` loads nothing else: each name is
imported when it is first used.

Example:
    >>> import wrpo_ray
    >>> config = wrpo_ray.load("jobs/demo.yaml", ["output=out/notebook"])  # doctest: +SKIP
    >>> summary = wrpo_ray.fuse(config, until="pair")  # doctest: +SKIP
    >>> pairs = wrpo_ray.read("out/notebook", "preferences")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "Config": "wrpo_ray.config",
    "load": "wrpo_ray.config",
}
"""{public name: the module that defines it}"""
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'wrpo_ray' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    """All public names, for completion."""
    return sorted(__all__)
