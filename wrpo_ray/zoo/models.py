"""Four architectures of about 0.3M parameters, small enough to train in seconds on one core.

The head size is 32, set explicitly: vLLM's CPU attention takes no smaller one. The eos and pad
ids are in the config, with no BOS, so that generation stops alike in transformers and vLLM.
"""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from wrpo_ray.zoo.tokenizers import CONTEXT


def llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Llama of width 96 with four heads."""
    return LlamaForCausalLM(LlamaConfig(**_shape(tokenizer, 96, 256, 4, 4)))


def qwen3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Qwen 3 (normed queries and keys) of width 96 with grouped queries."""
    return Qwen3ForCausalLM(Qwen3Config(**_shape(tokenizer, 96, 256, 4, 2)))


def gemma2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Gemma 2 (soft caps, a sliding window in every other layer) of width 64."""
    config = Gemma2Config(
        **_shape(tokenizer, 64, 256, 4, 2),
        query_pre_attn_scalar=32,
        sliding_window=64,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def reward_model(base: LlamaForCausalLM) -> LlamaForSequenceClassification:
    """A scalar head on the transformer of `base`, which is shared and not copied."""
    shape = base.config.to_dict()
    for key in ("architectures", "id2label", "label2id"):
        shape.pop(key, None)
    config = LlamaConfig(**shape, num_labels=1)
    model = LlamaForSequenceClassification(config)
    model.model = base.model
    return model


def _shape(
    tokenizer: PreTrainedTokenizerFast, width: int, inner: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "initializer_range": 0.06,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
