"""The recipe: one YAML file that says which model is trained on what, how, and what chooses the checkpoint.

`config` has every key, `load` turns a file and overrides into a `Recipe`, `json_schema` serves editors.
"""

from sft.recipe.config import (
    BUILT_BENCHMARKS,
    GROUPS,
    By,
    CheckpointsConfig,
    DataConfig,
    DatasetConfig,
    DistributedConfig,
    EvaluationConfig,
    Group,
    GroupConfig,
    LoraSettings,
    LoraTarget,
    ModelConfig,
    Rank,
    Recipe,
    Rule,
    SourceConfig,
    TrainingConfig,
    ValidationConfig,
)
from sft.recipe.engines import ENGINES, AskedEngine, EngineName
from sft.recipe.load import load_recipe, with_overrides
from sft.recipe.optimizers import OPTIMIZERS, OptimizerName

__all__ = [
    "BUILT_BENCHMARKS",
    "ENGINES",
    "GROUPS",
    "OPTIMIZERS",
    "AskedEngine",
    "By",
    "CheckpointsConfig",
    "DataConfig",
    "DatasetConfig",
    "DistributedConfig",
    "EngineName",
    "EvaluationConfig",
    "Group",
    "GroupConfig",
    "LoraSettings",
    "LoraTarget",
    "ModelConfig",
    "OptimizerName",
    "Rank",
    "Recipe",
    "Rule",
    "SourceConfig",
    "TrainingConfig",
    "ValidationConfig",
    "load_recipe",
    "with_overrides",
]
