"""Reward models on the conversation's tokens: batches of like length, padded on the right."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from wrpo_ray.config import ScoreConfig
from wrpo_ray.core.chat import conversation_ids, load_tokenizer, prompt_ids
from wrpo_ray.core.vllm import CPU_ENGINE
from wrpo_ray.errors import UserError
from wrpo_ray.score.base import Item, Outcome, TooLongError, finite

ARMORM = "LlamaForRewardModelWithGating"
CLASSIFIER = "ForSequenceClassification"


def check_reward_model(config: dict[str, Any], part: ScoreConfig, where: str) -> None:
    """Check by a folder's config.json that it is a reward model which `part` can be.

    Raises:
        UserError: it is not; `where` names it.
    """
    names = config.get("architectures") or ["none"]
    if names == [ARMORM]:
        if part.engine == "vllm":
            raise UserError(f"{where}: ArmoRM does not run on vLLM; leave out `engine`")
        return
    if not names[0].endswith(CLASSIFIER):
        raise UserError(
            f"{where}: its architecture is {names[0]}, which gives no reward; give a sequence "
            f"classifier with one label, or ArmoRM-Llama3-8B-v0.1"
        )
    labels = config.get("num_labels") or len(config.get("id2label") or range(2))
    if labels != 1:
        raise UserError(f"{where}: it has {labels} labels; a reward model has one")
    text = config.get("text_config") or {}
    if part.engine == "transformers" and _pad(config) is None and _pad(text) is None:
        raise UserError(f"{where}: its config.json has no pad_token_id; set it")


def _pad(config: dict[str, Any]) -> int | None:
    return config.get("pad_token_id")


def load_classifier(part: ScoreConfig, folder: Path, *, on_gpu: bool) -> TokenReward:
    """The reward model in a folder.

    Raises:
        UserError: it is none, or its weights are not those of its architecture.
    """
    config = json.loads((folder / "config.json").read_bytes())
    check_reward_model(config, part, f"reward: {folder}")
    if part.engine == "vllm":
        return VllmReward(part, folder, on_gpu=on_gpu)
    if config["architectures"] == [ARMORM]:
        from wrpo_ray.score.armorm import ArmoReward

        return ArmoReward(part, folder, on_gpu=on_gpu)
    return ClassifierReward(part, folder, on_gpu=on_gpu)


class TokenReward(ABC):
    """A model that gives token ids a reward."""

    context: int | None = None
    """Tokens that the model itself takes; None if it does not say."""

    def __init__(self, part: ScoreConfig, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        self.max_length = min(part.max_length, self.context or part.max_length)
        self.cut_prompt = part.overflow == "cut_prompt"
        self.batch_size = part.batch_size

    @abstractmethod
    def rewards(self, rows: list[list[int]]) -> list[float]:
        """The rewards of some rows of token ids."""

    def score(self, items: list[Item]) -> list[Outcome]:
        """Rows of like length go together; an item's reward does not depend on the others."""
        scores: dict[int, Outcome] = {}
        encoded: dict[int, list[int]] = {}
        for i, item in enumerate(items):
            try:
                encoded[i] = self.encode(item)
            except Exception as error:  # a template can raise anything; the row keeps it
                scores[i] = error
        ready = sorted(encoded, key=lambda i: len(encoded[i]))
        for start in range(0, len(ready), self.batch_size):
            batch = ready[start : start + self.batch_size]
            values = self.rewards([encoded[i] for i in batch])
            scores |= {i: finite(value) for i, value in zip(batch, values, strict=True)}
        return [scores[i] for i in range(len(items))]

    def encode(self, item: Item) -> list[int]:
        """The conversation's token ids, at most `max_length`.

        Raises:
            TooLongError: they are more, and may not be cut.
        """
        ids = conversation_ids(self.tokenizer, item.messages, item.text)
        excess = len(ids) - self.max_length
        if excess <= 0:
            return ids
        if not self.cut_prompt:
            raise TooLongError(f"prompt and answer have {len(ids)} tokens, above {self.max_length}")
        start = int(ids[0] == self.tokenizer.bos_token_id)  # a BOS stays
        prompt = prompt_ids(self.tokenizer, item.messages)
        if ids[: len(prompt)] != prompt or start + excess > len(prompt):
            raise TooLongError(
                f"the answer leaves the prompt no room in {self.max_length} tokens, or cannot be "
                f"told from it"
            )
        return ids[:start] + ids[start + excess :]


def padded(rows: list[list[int]], pad: int, device: str) -> tuple[Any, Any]:
    """Token ids (B, T) with padding on the right, and their attention mask (B, T)."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


class ClassifierReward(TokenReward):
    """A Hugging Face sequence classifier with one label."""

    def __init__(self, part: ScoreConfig, folder: Path, *, on_gpu: bool):
        from transformers import AutoModelForSequenceClassification

        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch_dtype(part), output_loading_info=True
        )
        if lacking := sorted(loaded["missing_keys"]):
            raise UserError(f"reward: {folder} has no weights for {', '.join(lacking)}")
        self.device = "cuda" if on_gpu else "cpu"
        self.model = model.to(self.device).eval()
        text = model.config.get_text_config()
        self.pad, self.context = text.pad_token_id, getattr(text, "max_position_embeddings", None)
        super().__init__(part, folder)

    def rewards(self, rows: list[list[int]]) -> list[float]:
        """One forward pass."""
        import torch

        ids, mask = padded(rows, self.pad, self.device)
        with torch.inference_mode():
            out = self.model(input_ids=ids, attention_mask=mask)
        return out.logits[:, 0].float().tolist()


class VllmReward(TokenReward):
    """A Hugging Face sequence classifier with one label, on vLLM, which batches by itself."""

    def __init__(self, part: ScoreConfig, folder: Path, *, on_gpu: bool):
        import vllm

        config = json.loads((folder / "config.json").read_bytes())
        self.context = config.get("max_position_embeddings")
        super().__init__(part, folder)
        given = {} if part.dtype == "auto" else {"dtype": part.dtype}
        self.llm = vllm.LLM(
            model=str(folder),
            runner="pooling",
            convert="classify",
            max_model_len=self.max_length,
            disable_log_stats=True,
            **({} if on_gpu else CPU_ENGINE | {"dtype": "float32"}) | given,
        )
        self.batch_size = 2**31

    def rewards(self, rows: list[list[int]]) -> list[float]:
        """All rows at once, as the raw output of the head."""
        from vllm import PoolingParams

        outputs = self.llm.classify(
            [{"prompt_token_ids": row} for row in rows],
            pooling_params=PoolingParams(use_activation=False),
            use_tqdm=False,
        )
        return [output.outputs.probs[0] for output in outputs]


def torch_dtype(part: ScoreConfig) -> Any:
    """The precision as torch names it, or `auto`."""
    import torch

    return "auto" if part.dtype == "auto" else getattr(torch, part.dtype)
