"""Modules that keep less for the backward pass: which they are, and that they compute the same."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))

from counting import Counts
from support.tiny_models import preference_rows, write_model
from test_train_faults import STEPS, WRPO, create, records
from test_train_packing import KINDS, loss_and_gradients, make, relative, some_rows
from torch import nn

from wrpo_ray.config import LoraConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm import attention
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.stages.train import layers, recompute, slimming
from wrpo_ray.stages.train.model import Policy
from wrpo_ray.stages.train.packing import pack
from wrpo_ray.stages.train.rows import Tokenizing
from wrpo_ray.stages.train.slimming import own_forwards, slim
from wrpo_ray.stages.train.task import WRPO_ANSWERS


class OneRMSNorm(nn.Module):
    """An RMS norm of some kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.eps = 1e-5

    def forward(self, hidden):
        return self.gained(hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps))

    def gained(self, normal):
        return self.weight * normal


class SquareRMSNorm(OneRMSNorm):
    """With the square of its gain."""

    def gained(self, normal):
        return self.weight**2 * normal


class DetachedRMSNorm(OneRMSNorm):
    """Equal in value, but not in its gradients."""

    def gained(self, normal):
        return self.weight.detach() * normal + 0 * self.weight


class RaisedRMSNorm(OneRMSNorm):
    """Equal in its gradients, but not in value."""

    def gained(self, normal):
        return self.weight * normal + 0.5


class CentredRMSNorm(OneRMSNorm):
    """Subtracts the mean."""

    def forward(self, hidden):
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


class PairRMSNorm(OneRMSNorm):
    """Takes a gate too."""

    def forward(self, hidden, gate):
        return super().forward(hidden) * gate


class GatedMLP(nn.Module):
    """A gated MLP whose activation is none that we know."""

    def __init__(self, activation=torch.relu) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(6, 6) for _ in range(3))
        self.act_fn = activation

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class ClampedMLP(GatedMLP):
    """With a limit within."""

    def forward(self, hidden):
        inner = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(inner.clamp(max=0.1))


class LimitedMLP(GatedMLP):
    """With a limit that inputs of usual size do not reach, as in DeepSeek-V4 and GLM-5."""

    def __init__(self, limit: float = 10.0) -> None:
        super().__init__(nn.SiLU())
        self.limit = limit

    def forward(self, hidden):
        gate = self.gate_proj(hidden).clamp(max=self.limit)
        up = self.up_proj(hidden).clamp(min=-self.limit, max=self.limit)
        return self.down_proj(self.act_fn(gate) * up)


class ScaledMLP(GatedMLP):
    """Times a weight, which is 1 at first, as in Inkling."""

    def __init__(self) -> None:
        super().__init__(nn.SiLU())
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, hidden):
        return super().forward(hidden) * self.scale


class ShiftedRMSNorm(OneRMSNorm):
    """With the epsilon outside of the root, which counts for small inputs only."""

    def forward(self, hidden):
        return self.gained(hidden / (hidden.pow(2).mean(-1, keepdim=True).sqrt() + self.eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_all_norms_mlps_and_rotations_are_slim(kind, dtype):
    model = make(kind, "eager", dtype)
    names = [type(m).__name__ for m in model.modules()]
    want = {n: names.count(n) for n in names if n.endswith(("RMSNorm", "MLP", "Attention"))}
    assert slim(model) == want


@pytest.mark.parametrize(
    "module",
    [SquareRMSNorm(), DetachedRMSNorm(), RaisedRMSNorm(), CentredRMSNorm(), PairRMSNorm(),
     GatedMLP(), ClampedMLP(nn.SiLU()), LimitedMLP(), ScaledMLP(), ShiftedRMSNorm()],
)  # fmt: skip
def test_what_computes_something_else_stays_as_it_is(module):
    assert slim(nn.Sequential(module)) == {}
    assert "forward" not in vars(module)


@pytest.mark.parametrize(
    ("limits", "want"), [((torch.inf, 16.0, torch.inf), 2), ((16.0, torch.inf), 1)]
)
def test_modules_of_a_class_that_differ_in_a_number_are_looked_at_one_by_one(limits, want):
    """As in Step 3.7, where few layers have a limit, and Gemma 3n, where few are sparse."""
    model = nn.Sequential(*map(LimitedMLP, limits))
    assert slim(model) == {"LimitedMLP": want}
    assert [hasattr(m, "slim_kind") for m in model] == [limit == torch.inf for limit in limits]


@pytest.mark.parametrize("heads", [torch.bfloat16, torch.float32])
def test_positions_in_another_precision_than_heads_are_turned_by_the_model(heads):
    """Whether it then computes in the wider one, and what it returns, is its own matter."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = torch.randn(2, 1, 5, 8)
    query, key = torch.randn(2, 1, 3, 5, 8, dtype=heads)
    found = slimming.rotary(apply_rotary_pos_emb)(query, key, cos, sin)
    for turned, wanted in zip(found, apply_rotary_pos_emb(query, key, cos, sin), strict=True):
        assert turned.dtype == wanted.dtype
        assert torch.equal(turned, wanted)


@pytest.mark.parametrize("module", [OneRMSNorm(), GatedMLP(nn.SiLU()), GatedMLP(nn.GELU())])
def test_what_computes_the_same_is_slim_and_so_are_its_copies(module):
    whole = nn.Sequential(module)
    assert slim(whole) == {type(module).__name__: 1}
    other = copy.deepcopy(whole)
    hidden = torch.randn(2, 3, 6)
    before = other(hidden)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.zero_()
    assert torch.equal(other(hidden), before)
    assert not torch.equal(whole(hidden), before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_are_slim_everywhere_but_for_comparisons(device):
    """A meta tensor stands for one on a GPU."""
    for asked, want in (({}, 9), ({"slim": False}, 0)):  # 5 norms, 2 MLPs, 2 attentions
        model = make("llama-gqa", attention.SHARED_PROMPT, torch.float32).to(device)
        policy = Policy(model, **asked)
        assert sum(hasattr(module, "slim_kind") for module in policy.modules()) == want


def test_random_numbers_are_as_without():
    """New adapters depend on the seed alone."""
    torch.manual_seed(3)
    want = torch.randn(2)
    model = make("llama-gqa", "eager", torch.float32)
    torch.manual_seed(3)
    slim(model)
    assert torch.equal(torch.randn(2), want)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_values_are_equal_and_gradients_but_for_rounding(kind):
    """Against the model's own modules in the same precision; own ones differ from fp32's more."""
    (want, got), (apart, ours) = in_bf16(kind)
    assert torch.equal(got, want)
    assert ours <= 1.05 * apart


def in_bf16(kind: str) -> tuple[list[torch.Tensor], list[float]]:
    """Log-probs in bf16 of the model's own modules and of ours; errors of both's gradients."""
    rows, found = some_rows(seed=4), []
    for dtype, ours in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = make(kind, attention.SHARED_PROMPT, torch.bfloat16).to(dtype)
        policy = Policy(model, slim=True)
        if ours:
            logps = policy(pack(rows))
        else:
            with own_forwards(model):
                logps = policy(pack(rows))
        found.append((logps, loss_and_gradients(model, logps, rows)[1]))
    (_, exact), *others = found
    errors = [sum(relative(g[n].float(), exact[n]) for n in exact) for _, g in others]
    return [logps for logps, _ in others], errors


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 1, "gradient_checkpointing": True},
        {"zero_stage": 3, "lora": LoraConfig(rank=4)},
        {"zero_stage": 3, "offload": "optimizer"},
        {"zero_stage": 3, "gradient_checkpointing": True},
        {"zero_stage": 2, "packing": False},
    ],
)
def test_a_training_takes_the_same_steps(tmp_path, settings, monkeypatch):
    """Real DeepSpeed: each step's loss and gradient norm, of layers that are slim and not."""
    environment = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "LOCAL_RANK": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    base = write_model(tmp_path / "base", tied=True)
    tokenizing = Tokenizing(load_tokenizer(base), frozenset({1}), WRPO_ANSWERS, WRPO)
    rows, found = tokenizing.rows(preference_rows(4 * STEPS), "rows").kept, {}
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr(slimming, "slim", lambda model: {})
        trainer = create(tmp_path / str(ours), base, rows, WRPO.model_copy(update=settings))
        assert any(hasattr(m, "slim_kind") for m in trainer.policy.modules()) is ours
        trainer.run(0)
        found[ours] = [[line[key] for line in records(trainer)] for key in ("loss", "grad_norm")]
    for want, got in zip(found[False], found[True], strict=True):
        assert len(want) == STEPS
        assert got == pytest.approx(want, rel=1e-5)
        assert min(want) > 0.01


def kept_bytes(policy: Policy, rows) -> int:
    """Bytes that the graph of the rows' log-probs holds."""
    with Counts() as counts:
        logps = policy(pack(rows))
        kept = counts.kept
    logps.sum().backward()
    return kept


def test_nothing_is_held_for_what_is_computed_again():
    """Of two layers in fp32: the MLP's product and activation, and two tensors of each norm."""
    rows = some_rows(seed=5)
    slimmer, whole = (
        kept_bytes(
            Policy(make("llama-gqa", attention.SHARED_PROMPT, torch.float32), slim=slim), rows
        )
        for slim in (True, False)
    )
    tokens = pack(rows).size
    assert whole - slimmer >= 4 * tokens * 2 * (2 * 48 + 2 * 2 * 32)
    assert not recompute._notes


def test_a_noted_tensor_that_is_changed_in_place_is_kept():
    """And one that nobody changed is computed again, once, whatever part of it is kept."""
    calls = []
    leaf = torch.arange(6.0, requires_grad=True)
    for changes in (False, True):

        def compute(changes=changes) -> torch.Tensor:
            calls.append(changes)
            return leaf.detach() * 2

        with recompute.recomputing():
            doubled = recompute.note(leaf * 2, compute)
            if changes:
                doubled.add_(1)
            squares = (doubled.view(2, 3)[1] ** 2).sum() + (doubled**2).sum()
        (gradient,) = torch.autograd.grad(squares, leaf)
        base = 2 * leaf.detach() + changes
        torch.testing.assert_close(gradient, 4 * base * torch.tensor([1, 1, 1, 2, 2, 2]))
    assert calls == [False]


def test_a_tensor_that_is_changed_in_place_after_it_is_kept_is_no_silent_error():
    """As without hooks, where torch refuses it; the norm's own code kept a copy in fp32."""
    norm = OneRMSNorm()
    assert slim(nn.Sequential(norm))
    for changes in (False, True):
        leaf = torch.randn(3, 6, requires_grad=True)
        with recompute.recomputing():
            hidden = leaf * 1
            total = norm(hidden).sum()
            if changes:
                hidden.mul_(2)
        if not changes:
            total.backward()
            continue
        with pytest.raises(UserError, match="changes a tensor in place"):
            total.backward()


def test_outside_of_a_pass_nothing_is_noted():
    out = recompute.note(torch.ones(2, requires_grad=True) * 2, lambda: pytest.fail("computed"))
    (out**2).sum().backward()


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["llama-gqa", "gemma2-softcap", "phi3"])
def test_compiled_functions_compute_the_same(kind, monkeypatch):
    """Compiled for the CPU in place of a GPU: in the forward pass, under its hooks, and after."""
    rows, found, calls = some_rows(seed=4), [], []
    models = [make(kind, attention.SHARED_PROMPT, torch.float32) for _ in range(2)]
    policies = [Policy(model, slim=True) for model in models]
    for name in ("_norm", "_norm_again", "_norm_backward", "_product", "_product_backward",
                 "_turn", "_turn_back"):  # fmt: skip
        compiled = torch.compile(getattr(layers, name).__wrapped__)

        def call(*arguments, name=name, compiled=compiled):
            calls.append(name)
            return compiled(*arguments)

        monkeypatch.setattr(layers, name, call)
    for policy, ours in zip(policies, (False, True), strict=True):
        with nullcontext() if ours else own_forwards(policy.model):
            logps = policy(pack(rows))
        found.append((logps, loss_and_gradients(policy.model, logps, rows)[1]))
    (want, wanted), (got, gradients) = found
    assert relative(got, want) < 1e-5
    for name, gradient in wanted.items():
        assert relative(gradients[name], gradient) < 1e-4, name
    assert len(set(calls)) == 7
