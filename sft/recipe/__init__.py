"""The recipe: one YAML file that says which model is trained on what, how, and what chooses the checkpoint.

`config` has every key, `load` turns a file and overrides into a `Recipe`, `json_schema` serves editors.
"""

from sft.recipe.config import (
    BUILT_BENCHMARKS,
    GROUPS,
    CheckpointsConfig,
    DataConfig,
    DatasetConfig,
    DistributedConfig,
    Engine,
    EvaluationConfig,
    Group,
    GroupConfig,
    LoraSettings,
    LoraTarget,
    ModelConfig,
    Recipe,
    Rule,
    Scoring,
    SourceConfig,
    TrainingConfig,
    ValidationConfig,
)
from sft.recipe.load import load_recipe, with_overrides

__all__ = [
    "BUILT_BENCHMARKS",
    "GROUPS",
    "CheckpointsConfig",
    "DataConfig",
    "DatasetConfig",
    "DistributedConfig",
    "Engine",
    "EvaluationConfig",
    "Group",
    "GroupConfig",
    "LoraSettings",
    "LoraTarget",
    "ModelConfig",
    "Recipe",
    "Rule",
    "Scoring",
    "SourceConfig",
    "TrainingConfig",
    "ValidationConfig",
    "load_recipe",
    "with_overrides",
]
