"""Overload: keys take turns, refusals read no body, refused clients return at the measured rate."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrpo_ray import config
from wrpo_ray.errors import UserError
from wrpo_ray.serve import fairness
from wrpo_ray.serve.api import create
from wrpo_ray.serve.backends import DONE
from wrpo_ray.serve.errors import ClientError
from wrpo_ray.serve.fairness import JITTER, LONGEST_WAIT, Crowd, FairQueue, FullError, Returns
from wrpo_ray.serve.keys import Keys, Limits, new_key
from wrpo_ray.serve.prompts import KEY, Prompts
from wrpo_ray.zoo.tokenizers import byte_tokenizer


async def settled() -> None:
    """Let every task go on until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


# --- the queue ---------------------------------------------------------------------------------


class Crowded:
    """Tasks that hold a place of a queue until they are told to leave."""

    def __init__(self, places: int, waiting: float = 1e9):
        self.now = 0.0
        self.queue = FairQueue(lambda: places, lambda: waiting, lambda: self.now)
        self.served: list[str] = []
        self.refused: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self.holding: list[tuple[str, asyncio.Event]] = []
        self.tasks: list[asyncio.Task[None]] = []

    def come(self, key: str, weight: int = 1) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(self._hold(key, weight)))
        return self.tasks[-1]

    async def _hold(self, key: str, weight: int) -> None:
        self.waiting[key] += 1
        try:
            turn = await self.queue.enter(key, weight)
        except FullError:
            self.refused[key] += 1
            return
        finally:
            self.waiting[key] -= 1
        self.served.append(key)
        event = asyncio.Event()
        self.holding.append((key, event))
        await event.wait()
        self.queue.leave(turn)

    async def leave(self, number: int = 0, seconds: float = 1) -> None:
        """One of those that hold a place leaves, after so many seconds."""
        self.now += seconds
        self.holding.pop(number % len(self.holding))[1].set()
        await settled()


@given(st.lists(st.one_of(st.sampled_from("ABC"), st.integers(0, 9)), max_size=60))
def test_a_place_goes_to_the_waiting_key_with_the_fewest(steps: list[str | int]):
    """Keys that come, and places that become free, in any order."""

    async def run() -> None:
        crowd = Crowded(places=3)
        for step in steps:
            if isinstance(step, int) and not crowd.holding:
                continue
            before, served = Counter(crowd.waiting), len(crowd.served)
            if isinstance(step, int):
                left = crowd.holding[step % len(crowd.holding)][0]
                held = Counter(key for key, _ in crowd.holding) - Counter([left])
                await crowd.leave(step)
                fewest = [k for k in before if before[k] and held[k] == _least(before, held)]
                assert crowd.served[served:] == [] or crowd.served[served] in fewest
                assert len(crowd.served) - served == min(1, before.total())
            else:
                crowd.come(step)
                await settled()
            assert len(crowd.holding) == min(3, len(crowd.holding) + crowd.waiting.total())
        while crowd.holding:
            await crowd.leave()
        assert not crowd.waiting.total()
        assert not crowd.queue._held
        assert not crowd.queue._queues

    asyncio.run(run())


def _least(waiting: Counter[str], held: Counter[str]) -> int:
    return min(held[key] for key in waiting if waiting[key])


def test_a_backlog_delays_another_key_by_one_request():
    async def run() -> None:
        crowd = Crowded(places=2)
        for _ in range(50):
            crowd.come("A")
        await settled()
        crowd.come("B")
        await settled()
        assert crowd.served == ["A", "A"]
        await crowd.leave()
        assert crowd.served == ["A", "A", "B"], "the first place that became free"
        await _all_leave(crowd)

    asyncio.run(run())


def test_a_full_queue_refuses_the_newest_of_the_key_with_the_most():
    async def run() -> None:
        crowd = Crowded(places=1, waiting=4)
        for _ in range(7):
            crowd.come("A")
        await settled()
        assert (crowd.refused, crowd.waiting["A"]) == ({"A": 2}, 4)
        for _ in range(3):
            crowd.come("B")
        await settled()
        assert crowd.refused == {"A": 4, "B": 1}, "two wait of each key"
        assert (crowd.waiting["A"], crowd.waiting["B"]) == (2, 2)
        await _all_leave(crowd)
        assert crowd.served == ["A", "B", "A", "B", "A"]

    asyncio.run(run())


def test_a_request_of_many_answers_holds_as_many_places():
    async def run() -> None:
        crowd = Crowded(places=8)
        crowd.come("A", weight=8)
        crowd.come("A")
        await settled()
        assert crowd.served == ["A"], "with one free place it starts, and then there is none"
        crowd.come("B")
        crowd.come("A")
        await crowd.leave()
        assert crowd.served == ["A", "B", "A", "A"]
        await _all_leave(crowd)

    asyncio.run(run())


def test_a_key_of_long_requests_has_fewer_turns():
    """Of two that always have one waiting, each has half the time, however long its requests."""

    async def run() -> None:
        crowd, of = Crowded(places=1), {"A": 8, "B": 1}
        for key in ("A", "B") * 50:
            crowd.come(key)
        await settled()
        for _ in range(45):
            await crowd.leave(seconds=of[crowd.holding[0][0]])
        assert Counter(crowd.served[:45]) == {"A": 5, "B": 40}
        await _all_leave(crowd)

    asyncio.run(run())


def test_a_key_that_was_away_has_saved_nothing():
    async def run() -> None:
        crowd = Crowded(places=1)
        crowd.come("B")
        await settled()
        await crowd.leave()
        for _ in range(20):
            crowd.come("A")
        await settled()
        for _ in range(10):
            await crowd.leave()
        for _ in range(10):
            crowd.come("B")
        await settled()
        before = len(crowd.served)
        for _ in range(6):
            await crowd.leave()
        assert Counter(crowd.served[before:]) == {"A": 3, "B": 3}
        await _all_leave(crowd)

    asyncio.run(run())


def test_a_key_that_used_an_idle_server_owes_nothing():
    """Hours of eight places at night, and then as many other keys as there are places."""

    async def run() -> None:
        crowd = Crowded(places=2)
        crowd.come("night", weight=8)
        await settled()
        await crowd.leave(seconds=7200)
        for _ in range(3):
            for key in "ABC":
                crowd.come(key)
        await settled()
        crowd.come("night")
        await settled()
        for _ in range(3):
            await crowd.leave()
        assert "night" in crowd.served[1:]
        await _all_leave(crowd)

    asyncio.run(run())


def test_a_debt_ends_and_a_new_key_has_none():
    """Of a key that held the places for long while another waited."""

    async def run() -> None:
        crowd = Crowded(places=1)
        crowd.come("heavy")
        for key in "ABC" * 200:
            crowd.come(key)
        await settled()
        await crowd.leave(seconds=7200)
        crowd.come("heavy")
        await settled()
        before = len(crowd.served)
        while "heavy" not in crowd.served[before:]:
            await crowd.leave()
        late = crowd.served[before:]
        assert len(late) <= 3 * fairness.DEBT + 3
        crowd.come("new")
        await settled()
        before = len(crowd.served)
        for _ in range(4):
            await crowd.leave()
        assert "new" in crowd.served[before:]
        await _all_leave(crowd)

    asyncio.run(run())


def test_a_debt_is_bounded_while_its_key_stays():
    """Of a key that always has one waiting: it does not come anew, which bounds a debt, too."""

    async def run() -> None:
        crowd = Crowded(places=1)
        for key in ("heavy", "heavy", *"ABC" * 200):
            crowd.come(key)
        await settled()
        await crowd.leave(seconds=7200)
        before = len(crowd.served)
        while "heavy" not in crowd.served[before:]:
            await crowd.leave()
        assert len(crowd.served[before:]) <= 3 * fairness.DEBT + 3
        await _all_leave(crowd)

    asyncio.run(run())


def test_a_key_that_was_served_for_long_owes_little_when_it_comes_back():
    """Beside a key that never came before, after both have left."""

    async def run() -> None:
        crowd = Crowded(places=1)
        for key in "AB" * 20:
            crowd.come(key)
        await settled()
        while crowd.holding:
            await crowd.leave(seconds=1000)
        for _ in range(300):
            crowd.come("new")
        crowd.come("A")
        await settled()
        before = len(crowd.served)
        while "A" not in crowd.served[before:]:
            await crowd.leave()
        assert len(crowd.served[before:]) <= fairness.DEBT + 3
        await _all_leave(crowd)

    asyncio.run(run())


async def _all_leave(crowd: Crowded) -> None:
    while crowd.holding:
        await crowd.leave()
    await asyncio.gather(*crowd.tasks, return_exceptions=True)


@pytest.mark.parametrize("is_given", [False, True])
def test_a_cancelled_request_leaves_nothing(is_given: bool):
    """While it waits, or in the very moment in which it has its place."""

    async def run() -> None:
        crowd = Crowded(places=1)
        first, second = crowd.come("A"), crowd.come("B")
        await settled()
        if is_given:
            crowd.holding[0][1].set()
            await asyncio.sleep(0)  # B has the place, and has not noticed
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        crowd.come("C")
        await settled()
        assert crowd.served == (["A", "C"] if is_given else ["A"])
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    asyncio.run(run())


def test_new_places_are_found_by_those_that_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fairness, "RECHECK", 0.001)

    async def run() -> None:
        crowd, places = Crowded(places=1), [1]
        crowd.queue.places = lambda: places[0]
        crowd.come("A")
        crowd.come("B")
        await settled()
        assert crowd.served == ["A"]
        places[0] = 2
        await until(lambda: crowd.served == ["A", "B"])
        await _all_leave(crowd)

    asyncio.run(run())


# --- the count ---------------------------------------------------------------------------------


def test_a_full_count_lets_in_a_key_with_fewer():
    crowd = Crowd(lambda: 3)
    with crowd.entered("A"), crowd.entered("A"), crowd.entered("A"):
        with pytest.raises(FullError), crowd.entered("A"):
            pass
        beside = (crowd.entered("B") for _ in range(3))
        with next(beside), next(beside), pytest.raises(FullError), next(beside):
            pass
    with crowd.entered("A"), crowd.entered("A"), crowd.entered("A"):
        pass


def test_a_count_is_never_more_than_twice_its_bound():
    """However many keys come, each with one request fewer than the one before."""
    crowd = Crowd(lambda: 8)
    with ExitStack() as held:
        for key in range(20):
            for _ in range(20 - key):
                with suppress(FullError):
                    held.enter_context(crowd.entered(str(key)))
        assert crowd._here.total() == 16


def test_clients_return_one_by_one_at_the_rate_of_ends():
    now = [0.0]
    returns = Returns(now=lambda: now[0], jitter=lambda: 1.0)
    assert returns.after("A") == 1, "before anything has ended"
    returns = Returns(now=lambda: now[0], jitter=lambda: 1.0)
    for _ in range(9):
        returns.ended()
        now[0] += 0.5
    assert returns.rate == pytest.approx(8 / 4.5)
    assert [returns.after("A") for _ in range(8)] == [1, 2, 2, 3, 3, 4, 4, 5]
    assert returns.after("B") == 2, "every second turn is its own"
    for _ in range(1000):
        last = returns.after("A")
    assert last == LONGEST_WAIT
    now[0] += 1000
    assert returns.rate < 0.01, "when nothing ends any more"


def test_clients_that_are_refused_together_do_not_return_together():
    """Of different keys, at 10 ends a second: not more than so many return in a second."""
    now = [0.0]
    returns = Returns(now=lambda: now[0], jitter=lambda: 1.0)
    for _ in range(64):
        returns.ended()
        now[0] += 0.1
    waits = Counter(returns.after(f"key {i}") for i in range(180))
    assert max(waits) == pytest.approx(180 / returns.rate, abs=1)
    assert max(waits.values()) <= 11
    jittered = Returns(now=lambda: now[0])
    waits = Counter(jittered.after("A") for _ in range(1000))
    assert LONGEST_WAIT < max(waits) <= LONGEST_WAIT * JITTER
    assert len(waits) > 8


# --- the endpoint ------------------------------------------------------------------------------

NAMES = ("alice", "bob")
ALICE, BOB = (new_key(name) for name in NAMES)
WHOLE = '{"choices":[{"message":{"content":"yes"}}],"usage":{"prompt_tokens":3}}'
BODY = {"model": "m", "prompt": "p"}


class Gated:
    """A model that ends one answer for each `open`."""

    def __init__(self, places: int):
        self.room, self.gate, self.asked = places, asyncio.Semaphore(0), []

    async def ask(self, call: str, body: dict[str, Any], key: str) -> AsyncGenerator[Any, None]:
        self.asked.append(key)
        await self.gate.acquire()
        yield [WHOLE, DONE]

    def places(self) -> int:
        return self.room

    async def ready(self) -> bool:
        return True


def gated(places: int, scorer: Any = None, **settings: Any) -> tuple[Gated, Any]:
    model = Gated(places)
    tree = {"models": [{"name": "m", "model": "folder"}], "concurrent": 10_000, **settings}
    keys = Keys(f"{ALICE[1]}\n{BOB[1]}\n")

    class Silent:
        def finished(self, *_: Any) -> None: ...
        def first_token(self, *_: Any) -> None: ...
        def tokens(self, *_: Any) -> None: ...

    return model, create(config.serving(tree), {"m": model}, keys, Silent(), scorer)


def test_another_keys_next_request_is_the_next_that_a_model_gets():
    async def run() -> None:
        model, app = gated(2)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://x"
        ) as http:

            def post(key: str) -> asyncio.Task[httpx.Response]:
                headers = {"Authorization": f"Bearer {key}"}
                return asyncio.create_task(http.post("/v1/completions", json=BODY, headers=headers))

            backlog = [post(ALICE[0]) for _ in range(40)]
            await until(lambda: len(model.asked) == 2)
            bob = post(BOB[0])
            await settled()
            model.gate.release()
            await until(lambda: len(model.asked) == 3)
            assert model.asked == ["alice", "alice", "bob"]
            for _ in range(50):
                model.gate.release()
            answers = await asyncio.gather(bob, *backlog)
            assert {answer.status_code for answer in answers} == {200}

    asyncio.run(run())


async def until(is_true: Any) -> None:
    while not is_true():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/score"])
def test_one_request_too_many_is_refused_before_its_body_is_read(path: str):
    async def run() -> None:
        model, app = gated(2, queue=1)
        backlog = [asyncio.create_task(_call(app, ALICE[0])) for _ in range(3)]
        await until(lambda: len(model.asked) == 2)
        status, headers, was_read = await _call(app, ALICE[0], path)
        assert (status, was_read) == (429, False)
        assert int(headers[b"retry-after"]) >= 1
        status, _, was_read = await _call(app, "wrpo-wrong", path)
        assert (status, was_read) == (401, False)
        bob = asyncio.create_task(_call(app, BOB[0]))
        await settled()
        for _ in range(4):
            model.gate.release()
        outcomes = Counter(status for status, _, _ in await asyncio.gather(*backlog, bob))
        assert outcomes == {200: 3, 429: 1}, "bob's took the place of one that waited"
        assert (await bob)[0] == 200

    asyncio.run(run())


def test_the_rewards_places_let_in_no_more_requests_for_models():
    async def run() -> None:
        model, app = gated(2, scorer=Gated(100), queue=1)
        backlog = [asyncio.create_task(_call(app, ALICE[0])) for _ in range(3)]
        await until(lambda: len(model.asked) == 2)
        assert (await _call(app, ALICE[0]))[::2] == (429, False)
        status, _, was_read = await _call(app, ALICE[0], "/v1/score")
        assert (status, was_read) == (400, True), "let in; it has nothing to be scored"
        for _ in backlog:
            model.gate.release()
        await asyncio.gather(*backlog)

    asyncio.run(run())


async def _call(
    app: Any, key: str, path: str = "/v1/completions"
) -> tuple[int, dict[bytes, bytes], bool]:
    """The status and headers of an answer, and whether the body was asked for."""
    was_read, sent = [], []
    fields = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    scope |= {"query_string": b"", "client": ("127.0.0.1", 1), "http_version": "1.1"}

    async def receive() -> dict[str, Any]:
        was_read.append(True)
        return {"type": "http.request", "body": httpx.Request("POST", "http://x", json=BODY).read()}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), bool(was_read)


@pytest.mark.parametrize(
    ("actors", "set_to", "ingresses"),
    [
        ([(1, 1)], None, (1, 1)),
        ([(1, 4), (2, 3)], None, (3, 7)),
        ([(1, 8)], 2, (2, 2)),
        ([(40, 40), (40, 90)], None, (64, 64)),
    ],
)
def test_there_are_as_many_ingresses_as_replicas_of_models(
    actors: list[tuple[int, int]], set_to: int | None, ingresses: tuple[int, int]
):
    models = [
        {"name": f"m{i}", "model": "folder", "actors": {"min": least, "max": most}}
        for i, (least, most) in enumerate(actors)
    ]
    settings = config.serving({"models": models, "ingress_replicas": set_to})
    assert settings.ingresses == ingresses


def test_limits_are_divided_by_the_number_of_ingresses():
    """Which changes while they run."""
    number = [1]
    limits = Limits(100, 4, share=lambda: number[0])
    with limits.admit("a"), limits.admit("a"):
        number[0] = 2
        with pytest.raises(ClientError, match="more than 2 requests at once"), limits.admit("a"):
            pass
        number[0] = 1
        with limits.admit("a"):
            pass


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["messages", "prompt"])
def test_a_prompt_with_too_many_characters_is_refused_before_it_is_tokenized(field: str):
    """A tokenizer over bytes has a token for each letter; special ones are longer in a prompt."""
    tokenizer = byte_tokenizer()
    prompts = Prompts(tokenizer, context=100)
    longest = 1 if field == "messages" else max(map(len, tokenizer.get_vocab()))

    def body(letters: int) -> dict[str, Any]:
        text = "a" * letters
        return {field: [{"role": "user", "content": text}] if field == "messages" else ["b", text]}

    prompts.check_length(body(100 * longest))
    prompts.check_length({"prompt": [1] * 10**6})
    with pytest.raises(UserError, match=f"^{field}: {100 * longest + 1} characters"):
        prompts.check_length(body(100 * longest + 1))
    tools = body(101) | {"tools": [{}]}
    prompts.check_length(tools)


def test_no_text_within_the_context_is_refused_by_its_characters():
    """Every text of a tokenizer's own tokens: as long as text of so many tokens may be."""
    tokenizer = byte_tokenizer()
    texts = [tokenizer.decode([i] * 8) for i in tokenizer.get_vocab().values()]
    prompts = Prompts(tokenizer, context=8)
    for text in texts:
        prompts.check_length({"prompt": text})


def test_prompts_of_keys_are_rendered_in_turn():
    """One thread renders: another key's chat is the next, whatever waits."""

    async def run() -> None:
        prompts, order = Prompts(byte_tokenizer()), []

        async def render(key: str) -> None:
            KEY.set(key)
            await prompts.add({"messages": [{"role": "user", "content": "x" * 20_000}]})
            order.append(key)

        backlog = [asyncio.create_task(render("A")) for _ in range(20)]
        await asyncio.sleep(0)
        other = asyncio.create_task(render("B"))
        await asyncio.gather(*backlog, other)
        assert order.index("B") <= 1

    asyncio.run(run())


def test_vllms_own_rendering_takes_turns_with_ours():
    class Renderer:
        def __init__(self) -> None:
            self.order: list[str] = []

        async def _tokenize_prompt_async(self, text: str) -> str:
            await settled()
            self.order.append(KEY.get())
            return text

        _apply_chat_template_async = _tokenize_prompt_async

    async def run() -> None:
        renderer, prompts = Renderer(), Prompts(byte_tokenizer())
        prompts.take_turns(renderer)

        async def ask(key: str, name: str) -> None:
            KEY.set(key)
            assert await getattr(renderer, name)(key) == key

        names = ("_tokenize_prompt_async", "_apply_chat_template_async")
        tasks = [asyncio.create_task(ask("A", names[i % 2])) for i in range(20)]
        await asyncio.sleep(0)
        await asyncio.gather(*tasks, asyncio.create_task(ask("B", names[0])))
        assert renderer.order.index("B") <= 1

    asyncio.run(run())
