"""Idefics3, SmolVLM and SmolVLM2: images are cut into tiles, whose states are part of the text.

The weights are those of transformers' `Idefics3ForConditionalGeneration` or `SmolVLMForConditionalGeneration`, on disk
as well. The two classes compute the same.

family   its parts, as `sft.models.family` asks for them; what is its own of model folders
names    groups of parameters, adapter targets and image settings, without torch
tilings  how an image is cut, and what it costs; without torch
text     the vocabulary and its rules
images   an image -> tiles and tokens
packed   the forward over packed batches
"""
