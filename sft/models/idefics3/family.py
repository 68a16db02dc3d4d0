"""Idefics3 and SmolVLM as a family: its parts, put together."""

from sft.models.family import Family
from sft.models.idefics3 import text
from sft.models.idefics3.images import TiledImages
from sft.models.idefics3.weights import TiledFolder

FAMILY = Family(name="idefics3", text=text, images=TiledImages, weights=TiledFolder())
