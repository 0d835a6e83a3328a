"""What `VllmEngine` uses of vLLM, without a model: for tests of scheduling and of lost nodes only.

A process whose PYTHONPATH begins with this folder's parent imports it as vLLM. An engine starts at
once, and its answers are numbers that only the prompt and the seed determine. With HELD in the
environment as "COUNT FOLDER PATTERN" it stops after so many requests until such a file is there.
"""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]
__version__ = "fake"
SECONDS = 0.02
"""How long a request takes; requests are worked on one after the other."""
HELD = "WRPO_TEST_HELD"


class LLM:
    """A model of which only the engine is used."""

    def __init__(self, model: str, **_: Any):
        self.llm_engine = Engine()


class Engine:
    """Requests in, answers out."""

    model_config = SimpleNamespace(max_model_len=2048)
    output_processor = SimpleNamespace(request_states={}, parent_requests={})
    """No answer is seen before its end."""

    def __init__(self) -> None:
        self._requests: list[tuple[str, list[int], SamplingParams]] = []
        count, *self._awaited = os.environ.get(HELD, "0").split()
        self._left = int(count)

    def add_request(self, key: str, prompt: dict[str, list[int]], params: SamplingParams) -> None:
        self._requests.append((key, prompt["prompt_token_ids"], params))

    def step(self) -> list[SimpleNamespace]:
        time.sleep(SECONDS)
        self._left -= 1
        while self._awaited and self._left < 0 and not self._is_there():
            time.sleep(0.1)
        key, ids, params = self._requests.pop(0)
        answers = [_answer(ids, params.seed + i) for i in range(params.n)]
        return [SimpleNamespace(request_id=key, finished=True, outputs=answers)]

    def _is_there(self) -> bool:
        folder, pattern = self._awaited
        return next(Path(folder).glob(pattern), None) is not None


def _answer(ids: list[int], seed: int) -> SimpleNamespace:
    text = str(zlib.crc32(repr((ids, seed)).encode()))
    return SimpleNamespace(text=text, token_ids=ids[:4], finish_reason="stop", logprobs=None)
