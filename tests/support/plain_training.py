"""Training in plain torch: what the stage `train` has to agree with."""

from __future__ import annotations

from pathlib import Path

import torch

from wrpo_ray.config import TrainConfig, WrpoConfig


def plain_training(
    base: Path, prepared: Path, config: TrainConfig, seed: int
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """One process, one row at a time, torch alone, on rows that the stage has prepared.

    Weights, the loss of each step, and the norm of its whole gradient before clipping.
    """
    from transformers import AutoModelForCausalLM

    from wrpo_ray.stages.train.order import Order, alpha_at, learning_rate_at
    from wrpo_ray.stages.train.rows import PreparedRows

    preference, rows = isinstance(config, WrpoConfig), PreparedRows(prepared)
    model, reference = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
    order = Order(len(rows), config.epochs, config.batch_size, seed)
    found: list[float] = []
    norms: list[float] = []

    def logp(model, row, answer):
        ids = torch.tensor([[*row.prompt, *answer]])
        table = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return table.gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :].sum()

    def loss_of(row, alpha):
        own = [logp(model, row, answer) for answer in row.answers]
        if not preference:
            return -own[0]
        with torch.no_grad():
            ref = [logp(reference, row, answer) for answer in row.answers]
        ws, wt, lose = (config.beta * (a - b) for a, b in zip(own, ref, strict=True))
        return -torch.log(torch.sigmoid(alpha * ws + (1 - alpha) * wt - lose))

    for step_index in range(order.steps):
        batch = [rows[i] for i in order.batch(step_index)]
        alpha = alpha_at(config.alpha, order.consumed(step_index)) if preference else 0
        count = len(batch) if preference else sum(len(row.answers[0]) for row in batch)
        optimizer.param_groups[0]["lr"] = learning_rate_at(config, step_index, order.steps)
        optimizer.zero_grad()
        loss = torch.stack([loss_of(row, alpha) for row in batch]).sum() / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or 1e9)
        optimizer.step()
        found.append(loss.item())
        norms.append(norm.item())
    return model.state_dict(), found, norms
