"""IDEFICS-1 as a family: its parts, put together."""

from sft.models.family import Family
from sft.models.idefics import text
from sft.models.idefics.images import IdeficsImages
from sft.models.idefics.weights import weights

FAMILY = Family(name="idefics", text=text, images=IdeficsImages, weights=weights)
