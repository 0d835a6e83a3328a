"""Reward models on the conversation's tokens, in batches; answers to a prompt share it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from wrpo_ray.config import ScoreConfig
from wrpo_ray.data.buckets import chunks
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import Use, check_loaded, check_weights, telling_of, without_memory
from wrpo_ray.llm.chat import conversation_ids, prompt_ids
from wrpo_ray.llm.rendering import load_tokenizer
from wrpo_ray.llm.vllm_settings import CPU_ENGINE, quick_imports
from wrpo_ray.stages.score.base import Item, Outcome, TooLongError, finite
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.tensors import read_json
from wrpo_ray.text.files import decode

ARMORM = "LlamaForRewardModelWithGating"
CLASSIFIER = "ForSequenceClassification"
HEAD = "score"
"""The attribute of the head in transformers' decoder classifiers, except for two families."""
OTHER_HEADS = ("CTRL", "ModernBertDecoder")
"""Those two; they find the last token by the padding."""


def check_reward_model(config: dict[str, Any], part: ScoreConfig) -> None:
    """Check a folder's config.json: it must describe a reward model that fits `part`.

    Raises:
        UserError: it is not.
    """
    names = config.get("architectures") or ["none"]
    if names == [ARMORM]:
        if part.engine == "vllm":
            raise UserError("ArmoRM does not run on vLLM; leave out `engine`")
        return
    if not str(names[0]).endswith(CLASSIFIER) or str(names[0]).startswith(OTHER_HEADS):
        raise UserError(
            f"its architecture is {names[0]}, which gives no reward; give a sequence classifier "
            f"with one label, or ArmoRM-Llama3-8B-v0.1"
        )
    labels = config.get("num_labels") or len(config.get("id2label") or range(2))
    if labels != 1:
        raise UserError(f"it has {labels} labels; a reward model has one")
    pads = [_pad(config), _pad(config.get("text_config") or {})]
    has_pad = any(pad is not None and pad >= 0 for pad in pads)
    if part.engine == "transformers" and not has_pad and not _is_decoder(config):
        raise UserError("its config.json has no pad_token_id, which an encoder needs; set it")


def _is_decoder(config: dict[str, Any]) -> bool:
    """Whether transformers builds a classifier from it that is read at its last token."""
    import transformers

    try:
        settings = transformers.AutoConfig.for_model(**config)
        return _has_head(
            without_memory(getattr(transformers, config["architectures"][0]), settings)
        )
    except Exception:  # a config can make constructors raise anything; later checks report it
        return False


def _has_head(model: Any) -> bool:
    """Whether a classifier is a decoder, whose head is read at the last token."""
    return hasattr(model, HEAD) and not bool(model.config.is_encoder_decoder)


def _pad(config: dict[str, Any]) -> int | None:
    return config.get("pad_token_id")


def can_end_with_padding(folder: Folder) -> bool:
    """Whether conversations may end with the padding token, by a folder's small files.

    True if special tokens cannot be identified.
    """
    config = read_json(folder, "config.json")
    pad = _pad(config.get("text_config") or {})
    pad = _pad(config) if pad is None else pad
    settings = read_json(folder, "tokenizer_config.json")
    table = read_json(folder, "tokenizer.json") if folder.exists("tokenizer.json") else {}
    added = table.get("added_tokens") or []
    special = {token["id"]: token["content"] for token in added if token.get("special")}
    if pad not in special:
        return pad is not None
    ends = [settings.get(name) for name in ("eos_token", "bos_token")]
    named = [end["content"] if isinstance(end, dict) else end for end in ends]
    return special[pad] in named or special[pad] in _template(folder, settings)


def _template(folder: Folder, settings: dict[str, Any]) -> str:
    if folder.exists("chat_template.jinja"):
        return decode(folder.read("chat_template.jinja"), f"{folder}: chat_template.jinja")
    return str(settings.get("chat_template"))


def is_armorm(folder: Path) -> bool:
    """Whether a local folder's config.json says that it is ArmoRM."""
    return bool(json.loads((folder / "config.json").read_bytes()).get("architectures") == [ARMORM])


def use_of(part: ScoreConfig) -> Use:
    """Return the use of a part's model folder."""
    return Use.REWARD_ON_VLLM if part.engine == "vllm" else Use.REWARD


def load_classifier(part: ScoreConfig, folder: Path, *, on_gpu: bool) -> TokenReward:
    """Load the reward model in a folder.

    Raises:
        UserError: it is not one, or its weights are not those of its architecture.
    """
    with telling_of(f"reward: {folder}"):
        check_reward_model(json.loads((folder / "config.json").read_bytes()), part)
    if is_armorm(folder):
        from wrpo_ray.stages.score.armorm import ArmoReward

        return ArmoReward(part, folder, on_gpu=on_gpu)
    with telling_of("reward"):
        check_weights(folder, use_of(part))
    kind = VllmReward if part.engine == "vllm" else ClassifierReward
    return kind(part, folder, on_gpu=on_gpu)


class TokenReward(ABC):
    """A reward model that scores token ids."""

    context: int | None = None
    """The model's own limit in tokens; None if its config has none."""

    def __init__(self, part: ScoreConfig, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        self.max_length = min(part.max_length, self.context or part.max_length)
        self.cut_prompt = part.overflow == "cut_prompt"
        self.batch_size = part.batch_size

    @abstractmethod
    def rewards(self, groups: list[list[list[int]]]) -> list[float]:
        """Return the rewards of the groups' rows of token ids, one after another."""

    @property
    def shares(self) -> bool:
        """Whether rows of the same prompt, as a group, share the computation of the prompt."""
        return False

    def score(self, items: list[Item]) -> list[Outcome]:
        """Score in batches; an item's reward does not depend on its batch, but for rounding."""
        scores: dict[int, Outcome] = {}
        encoded: dict[int, list[int]] = {}
        for i, item in enumerate(items):
            try:
                encoded[i] = self.encode(item)
            except Exception as error:  # a template can raise anything; the row keeps it
                scores[i] = error
        first: dict[tuple[int, ...], int] = {}
        same = {i: first.setdefault(tuple(row), i) for i, row in encoded.items()}
        for batch in self._batches(items, {i: encoded[i] for i in first.values()}):
            values = self.rewards([[encoded[i] for i in group] for group in batch])
            scores |= zip(chain(*batch), map(finite, values), strict=True)
        return [scores[same.get(i, i)] for i in range(len(items))]

    def _batches(
        self, items: list[Item], encoded: dict[int, list[int]]
    ) -> Iterator[list[list[int]]]:
        """Yield batches of at most `batch_size` items of similar length, by numbers, in groups."""
        groups = [[i] for i in encoded]
        if self.shares:
            by_prompt = groupby(encoded, key=lambda i: items[i].messages)
            groups = [g for _, same in by_prompt for g in chunks([*same], self.batch_size)]
        batch: list[list[int]] = []
        for group in sorted(groups, key=lambda group: len(encoded[group[0]])):
            if sum(map(len, batch)) + len(group) > self.batch_size:
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def encode(self, item: Item) -> list[int]:
        """Return the conversation's token ids, at most `max_length`.

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


def to_list(outputs: Any) -> list[float]:
    """Return a head's outputs (B, 1) as numbers."""
    values: list[float] = outputs[:, 0].float().tolist()
    return values


class ClassifierReward(TokenReward):
    """A Hugging Face sequence classifier with one label.

    A decoder's reward is its head's value at the last token. transformers looks for the last one
    that is not the padding, which is another where a conversation ends with that token (often the
    end of turn pads too); so the head is read here, where vLLM reads it.
    """

    def __init__(self, part: ScoreConfig, folder: Path, *, on_gpu: bool):
        from transformers import AutoModelForSequenceClassification

        from wrpo_ray.stages.score.decoder import Decoder

        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch_dtype(part), output_loading_info=True, trust_remote_code=False
        )
        with telling_of(f"reward: {folder}"):
            check_loaded(loaded, model)
        self.device = "cuda" if on_gpu else "cpu"
        self.model = model.to(self.device).eval()
        text = model.config.get_text_config()
        self.pad, self.context = text.pad_token_id, getattr(text, "max_position_embeddings", None)
        super().__init__(part, folder)
        self.decoder = None
        if _has_head(model):
            # any token will do on the right, where none that is read sees it
            pad = 0 if self.pad is None or self.pad < 0 else self.pad
            self.decoder = Decoder(self.model.base_model, pad, self.device, self.max_length)

    @property
    def shares(self) -> bool:
        """If the model is a decoder that allows it."""
        return self.decoder is not None and self.decoder.shares

    def rewards(self, groups: list[list[list[int]]]) -> list[float]:
        """One forward pass."""
        import torch

        from wrpo_ray.stages.score.decoder import ends, padded

        with torch.inference_mode():
            if self.decoder:
                return to_list(self.model.score(self.decoder.states(groups, ends)[:, 0]))
            # it reads its first token, or has a head of its own
            ids, mask = padded([*chain(*groups)], self.pad, self.device)
            return to_list(self.model(input_ids=ids, attention_mask=mask).logits)


class VllmReward(TokenReward):
    """A Hugging Face sequence classifier with one label, on vLLM, which batches by itself."""

    def __init__(self, part: ScoreConfig, folder: Path, *, on_gpu: bool):
        with quick_imports():
            from vllm import LLM

        config = json.loads((folder / "config.json").read_bytes())
        self.context = config.get("max_position_embeddings")
        super().__init__(part, folder)
        given = {} if part.dtype == "auto" else {"dtype": part.dtype}
        self.llm = LLM(
            model=str(folder),
            runner="pooling",
            convert="classify",
            max_model_len=self.max_length,
            disable_log_stats=True,
            **({} if on_gpu else CPU_ENGINE | {"dtype": "float32"}) | given,
        )
        self.batch_size = 2**31

    @property
    def shares(self) -> bool:
        """Its prefix caching finds a prompt that was computed shortly before."""
        return True

    def rewards(self, groups: list[list[list[int]]]) -> list[float]:
        """All rows at once, as the raw output of the head."""
        from vllm import PoolingParams

        outputs = self.llm.classify(
            [{"prompt_token_ids": row} for row in chain(*groups)],
            pooling_params=PoolingParams(use_activation=False),
            use_tqdm=False,
        )
        return [output.outputs.probs[0] for output in outputs]


def torch_dtype(part: ScoreConfig) -> Any:
    """Return the precision as a torch dtype, or `auto`."""
    import torch

    return "auto" if part.dtype == "auto" else getattr(torch, part.dtype)
