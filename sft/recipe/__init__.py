"""The recipe: one YAML file that says which model is trained on which data, how, and what chooses the checkpoint.

YAML file, overrides ─load─> values ─config─> Recipe            if wrong ─explain─> line, what was found, what is right

config       every key, with its meaning; model, evaluation: the keys of these sections; fields: their base class
optimizers   the table of optimizers, a row each
engines      the table of engines, and what they refuse
load         reads a file, applies overrides and returns a `Recipe`
explain      the message for everything that is wrong with a recipe
json_schema  the schema by which editors complete and check recipes
"""

from sft.recipe.config import BUILT_BENCHMARKS as BUILT_BENCHMARKS
from sft.recipe.config import DataConfig as DataConfig
from sft.recipe.config import DatasetConfig as DatasetConfig
from sft.recipe.config import GroupConfig as GroupConfig
from sft.recipe.config import Recipe as Recipe
from sft.recipe.config import SourceConfig as SourceConfig
from sft.recipe.config import TrainingConfig as TrainingConfig
from sft.recipe.config import ValidationConfig as ValidationConfig
from sft.recipe.engines import ENGINES as ENGINES
from sft.recipe.engines import AskedEngine as AskedEngine
from sft.recipe.engines import EngineName as EngineName
from sft.recipe.evaluation import EvaluationConfig as EvaluationConfig
from sft.recipe.evaluation import Rule as Rule
from sft.recipe.evaluation import Scoring as Scoring
from sft.recipe.load import load_recipe as load_recipe
from sft.recipe.load import with_overrides as with_overrides
from sft.recipe.model import LoraSettings as LoraSettings
from sft.recipe.model import ModelConfig as ModelConfig
from sft.recipe.optimizers import OPTIMIZERS as OPTIMIZERS
from sft.recipe.optimizers import OptimizerName as OptimizerName
