"""The names of Idefics2 that a recipe may use."""

from sft.models.idefics3.names import ENCODER_GROUPS as ENCODER_GROUPS
from sft.models.idefics3.names import GROUPS as GROUPS
from sft.models.idefics3.names import lora_targets

LORA_TARGETS = lora_targets("vision", "connector", "language")

IMAGE_SETTINGS = ("longest_edge", "shortest_edge", "split")
