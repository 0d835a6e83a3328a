"""Linear layers of one input as one matrix product: which they are, and that they are exact.

On CPUs they stay apart, so here `joined` has them joined in spite of that.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from support.tiny_models import preference_rows, write_model
from test_train_faults import STEPS, WRPO, create, records
from test_train_packing import (
    KINDS,
    check_against_plain,
    loss_and_gradients,
    make,
    relative,
    some_rows,
)
from test_train_slim import in_bf16
from torch import nn

from wrpo_ray.config import LoraConfig
from wrpo_ray.llm import attention
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.stages.train import layers, slimming
from wrpo_ray.stages.train.layers import Together, put_side_by_side, side_by_side
from wrpo_ray.stages.train.model import Policy, gather_weights, with_lora
from wrpo_ray.stages.train.packing import pack, pad
from wrpo_ray.stages.train.rows import Tokenizing
from wrpo_ray.stages.train.slimming import own_forwards
from wrpo_ray.stages.train.task import WRPO_ANSWERS


@pytest.fixture
def joined(monkeypatch):
    """Layers on the CPU are joined; returns how often each function was."""
    calls: Counter[str] = Counter()
    monkeypatch.setattr(slimming, "saves_time", lambda weight: True)
    monkeypatch.setattr(slimming, "_lets_go", lambda module: True)
    for name in ("_Joined", "_Mlp"):
        own = getattr(layers, name)

        def forward(*given, name=name, own=own.forward):
            calls[name] += 1
            return own(*given)

        monkeypatch.setattr(own, "forward", staticmethod(forward))
    return calls


def linears(*rows: int) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(6, n, bias=False, dtype=torch.float64) for n in rows]


def joins_of(model) -> tuple[int, int]:
    """Attention modules and MLPs that are joined."""
    groups = {id(m.slim_together) for m in model.modules() if hasattr(m, "slim_together")}
    return len(groups), sum(getattr(m, "slim_whole", False) for m in model.modules())


# --- weights in memory --------------------------------------------------------------------------


def test_weights_side_by_side_are_seen_as_one_and_keep_their_values():
    weights = [layer.weight for layer in linears(2, 3, 4)]
    before = [w.detach().clone() for w in weights]
    assert side_by_side(weights) is None
    put_side_by_side(weights)
    whole = side_by_side(weights)
    assert torch.equal(whole, torch.cat(before))
    with torch.no_grad():
        weights[1].fill_(7)  # as an optimizer does
    assert torch.equal(whole[2:5], torch.full((3, 6), 7.0).double())
    assert side_by_side([weights[1], weights[0]]) is None
    assert side_by_side([weights[0], weights[2]]) is None
    assert side_by_side(weights[1:]).shape == (7, 6)
    address = whole.data_ptr()
    put_side_by_side(weights)  # they are: nothing moves
    assert side_by_side(weights).data_ptr() == address


@pytest.mark.parametrize(
    "change", ["sharded", "empty", "replaced", "elsewhere", "transposed", "precision"]
)
def test_weights_that_cannot_be_one_view_are_apart(change):
    weights = [layer.weight for layer in linears(6, 6)]
    put_side_by_side(weights)
    if change == "sharded":
        weights[1].ds_id = 3
    elif change == "empty":  # a weight under ZeRO-3 whose module is not at work
        weights[1].data = torch.empty(0, dtype=torch.float64)
    elif change == "replaced":
        weights[1].data = weights[1].data.clone()
    elif change == "elsewhere":  # at the right place of another storage
        weights[1].data = torch.zeros(12, 6, dtype=torch.float64)[6:]
    elif change == "transposed":
        weights[1].data = weights[1].data.t()
    else:
        weights[1].data = weights[1].data.view(torch.complex64)
    assert side_by_side(weights) is None


def test_sharded_weights_are_not_moved():
    weights = [layer.weight for layer in linears(6, 6)]
    weights[0].ds_id = 3
    before = [weight.data_ptr() for weight in weights]
    put_side_by_side(weights)
    assert [weight.data_ptr() for weight in weights] == before


# --- layers that are called one after another ---------------------------------------------------


@pytest.mark.parametrize("trained", [(1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 0, 0), (1, 1, 1, 0)])
def test_outputs_and_gradients_are_those_of_layers_apart(trained):
    """Also of a layer whose output nobody used, and of frozen ones."""
    group, hidden = linears(2, 3, 4), torch.randn(1, 5, 6, dtype=torch.float64)
    leaves = [hidden, *(layer.weight for layer in group)]
    for leaf, needs in zip(leaves, trained, strict=True):
        leaf.requires_grad_(bool(needs))
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    found = []
    for together in (None, Together(group)):
        if together:
            put_side_by_side([layer.weight for layer in group])
        out = [together(x, hidden) if together else x(hidden) for x in group]
        total = (out[0] ** 2).sum() + (out[2] ** 3).sum()
        found.append((out, torch.autograd.grad(total, asked, materialize_grads=True)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert "_Joined" in type(found[1][0][0].grad_fn).__name__


def test_calls_that_do_not_fit_are_computed_by_themselves():
    one, two, three = group = linears(2, 3, 4)
    put_side_by_side([layer.weight for layer in group])
    together = Together(group)
    hidden, other = torch.randn(2, 5, 6, dtype=torch.float64)

    def check(*calls: tuple[nn.Linear, torch.Tensor]) -> None:
        for layer, given in calls:
            torch.testing.assert_close(together(layer, given), given @ layer.weight.t())

    check((two, hidden), (one, hidden), (three, hidden), (two, hidden), (two, hidden))
    check((one, hidden), (two, other), (one, other), (two, hidden), (three, other), (two, other))
    with torch.no_grad():
        check((one, hidden))
        hidden.mul_(2)  # the others' outputs are those of the input as it was
        three.weight.data = three.weight.data.clone()
        check((one, hidden), (two, hidden), (three, hidden))


def test_nothing_is_held_once_each_was_called():
    group, hidden = linears(2, 3), torch.randn(5, 6, dtype=torch.float64)
    put_side_by_side([layer.weight for layer in group])
    together = Together(group)
    for layer in group:
        together(layer, hidden)
    assert (together._hidden, together._waiting) == (None, {})


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_equal_the_plain_computation(
    kind, collate, dtype, tolerance, wide, joined
):
    model, policy, batch = check_against_plain(kind, collate, dtype, tolerance, wide, slim=True)
    assert (joined["_Joined"], joined["_Mlp"]) == joins_of(model)
    with own_forwards(model):
        policy(batch)
    assert (joined["_Joined"], joined["_Mlp"]) == joins_of(model)  # as before
    policy(batch)
    assert joined.total() == 2 * sum(joins_of(model))


@pytest.mark.parametrize(
    ("kind", "dtype", "implementation", "want"),
    [
        ("llama-gqa", torch.bfloat16, attention.SHARED_PROMPT, (2, 2)),
        ("qwen3-window", torch.bfloat16, attention.SHARED_PROMPT, (2, 2)),
        ("qwen2-bias", torch.bfloat16, attention.SHARED_PROMPT, (0, 2)),
        ("phi3", torch.bfloat16, attention.SHARED_PROMPT, (0, 2)),  # one layer as it is
        # attention that would hold the whole product for the values
        ("gemma2-softcap", torch.bfloat16, attention.SHARED_PROMPT, (0, 2)),
        ("llama-gqa", torch.float32, attention.SHARED_PROMPT, (0, 2)),
        ("llama-gqa", torch.bfloat16, "sdpa", (0, 2)),
    ],
)
def test_which_layers_are_joined_on_gpus(kind, dtype, implementation, want):
    """A meta tensor stands for one on a GPU."""
    model = make(kind, implementation, dtype)
    assert joins_of(Policy(copy.deepcopy(model), slim=True).model) == (0, 0)  # on a CPU
    assert joins_of(Policy(model.to("meta")).model) == want


def test_adapters_stay_apart_from_other_layers(joined):
    lora = LoraConfig(rank=2, targets=["k_proj", "up_proj"])
    model = with_lora(make("llama-gqa", "eager", torch.float32), lora)
    assert joins_of(Policy(model, slim=True)) == (0, 0)


def test_adapters_that_are_added_later_take_part(joined):
    rows, found = some_rows(seed=3), []
    for ours in (False, True):
        model = make("llama-gqa", attention.SHARED_PROMPT, torch.float64)
        policy = Policy(model, slim=ours)
        torch.manual_seed(1)
        adapted = with_lora(model, LoraConfig(rank=2))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        logps = policy(pack(rows))
        found.append((logps, loss_and_gradients(adapted, logps, rows)[1]))
    assert joined["_Joined"] == 2
    (want, wanted), (got, gradients) = found
    assert relative(got, want) < 1e-9
    for name, gradient in wanted.items():
        assert relative(gradients[name], gradient) < 1e-9, name


class InPlace(nn.Module):
    """Attention that clamps its projections."""

    def forward(self, hidden):
        q, k, v = (f(hidden) for f in (self.q_proj, self.k_proj, self.v_proj))
        return q.clamp_(max=1), k, v


class Apart(InPlace):
    """That changes none."""

    def forward(self, hidden):
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)


class Shared(Apart):
    """That takes another layer's keys."""

    is_kv_shared_layer = True


class QueriesAlone(Apart):
    """That computes no keys of its own."""

    def forward(self, hidden):
        return self.q_proj(hidden)


@pytest.mark.parametrize(
    ("kind", "want"), [(Apart, 1), (InPlace, 0), (Shared, 0), (QueriesAlone, 0)]
)
@pytest.mark.usefixtures("joined")
def test_attention_that_calls_or_uses_its_layers_otherwise_stays(kind, want):
    module = kind()
    module.q_proj, module.k_proj, module.v_proj = linears(2, 3, 4)
    slimming.slim(module)
    assert joins_of(module)[0] == want


def test_a_copy_computes_with_weights_of_its_own(joined):
    model = make("llama-gqa", "eager", torch.float64)
    slimming.slim(model)
    other, ids = copy.deepcopy(model), torch.tensor([[3, 4, 5]])
    before = other(ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(other(ids).logits, before)
    assert not torch.allclose(model(ids).logits, before)


def test_a_joined_model_is_saved_as_any(tmp_path, joined):
    model = make("llama-gqa", "eager", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slimming.slim(model)
    assert joins_of(model) == (2, 2)
    model.save_pretrained(tmp_path)
    after = type(model).from_pretrained(tmp_path).state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_in_bf16_gradients_are_as_exact_as_those_of_layers_apart(joined):
    _, (apart, together) = in_bf16("llama-gqa")
    assert joined.total() == 4
    assert together <= 1.05 * apart


def test_checkpointing_changes_nothing(joined):
    rows, found = some_rows(seed=2), []
    for checkpointing in (False, True):
        model = make("llama-gqa", attention.SHARED_PROMPT, torch.float64)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(loss_and_gradients(model, Policy(model, slim=True)(pack(rows)), rows)[1])
        for module in model.modules():
            assert not getattr(getattr(module, "slim_together", None), "_waiting", None)
    assert joined.total() == 4 + 8
    for name, gradient in found[0].items():
        assert relative(found[1][name], gradient) < 1e-12


# --- training -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"zero_stage": 0}, True),
        ({"zero_stage": 1, "gradient_checkpointing": True}, True),
        ({"zero_stage": 1, "precision": "bf16"}, True),
        ({"zero_stage": 2, "offload": "optimizer"}, True),
        ({"zero_stage": 3}, False),
        ({"zero_stage": 3, "gradient_checkpointing": True}, False),
        ({"zero_stage": 1, "lora": LoraConfig(rank=4)}, False),
    ],
)
def test_a_training_takes_the_same_steps(tmp_path, settings, want, monkeypatch, joined):
    """Real DeepSpeed, whose flat buffers move the weights; only stage 3 takes them apart."""
    environment = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "LOCAL_RANK": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    base, found, weights = write_model(tmp_path / "base", tied=True), {}, {}
    tokenizing = Tokenizing(load_tokenizer(base), frozenset({1}), WRPO_ANSWERS, WRPO)
    rows = tokenizing.rows(preference_rows(4 * STEPS), "rows").kept
    for ours in (False, True):
        monkeypatch.setattr(slimming, "saves_time", lambda weight, chosen=ours: chosen)
        trainer = create(tmp_path / str(ours), base, rows, WRPO.model_copy(update=settings))
        joined.clear()  # of the reference's pass, whose weights are whole
        trainer.run(0)
        found[ours] = [[line[key] for line in records(trainer)] for key in ("loss", "grad_norm")]
        weights[ours] = gather_weights(trainer.policy.module.model, base, keep=True)[0]
        assert set(joined) == ({"_Joined", "_Mlp"} if ours and want else set())
    limit = 1e-5 if settings.get("precision") != "bf16" else 0.02
    for apart, together in zip(found[False], found[True], strict=True):
        assert len(apart) == STEPS
        assert together == pytest.approx(apart, rel=limit)
    assert weights[False].keys() == weights[True].keys()
    for name, weight in weights[False].items():
        assert relative(weights[True][name].float(), weight.float()) < limit, name


@pytest.mark.soak
def test_what_is_compiled_computes_the_same(joined, monkeypatch):
    """Compiled for the CPU in place of a GPU, with the compiler's options of GPUs."""
    rows, found, calls = some_rows(seed=4), [], Counter()
    for compiling in (False, True):
        policy = Policy(make("llama-gqa", attention.SHARED_PROMPT, torch.float32), slim=True)
        for name in ("_product", "_product_and_slopes", "_turn", "_turn_back") * compiling:
            own = getattr(layers, name).__wrapped__
            compiled = torch.compile(own, options=layers.OPTIONS)

            def call(*arguments, name=name, compiled=compiled):
                calls[name] += 1
                return compiled(*arguments)

            monkeypatch.setattr(layers, name, call)
        logps = policy(pack(rows))
        found.append((logps, loss_and_gradients(policy.model, logps, rows)[1]))
    (want, wanted), (got, gradients) = found
    assert relative(got, want) < 1e-5
    for name, gradient in wanted.items():
        assert relative(gradients[name], gradient) < 1e-4, name
    assert set(calls.values()) == {2}
    assert len(calls) == 4
