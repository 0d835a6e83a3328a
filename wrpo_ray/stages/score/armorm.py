"""ArmoRM-Llama3-8B-v0.1 (arXiv 2406.12845), the paper's reward, without its remote code.

A Llama gives hidden states h. The last token's are regressed to K ratings (helpfulness, verbosity,
safety...), which a matrix M rids of their correlation with verbosity. The hidden states where the
last turn of the assistant begins, which know the prompt alone, give the ratings' weights:

    reward = sum_k  s * softmax(MLP(h_gate) / temperature)_k  *  (W h_last  M)_k

Backbone and heads keep their own precision: published are bf16 and fp32.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from wrpo_ray.config import ScoreConfig
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import first_of, telling_of
from wrpo_ray.stages.score.base import Item
from wrpo_ray.stages.score.decoder import Decoder
from wrpo_ray.stages.score.reward_models import TokenReward, torch_dtype
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.tensors import Tensors, read_tensors

HEADER = (128009, 128006, 78191, 128007, 271)
"""<|eot_id|><|start_header_id|>assistant<|end_header_id|> and an empty line, by Llama 3's ids."""
BACKBONE = "model."
"""Prefix of the Llama's weights."""


class NoTurnError(ValueError):
    """The conversation has no turn of the assistant where ArmoRM looks for one."""


def gate_position(ids: list[int]) -> int:
    """Return the position that the gate reads: the token that ends the turn before the answer.

    Raises:
        NoTurnError: the conversation has no turn of the assistant.
    """
    for start in range(len(ids) - len(HEADER), -1, -1):
        if tuple(ids[start : start + len(HEADER)]) == HEADER:
            return start
    raise NoTurnError(f"the conversation's tokens have no {list(HEADER)}, the assistant's header")


class Gate(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Weights of K ratings: an MLP with ReLU, and a softmax with a temperature."""

    def __init__(self, width: int, ratings: int, config: LlamaConfig):
        super().__init__()
        hidden = getattr(config, "gating_hidden_dim", 1024)
        depth = getattr(config, "gating_n_hidden", 3)
        self.temperature = getattr(config, "gating_temperature", 10)
        sizes = [width, *[hidden] * depth, ratings]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, states: Tensor) -> Tensor:
        """States (B, H) to weights (B, K)."""
        for layer in self.layers[:-1]:
            states = layer(states).relu()
        return self.logit_scale * (self.layers[-1](states) / self.temperature).softmax(-1)


class Heads(nn.Module):  # type: ignore[misc]
    """ArmoRM without the Llama; attribute names are those of the published weights."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, ratings = config.hidden_size, getattr(config, "num_objectives", 19)
        self.regression_layer = nn.Linear(width, ratings, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(ratings))
        self.gating = Gate(width, ratings, config)

    def forward(self, last: Tensor, gate: Tensor) -> Tensor:
        """States (B, H) of the last tokens and at the gates to rewards (B,)."""
        ratings = self.regression_layer(last) @ self.reward_transform_matrix
        return (self.gating(gate) * ratings).sum(-1)


class ArmoReward(TokenReward):
    """ArmoRM in a folder as published."""

    def __init__(self, part: ScoreConfig, folder: Path, *, on_gpu: bool):
        config = LlamaConfig.from_pretrained(folder)
        with telling_of(f"reward: {folder}"):
            tensors = read_tensors(Folder(str(folder)))
            check_tensors(folder, tensors)
        files = {name: folder / header.file for name, header in (tensors or {}).items()}
        self.device = "cuda" if on_gpu else "cpu"
        llama = LlamaModel.from_pretrained(folder, config=config, dtype=torch_dtype(part))
        self.llama = llama.to(self.device).eval()
        self.heads = load_heads(config, files).to(self.device).eval()
        self.context = config.max_position_embeddings
        super().__init__(part, folder)
        pad = 0 if config.pad_token_id is None else config.pad_token_id
        self.decoder = Decoder(self.llama, pad, self.device, self.max_length)

    @property
    def shares(self) -> bool:
        """If the loaded model allows it."""
        return bool(self.decoder.shares)

    def encode(self, item: Item) -> list[int]:
        """The conversation's token ids.

        Raises:
            TooLongError: they are too many.
            NoTurnError: they have no turn of the assistant.
        """
        ids = super().encode(item)
        gate_position(ids)
        return ids

    def rewards(self, groups: list[list[list[int]]]) -> list[float]:
        """One forward pass."""
        with torch.inference_mode():
            states = self.decoder.states(groups, lambda ids: [len(ids) - 1, gate_position(ids)])
            last, gate = states.float().unbind(1)
            rewards: list[float] = self.heads(last, gate).tolist()
        return rewards


# --- weights ---------------------------------------------------------------------------------


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an ArmoRM."""
    with torch.device("meta"):
        llama, heads = LlamaModel(config).state_dict(), Heads(config).state_dict()
    named = {f"{BACKBONE}{name}": tensor for name, tensor in llama.items()} | heads
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


def check_tensors(folder: Path, tensors: Tensors | None) -> None:
    """Compare the tensors of a folder with ArmoRM's, of the sizes in its config.json.

    Raises:
        UserError: tensors are missing, too many or of another shape, or in another form of file.
    """
    wanted = shapes(LlamaConfig.from_pretrained(folder))
    found = {n: t.shape for n, t in (tensors or {}).items() if t.file.endswith(".safetensors")}
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in wanted]
    wrong += [
        f"{name} has shape {found[name]}, not {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        raise UserError(
            f"its weights are not ArmoRM's: {first_of(wrong)}; download "
            f"RLHFlow/ArmoRM-Llama3-8B-v0.1 again (its .safetensors files)"
        )


def load_heads(config: LlamaConfig, files: dict[str, Path]) -> Heads:
    """Load the heads, in fp32."""
    heads = Heads(config)
    state: dict[str, Any] = {}
    for name in heads.state_dict():
        with safe_open(files[name], framework="pt") as file:
            state[name] = file.get_tensor(name)
    heads.load_state_dict(state)
    float32: Heads = heads.float()
    return float32
