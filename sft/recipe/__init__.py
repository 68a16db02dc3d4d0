"""The recipe: one YAML file that says which model is trained on which data, how, and what chooses the checkpoint.

YAML file, overrides ─load─> values ─config─> Recipe            if wrong ─explain─> line, what was found, what is right

config       every key, with its meaning
optimizers   the table of optimizers, a row each
engines      the table of engines, and what they refuse
load         reads a file, applies overrides and returns a `Recipe`
explain      the message for everything that is wrong with a recipe
json_schema  the schema by which editors complete and check recipes
"""

from sft.recipe.config import (
    BUILT_BENCHMARKS,
    CheckpointsConfig,
    DataConfig,
    DatasetConfig,
    DistributedConfig,
    EvaluationConfig,
    GroupConfig,
    LoraSettings,
    ModelConfig,
    Recipe,
    Rule,
    Scoring,
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
    "OPTIMIZERS",
    "AskedEngine",
    "CheckpointsConfig",
    "DataConfig",
    "DatasetConfig",
    "DistributedConfig",
    "EngineName",
    "EvaluationConfig",
    "GroupConfig",
    "LoraSettings",
    "ModelConfig",
    "OptimizerName",
    "Recipe",
    "Rule",
    "Scoring",
    "SourceConfig",
    "TrainingConfig",
    "ValidationConfig",
    "load_recipe",
    "with_overrides",
]
