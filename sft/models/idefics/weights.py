"""What the toolkit asks of IDEFICS' weights (`sft.models.family.Weights`), gathered from the files that do it."""

from sft.models.idefics.base import prepare_base
from sft.models.idefics.folders import encoder_settings, load_config, write_config
from sft.models.idefics.images import save_processor
from sft.models.idefics.loading import load_model, save_model
from sft.models.idefics.parameters import group_of, is_decayed, lora_pattern, select_trainable
from sft.models.model_folder import weight_files

__all__ = [
    "encoder_settings",
    "group_of",
    "is_decayed",
    "load_config",
    "load_model",
    "lora_pattern",
    "prepare_base",
    "save_model",
    "save_processor",
    "select_trainable",
    "weight_files",
    "write_config",
]
