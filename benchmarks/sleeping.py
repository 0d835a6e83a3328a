"""Engines and a reward that answer after the time of a table, in the actors of the real stages.

They need no GPU, torch or vLLM: all else, from the pools to the committed shards, is the real
code. `on_ray.py` writes the table and runs them.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import NormalDist
from typing import Any

import psutil

from wrpo_ray.config import SamplingConfig
from wrpo_ray.data.records import Message
from wrpo_ray.stages.generate import stage
from wrpo_ray.stages.generate.vllm_engine import Answers, Request, SamplingIdentity
from wrpo_ray.storage.fingerprints import digest

FOLDER = "WRPO_BENCH_SLEEPS"
"""Environment variable of all nodes: the folder with the table, and with what actors note."""
TABLE, NOTES = "table.json", "notes"


@dataclass(frozen=True)
class Pace:
    """How long a pool's actors take."""

    start: float
    """Seconds from the process of an actor to its first answer."""
    steps: tuple[float, ...]
    """Seconds of a decoding step by the number of answers; of a reward, of a token."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of answers: log-normal, cut."""

    mean: float
    sigma: float
    most: int

    def of(self, source: str, prompt_id: str, sample: int) -> int:
        """Tokens of one answer, which its key decides."""
        drawn = (int(digest([source, prompt_id, sample], 12), 16) + 0.5) / 16**12
        spread = self.sigma * NormalDist().inv_cdf(drawn) - self.sigma**2 / 2
        return max(1, min(self.most, round(self.mean * math.exp(spread))))


@dataclass(frozen=True)
class Table:
    """The times of all pools."""

    engines: dict[str, Pace]
    reward: Pace
    prompt: float
    """Tokens of a prompt."""
    lengths: Lengths

    def write(self, folder: Path) -> None:
        """For the actors, of which each notes its times in `NOTES`."""
        (folder / NOTES).mkdir()
        (folder / TABLE).write_text(json.dumps(asdict(self)))


@cache
def table() -> Table:
    """The table of this run."""
    given = json.loads((Path(os.environ[FOLDER]) / TABLE).read_text())
    engines = {name: _pace(pace) for name, pace in given["engines"].items()}
    return Table(engines, _pace(given["reward"]), given["prompt"], Lengths(**given["lengths"]))


def _pace(given: dict[str, Any]) -> Pace:
    return Pace(given["start"], tuple(given["steps"]))


def note(**times: float) -> None:
    """Keep times of this actor for the driver: `since` its process began."""
    import ray

    actor = ray.get_runtime_context().get_actor_id()
    since = psutil.Process().create_time()
    path = Path(os.environ[FOLDER]) / NOTES / f"{actor}.json"
    path.write_text(json.dumps({"since": since, **times}))


def load(pace: Pace) -> None:
    """Take what is left of the time of a start, and note it."""
    time.sleep(max(0.0, psutil.Process().create_time() + pace.start - time.time()))
    note(ready=time.time())


class Sleeper(stage.Generator):
    """The pipeline's actor with an engine that sleeps."""

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        note()

    @cached_property
    def engine(self) -> SleepingEngine:  # type: ignore[override]
        """The engine."""
        pace = table().engines[self.jobs[0].model.name]
        with self._start_clock.running():
            load(pace)
        return SleepingEngine(pace)


@dataclass
class _Asked:
    """A request, and how many of its answers are to come."""

    request: Request
    left: int
    tokens: list[int]
    out: SimpleQueue[_Asked]


class SleepingEngine:
    """A continuous batch: each answer is a number of steps, whose time the batch's size decides.

    Its own clock goes from event to event: a thread that wakes late makes no answer late by more
    than that.
    """

    def __init__(self, pace: Pace):
        self.steps = pace.steps
        self._inbox: SimpleQueue[tuple[float, _Asked]] = SimpleQueue()
        self._waiting: deque[tuple[int, _Asked]] = deque()
        self._active: list[tuple[float, int, _Asked]] = []
        """(value of `_made` when it leaves, order, request) of each answer, a heap."""
        self._made, self._now, self._count = 0.0, 0.0, 0
        threading.Thread(target=self._work, daemon=True).start()

    def answers(
        self, requests: list[Request], sampling: SamplingConfig, identity: SamplingIdentity
    ) -> Iterator[Answers]:
        """The answers of one request after another, as they finish; threads may call at once."""
        out: SimpleQueue[_Asked] = SimpleQueue()
        lengths = table().lengths
        for request in requests:
            tokens = [lengths.of(identity.name, request.prompt_id, s) for s in request.samples]
            self._inbox.put((time.monotonic(), _Asked(request, len(tokens), tokens, out)))
        for _ in requests:
            asked = out.get()
            yield [_row(asked, n, identity) for n in range(len(asked.tokens))], []

    def under_way(self) -> dict[int, dict[str, int]]:
        """Nothing: it has no tokens before an answer ends."""
        return {}

    def _work(self) -> None:
        """Go from one event to the next: the end of an answer, or a request that comes."""
        while True:
            if not self._active:
                came, asked = self._inbox.get()
                self._now = max(self._now, came)
                self._take(asked)
            elif self._wait(self._next):
                self._end_one()
            self._admit()

    @property
    def _next(self) -> float:
        """When the first answer ends, if none comes."""
        return self._now + (self._active[0][0] - self._made) * self.steps[len(self._active)]

    def _wait(self, until: float) -> bool:
        """Wait for the end of an answer; False if a request came first, which is taken."""
        try:
            left = until - time.monotonic()
            came, asked = self._inbox.get(timeout=left) if left > 0 else self._inbox.get_nowait()
        except Empty:
            return True
        came = min(max(came, self._now), until)
        self._made += (came - self._now) / self.steps[len(self._active)]
        self._now = came
        self._take(asked)
        return False

    def _take(self, asked: _Asked) -> None:
        self._waiting += [(tokens, asked) for tokens in asked.tokens]

    def _admit(self) -> None:
        while self._waiting and len(self._active) < len(self.steps) - 1:
            tokens, asked = self._waiting.popleft()
            self._count += 1
            heapq.heappush(self._active, (self._made + tokens, self._count, asked))

    def _end_one(self) -> None:
        self._now = self._next
        self._made, _, asked = heapq.heappop(self._active)
        asked.left -= 1
        if not asked.left:
            asked.out.put(asked)


def _row(asked: _Asked, number: int, identity: SamplingIdentity) -> dict[str, Any]:
    """A RESPONSE record, whose text is the number of its tokens."""
    return {
        "prompt_id": asked.request.prompt_id,
        "source": identity.name,
        "sample": asked.request.first + number,
        "text": str(asked.tokens[number]),
        "finish_reason": "stop",
        "prompt_tokens": round(table().prompt),
        "output_tokens": asked.tokens[number],
        "engine": "sleeps",
    }


@cache
def _loaded() -> Pace:
    load(table().reward)
    return table().reward


def reward(messages: list[Message], text: str, reference: object) -> float:
    """A score after the time for the tokens of prompt and answer."""
    pace = _loaded()
    time.sleep((table().prompt + int(text)) * pace.steps[0])
    return int(digest([messages, text], 6), 16) / 16**6
