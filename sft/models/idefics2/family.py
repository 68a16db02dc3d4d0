"""Idefics2 as a family: its parts, put together."""

from sft.models.family import Family
from sft.models.idefics2 import text
from sft.models.idefics2.images import SizedImages
from sft.models.idefics2.weights import SizedFolder

FAMILY = Family(name="idefics2", text=text, images=SizedImages, weights=SizedFolder())
