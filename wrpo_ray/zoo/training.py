"""Training, generation and scoring of the zoo's models: PyTorch loops on one CPU core in fp32.

Letters in shape comments: B rows, T tokens, V vocabulary. Not covered: GPUs, mixed precision,
checkpoints. A model takes half a minute; an interrupted training starts from the beginning.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

T = TypeVar("T")
Report = Callable[[int, int, float], None]
"""Called with step, number of steps and loss."""


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation's token ids, and the index at which the answer starts."""

    ids: list[int]
    start: int


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Conversations of (prompt, answer) as rows."""
    texts = tokenizer.apply_chat_template([_turns(*pair) for pair in pairs], tokenize=False)
    opening = _opening(tokenizer)
    return [
        Row(ids, ids.index(opening[0]) + len(opening))
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]


def collate(rows: Sequence[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as a batch.

    Returns:
        ids (B, T), padded on the right; attention mask (B, T); labels (B, T), which are the ids
        of the answer and its end token, and -100 elsewhere.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, row.start : len(row.ids)] = ids[i, row.start : len(row.ids)]
    lengths = torch.tensor([len(row.ids) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long(), labels


def train_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    *,
    learning_rate: float,
    report: Report,
    batch: int = 32,
) -> None:
    """One pass over (prompt, answer) pairs, cross-entropy on the answers' tokens."""

    def loss(rows: Sequence[Row]) -> torch.Tensor:
        ids, mask, labels = collate(rows, tokenizer.pad_token_id)
        return answer_loss(model(input_ids=ids, attention_mask=mask).logits, labels)

    batches = _batches(encode(tokenizer, pairs), batch)
    _descend([model], loss, batches, learning_rate, report)


def train_reward_model(
    reward: PreTrainedModel,
    lm_head: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    triples: Sequence[tuple[str, str, str]],
    *,
    learning_rate: float,
    report: Report,
    batch: int = 32,
    lm_weight: float = 0.2,
    score_penalty: float = 0.01,
) -> None:
    """One pass of Bradley-Terry training over (prompt, right answer, wrong answer).

    A language-model term on the right answers keeps the skills in the shared transformer, and
    a small penalty on the squared scores keeps these near zero.
    """

    def loss(rows: Sequence[tuple[Row, Row]]) -> torch.Tensor:
        both = [right for right, _ in rows] + [wrong for _, wrong in rows]
        ids, mask, labels = collate(both, tokenizer.pad_token_id)
        hidden = reward.model(input_ids=ids, attention_mask=mask).last_hidden_state
        ends = hidden[torch.arange(len(ids)), mask.sum(1) - 1]  # (2B, width)
        scores = reward.score(ends).squeeze(-1)  # (2B,)
        chosen, rejected = scores.chunk(2)
        language = answer_loss(lm_head(hidden[: len(rows)]), labels[: len(rows)])
        preference = -F.logsigmoid(chosen - rejected).mean()
        return preference + lm_weight * language + score_penalty * scores.square().mean()

    right = encode(tokenizer, [(prompt, chosen) for prompt, chosen, _ in triples])
    wrong = encode(tokenizer, [(prompt, rejected) for prompt, _, rejected in triples])
    batches = _batches(list(zip(right, wrong, strict=True)), batch)
    _descend([reward, lm_head], loss, batches, learning_rate, report)


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits (B, T, V) against the next token's labels (B, T)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    batch: int = 300,
    max_tokens: int = 20,
    **sampling: object,
) -> list[str]:
    """Return the model's answers to single-turn prompts; greedy, unless `sampling` differs."""
    model.eval()
    answers: list[str] = []
    for part in _batches(prompts, batch):
        texts = tokenizer.apply_chat_template(
            [_turns(prompt) for prompt in part], tokenize=False, add_generation_prompt=True
        )
        rows = tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        options = {"do_sample": False, **sampling}
        with torch.inference_mode():
            out = model.generate(**rows, max_new_tokens=max_tokens, **options)
        new = out[:, rows["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def score(
    reward: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    batch: int = 300,
) -> list[float]:
    """Return the reward of each (prompt, answer)."""
    reward.eval()
    scores: list[float] = []
    for part in _batches(pairs, batch):
        ids, mask, _ = collate(encode(tokenizer, part), tokenizer.pad_token_id)
        with torch.inference_mode():
            scores += reward(input_ids=ids, attention_mask=mask).logits.squeeze(-1).tolist()
    return scores


def _turns(prompt: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def _opening(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that open an assistant's turn; the first is a special token."""
    asked, opened = (
        tokenizer.apply_chat_template(
            _turns("a"), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        for add_generation_prompt in (False, True)
    )
    added = opened.removeprefix(asked)
    ids: list[int] = tokenizer(added, add_special_tokens=False)["input_ids"]
    return ids


def _batches(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _descend(
    modules: list[torch.nn.Module],
    loss_of: Callable[[Sequence[T]], torch.Tensor],
    batches: list[Sequence[T]],
    learning_rate: float,
    report: Report,
) -> None:
    """AdamW over the batches, clipped at norm 1, linear warm-up and linear decay."""
    for module in modules:
        module.train()
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    rates = _rates(learning_rate, len(batches))
    for step, (rows, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == len(batches):
            report(step, len(batches), loss.item())


def _rates(peak: float, steps: int) -> Iterator[float]:
    """Rise to the peak in a tenth of the steps (at most 20), then fall to a tenth of the peak."""
    warmup = max(1, min(20, steps // 10))
    for step in range(steps):
        yield peak * min((step + 1) / warmup, 1 - 0.9 * max(0, step - warmup) / steps)
