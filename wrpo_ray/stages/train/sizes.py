"""The sizes of a decoder model, from its Hugging Face config.

Makers name them differently, and transformers leaves out of a saved config what is the default of
its class. What a config lacks is a Llama's of its width. P parameters.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wrpo_ray.llm.experts import experts_of

WIDTH = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
"""As in transformers 5.23."""
TIED = "tie_word_embeddings"
ROUTER_LOSS = "output_router_logits"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder model."""

    width: int
    layers: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together."""
    inner: int
    """Width of the MLPs that a token goes through in a layer, together."""
    all_inner: int
    """The same of all experts."""
    vocabulary: int
    tied: bool
    routed: int = 0
    """Experts of a layer if the config asks for the loss of its router, else 0."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Sizes":
        """The sizes in a config, or in its part for text."""
        tied, has_loss = _is_tied(config), config.get(ROUTER_LOSS)
        config = config.get("text_config") or config
        width, heads = _number(config, WIDTH, 4096), _number(config, HEADS, 32)
        head = _number(config, ("head_dim",), width // heads)
        dense = _number(config, INNER, 4 * width)
        experts, active, shared = experts_of(config)
        inner = _number(config, ("moe_intermediate_size",), dense) if experts > 1 else dense
        return cls(
            width=width,
            layers=_number(config, LAYERS, 32),
            queries=head * heads,
            keys=head * _number(config, KEY_HEADS, heads),
            inner=inner * (active + shared),
            all_inner=inner * (experts + shared),
            vocabulary=_number(config, ("vocab_size",), 32000),
            tied=tied,
            routed=experts if has_loss or config.get(ROUTER_LOSS) else 0,
        )

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.width * (2 * self.queries + 2 * self.keys + 3 * self.all_inner + 2)

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All parameters, shared ones once."""
        return self.layers * self.layer + self.head * (1 if self.tied else 2) + self.width

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on all linear layers of the body."""
        ends = 4 * self.width + 2 * self.queries + 2 * self.keys  # of q, k, v, o
        return self.layers * rank * (ends + 3 * (self.width + self.all_inner))


def _number(config: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    """The first number under one of the names; of a list, of layers, the greatest."""
    found = (config.get(name) for name in names)
    known = next((n for n in found if n), default)
    return int(max(known) if isinstance(known, list) else known)


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head's weights are the embeddings; where the config omits it, as its class."""
    parts = (config, config.get("text_config") or {})
    given = [bool(part[TIED]) for part in parts if part.get(TIED) is not None]
    if given:
        return any(given)
    with suppress(KeyError, ValueError):  # of a model that transformers does not know
        from transformers import AutoConfig

        return bool(
            AutoConfig.for_model(config["model_type"]).get_text_config().tie_word_embeddings
        )
    return False
