"""The config of a run: one frozen tree with a module for each subject."""

from wrpo_ray.config.base import NAME, Section
from wrpo_ray.config.data import (
    Columns,
    ImportConfig,
    PromptsConfig,
    ResponseColumns,
    SplitConfig,
    StorageConfig,
)
from wrpo_ray.config.evaluation import (
    AlpacaEvalConfig,
    ArenaHardConfig,
    BaselinesConfig,
    BenchmarksConfig,
    EvaluateConfig,
    MTBenchConfig,
    PairwiseConfig,
)
from wrpo_ray.config.loader import (
    explain,
    load,
    load_study,
    parse,
    read_serving,
    serving,
    study_config,
)
from wrpo_ray.config.models import EndpointConfig, ModelConfig, SamplingConfig
from wrpo_ray.config.pairing import (
    AnswersConfig,
    ContaminationConfig,
    MarginConfig,
    PairConfig,
)
from wrpo_ray.config.planning import BudgetConfig, PlanConfig, PricesConfig
from wrpo_ray.config.recorded import (
    RecordedAnswers,
    RecordedColumns,
    RecordedConfig,
    TargetConfig,
)
from wrpo_ray.config.resources import Actors, ClusterConfig
from wrpo_ray.config.reward import (
    CodeConfig,
    GroupedRewardConfig,
    JudgeConfig,
    PartConfig,
    RewardConfig,
    ScoreConfig,
    VerifierName,
)
from wrpo_ray.config.root import Config
from wrpo_ray.config.serving import ServeConfig, ServedModel
from wrpo_ray.config.study import CaseConfig, StudyConfig, VariantConfig
from wrpo_ray.config.training import (
    AlphaConfig,
    LoraConfig,
    ReferenceConfig,
    SftConfig,
    TrainConfig,
    WrpoConfig,
)

__all__ = [
    "NAME",
    "Actors",
    "AlpacaEvalConfig",
    "AlphaConfig",
    "AnswersConfig",
    "ArenaHardConfig",
    "BaselinesConfig",
    "BenchmarksConfig",
    "BudgetConfig",
    "CaseConfig",
    "ClusterConfig",
    "CodeConfig",
    "Columns",
    "Config",
    "ContaminationConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "GroupedRewardConfig",
    "ImportConfig",
    "JudgeConfig",
    "LoraConfig",
    "MTBenchConfig",
    "MarginConfig",
    "ModelConfig",
    "PairConfig",
    "PairwiseConfig",
    "PartConfig",
    "PlanConfig",
    "PricesConfig",
    "PromptsConfig",
    "RecordedAnswers",
    "RecordedColumns",
    "RecordedConfig",
    "ReferenceConfig",
    "ResponseColumns",
    "RewardConfig",
    "SamplingConfig",
    "ScoreConfig",
    "Section",
    "ServeConfig",
    "ServedModel",
    "SftConfig",
    "SplitConfig",
    "StorageConfig",
    "StudyConfig",
    "TargetConfig",
    "TrainConfig",
    "VariantConfig",
    "VerifierName",
    "WrpoConfig",
    "explain",
    "load",
    "load_study",
    "parse",
    "read_serving",
    "serving",
    "study_config",
]
