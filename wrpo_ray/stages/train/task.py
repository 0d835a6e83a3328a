"""What one training run is given, as it travels from the driver to the workers."""

from __future__ import annotations

from dataclasses import dataclass

from wrpo_ray.config import TrainConfig, WrpoConfig
from wrpo_ray.llm.rendering import OWN, Template
from wrpo_ray.runtime.context import Run
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

MODEL = "model"
"""Subfolder of a training step with the trained model."""
ADAPTERS = "adapters"
"""Subfolder with the LoRA adapters that the trained model has merged in."""
CHECKPOINTS = "checkpoints"
"""Subfolder with what an unfinished run resumes from."""
TRAINED = "trained.json"
"""Counts of a model that is trained while others of its series are not yet."""
METRICS = "metrics.jsonl"
"""One JSON record an optimizer step."""

SFT_ANSWERS = ("source_chosen",)
WRPO_ANSWERS = ("source_chosen", "target_chosen", "rejected")
"""The answers of a row in the order in which they are tokenized and stacked."""


@dataclass(frozen=True)
class Task:
    """One training run."""

    run: Run
    step: Step
    """Whose folder takes the result."""
    rows: Folder
    """Holds the prepared rows (`rows`)."""
    base: Folder
    """The model to start from, which is also the reference of preference training."""
    fingerprint: str
    """What identifies the base: its copies on nodes are kept under it."""
    config: TrainConfig
    seed: int
    template: Template = OWN
    """What replaces the base's own chat template."""

    @property
    def folder(self) -> Folder:
        """The step's folder."""
        return self.run.root / self.step.folder

    @property
    def is_preference(self) -> bool:
        """Whether this is preference training; else it is SFT."""
        return isinstance(self.config, WrpoConfig)

    @property
    def has_second_model(self) -> bool:
        """Whether workers hold the reference; with LoRA it is the policy without adapters."""
        config = self.config
        if not isinstance(config, WrpoConfig) or config.lora or not config.has_reference:
            return False
        return config.reference.mode == "live"
