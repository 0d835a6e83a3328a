"""An engine and a reward that cost nothing, for tests of scheduling and of lost nodes only."""

from __future__ import annotations

import os
from pathlib import Path

PYTHONPATH = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
"""Of processes for which `vllm` is the folder of that name beside this file."""


def reward(messages: list[dict[str, str]], response: str, reference: str | None) -> float:
    """The last digits of the number that the engine answers."""
    return float(int(response) % 997)
