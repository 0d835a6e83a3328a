"""`wrpo serve` with a zoo model on Ray Serve and vLLM, as clients and killers meet it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from support.harness import ROOT
from support.in_browser import picture
from support.request_fuzz import Fuzzer, Sent
from support.request_values import ACCEPTED, TOOL, VALUES, is_accepted
from support.waiting import LIMIT, wait_until

from wrpo_ray.config import RewardConfig
from wrpo_ray.llm.chat import prompt_ids
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.serve.keys import new_key
from wrpo_ray.stages.score.base import Item
from wrpo_ray.stages.score.reward_models import load_classifier

SECRET = "xyzzyplugh"
SETTINGS = {
    "max_tokens": 240,
    "read_timeout": 2,
    "timeout": LIMIT,
    "requests_per_minute": 1_000_000,
    "concurrent": 200,
    "ongoing": 24,
    "queue": 8,
    "connections": 300,
}
CLIENTS = 64
"""Keys beside the first."""
LONG = {"max_tokens": 200, "temperature": 0, "extra_body": {"ignore_eos": True}}
"""Answers that take long enough to be broken off."""


@dataclass(frozen=True)
class Server:
    """A running `wrpo serve`."""

    process: subprocess.Popen[str]
    url: str
    keys: list[str]
    logs: Path

    @property
    def key(self) -> str:
        return self.keys[0]

    def client(self, **changes: Any) -> openai.OpenAI:
        settings = {"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0}
        return openai.OpenAI(**settings | {"timeout": LIMIT} | changes)

    def children(self) -> list[psutil.Process]:
        """All its processes but the first."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        """The processes of the model's replicas."""
        return [p for p in self.children() if any("Model:target" in w for w in _words(p))]


def _adapter(model: Path, folder: Path) -> str:
    """A LoRA adapter that changes a model's answers, with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    shape = LoraConfig(
        r=4, lora_alpha=256, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), shape).save_pretrained(folder)
    return str(folder)


def _with_another_eos(model: Path, folder: Path) -> str:
    """A copy whose template ends a turn with a token that no config lists as an end."""
    shutil.copytree(model, folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps(settings | {"eos_token_id": settings["pad_token_id"]})
        )
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"eos_token": settings["pad_token"]}))
    return str(folder)


@pytest.fixture(scope="module")
def server(zoo: Path) -> Iterator[Server]:
    with serving(zoo) as server:
        yield server


@pytest.fixture
def limited(zoo: Path) -> Iterator[Server]:
    """With the default limits of requests a minute and of the queue."""
    with serving(zoo, requests_per_minute=600, queue=64) as server:
        yield server


@contextmanager
def serving(zoo: Path, **changes: Any) -> Iterator[Server]:
    """`wrpo serve` with a model and its adapter, a reward, and keys."""
    with tempfile.TemporaryDirectory(prefix="wrpo-", ignore_cleanup_errors=True) as folder:
        adapter = _adapter(zoo / "target", Path(folder) / "adapter")
        target = _with_another_eos(zoo / "target", Path(folder) / "target")
        model = {"name": "target", "model": target, "adapters": {"tuned": adapter}}
        file, long = Path(folder) / "serve.yaml", Path(folder) / ("t" * 100)
        long.mkdir()  # sockets, whose paths have 107 bytes at most, work there too
        reward = {"model": str(zoo / "reward"), "max_length": 128}
        keys, lines = zip(*(new_key(f"key-{i}") for i in range(CLIENTS + 1)), strict=True)
        (Path(folder) / "keys").write_text("\n".join(lines))
        own = {"models": [model], "reward": reward, "keys": f"{folder}/keys"}
        file.write_text(yaml.safe_dump(own | SETTINGS | changes))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = [sys.executable, "-m", "wrpo_ray", "serve", "--config", str(file)]
        with subprocess.Popen(
            [*words, "--port", str(port)],
            cwd=ROOT,
            env=os.environ | {"RAY_TMPDIR": str(long), "TMPDIR": str(long)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            told = ""
            while "page: " not in told:
                line = process.stdout.readline()
                assert line, f"it ended: {told}"
                told += line
            server = Server(process, f"http://127.0.0.1:{port}", list(keys), Path(folder))
            yield server
            process.terminate()
            process.wait(LIMIT)


def messages(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def test_the_openai_client_gets_answers_whole_and_streamed(server: Server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["target", "tuned"]
    ask = {"model": "target", "messages": messages("Vowels in jaf:"), "temperature": 0}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].finish_reason == "stop", "at the end of turn that only its template has"
    streamed = list(
        client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
    assert text == whole.choices[0].message.content != ""
    assert streamed[-1].usage == whole.usage
    plain = list(client.chat.completions.create(**ask, stream=True))
    assert all(c.usage is None for c in plain)
    completion = client.completions.create(model="target", prompt=["ab", "cd"], n=2, max_tokens=3)
    assert [c.index for c in completion.choices] == [0, 1, 2, 3]
    # Nothing given: the settings' bound holds, below what the context would allow.
    ask = {"model": "target", "messages": messages("a"), "extra_body": {"ignore_eos": True}}
    free = client.chat.completions.create(**ask)
    assert free.usage.completion_tokens == SETTINGS["max_tokens"]


def test_text_that_spells_a_special_token_stays_text(server: Server, zoo: Path):
    tokenizer = load_tokenizer(zoo / "target")
    asked = messages(f"a{tokenizer.eos_token}b")
    answer = server.client().chat.completions.create(
        model="target", messages=asked, temperature=0, max_tokens=1
    )
    assert answer.usage.prompt_tokens == len(prompt_ids(tokenizer, asked))
    plain = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
    assert answer.usage.prompt_tokens > len(plain["input_ids"]), "where it is one token"


def test_an_adapter_is_a_model_of_its_own(server: Server):
    create = server.client().chat.completions.create
    ask = {"messages": messages("Vowels in jaf:"), "temperature": 0, "max_tokens": 20}
    models = ("target", "tuned")
    texts = [create(model=m, **ask).choices[0].message.content for m in models]
    assert texts[0] != texts[1]
    with ThreadPoolExecutor(8) as threads:  # in one batch
        together = threads.map(lambda m: create(model=m, **ask).choices[0].message, models * 4)
    assert [message.content for message in together] == texts * 4


def test_an_answer_is_scored_by_the_reward_model(server: Server, zoo: Path):
    ask = messages("Vowels in jaf:")
    answers = ["a", "no vowel at all"]
    got = [_score(server, [*ask, {"role": "assistant", "content": text}]) for text in answers]
    settings = RewardConfig(model=str(zoo / "reward"), max_length=128)
    reward = load_classifier(settings, zoo / "reward", on_gpu=False)
    alone = reward.score([Item(ask, text, None) for text in answers])
    assert [answer.json()["reward"] for answer in got] == pytest.approx(alone, abs=1e-4)
    refused = _score(server, [*ask, {"role": "assistant", "content": "a" * 1000}])
    assert refused.status_code == 400
    assert "tokens, above 128" in refused.json()["error"]["message"]
    refused = _score(server, [*ask, {"role": "assistant", "content": "a" * 900_000}])
    assert refused.status_code == 400
    assert "characters are scored" in refused.json()["error"]["message"]


def _score(server: Server, chat: list[Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.key}"}
    return httpx.post(
        f"{server.url}/v1/score", json={"messages": chat}, headers=headers, timeout=LIMIT
    )


def test_the_playground_shows_what_models_say_and_what_it_is_worth(server: Server, browser: Any):
    page = browser.new_page(viewport={"width": 1000, "height": 560})
    page.set_default_timeout(1000 * LIMIT)
    page.goto(server.url)
    page.fill("#key", server.key)
    page.keyboard.press("Enter")
    page.wait_for_selector("#ask:visible")
    page.fill("#tokens", "20")
    page.fill("#temperature", "0")
    page.fill("#prompt", "Vowels in jaf:")
    page.keyboard.press("Control+Enter")
    page.get_by_text("2 of 2 answers complete").wait_for()
    for said in page.locator("article").all_inner_texts():
        assert re.search(r"tokens/s.*reward -?\d+\.\d{3}", said), said
    picture(page, "playground")


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_the_clients_kind_of_errors(server: Server, stream: bool):
    create = server.client().chat.completions.create
    ask = {"model": "target", "messages": messages(SECRET), "stream": stream}
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrpo-no").chat.completions.create(**ask)
    with pytest.raises(openai.NotFoundError):
        create(**ask | {"model": "other"})
    for wrong in (
        {"messages": messages(SECRET * 100)},
        {"max_tokens": 100_000},
        {"temperature": -1},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"response_format": {"type": SECRET}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": SECRET}}},
        {"tools": [{SECRET: SECRET}]},
        {"tools": [], "tool_choice": SECRET},
        {"logit_bias": {SECRET: 1}},
        {"logit_bias": {"999999": 1}},
    ):
        with pytest.raises(openai.BadRequestError):
            create(**ask | wrong)


def test_what_the_engine_takes_or_refuses_of_every_field_names_the_field(server: Server):
    """Of each field the values that the endpoint passes on, and what only the engine knows."""
    tool = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}}
    tag = {"type": "structural_tag", "format": {"type": "nothing"}}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        (call, field, {field: value})
        for call in ("chat", "completions")
        for field in ACCEPTED[call]
        for value in VALUES
        if is_accepted(call, field, value)
    ]
    refused: list[tuple[str, str, dict[str, Any]]] = [
        ("completions", "prompt", {"prompt": [2**31 - 1]}),
        ("completions", "prompt", {"prompt": "a" * 5000}),
        ("completions", "prompt", {"prompt": [[1], [2**31 - 1]]}),
        ("chat", "messages", {"messages": messages("a" * 5000)}),
        ("chat", "logit_bias", {"logit_bias": {"999999": 1}}),
        ("completions", "logit_bias", {"logit_bias": {"999999": 1}}),
        ("chat", "tools", tool),  # the template leaves them out
        ("chat", "tools", tool | {"tool_choice": "auto"}),
        ("chat", "tools", tool | {"tool_choice": "required"}),
        ("chat", "response_format", {"response_format": schema}),
        ("chat", "response_format", {"response_format": tag}),
        ("completions", "response_format", {"response_format": schema}),
        ("chat", "n", {"n": 2, "temperature": 0}),
    ]
    headers, wrong = {"Authorization": f"Bearer {server.key}"}, []
    with httpx.Client(base_url=f"{server.url}/v1", headers=headers, timeout=LIMIT) as http:
        for call, field, fields in asked + refused:
            prompt = {"messages": messages("a")} if call == "chat" else {"prompt": "a"}
            sent = {"model": "target", "max_tokens": 1} | prompt | fields
            path = "chat/completions" if call == "chat" else call
            answer = http.post(f"/{path}", json=sent)
            error = answer.json().get("error", {}) if answer.status_code != 200 else None
            is_named = error and answer.status_code == 400 and error["param"] == field
            is_named = is_named and field in error["message"]
            if not (is_named or (error is None and (call, field, fields) in asked)):
                wrong.append((call, str(fields)[:200], answer.status_code, answer.text[:500]))
    assert not wrong


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.soak)])
def test_random_requests_are_answered_or_refused_and_nothing_breaks(server: Server, count: int):
    """No 5xx, no process lost; beside 20,000 requests `/health` is quick at the 99th percentile."""
    before, stop, waits = server.replicas(), threading.Event(), []
    statuses: Counter[int] = Counter()
    wrong: list[Any] = []

    def ask(sent: list[Sent]) -> None:
        with httpx.Client(timeout=LIMIT) as http:
            for one in sent:
                answer = http.request(
                    one.method, server.url + one.path, headers=one.headers, content=one.body
                )
                statuses[answer.status_code] += 1
                if answer.status_code >= 500:
                    wrong.append((answer.status_code, answer.text[:200], one.path, one.body[:500]))

    def probe() -> None:
        with httpx.Client(timeout=LIMIT) as http:
            while not stop.wait(0.02):
                begun = time.perf_counter()
                assert http.get(f"{server.url}/health").status_code == 200
                waits.append(time.perf_counter() - begun)

    shares = [list(Fuzzer(seed, server.key).requests(count // 4)) for seed in range(4)]
    prober = threading.Thread(target=probe)
    prober.start()
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(ask, shares))
    finally:
        stop.set()
        prober.join()
    late = sorted(waits)[-max(1, len(waits) // 100)]
    print(dict(statuses), f"/health: p99 {1000 * late:.0f} ms of {len(waits)}")
    assert not wrong
    assert statuses[200] > count / 20
    assert server.replicas() == before
    if count >= 20_000:
        assert late < 0.1


def test_a_client_too_slow_with_its_body_is_told_so(server: Server):
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    with socket.create_connection((host, int(port)), timeout=LIMIT) as slow:
        head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        slow.sendall(head.encode())
        assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize(
    ("connections", "addresses"),
    [(SETTINGS["connections"] + 20, 1), pytest.param(4300, 16, marks=pytest.mark.soak)],
)
def test_half_sent_requests_take_nobodys_place(server: Server, connections: int, addresses: int):
    """Nor can one address have all connections; what it has ends after `read_timeout`."""
    port = int(server.url.rpartition(":")[2])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, connections + 1000), hard))
    begun = []
    try:
        for i in range(connections):
            # One too many may be reset at any moment: while it is made, or while it speaks.
            with suppress(ConnectionError):
                source = (f"127.0.0.{66 + i % addresses}", 0)
                begun.append(socket.create_connection(("127.0.0.1", port), LIMIT, source))
        for half in begun:
            with suppress(ConnectionError):
                half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
        for path in ("/health", "/"):
            assert httpx.get(server.url + path, timeout=LIMIT).status_code == 200
        answers = [_read(half) for half in begun]
        assert sum(b" 408 " in answer for answer in answers) >= SETTINGS["connections"] / 2
        told = [answer for answer in answers if answer and b" 408 " not in answer]
        assert not told
        refused = connections - len(begun) + answers.count(b"")
        assert refused >= connections - addresses * SETTINGS["connections"]
    finally:
        for half in begun:
            half.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _read(connection: socket.socket) -> bytes:
    """What comes until the other side ends."""
    try:
        return connection.recv(4096)
    except ConnectionError:
        return b""


def test_a_backlog_of_one_key_delays_another_by_one_request(server: Server):
    """Counted in requests of the backlog that end while the other key's waits."""
    places, ended, begun = SETTINGS["ongoing"], [], []
    url, create = f"{server.url}/v1/completions", httpx.Client(timeout=LIMIT)
    body = {"model": "target", "prompt": "a", "ignore_eos": True}

    def ask(key: str, tokens: int) -> int:
        begun.append(key)
        headers = {"Authorization": f"Bearer {key}"}
        status = create.post(url, json=body | {"max_tokens": tokens}, headers=headers).status_code
        ended.append(status)
        return status

    with ThreadPoolExecutor(80) as pool:
        # The first ends long before the next, and so on: no two leave at once.
        lengths = [20 + 8 * i for i in range(places)] + [200] * 40
        backlog = [pool.submit(ask, server.keys[1], min(n, 220)) for n in lengths]
        wait_until(lambda: 200 in ended and len(begun) == len(lengths))
        before = ended.count(200)
        assert ask(server.keys[2], 1) == 200
        assert ended.count(200) - before <= 4  # its own, the one that it waited for, and a margin
        statuses = Counter(asked.result() for asked in backlog)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= places


def test_prompts_far_beyond_the_context_cost_the_replica_nothing(server: Server):
    """In CPU seconds of its process; tokenized, each would take more than one."""

    def used() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in server.replicas())

    def ask(_: int) -> httpx.Response:
        headers = {"Authorization": f"Bearer {server.keys[1]}"}
        body = {"model": "target", "messages": messages("word " * 190_000)}
        url = f"{server.url}/v1/chat/completions"
        return httpx.post(url, json=body, headers=headers, timeout=LIMIT)

    before = used()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    print(f"{used() - before:.2f} CPU s")
    assert {answer.status_code for answer in answers} == {400}
    assert {answer.json()["error"]["param"] for answer in answers} == {"messages"}
    assert "950000 characters" in answers[0].json()["error"]["message"]
    assert used() - before < 20


def test_only_the_endpoint_listens_beyond_loopback(server: Server):
    """Each listening socket of its processes is in the guide's table of ports, and no other is."""
    port = int(server.url.rpartition(":")[2])
    found, beyond = set(), []
    for process in [psutil.Process(server.process.pid), *server.children()]:
        for open_ in process.net_connections("inet"):
            if open_.status == psutil.CONN_LISTEN:
                is_endpoint = open_.laddr.port == port
                if not (is_endpoint or _is_loopback(open_.laddr.ip)):
                    beyond.append((process.cmdline()[:3], open_.laddr))
                found.add((_role(process), "endpoint" if is_endpoint else "loopback"))
    assert not beyond
    assert found == set(_told_ports())


def _is_loopback(address: str) -> bool:
    return ip_address(address.removeprefix("::ffff:")).is_loopback


def _role(process: psutil.Process) -> str:
    """What the guide calls a process."""
    words = " ".join(process.cmdline())
    roles = {
        "haproxy": "HAProxy",
        "gcs_server": "Ray: GCS",
        "raylet/raylet": "Ray: raylet",
        "Agent": "Ray: agent",
    }
    return next((role for part, role in roles.items() if part in words), "Ray: worker")


def _told_ports() -> list[tuple[str, str]]:
    """The first two columns of the guide's table."""
    text = (ROOT / "docs" / "guides" / "security.md").read_text()
    table = text.partition("| process | port |")[2].partition("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines()[2:]]
    return [(row[1].strip(), "endpoint" if "endpoint" in row[2] else "loopback") for row in rows]


def test_above_the_queue_requests_are_shed_and_those_taken_have_their_answers(server: Server):
    async def crowd() -> list[Any]:
        ask = {"model": "target", "messages": messages("Vowels in jaf:")} | LONG
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=server.key, max_retries=0) as client:
            asked = (client.chat.completions.create(**ask) for _ in range(80))
            return await asyncio.gather(*asked, return_exceptions=True)

    outcomes = asyncio.run(crowd())
    shed = [o for o in outcomes if isinstance(o, openai.RateLimitError)]
    whole = [o for o in outcomes if o not in shed]
    assert {o.usage.completion_tokens for o in whole} == {LONG["max_tokens"]}
    assert len(whole) >= SETTINGS["ongoing"]
    assert len(shed) >= 80 - 2 * (SETTINGS["ongoing"] + SETTINGS["queue"])
    assert {error.code for error in shed} == {"overloaded"}
    assert all(int(error.response.headers["Retry-After"]) >= 1 for error in shed)


class Asker(threading.Thread):
    """A client that asks again and again until `stop`, and judges each answer."""

    def __init__(
        self,
        server: Server,
        number: int,
        right: dict[str, str],
        stop: threading.Event,
        refusals: tuple[int, ...],
    ):
        super().__init__()
        self.server, self.number, self.right, self.stop = server, number, right, stop
        self.refusals = refusals
        self.outcomes: Counter[str] = Counter()
        self.times: list[tuple[float, float]] = []
        """Of one whole answer and the next, with all refusals between them."""
        self.is_reading = False
        """An answer has begun and has not ended."""

    def run(self) -> None:
        prompts, since = list(self.right), time.monotonic()
        with httpx.Client(timeout=LIMIT) as http:
            while not self.stop.is_set():
                prompt = prompts[(self.number + self.outcomes.total()) % len(prompts)]
                try:
                    outcome = self._ask(http, prompt)
                    self.outcomes[outcome] += 1
                    if outcome == "whole":
                        self.times.append((since, since := time.monotonic()))
                except Exception as error:
                    self.outcomes[f"wrong: {error!r}"] += 1

    def _ask(self, http: httpx.Client, prompt: str) -> str:
        body = {"model": "target", "messages": messages(prompt), "stream": True} | LONG
        body |= body.pop("extra_body")
        headers = {"Authorization": f"Bearer {self.server.keys[1 + self.number]}"}
        url = f"{self.server.url}/v1/chat/completions"
        with http.stream("POST", url, json=body, headers=headers) as answer:
            if answer.status_code != 200:
                assert answer.status_code in self.refusals, answer.status_code
                assert set(json.loads(answer.read())["error"]) == {
                    "message",
                    "type",
                    "param",
                    "code",
                }
                wait = answer.headers["retry-after"] if answer.status_code == 429 else 0.2
                self.stop.wait(float(wait))
                return f"refused {answer.status_code}"
            stream = ""
            for piece in answer.iter_text():
                stream += piece
                self.is_reading = "data: [DONE]" not in stream
            self.is_reading = False
            text, events = "", stream.split("\n\n")
        assert events.pop() == ""
        if events[-1].startswith("event: error\n"):
            assert json.loads(events.pop().partition("data: ")[2])["error"]["code"] == "broken_off"
            assert "data: [DONE]" not in events
            outcome = "broken"
        else:
            assert events.pop() == "data: [DONE]"
            outcome = "whole"
        for event in events:
            text += json.loads(event.removeprefix("data: "))["choices"][0]["delta"].get(
                "content", ""
            )
        right = self.right[prompt]
        assert text == right if outcome == "whole" else right.startswith(text), (text, right)
        return outcome


@pytest.mark.parametrize(
    ("clients", "rounds", "kills"),
    [(6, 1, 1), pytest.param(64, 4, 2, marks=pytest.mark.soak)],
)
def test_a_killed_replica_breaks_answers_off_but_never_spoils_one(
    server: Server, clients: int, rounds: int, kills: int
):
    """Each client has so many whole answers, on average, before a kill and after it."""
    right = _right_answers(server)
    stop = threading.Event()
    # With a second kill there may be no replica for all of `timeout`.
    refusals = (429, 503) if kills == 1 else (429, 503, 504)
    askers = [Asker(server, i, right, stop, refusals) for i in range(clients)]
    for asker in askers:
        asker.start()
    try:
        for number in range(kills):
            wait_until(lambda n=number: _count(askers, "whole") >= (n + 1) * rounds * clients)
            wait_until(lambda: any(asker.is_reading for asker in askers))
            _kill_all(server.replicas())
            wait_until(lambda n=number: _count(askers, "broken") > n)
        wait_until(lambda: _count(askers, "whole") >= (kills + 1) * rounds * clients)
    finally:
        stop.set()
        for asker in askers:
            asker.join()
    outcomes = sum((asker.outcomes for asker in askers), Counter())
    print(dict(outcomes))
    assert not [name for name in outcomes if name.startswith("wrong")]
    assert outcomes["whole"] >= clients
    assert outcomes["broken"] >= 1


def _right_answers(server: Server) -> dict[str, str]:
    """Answers to prompts, asked one by one."""
    create, right = server.client().chat.completions.create, {}
    for prompt in ("Vowels in jaf:", "Say wetib 2 times over.", "First and last letter of omo?"):
        answer = create(model="target", messages=messages(prompt), **LONG)
        right[prompt] = answer.choices[0].message.content
    return right


@pytest.mark.soak
def test_an_abusive_key_does_not_slow_the_others_down(limited: Server):
    """64 clients, each with its key, for a minute with two kills: alone, and beside an abuser.

    The abuser has 64 requests open, does not wait when it is refused, and sends bodies of up to a
    megabyte, from a process of its own. Times are those from one whole answer of a client to the
    next, but for those in which the only replica was dead: its start is no matter of keys.
    """
    right, p95 = _right_answers(limited), {}
    for is_attacked in (False, True):
        stop, outages = threading.Event(), []
        askers = [Asker(limited, i, right, stop, (429, 503, 504)) for i in range(CLIENTS)]
        for asker in askers:
            asker.start()
        try:
            with _abuser(limited) if is_attacked else nullcontext():
                for _ in range(2):
                    stop.wait(20)
                    wait_until(lambda: any(asker.is_reading for asker in askers))  # noqa: B023
                    killed, dead = time.monotonic(), limited.replicas()
                    _kill_all(dead)
                    wait_until(lambda: set(limited.replicas()) - set(dead))  # noqa: B023
                    whole = _count(askers, "whole")
                    wait_until(lambda: _count(askers, "whole") > whole)  # noqa: B023
                    outages.append((killed, time.monotonic()))
                stop.wait(20)
        finally:
            stop.set()
            for asker in askers:
                asker.join()
        outcomes = sum((asker.outcomes for asker in askers), Counter())
        times = [time for asker in askers for time in asker.times]
        up = [t for t in times if all(t[1] < begun or t[0] > ended for begun, ended in outages)]
        p95[is_attacked] = _p95(up)
        dead = ", ".join(f"{ended - begun:.0f}" for begun, ended in outages)
        print(
            f"attacked: {is_attacked}, p95 {_p95(up):.2f} s of {len(up)}, with those of the "
            f"{dead} s without a replica {_p95(times):.2f} s of {len(times)}; {dict(outcomes)}"
        )
        assert not [name for name in outcomes if name.startswith("wrong")]
        assert outcomes["whole"] >= CLIENTS
    assert p95[True] <= 1.5 * p95[False]


def _p95(times: Sequence[tuple[float, float]]) -> float:
    return sorted(ended - begun for begun, ended in times)[int(0.95 * len(times))]


@contextmanager
def _abuser(server: Server) -> Iterator[None]:
    """64 clients with one key in another process, which lets the askers' threads go first."""
    process = get_context("spawn").Process(target=_abuse, args=(server.url, server.key))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _abuse(url: str, key: str) -> None:
    os.nice(10)
    bodies = [
        {"messages": messages("a" * 10)} | LONG["extra_body"],
        {"messages": messages("a" * 900_000)},
        {"messages": messages("a" * 10), "n": 8, "stream": True} | LONG["extra_body"],
    ]
    written = [json.dumps({"model": "target"} | body).encode() for body in bodies]
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def ask_again(number: int) -> None:
        with httpx.Client(headers=headers, timeout=LIMIT) as http:
            while True:
                with suppress(httpx.HTTPError):
                    http.post(f"{url}/v1/chat/completions", content=written[number % len(written)])
                time.sleep(0.2)

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(ask_again, range(64)))


def _count(askers: list[Asker], outcome: str) -> int:
    return sum(asker.outcomes[outcome] for asker in askers)


def _kill_all(replicas: list[psutil.Process]) -> None:
    assert replicas
    for replica in replicas:
        replica.send_signal(signal.SIGKILL)


def test_a_client_that_leaves_makes_room_at_once(server: Server):
    """Of as many streams as a replica takes one is left: a further request has its place.

    It is answered before any of the others has ended, unless a busy machine is late with it.
    """
    count = SETTINGS["ongoing"]
    ask = {"model": "target", "messages": messages("Vowels in jaf:"), "stream": True}
    ask |= {"extra_body": {"ignore_eos": True}}  # of `max_tokens` tokens
    create = server.client().chat.completions.create

    def is_answered_first() -> bool:
        ended: list[Any] = []
        with ThreadPoolExecutor(count) as pool:
            left, *others = pool.map(lambda _: create(**ask), range(count))
            for stream in others:
                pool.submit(lambda stream: ended.append(list(stream)), stream)
            left.close()
            create(**ask | {"stream": False, "max_tokens": 1})
            is_first = not ended
        assert len(ended) == count - 1
        return is_first

    assert any(is_answered_first() for _ in range(10))


def test_when_stopped_it_finishes_what_is_in_hand_and_has_logged_no_secret(server: Server):
    answer = server.client().chat.completions.create(
        model="target", messages=messages(SECRET), stream=True, **LONG
    )
    chunks = iter(answer)
    next(chunks)
    children = server.children()
    (proxy,) = (child for child in children if child.name() == "haproxy")
    own = Path(proxy.cmdline()[-1]).parents[1]  # wrpo-serve-*/node/haproxy.cfg
    beside = _texts(own)
    server.process.terminate()
    assert list(chunks)[-1].choices[0].finish_reason == "length"
    assert server.process.wait(LIMIT) == 143
    assert not psutil.wait_procs(children, timeout=LIMIT)[1]
    assert not own.exists()
    assert not [p for p in psutil.process_iter() if str(own) in " ".join(_words(p))]
    texts = _texts(server.logs) | beside
    assert any(b"key-0 asked target: 200" in text for text in texts.values())
    secrets = (SECRET.encode(), *(key.encode() for key in server.keys))
    assert not [f for f, text in texts.items() if any(secret in text for secret in secrets)]


def _texts(folder: Path) -> dict[Path, bytes]:
    """What all files in it hold."""
    files = [f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()]
    return {file: file.read_bytes() for file in files}


def _words(process: psutil.Process) -> list[str]:
    """Of its command, none if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
