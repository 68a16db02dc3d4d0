from dataclasses import replace

from sft.models.idefics3 import family

FAMILY = replace(family.FAMILY, name="outside")
