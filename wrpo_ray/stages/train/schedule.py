"""alpha and the learning rate as pure functions of a run's progress.

Steps count from 0; `steps` is the number of steps of the whole run.
"""

import math

from wrpo_ray.config import AlphaConfig, TrainConfig


def alpha_at(config: AlphaConfig, consumed: float) -> float:
    """The fusion coefficient (paper, section 3.3) after the share `consumed` of the rows.

    `dynamic` grows linearly from 0 at the first step to exactly `end` at the last, whose
    `consumed` is 1 (`Order.consumed`). `static` is `end` throughout.
    """
    return config.end if config.schedule == "static" else config.end * consumed


def learning_rate_at(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate at a step.

    It rises linearly over the first ceil(warmup * steps) steps, and reaches its peak at the
    step after them. Then `cosine` and `linear` fall towards 0, which a step after the last would
    have, and `constant` stays. The first step of a warm-up has a rate above 0, so that no step is
    wasted.
    """
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)  # in [0, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * shape[config.schedule]
