"""Idefics2: images keep about their shape and size, and their states are part of the text.

The weights are those of transformers' `Idefics2ForConditionalGeneration`, on disk as well.

family   its parts, as `sft.models.family` asks for them; what is its own of model folders
names    groups of parameters, adapter targets and image settings, without torch
tilings  the size that an image gets, and its quarters; without torch
text     Mistral's vocabulary and its rules
images   an image -> tiles and tokens
packed   the forward over packed batches
"""
