"""The experts of a mixture, by the names that they have in the configs of different makers."""

from collections.abc import Mapping
from typing import Any

ALL = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
"""As in transformers 5.23."""


def experts_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return how many experts a layer has, how many a token goes through, and how many are shared.

    A dense model has one.

    Example:
        >>> experts_of({"n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1})
        (256, 8, 1)
    """
    count = _first(config, ALL) or 1
    return count, (_first(config, ACTIVE) or 1) if count > 1 else 1, _first(config, SHARED)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The first number other than 0 under one of the names; of a list, of layers, the greatest."""
    found = filter(None, map(config.get, names))
    return next((int(max(n) if isinstance(n, list) else n) for n in found), 0)
