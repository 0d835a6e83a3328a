"""What turns (messages, answer) into a number: a sequence classifier or a Python function."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wrpo_ray.config import RewardConfig
from wrpo_ray.core.chat import conversation_ids, load_tokenizer
from wrpo_ray.core.records import Message
from wrpo_ray.errors import UserError

Verifier = Callable[[list[Message], str, str | None], float]


@dataclass(frozen=True)
class Item:
    """An answer to be scored."""

    messages: list[Message]
    text: str
    reference: str | None


class Reward(Protocol):
    """Scores answers; an answer that cannot be scored gets the error in place of a number."""

    def score(self, items: list[Item]) -> list[float | Exception]:
        """One number or error for each item, in order."""
        ...


class TooLongError(ValueError):
    """Prompt and answer do not fit the reward model; cutting would score another text."""


class NotFiniteError(ValueError):
    """The reward is not a finite number."""


def load_function(path: str) -> Verifier:
    """The function that `module:function` names.

    Raises:
        UserError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module can raise anything
        raise UserError(
            f"{path}: cannot be imported ({type(error).__name__}: {error}); put the module right, "
            f"or give `module:function`"
        ) from None
    if not callable(function):
        raise UserError(f"{path}: not a function")
    return function


class FunctionReward:
    """A function f(messages, response, reference) -> float."""

    def __init__(self, path: str):
        self.function = load_function(path)

    def score(self, items: list[Item]) -> list[float | Exception]:
        """One call an item; whatever the function raises is the item's error."""
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> float | Exception:
        try:
            return _finite(float(self.function(item.messages, item.text, item.reference)))
        except Exception as error:  # the user's code can raise anything; the row keeps it
            return error


class ClassifierReward:
    """A Hugging Face sequence classifier with one label, on the conversation's tokens."""

    def __init__(self, config: RewardConfig, folder: Path):
        import torch
        from transformers import AutoModelForSequenceClassification

        self.device = "cuda" if config.actors.num_gpus else "cpu"
        dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        if model.config.num_labels != 1:
            raise UserError(
                f"reward: {folder} has {model.config.num_labels} labels; a reward model has one"
            )
        self.model = model.to(self.device).eval()
        self.tokenizer = load_tokenizer(folder)
        self.pad = model.config.get_text_config().pad_token_id
        if self.pad is None:
            raise UserError(f"reward: {folder}/config.json has no pad_token_id; set it")
        self.max_length = config.max_length
        self.batch_size = config.batch_size

    def score(self, items: list[Item]) -> list[float | Exception]:
        """Batches of like length, padded on the right."""
        scores: dict[int, float | Exception] = {}
        encoded: dict[int, list[int]] = {}
        for i, item in enumerate(items):
            try:
                encoded[i] = self._ids(item)
            except Exception as error:  # a template can raise anything; the row keeps it
                scores[i] = error
        ready = sorted(encoded, key=lambda i: len(encoded[i]))
        for start in range(0, len(ready), self.batch_size):
            batch = ready[start : start + self.batch_size]
            values = self._forward([encoded[i] for i in batch])
            scores |= {i: _finite(value) for i, value in zip(batch, values, strict=True)}
        return [scores[i] for i in range(len(items))]

    def _ids(self, item: Item) -> list[int]:
        ids = conversation_ids(self.tokenizer, item.messages, item.text)
        if len(ids) > self.max_length:
            raise TooLongError(f"prompt and answer have {len(ids)} tokens, above {self.max_length}")
        return ids

    def _forward(self, rows: list[list[int]]) -> list[float]:
        """Rewards of token id rows."""
        import torch

        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])  # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            out = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        return out.logits[:, 0].float().tolist()


def _finite(value: float) -> float | Exception:
    return value if math.isfinite(value) else NotFiniteError(f"the reward is {value}")


def load_reward(config: RewardConfig, folder: Path | None) -> Reward:
    """The reward that the config describes; `folder` holds a classifier's weights."""
    if config.function is not None:
        return FunctionReward(config.function)
    assert folder is not None
    return ClassifierReward(config, folder)
