"""The inputs of one training run, as the driver sends them to the workers."""

from dataclasses import dataclass
from typing import TypedDict

from wrpo_ray.config import TrainConfig, WrpoConfig
from wrpo_ray.llm.rendering import OWN, Template
from wrpo_ray.runtime.context import Run
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

MODEL = "model"
"""Subfolder of a training step that holds the trained model."""
ADAPTERS = "adapters"
"""Subfolder of the LoRA adapters that are merged into the trained model."""
CHECKPOINTS = "checkpoints"
"""Subfolder of the checkpoints that an unfinished run resumes from."""
TRAINED = "trained.json"
"""File of counts of a trained model while others of its series are still to be trained."""
MEMORY = "memory.json"
"""File of the line that tells the micro-batches and the memory, while a training runs."""
METRICS = "metrics.jsonl"
"""One JSON record per optimizer step."""

SFT_ANSWERS, WRPO_ANSWERS = TrainConfig.answers, WrpoConfig.answers


class TrainedCounts(TypedDict):
    """Counts of a trained model, for the step's manifest and the log."""

    rows: int
    """Rows trained on."""
    held_out: int
    steps: int
    final_loss: float | None
    """The loss of the last step."""
    lost_in_bf16: float | None
    """Share of the changed weights whose change is lost in bf16; None if not known."""
    resumed_at: int
    """First step after the last resume; 0 without one."""
    workers: int
    """World size at the end."""
    seconds: float
    """From the start or the last resume; not in the manifest."""


@dataclass(frozen=True)
class Task:
    """One training run."""

    run: Run
    step: Step
    """The step whose folder takes the result."""
    rows: Folder
    """Folder of the prepared rows (`rows`)."""
    base: Folder
    """The model to start from, which is also the reference of preference training."""
    fingerprint: str
    """Fingerprint of the base, under which nodes cache it."""
    config: TrainConfig
    seed: int
    template: Template = OWN
    """Replacement of the base's own chat template."""

    @property
    def folder(self) -> Folder:
        """The step's folder."""
        return self.run.root / self.step.folder
