"""As vLLM names them."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace


class SamplingParams(SimpleNamespace):
    """Whatever it is made with."""


class RequestOutputKind(Enum):
    """The one that is asked for."""

    FINAL_ONLY = 2
