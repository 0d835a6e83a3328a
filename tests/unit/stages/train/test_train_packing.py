"""Packed rows with a shared prompt against each answer on its own, through real models."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wrpo_ray.llm import attention
from wrpo_ray.llm.attention import Block
from wrpo_ray.stages.train import logprobs
from wrpo_ray.stages.train.logprobs import token_logps
from wrpo_ray.stages.train.loss import Answers, Wrpo, preference_loss
from wrpo_ray.stages.train.model import Policy, disable_dropout
from wrpo_ray.stages.train.packing import assign_micro_batches, costs, pack, pad
from wrpo_ray.stages.train.rows import Row

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
KINDS = {
    "llama-gqa": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2-bias": ("Qwen2", {}),
    "qwen3-window": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gemma2-softcap": (
        "Gemma2",
        {
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": ("Phi3", {"head_dim": None}),
}


def make(kind: str, implementation: str, dtype: torch.dtype) -> torch.nn.Module:
    """The same random model for every implementation."""
    import transformers

    name, options = KINDS[kind]
    shape = {k: v for k, v in (SHAPE | options).items() if v is not None}
    config = getattr(transformers, f"{name}Config")(**shape)
    torch.manual_seed(5)
    attention.register()
    torch.set_default_dtype(dtype)
    try:
        model = getattr(transformers, f"{name}ForCausalLM")._from_config(
            config, attn_implementation=implementation
        )
    finally:
        torch.set_default_dtype(torch.float32)
    if model.get_output_embeddings().weight.std() < 0.1:
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    disable_dropout(model)
    return model.train()


def some_rows(seed: int, count: int = 5) -> list[Row]:
    rng = random.Random(seed)

    def ids(most: int) -> np.ndarray:
        return np.array(rng.choices(range(2, VOCABULARY), k=rng.randint(1, most)), np.int32)

    return [Row(str(i), ids(12), (ids(9), ids(9), ids(9))) for i in range(count)]


def plain_logps(model, rows: list[Row]) -> torch.Tensor:
    """Each answer on its own, all logits, log-softmax: nothing of ours but the rows."""
    sums = []
    for row in rows:
        for answer in row.answers:
            ids = torch.tensor([[*row.prompt, *answer]])
            table = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            sums.append(table.gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :].sum())
    return torch.stack(sums)


def loss_and_gradients(model, logps: torch.Tensor, rows: list[Row]):
    three = Answers(*logps.reshape(-1, 3).unbind(1))
    reference = Answers(*(t.detach() - 0.3 * i for i, t in enumerate(three)))
    lengths = Answers(*torch.tensor([[len(a) for a in r.answers] for r in rows]).unbind(1))
    loss = preference_loss(three, reference, lengths, Wrpo(beta=0.5), 0.3).mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize("slim", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_equal_the_plain_computation(
    kind, slim, collate, dtype, tolerance, wide
):
    torch.set_num_threads(1)
    check_against_plain(kind, collate, dtype, tolerance, wide, slim=slim)


def check_against_plain(kind, collate, dtype, tolerance, wide, *, slim):
    """Compare loss and gradients with the plain computation; return model, policy and batch."""
    rows = some_rows(seed=len(kind))
    reference = make(kind, "eager", dtype)
    wide(dtype)
    expected = plain_logps(reference, rows)
    want, wanted = loss_and_gradients(reference, expected, rows)

    plain = "eager" if "gemma" in kind else "sdpa"
    model = make(kind, attention.SHARED_PROMPT if collate is pack else plain, dtype)
    policy, batch = Policy(model, slim=slim), collate(rows)
    got_logps = policy(batch)
    got, gradients = loss_and_gradients(model, got_logps, rows)
    assert relative(got_logps, expected) < tolerance
    assert relative(got, want) < tolerance
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert relative(gradients[name], gradient) < tolerance, name
    return model, policy, batch


@pytest.mark.parametrize("slim", [False, True])
def test_gradient_checkpointing_changes_nothing(slim):
    rows = some_rows(seed=2)
    found = []
    for checkpointing in (False, True):
        model = make("llama-gqa", attention.SHARED_PROMPT, torch.float64)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(loss_and_gradients(model, Policy(model, slim=slim)(pack(rows)), rows)[1])
    for name, gradient in found[0].items():
        assert relative(found[1][name], gradient) < 1e-12


def test_layout_of_a_row_worked_by_hand():
    """Prompt 5 6, answers 7 / 8 9: positions go on from 2, and 6 predicts both first tokens."""
    row = Row("r", np.array([5, 6]), (np.array([7]), np.array([8, 9])))
    batch = pack([row])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert batch.predict.tolist() == [1, 1, 3]
    assert batch.targets.tolist() == [7, 8, 9]
    assert batch.lengths.tolist() == [1, 2]
    assert batch.layout.blocks == (Block(2), Block(1, 0), Block(2, 0))
    padded = pad([row])
    assert padded.ids.tolist() == [[5, 6, 7, 0], [5, 6, 8, 9]]
    assert padded.predict.tolist() == [1, 5, 6]
    assert (batch.tokens, batch.size, padded.tokens, padded.size) == (5, 5, 7, 8)
    assert costs(np.array([[2, 1, 2]]), packed=True) == [5]


def test_a_padded_row_costs_as_much_as_the_longest():
    """Two answers a row: (2, 1, 2) packs 5 tokens, (4, 3, 1) packs 8 and pads 2 x 7."""
    lengths = np.array([[2, 1, 2], [4, 3, 1]])
    assert costs(lengths, packed=True) == [5, 8]
    assert costs(lengths, packed=False) == [14, 14]


# --- varlen, whose kernel needs a GPU: what it is given is checked here -------------------------


def emulated_varlen(query, key, value, queries_at, keys_at, *_, scale, window_size, enable_gqa):
    """What torch's varlen_attn documents, sequence by sequence, masks at the bottom right."""
    out = []
    for q0, q1, k0, k1 in zip(
        queries_at[:-1], queries_at[1:], keys_at[:-1], keys_at[1:], strict=True
    ):
        q, k, v = (t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        if enable_gqa:
            k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
        place = torch.arange(k1 - k0)
        distance = place[-(q1 - q0) :, None] - place
        seen = distance >= 0
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 4])
def test_varlen_is_given_the_same_attention(monkeypatch, window):
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", emulated_varlen)
    torch.manual_seed(0)
    layout = pack(some_rows(seed=3)).layout
    tokens = sum(layout.lengths)
    shapes = ((1, 4, tokens, 8), (1, 2, tokens, 8), (1, 2, tokens, 8))
    given = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    want = attention.by_blocks(*given, layout, 0.3, window)
    got = attention.by_varlen(*given, layout, 0.3, window)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(want)
    wanted, found = (torch.autograd.grad(out, given, slope) for out in (want, got))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# --- the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("chunk", [1, 3 * 17, 10**6])
def test_the_head_against_autograd(softcap, chunk):
    torch.manual_seed(1)
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True)
                            for s in ((10, 6), (17, 6), (17,)))  # fmt: skip
    targets = torch.randint(17, (10,))

    def logps(hidden, weight, bias):
        return token_logps(hidden, weight, bias, targets, softcap, chunk)

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps(hidden, weight, bias), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("softcap", "again"), [(None, 2), (2.5, 3)])
def test_the_last_chunks_logits_are_kept(monkeypatch, softcap, again):
    """The backward pass has room for one chunk, so it recomputes those of the others only."""
    asked = []

    def counted(part, *rest):
        asked.append(len(part))
        return logits(part, *rest)

    logits = logprobs._logits
    monkeypatch.setattr(logprobs, "_logits", counted)
    hidden, weight = torch.randn(10, 6, requires_grad=True), torch.randn(17, 6, requires_grad=True)
    got = token_logps(hidden, weight, None, torch.arange(10), softcap, 4 * 17)
    assert asked == [4, 4, 2]
    grads = [torch.autograd.grad(got.sum(), [hidden, weight], retain_graph=True) for _ in range(2)]
    assert len(asked) == 3 + again + 3  # a second pass has none
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


def test_no_token_is_no_log_prob_and_no_gradient():
    hidden, weight = torch.randn(0, 6, requires_grad=True), torch.randn(17, 6, requires_grad=True)
    got = token_logps(hidden, weight, None, torch.arange(0))
    got.sum().backward()
    assert got.shape == (0,)
    assert hidden.grad.shape == (0, 6)
    assert not weight.grad.any()


def test_a_frozen_head_costs_no_gradient():
    hidden = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(17, 6)
    token_logps(hidden, weight, None, torch.arange(4)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_logits_of_all_tokens_never_exist():
    """The largest tensor that autograd or the forward pass makes has `chunk` numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            nonlocal largest
            out = function(*arguments, **(kwargs or {}))
            if torch.is_tensor(out):
                largest = max(largest, out.numel())
            return out

    hidden, weight = (torch.randn(*s, requires_grad=True) for s in ((300, 4), (100, 4)))
    with Watch():
        token_logps(
            hidden, weight, None, torch.zeros(300, dtype=torch.long), chunk=2000
        ).sum().backward()
    assert largest <= 2000


@pytest.fixture
def like_cuda(monkeypatch):
    """Matrix products with fp32 sums of half precision, which torch has on GPUs only."""
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(left, right, *, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(left, right, out=out)
        assert left.dtype == right.dtype == torch.bfloat16
        return mm(left.to(out_dtype), right.to(out_dtype))

    def wide_addmm(total, left, right, *, out_dtype, out):
        assert total is out
        assert (total.dtype, left.dtype, right.dtype) == (out_dtype, torch.bfloat16, torch.bfloat16)
        return addmm(total, left.to(out_dtype), right.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    for ask in (logprobs.gives_fp32, logprobs.adds_to_fp32):
        ask.cache_clear()
        assert ask(torch.device("cpu"), torch.bfloat16)
    yield
    for ask in (logprobs.gives_fp32, logprobs.adds_to_fp32):
        ask.cache_clear()


def head_in_bf16(biased: bool, softcap: float | None) -> list[torch.Tensor]:
    """Log-probs and gradients of a head in bf16, in chunks of 3 tokens."""
    torch.manual_seed(1)
    parts = [torch.randn(*s).bfloat16().requires_grad_() for s in ((10, 6), (17, 6), (17,))]
    bias = parts[2] if biased else None
    found = token_logps(*parts[:2], bias, torch.arange(10), softcap, 3 * 17)
    (found * torch.linspace(-1, 1, 10)).sum().backward()
    return [found, *(p.grad for p in parts if p.grad is not None)]


def head_in_fp64(biased: bool, softcap: float | None) -> list[torch.Tensor]:
    """The same by autograd alone."""
    torch.manual_seed(1)
    parts = [
        torch.randn(*s).bfloat16().double().requires_grad_() for s in ((10, 6), (17, 6), (17,))
    ]
    logits = parts[0] @ parts[1].T + (parts[2] if biased else 0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    found = logits.log_softmax(-1).gather(1, torch.arange(10)[:, None])[:, 0]
    (found * torch.linspace(-1, 1, 10)).sum().backward()
    return [found, *(p.grad for p in parts if p.grad is not None)]


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.usefixtures("like_cuda")
def test_a_gpus_matrix_products_give_the_same_head(biased, softcap):
    """Log-probs are exact to fp32, as no logit is rounded to bf16; gradients to bf16."""
    got, want = head_in_bf16(biased, softcap), head_in_fp64(biased, softcap)
    assert len(got) == len(want)
    assert relative(got[0].double(), want[0]) < 1e-6
    for ours, plain in zip(got[1:], want[1:], strict=True):
        assert relative(ours.double(), plain) < 4e-3


def test_a_cpu_has_no_such_products():
    for ask in (logprobs.gives_fp32, logprobs.adds_to_fp32):
        assert not ask(torch.device("cpu"), torch.bfloat16)
        assert not ask(torch.device("meta"), torch.float64)
        assert ask(torch.device("meta"), torch.bfloat16)


def test_bf16_is_summed_in_fp32():
    """300 tokens of a vocabulary of 4 with equal logits: each ln 1/4, in all -415.888."""
    row = Row("r", np.array([1]), (np.zeros(300, np.int32),))
    hidden = torch.zeros(1, 301, 8, dtype=torch.bfloat16)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16)
    from wrpo_ray.stages.train.logprobs import answer_logps

    got = answer_logps(hidden, lambda h, t: token_logps(h, weight, None, t), pack([row]))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(-300 * math.log(4), abs=1e-3)


# --- dealing ----------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(10, 120),
)
def test_rows_are_dealt_once_within_the_budget(costs, workers, budget):
    assigned = assign_micro_batches(costs, workers, budget)
    assert len(assigned) == workers
    assert len({len(part) for part in assigned}) == 1
    assert len(assigned[0]) <= math.ceil(len(costs) / workers)  # no pass that only dummies fill
    assert sorted(i for part in assigned for rows in part for i in rows) == list(range(len(costs)))
    for rows in (rows for part in assigned for rows in part):
        assert len(rows) < 2 or sum(costs[i] for i in rows) <= budget
    assert assigned == assign_micro_batches(costs, workers, budget)
    alone = sum(2 * cost > budget for cost in costs)
    enough = max(alone, 2 * sum(min(cost, budget) for cost in costs) / budget)
    assert len(assigned[0]) <= math.ceil(enough / workers) + 1


@pytest.mark.parametrize(
    ("least", "most", "few"), [(50, 1000, 33), (600, 1500, 66), (1200, 1365, 80), (700, 1365, 63)]
)
def test_few_micro_batches_hold_the_rows(least, most, few):
    """As few as trying each number takes; the tokens alone fill 33, 63, 76 and 61 (80 of three)."""
    rng = random.Random(0)
    costs = [rng.randint(least, most) for _ in range(240)]
    assert len(assign_micro_batches(costs, 1, 4096)[0]) <= few


class Counted(int):
    """A cost that counts the additions, products and changes of sign that it takes part in."""

    steps = 0

    def __radd__(self, other):
        Counted.steps += 1
        return other + int(self)

    __add__ = __radd__

    def __rmul__(self, other):
        Counted.steps += 1
        return other * int(self)

    def __neg__(self):
        Counted.steps += 1
        return -int(self)


@pytest.mark.parametrize("share", [0.3, 0.4, 0.6, 1.5])
def test_the_work_grows_with_the_rows(share):
    """At most 25 steps a row, however many there are and whatever part of the budget they take."""
    rng = random.Random(0)
    for count in (256, 4096):
        Counted.steps = 0
        costs = [Counted(rng.randint(int(950 * share), int(1050 * share))) for _ in range(count)]
        assign_micro_batches(costs, 4, 1000)
        assert count <= Counted.steps <= 25 * count


def test_loads_are_even():
    rng = random.Random(0)
    costs = [rng.randint(50, 1000) for _ in range(128)]
    loads = [
        sum(costs[i] for rows in part for i in rows)
        for part in assign_micro_batches(costs, 8, 4096)
    ]
    assert max(loads) < 1.05 * min(loads)
