"""IDEFICS-1 as a family: its parts, put together."""

from sft.models.family import Family
from sft.models.idefics import text, weights
from sft.models.idefics.images import IdeficsImages

FAMILY = Family(name="idefics", text=text, images=IdeficsImages, weights=weights)
